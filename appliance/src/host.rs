//! The host's memory, and the host's settings for this process.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use xpm_control::proc::meminfo;

/// The memory of this host, in bytes unless the name says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemInfo {
    /// Memory that processes can get without swapping (proc_meminfo(5), `MemAvailable`).
    pub available: u64,
    /// Free huge pages of the default size, without those reserved already, in bytes.
    pub huge_free: u64,
    /// Huge pages of the default size, as a number.
    pub huge_total: u64,
    /// Default size of a huge page.
    pub huge_len: u64,
}

impl MemInfo {
    /// Reads `/proc/meminfo`.
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

/// Asks the kernel to kill any other process first when memory runs out, because the pages of other machines'
/// processes live here. Logs a warning if that is not allowed.
///
/// The process's memory is not locked as a whole (mlockall(2)): with `MCL_FUTURE` each region would be
/// populated and locked inside of mmap(2), which would defeat the work in background steps and make trimmed
/// memory resident again. Instead, regions are locked one by one, on fault.
pub fn avoid_oom_killer() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(
            "cannot protect this process from the OOM killer ({error}): its clients lose their memory if it is killed; \
             give it CAP_SYS_RESOURCE, or OOMScoreAdjust=-1000 in its unit"
        );
    }
}

/// Raises the soft limit of locked memory to the hard limit. No effect where the soft limit is as high
/// already.
pub fn raise_limits() {
    let limit = getrlimit(Resource::Memlock);
    // A limit that cannot be raised is reported when it is exhausted.
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
