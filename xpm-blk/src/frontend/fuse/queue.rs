//! A queue of a mount: a thread that owns its buffers and its channel, and takes requests from the device, which all
//! queues of the mount share.
//!
//! ```text
//!           receive                  post                  completion
//!   Free ------------> (request) ------------> Busy --------------------> Free, answer sent
//!                          |
//!                          +-- no data: answer sent at once -----------> Free
//! ```
//!
//! On the path of a request, the thread never takes a lock, allocates or logs, and it waits at one place only: in
//! epoll, for the device and the channel alike.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::SyncSender;

use xpm_client_core::Channel;
use xpm_fuse::wire::{FallocateMode, Operation, Request, Unique, reply};
use xpm_fuse::{Device, Errno};
use xpm_transport::io::{Completion, IoError, Kind};
use xpm_transport::spin::Spin;

use super::PAGE;
use super::file::File;
use super::intake::{self, FIRST_MARK, Intake, Serve};
use crate::watch::Pulse;

/// Mark of the channel in the epoll set.
const CHANNEL: u64 = FIRST_MARK;

/// The parts of a queue.
pub(super) struct QueueParts {
    pub(super) depth: u16,
    /// Most data of one request, in bytes.
    pub(super) io_len: u32,
    /// The mount's descriptor of /dev/fuse, which is non-blocking.
    pub(super) device: Arc<Device>,
    pub(super) file: Arc<File>,
    /// Set when the kernel has ended the mount.
    pub(super) ended: Arc<AtomicBool>,
    /// Readable once every request has to fail.
    pub(super) give_up: Arc<OwnedFd>,
    pub(super) channel: Channel,
    pub(super) spin: Spin,
    pub(super) pulse: Arc<Pulse>,
}

/// Runs a queue: see [`intake::run`].
pub(super) fn run(parts: QueueParts, ready: &SyncSender<io::Result<()>>) {
    let ended = Arc::clone(&parts.ended);
    intake::run(|| Queue::new(parts), &ended, ready);
}

/// A request with the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pending {
    unique: Unique,
    kind: Kind,
    offset: u64,
    len: u64,
}

struct Queue {
    // Dropped before the buffers, which ends their use.
    channel: Option<Channel>,
    intake: Intake,
    file: Arc<File>,
    pending: Vec<Option<Pending>>,
    /// Busy requests for which the channel had no room.
    waiting: VecDeque<u16>,
    completions: Vec<Completion>,
    spin: Spin,
    pulse: Arc<Pulse>,
}

impl Serve for Queue {
    fn serve(&mut self) -> io::Result<()> {
        // Epoll reports the channel only when the queue waits for it, so the first turn polls the channel too.
        let mut told = true;
        loop {
            let took = self.take_requests()?;
            if self.intake.is_gone() {
                // No program waits for the requests in flight any more.
                self.channel = None;
                return Ok(());
            }
            let ended = self.take_completions(told)?;
            self.pulse.answer_if_asked();
            told = self.spin.looks_again(took || ended) || self.wait()?;
        }
    }
}

impl Queue {
    fn new(parts: QueueParts) -> io::Result<Queue> {
        let QueueParts { depth, io_len, device, file, give_up, mut channel, spin, pulse, .. } = parts;
        let mut intake = Intake::new(depth, io_len, device, give_up, &pulse)?;
        channel.register(intake.requests().all());
        intake.watch(&channel.wait_fd(), CHANNEL)?;
        let count = usize::from(depth);
        Ok(Queue {
            channel: Some(channel),
            intake,
            file,
            pending: vec![None; count],
            waiting: VecDeque::with_capacity(count),
            completions: Vec::with_capacity(count),
            spin,
            pulse,
        })
    }

    /// Waits for an event; returns whether the channel may be ready.
    fn wait(&mut self) -> io::Result<bool> {
        if let Some(channel) = &mut self.channel {
            channel.arm();
        }
        let mut told = false;
        let woken = self.intake.wait(|mark| told |= mark == CHANNEL)?;
        if woken.give_up {
            self.give_up()?;
        }
        Ok(told || woken.interrupted)
    }

    /// Takes requests from the device as long as there are requests and free buffers; returns whether there was one.
    fn take_requests(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some((tag, len)) = self.intake.receive()? {
            any = true;
            self.begin(tag, len)?;
        }
        Ok(any)
    }

