//! A queue of a ublk device: a thread that owns its ring, its buffers and its channel.
//!
//! Each tag is, at any time, *fetched* (the kernel has our fetch and will complete it with the next request),
//! *busy* (the request is with the channel) or *ended* (the device stops). The thread ends when every tag has
//! ended. On the path of a request, it never takes a lock, allocates or logs, and it waits at one place only:
//! in the ring, for the kernel and the channel alike.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use xpm_client_core::Channel;
use xpm_transport::io::{Completion, IoError, Kind, Operation};
use xpm_transport::spin::Spin;

use super::memory::Descriptors;
use super::request::Request;
use super::ring::{Event, Ring};
use super::uapi;
use crate::frontend::buffers::Buffers;
use crate::lifecycle::DieOnDrop;
use crate::watch::Pulse;

/// The parts of a queue.
pub(super) struct QueueParts {
    pub(super) id: u16,
    pub(super) depth: u16,
    /// Size of the device in bytes.
    pub(super) size: u64,
    /// Length of a tag's buffer in bytes.
    pub(super) io_len_max: u32,
    /// The device file.
    pub(super) device: Arc<OwnedFd>,
    /// Readable once every request has to fail: the device is removed although I/O is held.
    pub(super) give_up: Arc<OwnedFd>,
    pub(super) channel: Channel,
    pub(super) spin: Spin,
    pub(super) pulse: Arc<Pulse>,
}

/// Makes either all queues of a device fetch at the same time, or none. While a device gets another server,
/// the kernel must not see that server die with some of its queues fetched and others not: Linux 6.12 then
/// follows a null pointer.
#[derive(Debug, Default)]
pub(super) struct Gate {
    open: Mutex<Option<bool>>,
    decided: Condvar,
}

