//! The thread that owns a tree's table. It answers all requests that are not data, says when an allocation is made,
//! grown or freed, and holds requests that wait for that. It never waits itself, but for the disk that has the table.
//!
//! A file is in one of these states:
//!
//! ```text
//!              needs room                        the wish was fulfilled, or refused
//!   Settled ---------------> Growing ------------------------------------------------> Settled, what waited is done or refused
//!      |
//!      +-- becomes shorter --> Cutting -- what is cut off is zeros, and written down --> Settled
//! ```
//!
//! Whatever comes for a file that is not settled, and needs its size or its room, waits in the order in which it came.

mod attributes;
mod fates;
mod prober;

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use rustix::io::Errno;
use tokio::sync::mpsc::UnboundedSender;
use xpm_fuse::wire::reply::{self, Opened, Validity};
use xpm_fuse::wire::{FallocateMode, OpenFlags, Operation, Request, Setattr, Unique};
use xpm_fuse::{Device, Negotiated};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_transport::io::{IoError, Kind as IoKind};

pub(super) use self::attributes::kind;
use super::super::file::{now, to_nanoseconds, wanted};
use super::super::{Mounted, PAGE};
use super::journal::Journal;
use super::queue::{Inbox, Item};
use super::table::{Change, Kind, Node, StoreState, Table};
use super::{Fate, Tree, Wish};
use crate::error::DeviceError;
use crate::lifecycle::DieOnDrop;

/// The smallest region of an appliance, in bytes: sizes of allocations are multiples of it.
const GRAIN: u64 = 16 << 20;
/// A file that grows by being written gets a quarter of its room more than it needs, and at most so much, in bytes:
/// else one that is written from begin to end would ask the allocator for each region.
const AHEAD_MAX: u64 = 1 << 30;
/// The largest allocation that is asked for, in bytes.
const SIZE_MAX: u64 = 1 << 60;
/// Attributes are asked for again after this: how much memory a file takes changes without the kernel.
pub(super) const ATTRIBUTES: Validity = Validity { seconds: 1, nanoseconds: 0 };

/// A message to the clerk.
pub(super) enum Note {
    /// A request that is not data.
    Request(Vec<u8>),
    /// A request for data of a file that has no room for them, or none that is shown.
    Parked { node: u64, bytes: Vec<u8> },
    /// A WRITE is done that ends behind the file's end. To be answered.
    Extended { unique: Unique, node: u64, end: u64, written: u32 },
    /// The table is to survive the machine, and the request to be answered then.
    Sync { unique: Unique },
    /// An operation of the clerk's has ended.
    IoDone { token: u64, result: Result<(), IoError> },
    /// A queue has no channel to the allocation any more.
    Closed { store: u64 },
    /// An allocation is shown, or has another size.
    Shown { store: u64 },
    /// The kernel knows nothing of a file any more.
    Forgotten { node: u64 },
    /// A wish has ended.
    Fate(Fate),
    /// The mount has ended.
    Stop,
}

pub(super) struct ClerkParts {
    pub(super) tree: Arc<Tree>,
    pub(super) device: Arc<Device>,
    pub(super) inboxes: Vec<Arc<Inbox>>,
    pub(super) notes: Sender<Note>,
    pub(super) wishes: UnboundedSender<(Name, Wish)>,
    /// Data of one request at most, in bytes.
    pub(super) io_len: u32,
    pub(super) takes_over: bool,
}

/// The work that a file waits for.
enum Step {
    Growing,
    /// Operations that still make zeros of what is cut off, and how the first one failed that did. The request is the
    /// first one that waits.
    Cutting {
        open: u32,
        failed: Option<Errno>,
    },
}

struct Work {
    step: Step,
    waiting: VecDeque<Vec<u8>>,
}

pub(super) struct Clerk {
    pub(super) table: Table,
    journal: Journal,
    tree: Arc<Tree>,
    device: Arc<Device>,
    inboxes: Vec<Arc<Inbox>>,
    wishes: UnboundedSender<(Name, Wish)>,
    io_len: u32,
    work: HashMap<u64, Work>,
    /// Files of the clerk's own operations, by their tokens.
    tokens: HashMap<u64, u64>,
    token: u64,
    /// Queues that may still have a channel to an allocation that is to be freed.
    closing: HashMap<u64, usize>,
    /// Requests for the amount of memory (statfs) that wait for the answer.
    looking: Vec<Unique>,
    /// All memory and what is free of it, in bytes, as it was known last.
    space: (u64, u64),
    /// Asks the kernel whether it knows a file.
    prober: Sender<u64>,
}

