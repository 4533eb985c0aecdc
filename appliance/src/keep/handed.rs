//! The descriptors that the service manager kept and hands over at the start.

#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use rustix::io::{FdFlags, fcntl_setfd};
use xpm_control::manager;

/// Number of the first one (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// Takes them, with their names: at the first call, before this process opens any itself. Nothing at
/// further calls.
pub(crate) fn take() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, SeqCst) {
        return Vec::new();
    }
    (FIRST..).zip(manager::handed()).filter_map(|(number, name)| Some((name, own(number)?))).collect()
}

/// None where there is no such descriptor: then whoever set the environment was wrong.
fn own(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the borrowed value does not leave this function, and the kernel says whether the number
    // is a descriptor: one that is none is an error, not undefined.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is open, as was just seen; the environment says that it is for this process, which is
    // its only owner, since numbers are taken once, before anything else in this process opens any.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
