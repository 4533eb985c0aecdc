//! A file that a test has mapped, shared with all who use it.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The mapping, undone when dropped.
pub struct Mapped {
    address: *mut c_void,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, whichever thread has that.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn new(file: &File, len: usize) -> Mapped {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses; nothing refers to it.
        let address = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, 0) };
        Mapped { address: address.expect("the file can be mapped"), len }
    }

    /// Copies bytes out of it.
    ///
    /// # Panics
    /// When they are not within it.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.len, "read beyond a mapping");
        // SAFETY: within the mapping (asserted), which lives as long as this value; nobody has a reference to it.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address.byte_add(at).cast(), bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Copies bytes into it.
    ///
    /// # Panics
    /// When they are not within it.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "write beyond a mapping");
        // SAFETY: as for `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.byte_add(at).cast(), bytes.len());
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing refers to it any more.
        let _ = unsafe { munmap(self.address, self.len) };
    }
}