impl Clerk {
    /// Reads the table, and asks for what it lacks. Blocks.
    pub(super) fn new(parts: ClerkParts, path: &Path, root: &Mounted) -> Result<Clerk, DeviceError> {
        let ClerkParts { tree, device, inboxes, notes, wishes, io_len, takes_over } = parts;
        let new = || Table::new(root.mode, (root.uid, root.gid), to_nanoseconds(now()));
        let (journal, table) = Journal::open(path, new)?;
        let prober = prober::start(Arc::clone(&device), notes);
        let mut clerk = Clerk {
            table,
            journal,
            tree,
            device,
            inboxes,
            wishes,
            io_len,
            work: HashMap::new(),
            tokens: HashMap::new(),
            token: 0,
            closing: HashMap::new(),
            looking: Vec::new(),
            space: (0, 0),
            prober,
        };
        clerk.begin(takes_over)?;
        Ok(clerk)
    }

    /// Puts right what an earlier life left half done.
    fn begin(&mut self, takes_over: bool) -> Result<(), DeviceError> {
        let mut changes = Vec::new();
        let mut used = std::collections::BTreeSet::new();
        for (number, node) in self.table.nodes() {
            let gone = node.names == 0 && !takes_over;
            let wanted = node.store != 0 && self.table.store(node.store) != Some(StoreState::Made);
            match (gone, wanted) {
                (true, _) => changes.push(Change::NoNode { node: number }),
                (false, true) => {
                    changes.push(Change::Node { node: number, is: Node { store: 0, ..node.clone() } });
                }
                (false, false) => drop(used.insert(node.store)),
            }
        }
        let unused = self.table.stores().filter(|(store, _)| !used.contains(store));
        changes.extend(unused.map(|(store, _)| Change::Store { store, is: StoreState::Doomed }));
        let at = |errno: Errno| {
            let what = format!("write the table of tree {}: {errno}", self.tree.name);
            DeviceError::new(ErrorKind::Internal, what)
        };
        if !changes.is_empty() {
            self.journal
                .append(&changes)
                .and_then(|()| self.journal.sync())
                .map_err(|error| at(errno(&error)))?;
            changes.iter().for_each(|change| self.table.apply(change));
        }
        let nodes: Vec<(u64, Node)> =
            self.table.nodes().map(|(number, node)| (number, node.clone())).collect();
        for (number, node) in nodes {
            self.mirror(number, &node);
            if node.store != 0 && !self.look_at(number) {
                self.wish(Wish::Show { store: node.store });
            }
            if node.names == 0 {
                let _ = self.prober.send(number);
            }
        }
        let doomed = self.table.stores().filter(|(_, state)| *state == StoreState::Doomed);
        let doomed: Vec<u64> = doomed.map(|(store, _)| store).collect();
        doomed.into_iter().for_each(|store| self.wish(Wish::Free { store }));
        Ok(())
    }

    /// Serves until the mount has ended. A failure ends the process, so that another one can go on.
    pub(super) fn run(mut self, notes: &Receiver<Note>) {
        let alive = DieOnDrop;
        while let Ok(note) = notes.recv() {
            let served = match note {
                Note::Request(bytes) => self.request(bytes),
                Note::Parked { node, bytes } => self.route(node, bytes),
                Note::Extended { unique, node, end, written } => self.extended(unique, node, end, written),
                Note::Sync { unique } => {
                    let synced = self.sync();
                    self.answer(unique, synced)
                }
                Note::IoDone { token, result } => self.io_done(token, result),
                Note::Closed { store } => self.closed(store),
                Note::Shown { store } => self.shown(store),
                Note::Forgotten { node } => self.forgotten(node),
                Note::Fate(fate) => self.fate(fate),
                Note::Stop => break,
            };
            if let Err(error) = served {
                tracing::error!("tree {}: the kernel refuses an answer: {error}", self.tree.name);
                return;
            }
        }
        let _ = self.journal.sync();
        std::mem::forget(alive);
    }

