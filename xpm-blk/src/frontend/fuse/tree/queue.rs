//! One queue of a tree's mount: a thread that owns its buffers, and a channel for each file of the tree that it serves
//! data of. It takes requests off the device that all queues of the mount share.
//!
//! ```text
//!           receive, or the inbox               post                  completion
//!   Free -----------------------> (request) ------------> Busy --------------------> Free, answer sent
//!                                     |                                    |
//!                                     |                                    +-- a WRITE behind the end: the clerk answers
//!                                     +-- no data, or no allocation for them yet: copied to the clerk ---> Free
//! ```
//!
//! Data of a file that has its allocation pass through here alone. All else is copied and given to the clerk, which
//! answers it, or puts it into the inbox of a queue once it can be served. So no request that waits for the allocator
//! holds a buffer, and none waits here.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use xpm_client_core::Channel;
use xpm_fuse::wire::{FallocateMode, Operation, Request, Unique, reply};
use xpm_fuse::{Device, Errno};
use xpm_transport::io::{Completion, IoError, Kind};
use xpm_transport::spin::Spin;

use super::super::PAGE;
use super::super::intake::{self, FIRST_MARK, Intake, Serve};
use super::clerk::Note;
use super::{FileState, Tree};
use crate::watch::Pulse;

/// Marks of the descriptors in the epoll set; those of channels follow.
const INBOX: u64 = FIRST_MARK;
const CHANNELS: u64 = FIRST_MARK + 1;

/// A request of the clerk to a queue.
pub(super) enum Item {
    /// A request, as it was received: it can be served now.
    Request(Vec<u8>),
    /// An operation on a file's allocation; the clerk is told of its end by its token.
    Io { node: u64, kind: Kind, offset: u64, len: u64, token: u64 },
    /// The channel to this allocation of a file is to be dropped when nothing is in flight on it, and the clerk told.
    /// With 0: the channel to any allocation of the file, only if nothing is in flight, and the clerk is not told.
    Close { node: u64, store: u64 },
}

/// The requests of the clerk to a queue.
pub(super) struct Inbox {
    items: Mutex<VecDeque<Item>>,
    /// There may be items.
    filled: AtomicBool,
    bell: OwnedFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Inbox> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Inbox { items: Mutex::default(), filled: AtomicBool::new(false), bell })
    }

    pub(super) fn put(&self, item: Item) {
        self.items.lock().unwrap_or_else(PoisonError::into_inner).push_back(item);
        self.filled.store(true, Ordering::Release);
        // It fails only where it is readable already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Option<Item> {
        if !self.filled.load(Ordering::Acquire) {
            return None;
        }
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        let item = items.pop_front();
        if item.is_none() {
            self.filled.store(false, Ordering::Release);
            let _ = rustix::io::read(&self.bell, &mut [0_u8; 8]);
        }
        item
    }
}

/// The parts of a queue.
pub(super) struct QueueParts {
    /// Its number; the same in each life of the mount.
    pub(super) number: u16,
    pub(super) depth: u16,
    /// Data of one request at most, in bytes.
    pub(super) io_len: u32,
    pub(super) device: Arc<Device>,
    pub(super) tree: Arc<Tree>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) clerk: Sender<Note>,
    /// Set when the kernel has ended the mount.
    pub(super) ended: Arc<AtomicBool>,
    /// Readable once every request is to fail.
    pub(super) give_up: Arc<OwnedFd>,
    pub(super) spin: Spin,
    pub(super) pulse: Arc<Pulse>,
}

/// Runs a queue: see [`intake::run`].
pub(super) fn run(parts: QueueParts, ready: &SyncSender<io::Result<()>>) {
    let ended = Arc::clone(&parts.ended);
    intake::run(|| Queue::new(parts), &ended, ready);
}

/// The party that waits for an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiter {
    Kernel(Unique),
    /// The clerk, by this token.
    Clerk(u64),
}

/// An operation on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pending {
    waiter: Waiter,
    node: u64,
    slot: usize,
    kind: Kind,
    offset: u64,
    len: u64,
}

/// The way to a file's allocation.
struct Way {
    channel: Channel,
    node: u64,
    store: u64,
    in_flight: u32,
    /// It goes when nothing is in flight any more.
    closing: bool,
    /// It tells of what ends, until it is polled.
    armed: bool,
    /// Its descriptor was readable.
    told: bool,
    /// Operations that it had no room for.
    waiting: VecDeque<u16>,
}

