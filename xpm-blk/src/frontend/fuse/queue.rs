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
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use rustix::event::epoll::{self, EventData, EventFlags};
use xpm_client_core::Channel;
use xpm_fuse::wire::{FallocateMode, Operation, Request, Unique, reply};
use xpm_fuse::{Device, Errno};
use xpm_transport::io::{Completion, IoError, Kind, Operation as Io};
use xpm_transport::spin::Spin;

use super::PAGE;
use super::file::File;
use super::memory::Requests;
use crate::lifecycle::DieOnDrop;
use crate::watch::Pulse;

/// Tokens of the descriptors in the epoll set.
const DEVICE: u64 = 0;
const CHANNEL: u64 = 1;
const GIVE_UP: u64 = 2;
const PULSE: u64 = 3;

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

/// Runs a queue until its mount is gone. Sends the result of its start once.
///
/// A failure after that, or a panic, ends the whole process: another process can take the mount over, while a process
/// that lives on with a dead queue would leave every program that uses the file in an endless wait.
pub(super) fn run(parts: QueueParts, ready: &SyncSender<io::Result<()>>) {
    let alive = DieOnDrop;
    let ended = Arc::clone(&parts.ended);
    match Queue::new(parts) {
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
    requests: Requests,
    device: Arc<Device>,
    file: Arc<File>,
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    /// Busy requests for which the channel had no room.
    waiting: VecDeque<u16>,
    completions: Vec<Completion>,
    epoll: OwnedFd,
    /// Whether the device is in the epoll set; it is removed while every buffer is in use.
    watched: bool,
    give_up: Arc<OwnedFd>,
    gone: bool,
    spin: Spin,
    pulse: Arc<Pulse>,
}

impl Queue {
    fn new(parts: QueueParts) -> io::Result<Queue> {
        let QueueParts { depth, io_len, device, file, give_up, mut channel, spin, pulse, .. } = parts;
        let requests = Requests::new(depth, io_len)?;
        channel.register(requests.all());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch =
            |fd: &dyn AsFd, mark| epoll::add(&epoll, fd.as_fd(), EventData::new_u64(mark), EventFlags::IN);
        watch(&channel.wait_fd(), CHANNEL)?;
        watch(&give_up, GIVE_UP)?;
        watch(&pulse.poked(), PULSE)?;
        let count = usize::from(depth);
        let mut queue = Queue {
            channel: Some(channel),
            requests,
            device,
            file,
            pending: vec![None; count],
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(count),
            completions: Vec::with_capacity(count),
            epoll,
            watched: false,
            give_up,
            gone: false,
            spin,
            pulse,
        };
        queue.watch_device()?;
        Ok(queue)
    }

    fn serve(&mut self) -> io::Result<()> {
        // Epoll reports the channel only when the queue waits for it, so the first turn polls the channel too.
        let mut told = true;
        loop {
            let took = self.take_requests()?;
            if self.gone {
                // No program waits for the requests in flight any more.
                self.channel = None;
                return Ok(());
            }
            let ended = self.take_completions(told)?;
            self.pulse.answer_if_asked();
            told = match self.spin.looks_again(took || ended) {
                true => true,
                false => self.wait()?,
            };
        }
    }

    /// Waits for an event; returns whether the channel may be ready.
    fn wait(&mut self) -> io::Result<bool> {
        self.watch_device()?;
        if let Some(channel) = &mut self.channel {
            channel.arm();
        }
        let mut room = [MaybeUninit::uninit(); 4];
        let events = match epoll::wait(&self.epoll, &mut room, None) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let mut told = false;
        let mut give_up = false;
        for event in events.iter() {
            match event.data.u64() {
                CHANNEL => told = true,
                GIVE_UP => give_up = true,
                _ => {}
            }
        }
        if give_up {
            self.give_up()?;
        }
        Ok(told)
    }

    /// Keeps the device in the epoll set while a buffer is free. Exclusive, so that one request wakes one queue only.
    fn watch_device(&mut self) -> io::Result<()> {
        let wanted = !self.free.is_empty();
        if wanted != self.watched {
            match wanted {
                true => {
                    let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
                    epoll::add(&self.epoll, &self.device, EventData::new_u64(DEVICE), flags)?;
                }
                false => epoll::delete(&self.epoll, &self.device)?,
            }
            self.watched = wanted;
        }
        Ok(())
    }

    /// Takes requests from the device as long as there are requests and free buffers; returns whether there was one.
    fn take_requests(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(&tag) = self.free.last() {
            match self.requests.receive(tag, &self.device) {
                Ok(len) => {
                    any = true;
                    self.begin(tag, len)?;
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
                // The mount was unmounted, or its connection aborted.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED)) => {
                    self.gone = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(any)
    }

    fn begin(&mut self, tag: u16, len: usize) -> io::Result<()> {
        let begun = match Request::parse(self.requests.request(tag, len)) {
            Ok(request) => begin(&self.file, &request),
            Err(malformed) => match malformed.unique {
                Some(unique) => Begun::Refused(unique, Errno::INVAL),
                None => return Ok(()),
            },
        };
        match begun {
            Begun::Io(pending) => {
                self.free.pop();
                self.pending[usize::from(tag)] = Some(pending);
                match self.waiting.is_empty() {
                    true => self.post(tag),
                    false => {
                        self.waiting.push_back(tag);
                        Ok(())
                    }
                }
            }
            Begun::Refused(unique, errno) => self.send(&reply::error(unique, errno)),
            Begun::Done(unique) => self.send(&reply::empty(unique)),
            Begun::Other => {
                let Ok(request) = Request::parse(self.requests.request(tag, len)) else { return Ok(()) };
                let answer = self.file.answer(&request);
                match answer.bytes() {
                    [] => Ok(()),
                    bytes => self.send(bytes),
                }
            }
        }
    }

    fn post(&mut self, tag: u16) -> io::Result<()> {
        let Some(pending) = self.pending[usize::from(tag)] else { return Ok(()) };
        let Some(channel) = &mut self.channel else { return self.end(tag, Err(IoError::Unreachable)) };
        let buf = match pending.kind {
            Kind::Read | Kind::Write => Some(self.requests.lend(tag, pending.len as usize)),
            Kind::Trim | Kind::Zero | Kind::Flush => None,
        };
        let operation =
            Io { kind: pending.kind, offset: pending.offset, len: pending.len, buf, token: u64::from(tag) };
        if channel.post(operation).is_err() {
            self.requests.take_back(tag);
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
        self.requests.take_back(tag);
        self.free.push(tag);
        match (result, kind) {
            (Err(error), _) => self.send(&reply::error(unique, Errno::from_raw_os_error(error.errno()))),
            (Ok(()), Kind::Read) => {
                let len = len as usize;
                self.requests.send(tag, &reply::header(unique, len), len, &self.device)
            }
            (Ok(()), Kind::Write) => self.send(&reply::written(unique, len as u32)),
            (Ok(()), Kind::Trim | Kind::Zero | Kind::Flush) => self.send(&reply::empty(unique)),
        }
    }

    /// Sends an answer. It is no error if the answer is no longer expected, because its request was interrupted or the
    /// mount has ended.
    fn send(&self, answer: &[u8]) -> io::Result<()> {
        self.device.send_bytes(answer)?;
        Ok(())
    }

    /// Drops the channel, so that no operation uses a buffer any more, and fails the requests in flight and all later
    /// ones.
    fn give_up(&mut self) -> io::Result<()> {
        self.channel = None;
        epoll::delete(&self.epoll, &self.give_up)?;
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
