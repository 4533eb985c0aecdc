//! cachestat(2): what the page cache has of a file.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Pages of a file in the page cache, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct CacheStat {
    /// Pages that are cached, dirty ones included.
    pub cached: u64,
    /// Pages that are dirty and not being written.
    pub dirty: u64,
    /// Pages that are being written.
    pub writeback: u64,
    /// Pages that were evicted.
    pub evicted: u64,
    /// Pages that were evicted while they were in use.
    pub recently_evicted: u64,
}

#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// The number of the call on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// The cached part of a range of an open file, in bytes; with a `len` of 0 up to its end.
///
/// Asks the file's server nothing and waits for nobody.
///
/// # Errors
/// ENOSYS before Linux 6.5; EPERM where the caller neither owns the file nor may write to it; EBADF.
pub fn cachestat(file: impl AsFd, offset: u64, len: u64) -> Result<CacheStat, Errno> {
    let range = Range { offset, len };
    let mut stat = CacheStat::default();
    // SAFETY: both pointers are of live values with the layout of struct cachestat_range and struct cachestat, which
    // the kernel reads and writes within this call only; the descriptor is borrowed for as long.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_fd().as_raw_fd(), &raw const range, &raw mut stat, 0_u32)
    };
    if result == 0 { Ok(stat) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
