//! A table of descriptors that the program cannot reach.
//!
//! Any thread of a program can close or replace any number of the table that its threads share, at any time, by a system call that
//! nobody sees. So this library has all of its descriptors in another table: a thread that leaves the program's table opens them, and
//! the threads that it starts share its table with it. See unshare(2), close_range(2).

use std::io;
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};

/// Gives the calling thread a table of its own, which holds nothing but three descriptors that swallow what is written to them.
pub(crate) fn leave() -> io::Result<()> {
    // SAFETY: closes descriptors of the new table only, in which nobody has any.
    let left = unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    if left != 0 {
        return Err(io::Error::last_os_error());
    }
    for _ in 0..3 {
        // The numbers 0 to 2 must not become those of a connection: messages for people are written to 2.
        let nothing = open("/dev/null", OFlags::RDWR, Mode::empty())
            .or_else(|_| memfd_create("xpm-nothing", MemfdFlags::empty()))?;
        let _ = nothing.into_raw_fd();
    }
    Ok(())
}

/// Makes a descriptor the calling thread's standard error.
pub(crate) fn set_messages(to: &OwnedFd) -> io::Result<()> {
    // SAFETY: 2 of this table is of `leave`, and nobody else's.
    match unsafe { libc::dup2(to.as_raw_fd(), 2) } {
        2 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