struct Queue {
    // Before the buffers: dropping it ends the use of them.
    ways: Vec<Option<Way>>,
    by_node: HashMap<u64, (Arc<FileState>, Option<usize>)>,
    intake: Intake,
    number: u16,
    tree: Arc<Tree>,
    inbox: Arc<Inbox>,
    clerk: Sender<Note>,
    pending: Vec<Option<Pending>>,
    completions: Vec<Completion>,
    given_up: bool,
    spin: Spin,
    pulse: Arc<Pulse>,
}

impl Serve for Queue {
    fn serve(&mut self) -> io::Result<()> {
        // Epoll tells of channels only when it is waited for.
        let mut told = true;
        loop {
            let took = self.take_inbox()? | self.take_requests()?;
            if self.intake.is_gone() {
                // No program waits for the requests in flight any more.
                self.ways.clear();
                return Ok(());
            }
            let ended = self.take_completions(told)?;
            self.pulse.answer_if_asked();
            told = self.spin.looks_again(took || ended);
            if !told {
                self.wait()?;
            }
        }
    }
}

impl Queue {
    fn new(parts: QueueParts) -> io::Result<Queue> {
        let QueueParts { number, depth, io_len, device, tree, inbox, clerk, give_up, spin, pulse, .. } =
            parts;
        let intake = Intake::new(depth, io_len, device, give_up, &pulse)?;
        intake.watch(&inbox.bell, INBOX)?;
        let count = usize::from(depth);
        Ok(Queue {
            ways: Vec::new(),
            by_node: HashMap::new(),
            intake,
            number,
            tree,
            inbox,
            clerk,
            pending: vec![None; count],
            completions: Vec::with_capacity(count),
            given_up: false,
            spin,
            pulse,
        })
    }

    fn wait(&mut self) -> io::Result<()> {
        for way in self.ways.iter_mut().flatten().filter(|way| !way.armed) {
            way.channel.arm();
            way.armed = true;
        }
        let ways = &mut self.ways;
        let woken = self.intake.wait(|mark| {
            if let Some(place) = mark.checked_sub(CHANNELS)
                && let Some(Some(way)) = ways.get_mut(place as usize)
            {
                way.told = true;
            }
        })?;
        if woken.give_up {
            self.give_up()?;
        }
        Ok(())
    }

    /// Does what the clerk wants, as far as there are buffers; true when there was anything.
    fn take_inbox(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(tag) = self.intake.free_buffer() {
            let Some(item) = self.inbox.take() else { break };
            any = true;
            match item {
                Item::Request(bytes) => {
                    self.intake.requests().put(tag, &bytes);
                    self.begin(tag, bytes.len())?;
                }
                Item::Io { node, kind, offset, len, token } => {
                    let pending =
                        |slot| Pending { waiter: Waiter::Clerk(token), node, slot, kind, offset, len };
                    match self.way_to(node)? {
                        Some(slot) if !self.given_up => self.start(tag, pending(slot)),
                        _ => self.tell(Note::IoDone { token, result: Err(IoError::Unreachable) }),
                    }
                }
                Item::Close { node, store } => self.close(node, store),
            }
        }
        Ok(any)
    }

    /// Takes requests off the device while there are any, and buffers for them; true when there was one.
    fn take_requests(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some((tag, len)) = self.intake.receive()? {
            any = true;
            self.begin(tag, len)?;
        }
        Ok(any)
    }

    fn begin(&mut self, tag: u16, len: usize) -> io::Result<()> {
        let request = match Request::parse(self.intake.requests().request(tag, len)) {
            Ok(request) => request,
            Err(malformed) => {
                return match malformed.unique {
                    Some(unique) => self.intake.send(&reply::error(unique, Errno::INVAL)),
                    None => Ok(()),
                };
            }
        };
        let (node, unique) = (request.header.nodeid, request.header.unique);
        let wanted = wanted(&request.operation);
        let Some((kind, offset, len_wanted)) = wanted else {
            let bytes = self.intake.requests().request(tag, len).to_vec();
            self.tell(Note::Request(bytes));
            return Ok(());
        };
        let Some(file) = self.file(node) else {
            return self.intake.send(&reply::error(unique, Errno::STALE));
        };
        let size = file.size.load(Ordering::Acquire);
        let within = size.saturating_sub(offset).min(len_wanted);
        let io = match kind {
            Kind::Write if len_wanted == 0 => return self.intake.send(&reply::written(unique, 0)),
            Kind::Write => (kind, offset, len_wanted),
            Kind::Flush => (kind, 0, 0),
            _ if within == 0 => return self.intake.send(&reply::empty(unique)),
            Kind::Trim if offset.is_multiple_of(PAGE) && within.is_multiple_of(PAGE) => {
                (kind, offset, within)
            }
            Kind::Trim | Kind::Zero => (Kind::Zero, offset, within),
            Kind::Read => (kind, offset, within),
        };
        let fits = io.1.checked_add(io.2).is_some_and(|end| end <= file.capacity.load(Ordering::Acquire));
        let slot = if fits { self.way_to(node)? } else { None };
        match slot {
            _ if self.given_up => self.intake.send(&reply::error(unique, Errno::IO)),
            Some(slot) => {
                let (kind, offset, len) = io;
                let waiter = Waiter::Kernel(unique);
                self.start(tag, Pending { waiter, node, slot, kind, offset, len });
                Ok(())
            }
            // Nothing is with any appliance; the table is.
            None if kind == Kind::Flush && !file.has_store() => {
                self.tell(Note::Sync { unique });
                Ok(())
            }
            None => {
                let bytes = self.intake.requests().request(tag, len).to_vec();
                self.tell(Note::Parked { node, bytes });
                Ok(())
            }
        }
    }

