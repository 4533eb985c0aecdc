//! Shared code of the links' tests: memory for operations, a model to compare with, and the servers of other
//! projects.

#![allow(dead_code, reason = "not every test uses all of it")]

pub(crate) mod memory;
pub(crate) mod model;
pub(crate) mod peers;
pub(crate) mod scripted;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xpm_transport::{Completion, Link, LinkDown};

/// Time limit of every wait; a link that hangs fails its test after this.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Waits for completions by the link's descriptor, until there is at least one, or the link is down.
pub(crate) fn wait(link: &mut dyn Link, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
    let deadline = Instant::now() + LIMIT;
    loop {
        link.poll(completions)?;
        if !completions.is_empty() {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "nothing completes");
        if let Some(fd) = link.wait_fd() {
            readable(fd, Duration::from_secs(1));
        }
    }
}

/// Whether the descriptor is readable within the time.
pub(crate) fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&timeout)).unwrap() > 0
}
