//! A connection as a [`Link`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};

use super::bounce::Bounce;
use super::buffers::{Buffers, Local};
use super::cm::{Channel, Id, Kind as CmKind};
use super::verbs::{Batch, CompletionQueue, Ended, Request};
use super::wire::Entry;
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::link::{Full, Link, LinkDown};
use crate::nbd::client::NbdLink;
use crate::slots::Slots;

/// A request of so many in a row is signalled, for the queue to drain while a long operation runs.
const SIGNAL_EVERY: u32 = 16;
/// A busy link looks this often, in polls, for news beside its completions; an idle one each time.
const LOOK_EVERY: u32 = 256;
/// Longest access of one request, in bytes; devices take 1 GiB or more.
const REQUEST_LEN_MAX: u64 = 16 << 20;

/// A [`Link`] over one reliable connection. Nothing is allocated after it was made, but for the
/// registration of a device's buffers.
///
/// * Reads and writes are RDMA READ and WRITE, straight from and to registered buffers
///   ([`Link::register`]); others go through a buffer of the link.
/// * `Trim` and `Zero` need the appliance's processor: they go over the NBD connection that the link
///   has beside, as does the news that the appliance has ended.
/// * Completions are told by the wait descriptor only after [`Link::arm`].
pub struct RdmaLink {
    // First, so that nothing uses what follows.
    id: Id,
    completions: CompletionQueue,
    events: Arc<Channel>,
    beside: NbdLink,
    watch: OwnedFd,
    table: Table,
    buffers: Buffers,
    bounce: Bounce,
    operations: Slots<Progress>,
    /// Operations with parts left to be posted, oldest first.
    cutting: VecDeque<u32>,
    /// Parts in flight, in the order of their numbers, which is that in which they end.
    parts: VecDeque<Part>,
    /// Number of the first of them.
    first: u64,
    batch: Batch,
    unsignalled: u32,
    size: QueueSize,
    ended: Vec<Completion>,
    beside_in_flight: usize,
    armed: bool,
    polls: u32,
    down: Option<LinkDown>,
}

/// What a connection's queue pair takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueSize {
    /// Operations in flight.
    pub(super) depth: usize,
    /// Work requests in flight.
    pub(super) requests: usize,
    /// Bytes that a request may carry itself.
    pub(super) inline: usize,
}

/// What a connection is made of.
pub(super) struct Connection {
    pub(super) id: Id,
    pub(super) completions: CompletionQueue,
    pub(super) events: Arc<Channel>,
}

/// Where the bytes of the export lie at the appliance.
#[derive(Debug, Clone)]
pub struct Table {
    entries: Box<[Entry]>,
    shift: u32,
}

impl Table {
    /// A table of regions of two to the power of `shift` bytes.
    pub(super) fn new(entries: Box<[Entry]>, shift: u32) -> Table {
        Table { entries, shift }
    }

    /// Length of the export in bytes.
    pub const fn len(&self) -> u64 {
        (self.entries.len() as u64) << self.shift
    }

    /// Whether it has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Address and key of the byte at `offset`, and how many follow in the same region.
    fn at(&self, offset: u64) -> Option<(u64, u32, u64)> {
        let entry = self.entries.get((offset >> self.shift) as usize)?;
        let within = offset & ((1 << self.shift) - 1);
        // An appliance can say any address; it means something at its end only.
        Some((entry.address.wrapping_add(within), entry.rkey, (1 << self.shift) - within))
    }
}

struct Progress {
    operation: Operation,
    /// Bytes that parts were cut for.
    cut: u64,
    /// Parts in flight.
    open: u32,
}

/// One work request.
struct Part {
    operation: u32,
    /// Place in the bounce buffer, and what to do with it in the end.
    bounce: Option<(u32, IoBuf)>,
}