    pub(super) fn send(&self, answer: &[u8]) -> Result<(), Errno> {
        self.device.send_bytes(answer).map(drop)
    }

    /// Answers a request that has nothing to tell but whether it is done.
    pub(super) fn answer(&self, unique: Unique, done: Result<(), Errno>) -> Result<(), Errno> {
        match done {
            Ok(()) => self.send(&reply::empty(unique)),
            Err(errno) => self.send(&reply::error(unique, errno)),
        }
    }

    fn wish(&self, wish: Wish) {
        let _ = self.wishes.send((self.tree.name.clone(), wish));
    }

    /// Writes changes down, and makes them.
    pub(super) fn commit(&mut self, changes: &[Change]) -> Result<(), Errno> {
        self.journal.append(changes).map_err(|error| {
            tracing::error!("tree {}: its table cannot be written: {error}", self.tree.name);
            errno(&error)
        })?;
        for change in changes {
            self.table.apply(change);
            match change {
                Change::Node { node, is } => self.mirror(*node, is),
                Change::NoNode { node } => drop(self.tree.files().remove(node)),
                _ => {}
            }
        }
        self.journal.shorten(&self.table);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Errno> {
        self.journal.sync().map_err(|error| {
            tracing::error!("tree {}: its table cannot be synced: {error}", self.tree.name);
            errno(&error)
        })
    }

    /// Tells the queues of a file's size.
    fn mirror(&self, number: u64, node: &Node) {
        if node.kind == Kind::File {
            let file = Arc::clone(self.tree.files().entry(number).or_default());
            file.size.store(node.size, std::sync::atomic::Ordering::Release);
            file.stored.store(node.store != 0, std::sync::atomic::Ordering::Release);
        }
    }

    /// Has the queues use the allocation of a file, if it is made and shown; whether it is.
    fn look_at(&self, number: u64) -> bool {
        let Some(node) = self.table.node(number) else { return false };
        let made = self.table.store(node.store) == Some(StoreState::Made);
        match (made.then(|| self.tree.volume(node.store)).flatten(), self.tree.file(number)) {
            (Some(volume), Some(file)) => {
                file.show(node.store, &volume);
                true
            }
            _ => false,
        }
    }

    fn request(&mut self, bytes: Vec<u8>) -> Result<(), Errno> {
        let Ok(request) = Request::parse(&bytes) else { return Ok(()) };
        let (node, unique) = (request.header.nodeid, request.header.unique);
        match request.operation {
            Operation::Setattr(change) if change.size.is_some() => self.route(node, bytes),
            Operation::Fallocate(_) => self.route(node, bytes),
            Operation::Init(init) => match Negotiated::new(&init, &wanted(self.io_len)) {
                Ok(negotiated) => self.send(&reply::init(unique, &negotiated.reply())),
                Err(refused) => {
                    tracing::error!("{refused}");
                    self.send(&reply::error(unique, Errno::PROTO))
                }
            },
            Operation::Getattr { .. } => self.tell_attributes(unique, node),
            Operation::Setattr(change) => match self.set_attributes(node, &change) {
                Ok(()) => self.tell_attributes(unique, node),
                Err(errno) => self.send(&reply::error(unique, errno)),
            },
            Operation::Open(_) => {
                let flags = OpenFlags::KEEP_CACHE.with(OpenFlags::PARALLEL_DIRECT_WRITES);
                self.send(&reply::open(unique, Opened { fh: 0, flags }))
            }
            Operation::Opendir(_) => {
                self.send(&reply::open(unique, Opened { fh: 0, flags: OpenFlags::NONE }))
            }
            Operation::Flush { .. }
            | Operation::Release(_)
            | Operation::Releasedir(_)
            | Operation::Destroy => self.send(&reply::empty(unique)),
            Operation::Fsyncdir { .. } => {
                let synced = self.sync();
                self.answer(unique, synced)
            }
            Operation::Statfs => {
                self.looking.push(unique);
                self.wish(Wish::Look);
                Ok(())
            }
            Operation::Forget { .. } => {
                self.forget(node);
                Ok(())
            }
            Operation::BatchForget(forgets) => {
                forgets.iter().for_each(|(node, _)| self.forget(node));
                Ok(())
            }
            Operation::Interrupt { .. } | Operation::NotifyReply { .. } => Ok(()),
            _ => self.names(&request),
        }
    }

    /// Does what needs a file's size or its room, unless the file waits for something: then it waits, too.
    fn route(&mut self, number: u64, bytes: Vec<u8>) -> Result<(), Errno> {
        if let Some(work) = self.work.get_mut(&number) {
            work.waiting.push_back(bytes);
            return Ok(());
        }
        let Ok(request) = Request::parse(&bytes) else { return Ok(()) };
        let unique = request.header.unique;
        let Some(node) = self.table.node(number).filter(|node| node.kind == Kind::File).cloned() else {
            return self.send(&reply::error(unique, Errno::STALE));
        };
        match request.operation {
            Operation::Setattr(change) => match change.size {
                Some(size) if size < node.size || size == 0 => self.cut(number, &node, size, bytes, &change),
                Some(size) => match self.room(number, size, false) {
                    Ok(true) => {
                        let done =
                            self.set_size(number, size).and_then(|()| self.set_attributes(number, &change));
                        self.tell_change(unique, number, done)
                    }
                    waits => self.wait(number, unique, waits, bytes),
                },
                None => Ok(()),
            },
            Operation::Fallocate(range) => {
                let end = range.offset.saturating_add(range.length);
                let keeps = range.mode.contains(FallocateMode::KEEP_SIZE);
                match range.mode.without(FallocateMode::KEEP_SIZE) {
                    FallocateMode::NONE => match self.room(number, end, false) {
                        Ok(true) if keeps || end <= node.size => self.answer(unique, Ok(())),
                        Ok(true) => {
                            let done = self.set_size(number, end);
                            self.answer(unique, done)
                        }
                        waits => self.wait(number, unique, waits, bytes),
                    },
                    FallocateMode::PUNCH_HOLE | FallocateMode::ZERO_RANGE if keeps => {
                        self.data(number, &node, unique, bytes)
                    }
                    FallocateMode::ZERO_RANGE => match self.room(number, end, false) {
                        Ok(true) => {
                            // The size first: a request that is sent again after a kill finds it grown, and zeroes.
                            if end > node.size
                                && let Err(errno) = self.set_size(number, end)
                            {
                                return self.answer(unique, Err(errno));
                            }
                            // As it is done where the size is to stay.
                            let mut bytes = bytes;
                            keep_size(&mut bytes);
                            let node = self.table.node(number).cloned().unwrap_or(node);
                            self.data(number, &node, unique, bytes)
                        }
                        waits => self.wait(number, unique, waits, bytes),
                    },
                    _ => self.answer(unique, Err(Errno::OPNOTSUPP)),
                }
            }
            _ => self.data(number, &node, unique, bytes),
        }
    }

    /// Gives a request for data to a queue once there is room for them.
    fn data(&mut self, number: u64, node: &Node, unique: Unique, bytes: Vec<u8>) -> Result<(), Errno> {
        let Ok(request) = Request::parse(&bytes) else { return Ok(()) };
        let end = match request.operation {
            Operation::Write(write) => write.offset.saturating_add(write.data.len() as u64),
            // Nothing was ever written.
            Operation::Fallocate(_) | Operation::Fsync { .. } if node.store == 0 => {
                return self.answer(unique, Ok(()));
            }
            Operation::Read(_) if node.store == 0 => return self.answer(unique, Err(Errno::IO)),
            _ => 0,
        };
        match self.room(number, end, true) {
            Ok(true) => {
                self.inbox(number).put(Item::Request(bytes));
                Ok(())
            }
            waits => self.wait(number, unique, waits, bytes),
        }
    }

    fn inbox(&self, number: u64) -> &Inbox {
        &self.inboxes[(number % self.inboxes.len() as u64) as usize]
    }

    fn wait(
        &mut self,
        number: u64,
        unique: Unique,
        waits: Result<bool, Errno>,
        bytes: Vec<u8>,
    ) -> Result<(), Errno> {
        match waits {
            Err(errno) => self.send(&reply::error(unique, errno)),
            Ok(_) => {
                self.work.insert(number, Work { step: Step::Growing, waiting: [bytes].into() });
                Ok(())
            }
        }
    }

    /// Whether a file has an allocation that is shown, with room up to `end`. Where it has not, that is wished for.
    /// `ahead` asks for more room than is needed.
    fn room(&mut self, number: u64, end: u64, ahead: bool) -> Result<bool, Errno> {
        let Some(node) = self.table.node(number).cloned() else { return Err(Errno::STALE) };
        if end > SIZE_MAX {
            return Err(Errno::FBIG);
        }
        let grains = |size: u64| size.max(1).next_multiple_of(GRAIN);
        if node.store == 0 {
            let store = self.table.number();
            let is = Node { store, ..node };
            self.commit(&[
                Change::Store { store, is: StoreState::Wanted },
                Change::Node { node: number, is },
            ])?;
            // The allocator must have nothing that the table does not know, also after a power failure.
            self.sync()?;
            self.wish(Wish::Make { store, size: grains(end) });
            return Ok(false);
        }
        match (self.table.store(node.store), self.tree.capacity(node.store)) {
            (Some(StoreState::Made), Some(capacity)) if capacity >= end => Ok(self.look_at(number)),
            (Some(StoreState::Made), Some(capacity)) => {
                let more = if ahead { (capacity / 4).min(AHEAD_MAX) } else { 0 };
                self.wish(Wish::Grow { store: node.store, size: grains(end.max(capacity + more)) });
                Ok(false)
            }
            (Some(StoreState::Made), None) => {
                self.wish(Wish::Show { store: node.store });
                Ok(false)
            }
            _ => Err(Errno::IO),
        }
    }

    fn set_size(&mut self, number: u64, size: u64) -> Result<(), Errno> {
        let node = self.table.node(number).ok_or(Errno::STALE)?.clone();
        let time = to_nanoseconds(now());
        let is = Node { size, modified: time, changed: time, ..node };
        self.commit(&[Change::Node { node: number, is }])
    }

    fn extended(&mut self, unique: Unique, number: u64, end: u64, written: u32) -> Result<(), Errno> {
        let longer = self.table.node(number).is_some_and(|node| node.size < end);
        match if longer { self.set_size(number, end) } else { Ok(()) } {
            Ok(()) => self.send(&reply::written(unique, written)),
            Err(errno) => self.send(&reply::error(unique, errno)),
        }
    }

    /// Makes a file shorter.
    fn cut(
        &mut self,
        number: u64,
        node: &Node,
        size: u64,
        bytes: Vec<u8>,
        change: &Setattr,
    ) -> Result<(), Errno> {
        let Ok(request) = Request::parse(&bytes) else { return Ok(()) };
        let unique = request.header.unique;
        if size == 0 {
            let done = self.empty(number).and_then(|()| self.set_attributes(number, change));
            return self.tell_change(unique, number, done);
        }
        match self.room(number, size, false) {
            Ok(true) => {}
            waits => return self.wait(number, unique, waits, bytes),
        }
        // The bytes behind the end are zeros at any time, because a file that grows again shows them.
        let page = size.next_multiple_of(PAGE);
        let pieces = [
            (IoKind::Zero, size, page.min(node.size)),
            (IoKind::Trim, page, node.size.next_multiple_of(PAGE)),
        ];
        let mut open = 0;
        for (kind, offset, end) in pieces.into_iter().filter(|(_, offset, end)| offset < end) {
            self.token += 1;
            self.tokens.insert(self.token, number);
            let item = Item::Io { node: number, kind, offset, len: end - offset, token: self.token };
            self.inbox(number).put(item);
            open += 1;
        }
        self.work
            .insert(number, Work { step: Step::Cutting { open, failed: None }, waiting: [bytes].into() });
        Ok(())
    }

    /// Frees the allocation of a file, whose size is 0 then.
    fn empty(&mut self, number: u64) -> Result<(), Errno> {
        let node = self.table.node(number).ok_or(Errno::STALE)?.clone();
        let (store, time) = (node.store, to_nanoseconds(now()));
        let is = Node { size: 0, store: 0, modified: time, changed: time, ..node };
        let mut changes = vec![Change::Node { node: number, is }];
        if store != 0 {
            changes.push(Change::Store { store, is: StoreState::Doomed });
        }
        self.commit(&changes)?;
        if store != 0 { self.free(number, store) } else { Ok(()) }
    }

    /// Has an allocation freed that the table says is doomed.
    fn free(&mut self, number: u64, store: u64) -> Result<(), Errno> {
        // Else a power failure could bring a file back whose memory is gone.
        self.sync()?;
        if let Some(file) = self.tree.file(number) {
            file.hide(false);
        }
        self.closing.insert(store, self.inboxes.len());
        self.inboxes.iter().for_each(|inbox| inbox.put(Item::Close { node: number, store }));
        Ok(())
    }

    fn closed(&mut self, store: u64) -> Result<(), Errno> {
        if let Some(open) = self.closing.get_mut(&store) {
            *open -= 1;
            if *open == 0 {
                self.closing.remove(&store);
                self.wish(Wish::Free { store });
            }
        }
        Ok(())
    }

    fn io_done(&mut self, token: u64, result: Result<(), IoError>) -> Result<(), Errno> {
        let Some(number) = self.tokens.remove(&token) else { return Ok(()) };
        let Some(Work { step: Step::Cutting { open, failed }, .. }) = self.work.get_mut(&number) else {
            return Ok(());
        };
        if let Err(error) = result {
            *failed = Some(Errno::from_raw_os_error(error.errno()));
        }
        *open -= 1;
        if *open > 0 {
            return Ok(());
        }
        let failed = failed.take();
        let Some(work) = self.work.get_mut(&number) else { return Ok(()) };
        let first = work.waiting.pop_front().unwrap_or_default();
        if let Ok(Request { header, operation: Operation::Setattr(change) }) = Request::parse(&first) {
            let size = change.size.unwrap_or_default();
            let done = failed.map_or(Ok(()), Err);
            let done = done.and_then(|()| self.set_size(number, size));
            let done = done.and_then(|()| self.set_attributes(number, &change));
            self.tell_change(header.unique, number, done)?;
        }
        self.settle(number)
    }

    /// Does what waited for a file.
    fn settle(&mut self, number: u64) -> Result<(), Errno> {
        let Some(work) = self.work.remove(&number) else { return Ok(()) };
        work.waiting.into_iter().try_for_each(|bytes| self.route(number, bytes))
    }

    /// Refuses what waited for a file.
    fn refuse(&mut self, number: u64, errno: Errno) -> Result<(), Errno> {
        let Some(work) = self.work.remove(&number) else { return Ok(()) };
        for bytes in work.waiting {
            if let Ok(request) = Request::parse(&bytes) {
                self.send(&reply::error(request.header.unique, errno))?;
            }
        }
        Ok(())
    }

    /// The kernel forgets a file: its channels are not needed, and where it has no name it may be gone.
    fn forget(&mut self, number: u64) {
        match self.table.node(number) {
            Some(node) if node.names == 0 => drop(self.prober.send(number)),
            Some(node) if node.kind == Kind::File => {
                self.inboxes.iter().for_each(|inbox| inbox.put(Item::Close { node: number, store: 0 }));
            }
            _ => {}
        }
    }

    fn forgotten(&mut self, number: u64) -> Result<(), Errno> {
        let Some(node) = self.table.node(number).filter(|node| node.names == 0) else { return Ok(()) };
        let store = node.store;
        let mut changes = vec![Change::NoNode { node: number }];
        if store != 0 {
            changes.push(Change::Store { store, is: StoreState::Doomed });
        }
        if self.commit(&changes).is_ok() && store != 0 {
            let _ = self.free(number, store);
        }
        Ok(())
    }
}

/// Sets KEEP_SIZE in a FALLOCATE, whose mode is behind the header, the handle, the offset and the length.
fn keep_size(bytes: &mut [u8]) {
    const MODE: usize = xpm_fuse::wire::IN_HEADER_LEN + 24;
    let mode = FallocateMode::ZERO_RANGE.with(FallocateMode::KEEP_SIZE).bits();
    if let Some(place) = bytes.get_mut(MODE..MODE + 4) {
        place.copy_from_slice(&mode.to_ne_bytes());
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(match error.kind() {
        std::io::ErrorKind::ReadOnlyFilesystem => Errno::ROFS,
        _ => Errno::IO,
    })
}
