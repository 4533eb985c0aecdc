//! The part that the queues of a file and of a tree share: requests come off the mount's device into buffers, answers
//! go back, and one epoll set has all that a queue waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use rustix::event::epoll::{self, EventData, EventFlags};
use xpm_fuse::wire::{Unique, reply};
use xpm_fuse::{Device, Errno};
use xpm_transport::io::{Kind, Operation};

use super::memory::Requests;
use crate::lifecycle::DieOnDrop;
use crate::watch::Pulse;

/// Marks of the descriptors in the epoll set.
const DEVICE: u64 = 0;
const GIVE_UP: u64 = 1;
const PULSE: u64 = 2;
/// The first mark that a queue may use for its own descriptors.
pub(super) const FIRST_MARK: u64 = 3;
/// Descriptors that one wait reports.
const EVENTS: usize = 64;

/// A queue that serves a mount.
pub(super) trait Serve {
    /// Serves until the mount is gone.
    fn serve(&mut self) -> io::Result<()>;
}

/// Makes a queue and runs it until its mount is gone. Sends the result of its start once. `ended` is set when the
/// kernel has ended the mount.
///
/// A failure after that, or a panic, ends the whole process: another process can take the mount over, while a process
/// that lives on with a dead queue would leave every program that uses the mount in an endless wait.
pub(super) fn run<Q: Serve>(
    make: impl FnOnce() -> io::Result<Q>,
    ended: &AtomicBool,
    ready: &SyncSender<io::Result<()>>,
) {
    let alive = DieOnDrop;
    match make() {
        Err(error) => drop(ready.send(Err(error))),
        Ok(mut queue) => {
            let _ = ready.send(Ok(()));
            if let Err(error) = queue.serve() {
                tracing::error!(%error, "a queue of a mount failed");
                return;
            }
            ended.store(true, Ordering::Release);
        }
    }
    std::mem::forget(alive);
}

/// The report of one wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Woken {
    /// A signal ended the wait: any descriptor may be ready.
    pub(super) interrupted: bool,
    /// Every request has to fail from now on.
    pub(super) give_up: bool,
}

/// The buffers of a queue, the mount's device, and the epoll set.
pub(super) struct Intake {
    requests: Requests,
    device: Arc<Device>,
    free: Vec<u16>,
    epoll: OwnedFd,
    /// Whether the device is in the epoll set; it is removed while every buffer is in use.
    watched: bool,
    give_up: Arc<OwnedFd>,
    gone: bool,
}

impl Intake {
    /// Buffers for `depth` requests with data of at most `io_len` bytes each. `device` is non-blocking; `give_up` is
    /// readable once every request has to fail.
    pub(super) fn new(
        depth: u16,
        io_len: u32,
        device: Arc<Device>,
        give_up: Arc<OwnedFd>,
        pulse: &Pulse,
    ) -> io::Result<Intake> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut intake = Intake {
            requests: Requests::new(depth, io_len)?,
            device,
            free: (0..depth).rev().collect(),
            epoll,
            watched: false,
            give_up,
            gone: false,
        };
        intake.watch(&intake.give_up, GIVE_UP)?;
        intake.watch(&pulse.poked(), PULSE)?;
        intake.watch_device()?;
        Ok(intake)
    }

    /// Adds a descriptor to the epoll set.
    pub(super) fn watch(&self, fd: &impl AsFd, mark: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(mark), EventFlags::IN)?)
    }

    /// Removes a descriptor from the epoll set.
    pub(super) fn forget(&self, fd: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Removes the order to give up from the epoll set, once it is carried out.
    pub(super) fn forget_give_up(&self) -> io::Result<()> {
        self.forget(&self.give_up)
    }

    /// Keeps the device in the epoll set while a buffer is free. Exclusive, so that one request wakes one queue only.
    fn watch_device(&mut self) -> io::Result<()> {
        let wanted = !self.free.is_empty();
        if wanted != self.watched {
            if wanted {
                let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
                epoll::add(&self.epoll, &self.device, EventData::new_u64(DEVICE), flags)?;
            } else {
                epoll::delete(&self.epoll, &self.device)?;
            }
            self.watched = wanted;
        }
        Ok(())
    }

    /// Waits for an event, and calls `mark` with each mark of the queue's own that is ready.
    pub(super) fn wait(&mut self, mut mark: impl FnMut(u64)) -> io::Result<Woken> {
        self.watch_device()?;
        let mut room = [MaybeUninit::uninit(); EVENTS];
        let events = match epoll::wait(&self.epoll, &mut room, None) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(Woken { interrupted: true, give_up: false }),
            Err(error) => return Err(error.into()),
        };
        let mut give_up = false;
        for event in events.iter() {
            match event.data.u64() {
                GIVE_UP => give_up = true,
                own if own >= FIRST_MARK => mark(own),
                _ => {}
            }
        }
        Ok(Woken { interrupted: false, give_up })
    }

    /// Takes a request from the device, if there are one and a free buffer: the buffer, which stays free until
    /// [`Intake::claim`], and the request's length.
    pub(super) fn receive(&mut self) -> io::Result<Option<(u16, usize)>> {
        let Some(tag) = self.free_buffer() else { return Ok(None) };
        match self.requests.receive(tag, &self.device) {
            Ok(len) => Ok(Some((tag, len))),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
            // The mount was unmounted, or its connection aborted.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED)) => {
                self.gone = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel has ended the mount.
    pub(super) const fn is_gone(&self) -> bool {
        self.gone
    }

    /// The buffer that is used next.
    pub(super) fn free_buffer(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// The buffer that [`Intake::free_buffer`] returned is in use from now on.
    pub(super) fn claim(&mut self) {
        self.free.pop();
    }

    /// A buffer's operation has ended.
    pub(super) fn release(&mut self, tag: u16) {
        self.requests.take_back(tag);
        self.free.push(tag);
    }

    /// The buffers.
    pub(super) const fn requests(&mut self) -> &mut Requests {
        &mut self.requests
    }

    /// The operation of a channel for the request in a buffer, whose data are lent to it until
    /// [`Requests::take_back`].
    pub(super) fn operation(&mut self, tag: u16, (kind, offset, len): (Kind, u64, u64)) -> Operation {
        let buf = match kind {
            Kind::Read | Kind::Write => Some(self.requests.lend(tag, len as usize)),
            Kind::Trim | Kind::Zero | Kind::Flush => None,
        };
        Operation { kind, offset, len, buf, token: u64::from(tag) }
    }

    /// Sends an answer. It is no error if the answer is no longer expected, because its request was interrupted or the
    /// mount has ended.
    pub(super) fn send(&self, answer: &[u8]) -> io::Result<()> {
        self.device.send_bytes(answer)?;
        Ok(())
    }

    /// Sends the answer to a READ, whose data are in a buffer.
    pub(super) fn send_data(&mut self, tag: u16, unique: Unique, len: usize) -> io::Result<()> {
        self.requests.send(tag, &reply::header(unique, len), len, &self.device)
    }
}
