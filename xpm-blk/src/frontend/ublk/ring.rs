//! The ring of a queue: requests of the kernel, and the descriptors that wake the thread.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::uapi::{IoCommand, RES_ABORT};

/// An event from the ring.
#[derive(Debug)]
pub(super) enum Event {
    /// The kernel has a request for a tag.
    Request(u16),
    /// The device stops: the tag gets no more requests.
    Ended(u16),
    /// The channel has work.
    Channel,
    /// Every request has to fail.
    GiveUp,
    /// The watchdog checks whether the thread makes progress.
    Poked,
    /// The kernel refused a command; this indicates a defect of this program.
    Failed(io::Error),
}

const CHANNEL: u64 = 1 << 32;
const GIVE_UP: u64 = 2 << 32;
const POKED: u64 = 3 << 32;

/// The ring.
pub(super) struct Ring {
    ring: IoUring,
    device: Arc<OwnedFd>,
    /// Whether a poll of the channel's descriptor is with the kernel.
    channel_watched: bool,
}

impl Ring {
    /// A ring for `depth` tags of an open device file, used by the calling thread only.
    pub(super) fn new(device: Arc<OwnedFd>, depth: u16) -> io::Result<Ring> {
        // Every tag has at most one command, and there are three polls.
        let entries = (u32::from(depth) + 3).next_power_of_two();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_cqsize(entries * 2)
            .build(entries)?;
        Ok(Ring { ring, device, channel_watched: false })
    }

    /// Queues a fetch or a commit of a tag.
    pub(super) fn push_io(&mut self, number: u32, command: IoCommand) -> io::Result<()> {
        let entry = opcode::UringCmd16::new(types::Fd(self.device.as_raw_fd()), number)
            .cmd(command.encode())
            .build()
            .user_data(u64::from(command.tag));
        self.push(&entry)
    }

    /// Reports [`Event::GiveUp`] once `fd` is readable. `fd` must stay open while the ring lives.
    pub(super) fn watch_give_up(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.push(&poll_entry(fd, GIVE_UP))
    }

    /// Reports [`Event::Poked`] once `fd` is readable. `fd` must stay open while the ring lives.
    pub(super) fn watch_pokes(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.push(&poll_entry(fd, POKED))
    }

    /// Reports [`Event::Channel`] once `fd` is readable. A pending poll is kept: one at a time is enough,
    /// because the descriptor stays the same. A poll checks the state of the descriptor when it begins, so it
    /// misses no earlier event.
    pub(super) fn watch_channel(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        if !self.channel_watched {
            self.push(&poll_entry(fd, CHANNEL))?;
            self.channel_watched = true;
        }
        Ok(())
    }

    /// Passes the queued entries to the kernel, and lets the kernel run its work for this thread.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Like [`Ring::submit`], then blocks until there is an event.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(wanted) {
            Ok(_) => Ok(()),
            // Interrupted, or completions have to be taken first: the caller repeats the call.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next event, if there is one.
    pub(super) fn next(&mut self) -> Option<Event> {
        let completion: cqueue::Entry = self.ring.completion().next()?;
        let result = completion.result();
        Some(match completion.user_data() {
            CHANNEL => {
                self.channel_watched = false;
                Event::Channel
            }
            GIVE_UP => Event::GiveUp,
            POKED => Event::Poked,
            tag => match result {
                0 => Event::Request(tag as u16),
                RES_ABORT => Event::Ended(tag as u16),
                other => Event::Failed(io::Error::from_raw_os_error(-other)),
            },
        })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entries of this module name descriptors that stay open while the ring lives (the device
        // file by `self`, the others by the callers' contract), and buffers of the queue, which outlive the
        // ring's commands: the queue's thread ends when every tag has ended.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }
}

fn poll_entry(fd: BorrowedFd<'_>, user_data: u64) -> squeue::Entry {
    opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).build().user_data(user_data)
}
