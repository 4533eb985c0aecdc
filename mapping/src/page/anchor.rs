//! Keeps a descriptor's file open for as long as this process has its memory, whatever becomes of its numbers.
//!
//! When the last reference to a userfaultfd goes, the kernel lets absent pages be zeros at once: in a program that
//! closes a number that it did not open, and in one that is killed, whose threads end one by one while a system call
//! of another one may still read the window. So a ring of io_uring has the file registered, and the mapping of the
//! ring's memory, which lasts as long as the process's memory, keeps the ring.
//!
//! Where io_uring is forbidden (`kernel.io_uring_disabled`, seccomp), there is no anchor, and the numbers alone count.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd as _, BorrowedFd};

use io_uring::IoUring;

pub(crate) struct Anchor {
    /// Never used for I/O; its mapping is what counts.
    _ring: IoUring,
}

impl Anchor {
    /// None where the kernel forbids it.
    pub(crate) fn new(file: BorrowedFd<'_>) -> Option<Anchor> {
        let ring = IoUring::new(1).ok()?;
        ring.submitter().register_files(&[file.as_raw_fd()]).ok()?;
        Some(Anchor { _ring: ring })
    }
}
