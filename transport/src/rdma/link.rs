//! [`RdmaLink`]: a reliable RDMA connection as a [`Link`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::bounce::Bounce;
use super::buffers::Buffers;
use super::engine::{Engine, QueueSize, Reach, Table};
use super::pair::Pair;
use super::verbs::{Batch, CompletionQueue, Ended};
use crate::io::{Completion, IoBuf, Kind, Operation};
use crate::link::{Full, Link, LinkDown};
use crate::nbd::client::NbdLink;

/// Polls between two checks for events other than completions on a busy link; an idle link checks at each
/// poll.
const LOOK_EVERY: u32 = 256;

/// A [`Link`] over one reliable connection. The link allocates nothing after its creation, except for the
/// registration of a device's buffers.
///
/// - Reads and writes are RDMA READ and WRITE, straight from and to registered buffers ([`Link::register`]);
///   the data of other buffers go through a bounce buffer of the link.
/// - `Trim` and `Zero` need the appliance's processor: they go over the link's additional NBD connection,
///   which also reports when the appliance ends.
/// - The wait descriptor reports completions only after [`Link::arm`].
pub struct RdmaLink {
    // Dropped first: destroying the queue pair ends all use of the fields below.
    pair: Pair,
    completions: CompletionQueue,
    beside: NbdLink,
    watch: OwnedFd,
    engine: Engine,
    local: Local,
    batch: Batch,
    depth: usize,
    ended: Vec<Completion>,
    beside_in_flight: usize,
    armed: bool,
    polls: u32,
    down: Option<LinkDown>,
}

/// The parts of a connection.
pub(super) struct Connection {
    // Dropped first: destroying the queue pair ends all use of the completion queue.
    pub(super) pair: Pair,
    pub(super) completions: CompletionQueue,
}

/// How the link's device accesses memory of this process.
struct Local {
    buffers: Buffers,
    bounce: Bounce,
}

impl Reach for Local {
    fn key(&self, buffer: IoBuf) -> Option<u32> {
        self.buffers.key(buffer)
    }

    fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)> {
        self.bounce.take(len)
    }

    fn piece(&self, place: u32, len: usize) -> IoBuf {
        self.bounce.piece(place, len)
    }

    fn give_back(&mut self, place: u32) {
        self.bounce.give_back(place);
    }
}

impl RdmaLink {
    pub(super) fn new(
        connection: Connection,
        beside: NbdLink,
        table: Table,
        (buffers, bounce): (Buffers, Bounce),
        size: QueueSize,
    ) -> io::Result<RdmaLink> {
        // Bound in this order because locals are dropped in reverse order should a later step fail.
        let Connection { completions, pair } = connection;
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(0);
        epoll::add(&watch, completions.as_fd(), data, EventFlags::IN)?;
        epoll::add(&watch, pair.news(), data, EventFlags::IN)?;
        if let Some(fd) = beside.wait_fd() {
            epoll::add(&watch, fd, data, EventFlags::IN)?;
        }
        Ok(RdmaLink {
            pair,
            completions,
            beside,
            watch,
            engine: Engine::new(table, size),
            local: Local { buffers, bounce },
            batch: Batch::new(size.requests),
            depth: size.depth,
            ended: Vec::with_capacity(size.depth),
            beside_in_flight: 0,
            armed: false,
            polls: 0,
            down: None,
        })
    }

    /// The addresses of the grant's regions at the appliance.
    pub const fn table(&self) -> &Table {
        self.engine.table()
    }

    /// Replaces the table. Only for tests that the appliance's device refuses accesses outside of the grant.
    pub fn replace_table(&mut self, table: Table) {
        self.engine.replace_table(table);
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight() + self.ended.len() + self.beside_in_flight
    }

    /// Creates work requests for as long as there is room for them.
    fn cut(&mut self) {
        while let Some(request) = self.engine.next(&mut self.local) {
            self.batch.push(&request);
        }
    }

    fn flush(&mut self) {
        if self.batch.is_empty() || self.down.is_some() {
            return;
        }
        let posted = match self.pair.raw() {
            Some(queue_pair) => self.batch.post(queue_pair),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        if posted.is_err() {
            self.go_down(LinkDown::Broken);
        }
    }

    /// Processes the completions of work requests.
    fn reap(&mut self) {
        let (mut last, mut failed) = (None, None);
        let polled = self.completions.poll(|ended: Ended| match ended.status {
            0 => last = Some(ended.id),
            // Requests after the first failed one were only flushed.
            status => failed = failed.or(Some(status)),
        });
        if let Some(last) = last {
            self.engine.end(last, &mut self.local, &mut self.ended);
        }
        match (polled, failed) {
            (Err(_), _) => self.go_down(LinkDown::Broken),
            (_, Some(status)) => self.go_down(super::errors::of_status(status)),
            _ => {}
        }
    }

    /// Checks for rare events, of the RDMA connection and of the NBD connection.
    fn look(&mut self) {
        self.polls += 1;
        let due =
            self.polls >= LOOK_EVERY || self.armed || self.engine.is_idle() || self.beside_in_flight > 0;
        if !due {
            return;
        }
        self.polls = 0;
        let before = self.ended.len();
        let polled = self.beside.poll(&mut self.ended);
        self.beside_in_flight = self.beside_in_flight.saturating_sub(self.ended.len() - before);
        if let Err(down) = polled {
            return self.go_down(down);
        }
        if self.pair.is_over() {
            self.go_down(LinkDown::Broken);
        }
    }

    fn go_down(&mut self, why: LinkDown) {
        if self.down.is_none() {
            self.down = Some(why);
            // After this call, the device no longer accesses a buffer.
            self.pair.destroy();
        }
    }
}

impl Link for RdmaLink {
    fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        if self.down.is_some() {
            return Ok(());
        }
        let taken = match operation.kind {
            Kind::Read | Kind::Write => self.engine.add(operation).map(|()| self.cut()),
            Kind::Flush => {
                // Completed accesses have already reached the appliance's memory.
                self.ended.push(Completion { token: operation.token, result: Ok(()) });
                Ok(())
            }
            Kind::Trim | Kind::Zero => {
                self.beside.post(operation)?;
                self.beside_in_flight += 1;
                Ok(())
            }
        };
        if let Err(error) = taken {
            self.ended.push(Completion { token: operation.token, result: Err(error) });
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
        // Skipped when an access has just ended: the check costs as much as an access.
        if self.down.is_none() && (self.ended.is_empty() || self.beside_in_flight > 0) {
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
            // Arming does not report completions that arrived before.
            if self.down.is_none() {
                self.reap();
            }
        }
        self.down.is_some() || !self.ended.is_empty()
    }

    fn register(&mut self, buffer: IoBuf) {
        self.local.buffers.register(buffer);
    }
}
