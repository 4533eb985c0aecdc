//! The filter that keeps QEMU from asking for huge pages.
//!
//! QEMU advises MADV_HUGEPAGE for all RAM and has no option against it. On a mapped file, Linux 5.18 and later then reads 2 to
//! 4 MiB for each page that is missing, even where read-ahead is off (`do_sync_mmap_readahead` in mm/filemap.c): random accesses
//! became 67 times slower. The advice is only a hint, so the filter reports success for it and nothing is done.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::Error;

/// Place of the advice among the arguments of madvise(2).
const ADVICE: u8 = 2;

/// Installs the filter for this thread and all programs that it will execute. It stays for ever, and from now on no program
/// that is executed gains privileges (PR_SET_NO_NEW_PRIVS), which an unprivileged filter requires. The process must have no
/// other thread.
///
/// # Errors
/// When the kernel has no seccomp filters, or this processor is not known.
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
    // An error number of 0: the call is not made, and returns 0.
    let filter =
        SeccompFilter::new(rules.into_iter().collect(), SeccompAction::Allow, SeccompAction::Errno(0), arch)?;
    Ok(BpfProgram::try_from(filter)?)
}

#[cfg(test)]
mod tests {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::*;

    const LEN: usize = 4 << 20;

    /// Maps some memory, asks for huge pages, and returns whether the kernel has noted it. Forgets the memory.
    #[expect(unsafe_code, reason = "mapping memory")]
    fn is_advised() -> bool {
        // SAFETY: the mapping is new, and nothing refers to it.
        let at =
            unsafe { mmap_anonymous(std::ptr::null_mut(), LEN, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: it is that mapping; the advice changes no content.
        unsafe { madvise(at, LEN, Advice::LinuxHugepage) }.unwrap();
        let table = std::fs::read_to_string("/proc/thread-self/smaps").unwrap();
        // SAFETY: as above; nothing refers to it.
        unsafe { munmap(at, LEN) }.unwrap();
        let start = format!("{:x}-", at.addr());
        let mut lines = table.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
        flags.split_whitespace().any(|flag| flag == "hg")
    }

    #[test]
    fn the_advice_is_taken_and_not_followed() {
        // In a thread, as the filter stays.
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