impl RdmaLink {
    pub(super) fn new(
        connection: Connection,
        beside: NbdLink,
        table: Table,
        (buffers, bounce): (Buffers, Bounce),
        size: QueueSize,
    ) -> io::Result<RdmaLink> {
        let Connection { id, completions, events } = connection;
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(0);
        epoll::add(&watch, completions.as_fd(), data, EventFlags::IN)?;
        epoll::add(&watch, events.as_fd(), data, EventFlags::IN)?;
        if let Some(fd) = beside.wait_fd() {
            epoll::add(&watch, fd, data, EventFlags::IN)?;
        }
        Ok(RdmaLink {
            id,
            completions,
            events,
            beside,
            watch,
            table,
            buffers,
            bounce,
            operations: Slots::new(size.depth),
            cutting: VecDeque::with_capacity(size.depth),
            parts: VecDeque::with_capacity(size.requests),
            first: 0,
            batch: Batch::new(size.requests),
            unsignalled: 0,
            size,
            ended: Vec::with_capacity(size.depth),
            beside_in_flight: 0,
            armed: false,
            polls: 0,
            down: None,
        })
    }

    /// Where the grant's bytes lie at the appliance.
    pub const fn table(&self) -> &Table {
        &self.table
    }

    /// Uses another table from now on. The appliance's end has to refuse what is not of the grant:
    /// this is for tests of that.
    pub fn replace_table(&mut self, table: Table) {
        self.table = table;
    }

    fn in_flight(&self) -> usize {
        self.operations.used() + self.ended.len() + self.beside_in_flight
    }

    fn check(&self, operation: &Operation) -> Result<(), IoError> {
        let inside = operation.offset.checked_add(operation.len).is_some_and(|end| end <= self.table.len());
        let has_buffer = match operation.kind {
            Kind::Read | Kind::Write => operation.buf.is_some_and(|buf| buf.len() as u64 == operation.len),
            Kind::Trim | Kind::Zero | Kind::Flush => true,
        };
        (inside && has_buffer).then_some(()).ok_or(IoError::Invalid)
    }

    fn end(&mut self, token: u64, result: Result<(), IoError>) {
        self.ended.push(Completion { token, result });
    }

    /// Cuts parts of the oldest operations for as long as there is room for them.
    fn cut(&mut self) {
        while let Some(&id) = self.cutting.front() {
            if !self.cut_one(id) {
                return;
            }
            self.cutting.pop_front();
        }
    }

    /// Cuts the rest of an operation; false when there is no room for all of it now.
    fn cut_one(&mut self, id: u32) -> bool {
        let Some(Progress { operation, cut, open }) = self.operations.get_mut(id) else { return true };
        let Some(buf) = operation.buf else { return true };
        let is_read = operation.kind == Kind::Read;
        while *cut < operation.len {
            let Some((address, remote_key, rest)) = self.table.at(operation.offset + *cut) else {
                return true;
            };
            if self.parts.len() >= self.size.requests {
                return false;
            }
            let wanted = (operation.len - *cut).min(rest).min(REQUEST_LEN_MAX) as usize;
            let whole = buf.part(*cut as usize, wanted);
            let local = match !is_read && wanted <= self.size.inline {
                true => Local::Inline,
                false => self.buffers.find(whole),
            };
            let (buffer, local_key, bounce) = match local {
                Local::Inline => (whole, None, None),
                Local::Registered(key) => (whole, Some(key), None),
                Local::Foreign => {
                    let Some((place, piece, key)) = self.bounce.take(wanted) else { return false };
                    let own = whole.part(0, piece.len());
                    if !is_read {
                        own.copy_to(piece);
                    }
                    (piece, Some(key), Some((place, own)))
                }
            };
            *cut += buffer.len() as u64;
            *open += 1;
            self.unsignalled += 1;
            let signalled = *cut == operation.len || self.unsignalled == SIGNAL_EVERY;
            if signalled {
                self.unsignalled = 0;
            }
            let number = self.first + self.parts.len() as u64;
            self.parts.push_back(Part { operation: id, bounce });
            let request = Request { id: number, is_read, buffer, local_key, address, remote_key, signalled };
            self.batch.push(&request);
        }
        true
    }