impl Gate {
    /// Lets all queues continue, or end.
    pub(super) fn decide(&self, open: bool) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(open);
        self.decided.notify_all();
    }

    fn wait(&self) -> bool {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *open {
                Some(open) => return open,
                None => open = self.decided.wait(open).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Runs a queue until its device is stopped. Sends its state twice: when it is created, and, after the gate,
/// when its first fetches are with the kernel.
///
/// A failure after that, or a panic, ends the whole process: a process that lives on with a dead queue would
/// leave every task that uses the device in an endless wait.
pub(super) fn run(parts: QueueParts, gate: &Gate, ready: &SyncSender<io::Result<()>>) {
    let alive = DieOnDrop;
    let id = parts.id;
    match Queue::new(parts) {
        Err(error) => drop(ready.send(Err(error))),
        Ok(mut queue) => {
            let _ = ready.send(Ok(()));
            if gate.wait() {
                let fetched = queue.fetch_all();
                let go_on = fetched.is_ok();
                let _ = ready.send(fetched);
                if go_on && let Err(error) = queue.serve() {
                    tracing::error!(queue = id, %error, "ublk queue failed");
                    return;
                }
            }
        }
    }
    std::mem::forget(alive);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Fetched,
    Busy(Request),
    Ended,
}

/// The events that came out of the ring.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// Any event.
    any: bool,
    /// The channel has work.
    channel: bool,
}

struct Queue {
    id: u16,
    size: u64,
    io_len_max: u64,
    // Dropped before the buffers, which ends their use.
    channel: Option<Channel>,
    ring: Ring,
    descriptors: Descriptors,
    buffers: Buffers,
    tags: Vec<Tag>,
    ended: usize,
    /// Busy tags for which the channel had no room.
    waiting: VecDeque<u16>,
    completions: Vec<Completion>,
    give_up: Arc<OwnedFd>,
    spin: Spin,
    pulse: Arc<Pulse>,
}

impl Queue {
    fn new(parts: QueueParts) -> io::Result<Queue> {
        let QueueParts { id, depth, size, io_len_max, device, give_up, mut channel, spin, pulse } = parts;
        let count = usize::from(depth);
        let buffers = Buffers::new(depth, io_len_max as usize)?;
        channel.register(buffers.all());
        Ok(Queue {
            id,
            size,
            io_len_max: u64::from(io_len_max),
            descriptors: Descriptors::map(device.as_fd(), id, depth)?,
            buffers,
            ring: Ring::new(device, depth)?,
            channel: Some(channel),
            tags: vec![Tag::Fetched; count],
            ended: 0,
            waiting: VecDeque::with_capacity(count),
            completions: Vec::with_capacity(count),
            give_up,
            spin,
            pulse,
        })
    }

    fn fetch_all(&mut self) -> io::Result<()> {
        for tag in 0..self.tags.len() as u16 {
            self.ring.push_io(uapi::FETCH_REQ, self.io_command(tag, 0))?;
        }
        self.ring.watch_give_up(self.give_up.as_fd())?;
        self.ring.watch_pokes(self.pulse.poked())?;
        self.ring.submit()
    }

    fn serve(&mut self) -> io::Result<()> {
        // The ring reports the channel only when the queue waits for it.
        let mut looking = true;
        loop {
            let seen = self.take_events()?;
            let ends = self.take_completions(looking || seen.channel)?;
            if self.ended == self.tags.len() {
                return Ok(());
            }
            looking = self.spin.looks_again(seen.any || ends);
            if looking {
                self.ring.submit()?;
            } else {
                self.wait()?;
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        if let Some(channel) = &mut self.channel {
            channel.arm();
            self.ring.watch_channel(channel.wait_fd())?;
        }
        self.ring.wait()
    }

    /// Handles the events in the ring.
    fn take_events(&mut self) -> io::Result<Seen> {
        let mut seen = Seen::default();
        while let Some(event) = self.ring.next() {
            seen.any = true;
            match event {
                Event::Request(tag) => self.begin(tag)?,
                Event::Ended(tag) => self.end(tag),
                Event::Channel => seen.channel = true,
                Event::GiveUp => self.give_up()?,
                Event::Poked => {
                    self.pulse.answer();
                    self.ring.watch_pokes(self.pulse.poked())?;
                }
                Event::Failed(error) => return Err(error),
            }
        }
        Ok(seen)
    }

    fn begin(&mut self, tag: u16) -> io::Result<()> {
        match Request::decode(self.descriptors.get(tag), self.size, self.io_len_max) {
            Ok(request) => {
                self.tags[usize::from(tag)] = Tag::Busy(request);
                if self.waiting.is_empty() {
                    self.post(tag)
                } else {
                    self.waiting.push_back(tag);
                    Ok(())
                }
            }
            Err(error) => self.commit(tag, -error.errno()),
        }
    }

    fn post(&mut self, tag: u16) -> io::Result<()> {
        let Tag::Busy(request) = self.tags[usize::from(tag)] else { return Ok(()) };
        let Some(channel) = &mut self.channel else {
            return self.commit(tag, request.answer(Err(IoError::Unreachable)));
        };
        let operation = Operation {
            kind: request.kind,
            offset: request.offset,
            len: if request.kind == Kind::Flush { 0 } else { request.len },
            buf: request.buffer(self.buffers.of(tag)),
            token: u64::from(tag),
        };
        if channel.post(operation).is_err() {
            self.waiting.push_back(tag);
        }
        Ok(())
    }

    fn end(&mut self, tag: u16) {
        let state = &mut self.tags[usize::from(tag)];
        if *state != Tag::Ended {
            *state = Tag::Ended;
            self.ended += 1;
        }
    }

    /// Submits the posted operations, and handles the channel's completions; reads its sockets only if `told`
    /// says that the channel's descriptor was reported or may be ready. Returns whether there were any.
    fn take_completions(&mut self, told: bool) -> io::Result<bool> {
        let mut any = false;
        while let Some(channel) = &mut self.channel {
            channel.submit();
            match told && !any {
                true => channel.poll(&mut self.completions),
                false => channel.poll_untold(&mut self.completions),
            }
            if self.completions.is_empty() {
                break;
            }
            any = true;
            while let Some(completion) = self.completions.pop() {
                let tag = completion.token as u16;
                if let Some(&Tag::Busy(request)) = self.tags.get(usize::from(tag)) {
                    self.commit(tag, request.answer(completion.result))?;
                }
            }
            if self.waiting.is_empty() {
                break;
            }
            self.post_waiting()?;
        }
        Ok(any)
    }

    fn post_waiting(&mut self) -> io::Result<()> {
        for _ in 0..self.waiting.len() {
            if let Some(tag) = self.waiting.pop_front() {
                self.post(tag)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        self.tags[usize::from(tag)] = Tag::Fetched;
        self.ring.push_io(uapi::COMMIT_AND_FETCH_REQ, self.io_command(tag, result))
    }

    fn io_command(&self, tag: u16, result: i32) -> uapi::IoCommand {
        uapi::IoCommand { queue: self.id, tag, result, address: self.buffers.address(tag) }
    }

    /// Drops the channel, so that no operation uses a buffer any more, and fails the requests in flight and
    /// all later ones.
    fn give_up(&mut self) -> io::Result<()> {
        self.channel = None;
        self.waiting.clear();
        for tag in 0..self.tags.len() as u16 {
            if let Tag::Busy(request) = self.tags[usize::from(tag)] {
                self.commit(tag, request.answer(Err(IoError::Unreachable)))?;
            }
        }
        Ok(())
    }
}
