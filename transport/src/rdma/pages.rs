//! Anonymous memory in whole pages, which the device reads and writes.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::io::IoBuf;

/// Private anonymous memory, all zeros at first.
pub(super) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is not bound to a thread, and is accessed through `IoBuf`s only.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `len` bytes, faulted in.
    pub(super) fn new(len: usize) -> io::Result<Pages> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses affects no memory in use.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Pages { start, len })
    }

    /// All of the memory; valid only while `self` lives.
    pub(super) const fn whole(&self) -> IoBuf {
        // SAFETY: the mapping is readable and writable and lives as long as `self`; no reference to
        // it is ever made.
        unsafe { IoBuf::new(self.start, self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping was created with this address and length, and every user of the memory keeps
        // `self` alive.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::warn!("cannot unmap a buffer: {error}");
        }
    }
}