    fn flush(&mut self) {
        if self.batch.is_empty() || self.down.is_some() {
            return;
        }
        let posted = match self.id.queue_pair() {
            Some(queue_pair) => self.batch.post(queue_pair),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        if posted.is_err() {
            self.go_down(LinkDown::Broken);
        }
    }

    /// Takes the ends of work requests.
    fn reap(&mut self) {
        let (mut last, mut failed) = (None, None);
        let polled = self.completions.poll(|ended: Ended| match ended.status {
            0 => last = Some(ended.id),
            // What follows the first failure was only flushed.
            status => failed = failed.or(Some(status)),
        });
        if let Some(last) = last {
            self.end_parts(last);
        }
        match (polled, failed) {
            (Err(_), _) => self.go_down(LinkDown::Broken),
            (_, Some(status)) => self.go_down(super::errors::of_status(status)),
            _ => {}
        }
    }

    /// Ends the parts up to the one of this number: they end in the order of posting.
    fn end_parts(&mut self, last: u64) {
        while self.first <= last {
            let Some(part) = self.parts.pop_front() else { return };
            self.first += 1;
            let Some(progress) = self.operations.get_mut(part.operation) else { continue };
            if let Some((place, own)) = part.bounce {
                if progress.operation.kind == Kind::Read {
                    self.bounce.piece(place, own.len()).copy_to(own);
                }
                self.bounce.give_back(place);
            }
            progress.open -= 1;
            if progress.open == 0 && progress.cut == progress.operation.len {
                let token = progress.operation.token;
                self.operations.remove(part.operation);
                self.end(token, Ok(()));
            }
        }
    }

    /// Looks for what happens seldom: news of the connection and of the one beside.
    fn look(&mut self) {
        self.polls += 1;
        let due = self.polls >= LOOK_EVERY || self.parts.is_empty() || self.beside_in_flight > 0;
        if !due && !self.armed {
            return;
        }
        self.polls = 0;
        let before = self.ended.len();
        let polled = self.beside.poll(&mut self.ended);
        self.beside_in_flight = self.beside_in_flight.saturating_sub(self.ended.len() - before);
        if let Err(down) = polled {
            return self.go_down(down);
        }
        loop {
            match self.events.next() {
                Ok(None) => return,
                Ok(Some(event)) => match event.kind {
                    CmKind::Disconnected | CmKind::DeviceRemoved | CmKind::Failed | CmKind::Rejected => {
                        return self.go_down(LinkDown::Broken);
                    }
                    _ => {}
                },
                Err(_) => return self.go_down(LinkDown::Broken),
            }
        }
    }

    fn go_down(&mut self, why: LinkDown) {
        if self.down.is_none() {
            self.down = Some(why);
            // After this, the device touches no buffer any more.
            self.id.destroy_queue_pair();
        }
    }
}

impl Link for RdmaLink {
    fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.in_flight() >= self.size.depth {
            return Err(Full);
        }
        if self.down.is_some() {
            return Ok(());
        }
        match (self.check(&operation), operation.kind) {
            (Err(error), _) => self.end(operation.token, Err(error)),
            (Ok(()), Kind::Flush) => self.end(operation.token, Ok(())),
            (Ok(()), _) if operation.len == 0 => self.end(operation.token, Ok(())),
            (Ok(()), Kind::Trim | Kind::Zero) => {
                self.beside.post(operation)?;
                self.beside_in_flight += 1;
            }
            (Ok(()), Kind::Read | Kind::Write) => {
                let id = self.operations.insert(Progress { operation, cut: 0, open: 0 });
                self.cutting.push_back(id);
                if self.cutting.len() == 1 {
                    self.cut();
                }
            }
        }
        Ok(())
    }

    fn submit(&mut self) {
        self.flush();
        if self.beside_in_flight > 0 {
            self.beside.submit();
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
        if self.down.is_none() {
            if self.armed && self.completions.take_event() {
                self.armed = false;
            }
            self.reap();
        }
        if self.down.is_none() {
            self.look();
        }
        if self.down.is_none() {
            self.cut();
            self.flush();
        }
        completions.append(&mut self.ended);
        self.down.map_or(Ok(()), Err)
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }

    fn is_quiet(&self) -> bool {
        true
    }

    fn arm(&mut self) -> bool {
        if self.down.is_none() && !self.armed {
            match self.completions.arm() {
                Ok(()) => self.armed = true,
                Err(_) => self.go_down(LinkDown::Broken),
            }
            // What came before is not told.
            if self.down.is_none() {
                self.reap();
            }
        }
        self.down.is_some() || !self.ended.is_empty()
    }

    fn register(&mut self, buffer: IoBuf) {
        self.buffers.register(buffer);
    }
}
