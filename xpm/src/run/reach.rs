//! Whether this user may have system calls wait for external memory, by userfaultfd(2).

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd as _, OwnedFd};

use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// The system call is allowed, or the device is.
pub(super) fn may_serve_system_calls() -> bool {
    // SAFETY: it is registered for no memory, and closed at once.
    unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }.is_ok()
        || File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .is_ok_and(|device| makes_one(&device))
}

/// Whether the device gives a descriptor: what confines this process may forbid it.
fn makes_one(device: &File) -> bool {
    /// USERFAULTFD_IOC_NEW of linux/userfaultfd.h, with no flags.
    struct New;
    // SAFETY: the request takes flags as its argument, and writes nothing to this process's memory.
    unsafe impl rustix::ioctl::Ioctl for New {
        type Output = i32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> rustix::ioctl::Opcode {
            0xaa << 8
        }
        fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: rustix::ioctl::IoctlOutput,
            _extract: *mut rustix::ffi::c_void,
        ) -> rustix::io::Result<i32> {
            Ok(out)
        }
    }
    // SAFETY: as above.
    let Ok(fd) = (unsafe { rustix::ioctl::ioctl(device, New) }) else { return false };
    // SAFETY: the descriptor is new, and nobody else's.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    true
}
