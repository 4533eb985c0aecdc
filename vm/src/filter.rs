//! The seccomp filter that keeps QEMU from requesting huge pages.
//!
//! QEMU advises MADV_HUGEPAGE for all RAM and has no option against it. For a mapped file, Linux 5.18 and later then
//! reads 2 to 4 MiB for each missing page, even with read-ahead off (`do_sync_mmap_readahead` in mm/filemap.c):
//! random accesses became 67 times slower. The advice is only a hint, so the filter reports success without executing
//! the call.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::Error;

/// Index of the advice among the arguments of madvise(2).
const ADVICE: u8 = 2;

/// Installs the filter for this thread and all programs that it will execute. The filter cannot be removed, and
/// executed programs gain no privileges from now on (PR_SET_NO_NEW_PRIVS), which the kernel requires for an
/// unprivileged filter. The process must have no other thread.
///
/// # Errors
/// When the kernel has no seccomp filters, or this processor architecture is unknown.
pub fn refuse_huge_pages() -> Result<(), Error> {
    let failed = |why: &dyn std::fmt::Display| {
        Error::Machine(format!(
            "cannot install the filter against huge pages: {why}; the kernel needs CONFIG_SECCOMP_FILTER (or run with \
             --huge-pages, and accept that each random access reads megabytes)"
        ))
    };
    let program = program().map_err(|error| failed(&error))?;
    seccompiler::apply_filter(&program).map_err(|error| failed(&error))
}

fn program() -> Result<BpfProgram, seccompiler::Error> {
    let advice = libc::MADV_HUGEPAGE as u64;
    let condition = SeccompCondition::new(ADVICE, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, advice)?;
    let rules = [(libc::SYS_madvise, vec![SeccompRule::new(vec![condition])?])];
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    // Error number 0: the call is not executed, and returns 0.
    let filter =
        SeccompFilter::new(rules.into_iter().collect(), SeccompAction::Allow, SeccompAction::Errno(0), arch)?;
    Ok(BpfProgram::try_from(filter)?)
}

#[cfg(test)]
mod tests {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::*;

    const LEN: usize = 4 << 20;

    /// Maps some memory, requests huge pages for it, and returns whether the kernel has noted the request. Unmaps the
    /// memory.
    #[expect(unsafe_code, reason = "mapping memory")]
    fn is_advised() -> bool {
        // SAFETY: the mapping is new, and nothing refers to it.
        let at =
            unsafe { mmap_anonymous(std::ptr::null_mut(), LEN, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: `at` is that mapping; the advice changes no content.
        unsafe { madvise(at, LEN, Advice::LinuxHugepage) }.unwrap();
        let table = std::fs::read_to_string("/proc/thread-self/smaps").unwrap();
        // SAFETY: as above; nothing refers to the mapping.
        unsafe { munmap(at, LEN) }.unwrap();
        let start = format!("{:x}-", at.addr());
        let mut lines = table.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
        flags.split_whitespace().any(|flag| flag == "hg")
    }

    #[test]
    fn the_advice_succeeds_without_effect() {
        // In a thread of its own, because the filter cannot be removed.
        let (before, after) = std::thread::spawn(|| {
            let before = is_advised();
            refuse_huge_pages().unwrap();
            (before, is_advised())
        })
        .join()
        .unwrap();
        if !before {
            eprintln!("skipped: this kernel has no transparent huge pages");
            return;
        }
        assert!(!after);
    }
}