    fn begin(&mut self, tag: u16, len: usize) -> io::Result<()> {
        let begun = match Request::parse(self.intake.requests().request(tag, len)) {
            Ok(request) => begin(&self.file, &request),
            Err(malformed) => match malformed.unique {
                Some(unique) => Begun::Refused(unique, Errno::INVAL),
                None => return Ok(()),
            },
        };
        match begun {
            Begun::Io(pending) => {
                self.intake.claim();
                self.pending[usize::from(tag)] = Some(pending);
                match self.waiting.is_empty() {
                    true => self.post(tag),
                    false => {
                        self.waiting.push_back(tag);
                        Ok(())
                    }
                }
            }
            Begun::Refused(unique, errno) => self.intake.send(&reply::error(unique, errno)),
            Begun::Done(unique) => self.intake.send(&reply::empty(unique)),
            Begun::Other => {
                let Ok(request) = Request::parse(self.intake.requests().request(tag, len)) else {
                    return Ok(());
                };
                let answer = self.file.answer(&request);
                match answer.bytes() {
                    [] => Ok(()),
                    bytes => self.intake.send(bytes),
                }
            }
        }
    }

    fn post(&mut self, tag: u16) -> io::Result<()> {
        let Some(pending) = self.pending[usize::from(tag)] else { return Ok(()) };
        let Some(channel) = &mut self.channel else { return self.end(tag, Err(IoError::Unreachable)) };
        let operation = self.intake.operation(tag, (pending.kind, pending.offset, pending.len));
        if channel.post(operation).is_err() {
            self.intake.requests().take_back(tag);
            self.waiting.push_back(tag);
        }
        Ok(())
    }

    /// Submits the posted operations, and handles the channel's completions; reads its sockets only if `told` says that
    /// the channel's descriptor was reported or may be ready. Returns whether there were any.
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
                self.end(completion.token as u16, completion.result)?;
            }
            for _ in 0..self.waiting.len() {
                if let Some(tag) = self.waiting.pop_front() {
                    self.post(tag)?;
                }
            }
        }
        Ok(any)
    }

    fn end(&mut self, tag: u16, result: Result<(), IoError>) -> io::Result<()> {
        let Some(Pending { unique, kind, len, .. }) = self.pending[usize::from(tag)].take() else {
            return Ok(());
        };
        self.intake.release(tag);
        match (result, kind) {
            (Err(error), _) => {
                self.intake.send(&reply::error(unique, Errno::from_raw_os_error(error.errno())))
            }
            (Ok(()), Kind::Read) => self.intake.send_data(tag, unique, len as usize),
            (Ok(()), Kind::Write) => self.intake.send(&reply::written(unique, len as u32)),
            (Ok(()), Kind::Trim | Kind::Zero | Kind::Flush) => self.intake.send(&reply::empty(unique)),
        }
    }

    /// Drops the channel, so that no operation uses a buffer any more, and fails the requests in flight and all later
    /// ones.
    fn give_up(&mut self) -> io::Result<()> {
        self.channel = None;
        self.intake.forget_give_up()?;
        self.waiting.clear();
        for tag in 0..self.pending.len() as u16 {
            self.end(tag, Err(IoError::Unreachable))?;
        }
        Ok(())
    }
}

/// The first step of a request.
enum Begun {
    /// An operation of the channel.
    Io(Pending),
    Refused(Unique, Errno),
    /// The request is done without I/O.
    Done(Unique),
    /// A request that [`File::answer`] handles.
    Other,
}

fn begin(file: &File, request: &Request<'_>) -> Begun {
    let unique = request.header.unique;
    let io = |kind, offset, len| Begun::Io(Pending { unique, kind, offset, len });
    match &request.operation {
        Operation::Read(read) => {
            let len = file.size().saturating_sub(read.offset).min(u64::from(read.size));
            match len {
                0 => Begun::Done(unique),
                len => io(Kind::Read, read.offset, len),
            }
        }
        Operation::Write(write) => {
            let len = write.data.len() as u64;
            match write.offset.checked_add(len) {
                Some(_) if len == 0 => Begun::Done(unique),
                Some(end) if end <= file.size() => io(Kind::Write, write.offset, len),
                // Beyond the end of the allocation, which is resized by command, not by writing.
                _ => Begun::Refused(unique, Errno::FBIG),
            }
        }
        Operation::Fallocate(range) => {
            let end = range.offset.saturating_add(range.length);
            let len = end.min(file.size()).saturating_sub(range.offset);
            let aligned = range.offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            let keeps = range.mode.without(FallocateMode::KEEP_SIZE);
            match keeps {
                FallocateMode::NONE if end > file.size() => Begun::Refused(unique, Errno::FBIG),
                _ if len == 0 => Begun::Done(unique),
                FallocateMode::PUNCH_HOLE if aligned => io(Kind::Trim, range.offset, len),
                FallocateMode::PUNCH_HOLE | FallocateMode::ZERO_RANGE => io(Kind::Zero, range.offset, len),
                // The memory of an allocation is always reserved.
                FallocateMode::NONE => Begun::Done(unique),
                _ => Begun::Refused(unique, Errno::OPNOTSUPP),
            }
        }
        Operation::Fsync { .. } => io(Kind::Flush, 0, 0),
        _ => Begun::Other,
    }
}
