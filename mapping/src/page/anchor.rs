//! Keeps a userfaultfd open for as long as this process's memory exists, even if all of its descriptor numbers are
//! closed.
//!
//! When the last reference to a userfaultfd is gone, the kernel fills absent pages with zeros, which would be wrong
//! content. This happens when a program closes a descriptor that it did not open; and when a program is killed: its
//! threads end one by one, while a system call of another thread may still read the window. So the file is registered
//! with an io_uring. The ring's memory is mapped, that mapping lasts as long as the process's memory, and it keeps the
//! ring, and so the file, alive.
//!
//! If io_uring is forbidden (`kernel.io_uring_disabled`, seccomp), there is no anchor, and only the descriptor numbers
//! keep the file open.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd as _, BorrowedFd};

use io_uring::IoUring;

pub(crate) struct Anchor {
    /// Never used for I/O; only its mapping matters.
    _ring: IoUring,
}

impl Anchor {
    /// Registers `file`; none if the kernel forbids io_uring.
    pub(crate) fn new(file: BorrowedFd<'_>) -> Option<Anchor> {
        let ring = IoUring::new(1).ok()?;
        ring.submitter().register_files(&[file.as_raw_fd()]).ok()?;
        Some(Anchor { _ring: ring })
    }
}
