//! The wait primitive of a pager's threads.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::wake::signal::Signal;

/// A bell of one thread: other threads ring it when they have work for that thread. Ringing costs a system call only
/// when the thread sleeps.
pub(crate) struct Bell {
    fd: OwnedFd,
    signal: Signal,
}

impl Bell {
    pub(crate) fn new() -> std::io::Result<Bell> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { fd, signal: Signal::new() })
    }

    pub(crate) fn ring(&self) {
        if self.signal.tell() {
            // The write could fail only on an overflow, after 2^64 - 2 rings.
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }
    }

    /// Whether the bell rang since the last call. A single load when it did not.
    pub(crate) fn take(&self) -> bool {
        self.signal.take()
    }

    /// Sleeps until the bell rings, one of `others` is readable, or `limit` has passed. Only for the bell's thread.
    pub(crate) fn wait(&self, others: &[BorrowedFd<'_>], limit: Duration) {
        if !self.signal.may_sleep() {
            return;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)];
        fds.extend(others.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        let _ = poll(&mut fds, Timespec::try_from(limit).ok().as_ref());
        self.signal.is_awake();
        if fds[0].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        }
    }
}
