//! A table of descriptors that the program cannot reach.
//!
//! Any thread of a program can close or replace any number of the table that its threads share, at any time, by a
//! system call that nobody sees. So this library has all of its descriptors in another table: a thread that leaves
//! the program's table opens them, and the threads that it starts share its table with it. See unshare(2),
//! close_range(2).

use std::io;
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// Gives the calling thread a table of its own, which holds nothing but three descriptors that swallow what is
/// written to them.
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
    keep_pair()
}

/// Numbers of a pair of sockets that tokio makes once in a process, and each of its runtimes copies: that of signals,
/// which this library does not use. A child of fork(2) has these numbers in its memory, and its new table has not.
static PAIR: [AtomicI32; 2] = [const { AtomicI32::new(-1) }; 2];
/// No number of a new table is as high.
const HIGH: i32 = 64;

/// Makes sure that the pair is there.
fn keep_pair() -> io::Result<()> {
    let numbers = PAIR.each_ref().map(|number| number.load(Ordering::Relaxed));
    if numbers.contains(&-1) {
        return find_pair();
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Away from the numbers that they are to have.
    let pair = [fcntl_dupfd_cloexec(one, HIGH)?, fcntl_dupfd_cloexec(other, HIGH)?];
    for (fd, number) in pair.iter().zip(numbers) {
        // SAFETY: nothing is in this table but what is opened here and in `leave`.
        if unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) } != number {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Has tokio make the pair, and remembers its numbers.
fn find_pair() -> io::Result<()> {
    drop(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
    let mut sockets = Vec::new();
    for entry in std::fs::read_dir("/proc/thread-self/fd")? {
        let path = entry?.path();
        let is_socket = std::fs::read_link(&path)
            .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        let number = path.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok());
        sockets.extend(number.filter(|_| is_socket));
    }
    if let [one, other] = sockets[..] {
        PAIR[0].store(one, Ordering::Relaxed);
        PAIR[1].store(other, Ordering::Relaxed);
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