    fn file(&mut self, node: u64) -> Option<Arc<FileState>> {
        if let Some((file, _)) = self.by_node.get(&node) {
            return Some(Arc::clone(file));
        }
        let file = self.tree.file(node)?;
        self.by_node.insert(node, (Arc::clone(&file), None));
        Some(file)
    }

    /// The place of the channel to a file's allocation; none while it has none that is shown.
    fn way_to(&mut self, node: u64) -> io::Result<Option<usize>> {
        let Some(file) = self.file(node) else { return Ok(None) };
        let store = file.store.load(Ordering::Acquire);
        let known = self.by_node.get(&node).and_then(|(_, slot)| *slot);
        if let Some(slot) = known
            && self.ways[slot].as_ref().is_some_and(|way| way.store == store && !way.closing)
        {
            return Ok(Some(slot));
        }
        let Some(volume) = file.volume(store) else { return Ok(None) };
        // The one to an earlier allocation of the file is about to be closed, and still has its place.
        let slot = match self.ways.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.ways.push(None);
                self.ways.len() - 1
            }
        };
        let mut channel = volume.channel_of(self.number)?;
        channel.register(self.intake.requests().all());
        self.intake.watch(&channel.wait_fd(), CHANNELS + slot as u64)?;
        self.ways[slot] = Some(Way {
            channel,
            node,
            store,
            in_flight: 0,
            closing: false,
            armed: false,
            told: true,
            waiting: VecDeque::with_capacity(self.pending.len()),
        });
        self.by_node.insert(node, (file, Some(slot)));
        Ok(Some(slot))
    }

    /// Drops the channel to an allocation of a file, at once or when what is in flight has ended.
    fn close(&mut self, node: u64, store: u64) {
        let place = self.ways.iter().position(|way| {
            way.as_ref().is_some_and(|way| way.node == node && (way.store == store || store == 0))
        });
        match place.and_then(|slot| self.ways[slot].as_mut().map(|way| (slot, way))) {
            Some((_, way)) if way.in_flight > 0 => way.closing |= store != 0,
            Some((slot, way)) => {
                way.closing |= store != 0;
                self.drop_way(slot);
            }
            None if store != 0 => self.tell(Note::Closed { store }),
            None => {}
        }
        if self.by_node.get(&node).is_some_and(|(_, slot)| slot.is_none_or(|slot| self.ways[slot].is_none()))
        {
            self.by_node.remove(&node);
        }
    }

    fn drop_way(&mut self, slot: usize) {
        let Some(way) = self.ways[slot].take() else { return };
        let (node, store, closing) = (way.node, way.store, way.closing);
        let _ = self.intake.forget(&way.channel.wait_fd());
        drop(way);
        if let Some((_, known)) = self.by_node.get_mut(&node)
            && *known == Some(slot)
        {
            *known = None;
        }
        if closing {
            self.tell(Note::Closed { store });
        }
    }

    fn start(&mut self, tag: u16, pending: Pending) {
        self.intake.claim();
        self.pending[usize::from(tag)] = Some(pending);
        if let Some(way) = self.ways[pending.slot].as_mut() {
            way.in_flight += 1;
        }
        self.post(tag);
    }

    fn post(&mut self, tag: u16) {
        let Some(pending) = self.pending[usize::from(tag)] else { return };
        let Some(way) = self.ways[pending.slot].as_mut() else { return };
        let operation = self.intake.operation(tag, (pending.kind, pending.offset, pending.len));
        if way.channel.post(operation).is_err() {
            self.intake.requests().take_back(tag);
            way.waiting.push_back(tag);
        }
    }

    /// Submits what was posted, and takes what the channels have done: of those whose descriptors told so, or of all
    /// with anything in flight if they may have (`told`). True when there was anything.
    fn take_completions(&mut self, told: bool) -> io::Result<bool> {
        let mut any = false;
        for slot in 0..self.ways.len() {
            // As with a single file: the sockets are read once in a turn of the queue.
            let mut told = told;
            while let Some(way) = self.ways[slot].as_mut().filter(|way| way.in_flight > 0 || way.told) {
                way.channel.submit();
                way.armed = false;
                if std::mem::take(&mut way.told) | std::mem::take(&mut told) {
                    way.channel.poll(&mut self.completions);
                } else {
                    way.channel.poll_untold(&mut self.completions);
                }
                if self.completions.is_empty() {
                    break;
                }
                any = true;
                while let Some(completion) = self.completions.pop() {
                    self.end(completion.token as u16, completion.result)?;
                }
                let waiting = self.ways[slot].as_mut().map_or(0, |way| way.waiting.len());
                for _ in 0..waiting {
                    if let Some(tag) = self.ways[slot].as_mut().and_then(|way| way.waiting.pop_front()) {
                        self.post(tag);
                    }
                }
            }
            if self.ways[slot].as_ref().is_some_and(|way| way.closing && way.in_flight == 0) {
                self.drop_way(slot);
            }
        }
        Ok(any)
    }

    fn end(&mut self, tag: u16, result: Result<(), IoError>) -> io::Result<()> {
        let Some(pending) = self.pending[usize::from(tag)].take() else { return Ok(()) };
        let Pending { waiter, node, slot, kind, offset, len } = pending;
        if let Some(way) = self.ways[slot].as_mut() {
            way.in_flight -= 1;
        }
        self.intake.release(tag);
        let unique = match waiter {
            Waiter::Kernel(unique) => unique,
            Waiter::Clerk(token) => {
                self.tell(Note::IoDone { token, result });
                return Ok(());
            }
        };
        match (result, kind) {
            (Err(error), _) => {
                self.intake.send(&reply::error(unique, Errno::from_raw_os_error(error.errno())))
            }
            (Ok(()), Kind::Read) => self.intake.send_data(tag, unique, len as usize),
            (Ok(()), Kind::Write) => {
                let end = offset + len;
                let size = self.by_node.get(&node).map_or(0, |(file, _)| file.size.load(Ordering::Acquire));
                if end > size {
                    // The file's new size is written down before the kernel may forget these pages.
                    self.tell(Note::Extended { unique, node, end, written: len as u32 });
                    return Ok(());
                }
                self.intake.send(&reply::written(unique, len as u32))
            }
            (Ok(()), Kind::Flush) => {
                self.tell(Note::Sync { unique });
                Ok(())
            }
            (Ok(()), Kind::Trim | Kind::Zero) => self.intake.send(&reply::empty(unique)),
        }
    }

    fn tell(&self, note: Note) {
        // A clerk that is gone ends the process, unless the mount has ended.
        let _ = self.clerk.send(note);
    }

    /// Drops the channels, so that nothing uses a buffer any more, and fails what is in flight and all that still
    /// comes.
    fn give_up(&mut self) -> io::Result<()> {
        self.given_up = true;
        self.intake.forget_give_up()?;
        for slot in 0..self.ways.len() {
            self.ways[slot] = None;
        }
        self.by_node.values_mut().for_each(|(_, slot)| *slot = None);
        for tag in 0..self.pending.len() as u16 {
            self.end(tag, Err(IoError::Unreachable))?;
        }
        Ok(())
    }
}

/// The operation on an allocation that a request asks for, before its file is looked at; none where that is the
/// clerk's.
fn wanted(operation: &Operation<'_>) -> Option<(Kind, u64, u64)> {
    match operation {
        Operation::Read(read) => Some((Kind::Read, read.offset, u64::from(read.size))),
        Operation::Write(write) => Some((Kind::Write, write.offset, write.data.len() as u64)),
        Operation::Fsync { .. } => Some((Kind::Flush, 0, 0)),
        Operation::Fallocate(range) if range.mode.contains(FallocateMode::KEEP_SIZE) => {
            match range.mode.without(FallocateMode::KEEP_SIZE) {
                FallocateMode::PUNCH_HOLE => Some((Kind::Trim, range.offset, range.length)),
                FallocateMode::ZERO_RANGE => Some((Kind::Zero, range.offset, range.length)),
                _ => None,
            }
        }
        _ => None,
    }
}
