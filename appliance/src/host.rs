//! What this host has, and what it thinks of this process.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use xpm_control::proc::meminfo;

/// The memory of this host, in bytes where the name does not say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemInfo {
    /// What processes can have without swapping (proc_meminfo(5), `MemAvailable`).
    pub available: u64,
    /// Free huge pages of the default size, less those reserved already.
    pub huge_free: u64,
    /// Huge pages of the default size, as a number.
    pub huge_total: u64,
    /// Default size of a huge page.
    pub huge_len: u64,
}

impl MemInfo {
    /// Asks the kernel.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn read() -> io::Result<MemInfo> {
        fs::read_to_string("/proc/meminfo").map(|text| MemInfo::parse(&text))
    }

    fn parse(text: &str) -> MemInfo {
        let value = |key| meminfo(text, key).unwrap_or(0);
        let huge_len = value("Hugepagesize");
        MemInfo {
            available: value("MemAvailable"),
            huge_free: value("HugePages_Free").saturating_sub(value("HugePages_Rsvd")) * huge_len,
            huge_total: value("HugePages_Total"),
            huge_len,
        }
    }
}

/// Asks the kernel to kill any other process first when memory runs out: the pages of other
/// machines' processes live here. Warns where that is not allowed.
///
/// Its memory is not locked as a whole (mlockall(2)): with `MCL_FUTURE` each region would be
/// populated and locked inside of mmap(2), which would undo the work in background steps and make
/// what clients trimmed resident again; regions are locked one by one instead, on fault.
pub fn avoid_oom_killer() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(
            "cannot protect this process from the OOM killer ({error}): its clients lose their memory if it is killed; \
             give it CAP_SYS_RESOURCE, or OOMScoreAdjust=-1000 in its unit"
        );
    }
}

/// Raises the memory that this process may lock to what it is allowed to. Where the soft limit is as high already, nothing
/// changes.
pub fn raise_limits() {
    let limit = getrlimit(Resource::Memlock);
    // What cannot be raised is noticed, and said, when it is used up.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        let text = "MemTotal:  100 kB\nMemAvailable:   42 kB\nHugePages_Total:  9\nHugePages_Free:    8\nHugePages_Rsvd:    \
                    3\nHugepagesize:       2048 kB\n";
        let info = MemInfo::parse(text);
        assert_eq!(
            info,
            MemInfo { available: 42 << 10, huge_free: 10 << 20, huge_total: 9, huge_len: 2 << 20 }
        );
        assert_eq!(MemInfo::parse("MemAvailable: x kB\n"), MemInfo::default());
        assert!(MemInfo::read().unwrap().available > 0);
    }
}
