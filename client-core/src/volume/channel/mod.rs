//! A queue's interface to a volume: it cuts operations into legs, keeps the legs until they have ended, and
//! posts them again when a link is replaced.
//!
//! **Exactly once.** A request leaves its table with its single completion. It stays there until each of its
//! legs has ended. A leg leaves its table when its link completes it, or when it is given up because its
//! grant is lost or was out of reach for too long.
//!
//! **Order.** Legs are numbered as they are cut. When a link goes down, the legs in flight on it are put in
//! front of the held legs, in the order of their numbers, and no newer leg is posted on the next link before
//! them. So a repeated write never lands behind a write that was posted after the first one had been
//! answered. The appliance discards requests that the old connection may still have in its socket.
//!
//! **Changes.** While regions move, a leg that changes data may have a twin, which makes the same change at
//! the new place; `moves.rs` determines which legs have one, and `change.rs` describes how a channel follows
//! a change.

mod change;
mod store;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use xpm_transport::io::{Completion, IoBuf, IoError, Kind, Operation};
use xpm_transport::link::{Full, Link, LinkDown};
use xpm_transport::slots::Slots;

use self::change::Following;
use super::connector::Connector;
use super::moves::Fate;
use super::orders::Mailbox;
use super::plan::{Leg, Legs, Plan};
use super::port::{Delivery, Port};
use super::{Shared, Tally};

/// Legs in flight or held, for each request that may be in flight.
const LEGS_PER_REQUEST: usize = 4;
/// Number of polls after which epoll is queried about links that do not need it for their completions.
const ASK_EVERY: u32 = 64;
/// Most events of links that one poll handles; the next poll handles the rest.
const EVENTS_MAX: usize = 32;
/// Tokens in the epoll set of the descriptors that belong to no link.
const BELL: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

struct Request {
    token: u64,
    kind: Kind,
    len: u64,
    /// The first byte behind the request.
    end: u64,
    buf: Option<IoBuf>,
    legs: Legs,
    /// Legs that were cut and have not ended.
    open: u32,
    /// Whether all legs are cut.
    cut: bool,
    result: Result<(), IoError>,
}

#[derive(Clone, Copy)]
struct LegState {
    request: u32,
    number: u64,
    /// The region, by its place in the allocation.
    region: u32,
    grant: u32,
    operation: Operation,
    posted: bool,
    /// Whether the leg waits for the end of a lock.
    parked: bool,
    part: Part,
}

/// Which copy of a dual write this leg performs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The leg is no dual write.
    Whole,
    /// The copy at the old place; the contained leg performs the one at the new place.
    Old(u32),
    /// The copy at the new place.
    New,
}

/// The path to one grant.
struct Way {
    port: Arc<Port>,
    /// The connector that makes the path's links; none when no region of the grant is left.
    connector: Option<Arc<Connector>>,
    /// No region of the plan lies on the path: the path ends when its operations in flight have ended.
    retired: bool,
    link: Option<Box<dyn Link>>,
    /// The last link that gave memory in place: an access that began on it can be finished.
    last_direct: Option<Box<dyn Link>>,
    /// Legs that wait for a link, oldest first.
    held: VecDeque<u32>,
    in_flight: usize,
    lost: bool,
    down_since: Instant,
    submit: bool,
    /// Whether a completion arrived before the link was armed.
    early: bool,
}

/// A queue's interface to a volume. Owned by one thread; see the module's documentation.
pub struct Channel {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    ways: Vec<Way>,
    /// The only path with regions, if there is only one.
    only: Option<usize>,
    mailbox: Arc<Mailbox>,
    following: Following,
    epoll: OwnedFd,
    timer: OwnedFd,
    timer_set: bool,
    requests: Slots<Request>,
    legs: Slots<LegState>,
    /// Requests with legs left to be cut, oldest first.
    cutting: VecDeque<u32>,
    ended: VecDeque<Completion>,
    /// Limit of the completions that are in flight or ended and not fetched, so that `ended` never grows.
    ended_max: usize,
    link_completions: Vec<Completion>,
    /// Memory that is offered to each link for registration.
    buffers: Vec<IoBuf>,
    /// Whether links report their completions, since the last poll.
    armed: bool,
    /// Polls since epoll was last queried.
    polls: u32,
    number: u64,
    hold: Option<Duration>,
    tally: Arc<Tally>,
}

impl Channel {
    /// A channel with these ports, to which the connectors deliver links.
    pub(super) fn new(
        plan: Arc<Plan>,
        shared: Arc<Shared>,
        ports: Vec<(Arc<Port>, Option<Arc<Connector>>)>,
        mailbox: Arc<Mailbox>,
        (depth, hold): (usize, Option<Duration>),
    ) -> io::Result<Channel> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, mailbox.bell().fd(), EventData::new_u64(BELL), EventFlags::IN)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        let legs = depth * LEGS_PER_REQUEST + ports.len() + 1;
        let ways: Vec<Way> =
            ports.into_iter().map(|(port, connector)| Way::new(port, connector, legs)).collect();
        let tally = Arc::new(Tally::default());
        shared.add_tally(&tally);
        let mut channel = Channel {
            plan,
            shared,
            only: None,
            mailbox,
            following: Following::new(legs),
            epoll,
            timer,
            timer_set: false,
            requests: Slots::new(depth),
            legs: Slots::new(legs),
            cutting: VecDeque::with_capacity(depth),
            ended: VecDeque::with_capacity(2 * depth),
            ended_max: 2 * depth,
            link_completions: Vec::with_capacity(legs),
            buffers: Vec::new(),
            armed: false,
            polls: 0,
            number: 0,
            hold,
            ways,
            tally,
        };
        channel.find_only();
        channel.set_timer();
        Ok(channel)
    }

    /// Takes an operation on the volume. [`Channel::poll`] returns its completion, also when the operation
    /// lies outside of the volume. Never blocks.
    ///
    /// # Errors
    /// [`Full`] when the channel's limit of operations in flight is reached; the operation was not taken.
    pub fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.requests.is_full() || self.requests.used() + self.ended.len() >= self.ended_max {
            return Err(Full);
        }
        let checked = match self.following.allows(operation.offset, operation.len) {
            true => check(&self.plan, &operation),
            false => Err(IoError::Invalid),
        };
        if let Err(error) = checked {
            self.ended.push_back(Completion { token: operation.token, result: Err(error) });
            return Ok(());
        }
        let request = self.requests.insert(Request {
            token: operation.token,
            kind: operation.kind,
            len: operation.len,
            end: operation.offset.saturating_add(operation.len),
            buf: operation.buf,
            legs: self.plan.legs(operation.kind, operation.offset, operation.len),
            open: 0,
            cut: false,
            result: Ok(()),
        });
        self.tally.in_flight.fetch_add(1, Ordering::Relaxed);
        self.cutting.push_back(request);
        self.cut();
        Ok(())
    }

    /// Sends the posted operations. Completions may be available at once; [`Channel::poll`] returns them.
    pub fn submit(&mut self) {
        for way in &mut self.ways {
            if std::mem::take(&mut way.submit)
                && let Some(link) = &mut way.link
            {
                link.submit();
            }
        }
    }

    /// Appends completions. Never blocks.
    pub fn poll(&mut self, completions: &mut Vec<Completion>) {
        self.turn(true, completions);
    }

    /// Like [`Channel::poll`], but skips the socket reads: it appends only the completions of operations that
    /// ended during their submission, or by RDMA. For a queue that received no event of [`Channel::wait_fd`],
    /// and will wait for one.
    pub fn poll_untold(&mut self, completions: &mut Vec<Completion>) {
        self.turn(false, completions);
    }

    fn turn(&mut self, told: bool, completions: &mut Vec<Completion>) {
        if self.mailbox.bell().take() {
            self.take_deliveries();
            self.take_orders();
        }
        self.poll_links(told);
        // A cut may end the last operation that an order waits for.
        self.cut();
        if self.following.is_waiting() {
            self.take_orders();
        }
        if self.timer_set {
            self.give_up_late();
        }
        self.cut();
        self.submit();
        completions.extend(self.ended.drain(..));
    }

    /// Offers memory that many operations will use, so that transports need not copy. The memory has to stay
    /// mapped until the channel is dropped. Blocks until it is registered; data of memory that cannot be
    /// registered are copied.
    pub fn register(&mut self, buffer: IoBuf) {
        self.ways.iter_mut().filter_map(|way| way.link.as_mut()).for_each(|link| link.register(buffer));
        self.buffers.push(buffer);
    }

    /// Makes [`Channel::wait_fd`] report all operations that end from now on, and those that have ended
    /// already. To be called before waiting; the effect lasts until the next poll. A thread that polls
    /// without waiting need not call it.
    pub fn arm(&mut self) {
        self.armed = true;
        for way in &mut self.ways {
            let Some(link) = &mut way.link else {
                way.early = false;
                continue;
            };
            // Operations on memory in place have ended already, also those that the last poll posted.
            way.early |= link.arm() || way.in_flight > 0 && link.direct(0, 1).is_some();
        }
        if !self.ended.is_empty() || self.ways.iter().any(|way| way.early) {
            self.mailbox.bell().ring();
        }
    }

    /// After [`Channel::arm`], readable when [`Channel::poll`] has work to do. To be watched by level, not by
    /// edge.
    pub fn wait_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Passes the state of a change in progress to a channel that is created during the change.
    pub(super) fn join(&mut self, underway: super::Underway) {
        self.following.join(underway);
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.requests.used()
    }

    /// Acts as if the link to this grant had gone down.
    #[cfg(test)]
    pub(super) fn ways_down(&mut self, grant: usize) {
        self.disconnect(grant);
    }

    /// Cuts legs of the oldest requests for as long as there is room for them.
    fn cut(&mut self) {
        while let Some(&request) = self.cutting.front() {
            // Room for two: a leg may have a twin.
            while self.legs.free() >= 2 {
                let Some(pending) = self.requests.get_mut(request) else { break };
                let plan = match (&self.following.reads, pending.kind) {
                    (Some(plan), Kind::Read) => plan,
                    _ => &self.plan,
                };
                let Some(leg) = pending.legs.next(plan) else {
                    pending.cut = true;
                    break;
                };
                let fate = self.following.fate(pending.kind, &leg, self.plan.region_len());
                let id = self.add_leg(request, &leg, Part::Whole);
                match fate {
                    Fate::Old => self.start(id),
                    fate => self.add_twin(id, &leg, fate),
                }
            }
            match self.requests.get_mut(request) {
                Some(pending) if !pending.cut => return,
                _ => {
                    self.cutting.pop_front();
                    self.end_if_over(request);
                }
            }
        }
    }

    fn add_leg(&mut self, request: u32, leg: &Leg, part: Part) -> u32 {
        self.number += 1;
        let pending = self.requests.get_mut(request).expect("a leg is cut of a request that is there");
        pending.open += 1;
        let operation = leg_operation(pending, leg);
        let (number, region, grant) = (self.number, leg.region, leg.grant);
        self.legs.insert(LegState {
            request,
            number,
            region,
            grant,
            operation,
            posted: false,
            parked: false,
            part,
        })
    }

    /// Posts a new leg, holds it, or gives it up.
    fn start(&mut self, id: u32) {
        let Some(leg) = self.legs.get_mut(id) else { return };
        let way = &mut self.ways[leg.grant as usize];
        if way.lost {
            return self.end_leg(id, Err(IoError::Lost));
        }
        if !way.held.is_empty() || !way.post(leg, id) {
            way.held.push_back(id);
        }
    }

    fn end_leg(&mut self, id: u32, result: Result<(), IoError>) {
        let Some(leg) = self.legs.remove(id) else { return };
        if leg.posted {
            self.ways[leg.grant as usize].in_flight -= 1;
        }
        let result = self.following.counts(leg.part, result);
        if let Some(request) = self.requests.get_mut(leg.request) {
            request.open -= 1;
            request.result = request.result.and(result);
            self.end_if_over(leg.request);
        }
    }

    fn end_if_over(&mut self, id: u32) {
        if self.requests.get_mut(id).is_some_and(|request| request.cut && request.open == 0)
            && let Some(request) = self.requests.remove(id)
        {
            self.tally.ended(request.kind, request.len, request.result);
            self.ended.push_back(Completion { token: request.token, result: request.result });
        }
    }

    fn take_deliveries(&mut self) {
        for grant in 0..self.ways.len() {
            match self.ways[grant].port.take() {
                Some(Delivery::Link(link)) => self.connect(grant, link),
                Some(Delivery::Lost) => self.lose(grant),
                Some(Delivery::Held) => {
                    self.drop_link(grant);
                    // The channel may have had a link whose delivery took effect a moment ago.
                    self.want(grant);
                }
                Some(Delivery::Stalled(since)) => {
                    self.disconnect(grant);
                    self.ways[grant].down_since = since;
                }
                None => {}
            }
        }
        self.set_timer();
    }

    fn connect(&mut self, grant: usize, mut link: Box<dyn Link>) {
        // A link that arrives while another one exists replaces it; no third link is requested.
        self.drop_link(grant);
        self.buffers.iter().for_each(|buffer| link.register(*buffer));
        let watched = link.wait_fd().map_or(Ok(()), |fd| {
            epoll::add(&self.epoll, fd, EventData::new_u64(grant as u64), EventFlags::IN)
        });
        let way = &mut self.ways[grant];
        way.lost = false;
        way.link = Some(link);
        match watched {
            Ok(()) => {
                way.last_direct = None;
                way.port.satisfied();
                self.post_held(grant);
            }
            Err(_) => self.disconnect(grant),
        }
    }

    /// Posts held legs, oldest first, for as long as the link accepts them.
    fn post_held(&mut self, grant: usize) {
        let way = &mut self.ways[grant];
        while let Some(&id) = way.held.front() {
            let Some(leg) = self.legs.get_mut(id) else {
                way.held.pop_front();
                continue;
            };
            if !way.post(leg, id) {
                return;
            }
            way.held.pop_front();
        }
    }

    /// Drops the link and requests another one.
    fn disconnect(&mut self, grant: usize) {
        if self.drop_link(grant) {
            self.want(grant);
            self.set_timer();
        }
    }

    fn want(&self, grant: usize) {
        let way = &self.ways[grant];
        way.port.want();
        if let Some(connector) = &way.connector {
            connector.wake();
        }
    }

    /// Drops the link, if there is one; the legs in flight on it are held again.
    fn drop_link(&mut self, grant: usize) -> bool {
        let way = &mut self.ways[grant];
        let Some(link) = way.link.take() else { return false };
        if link.direct(0, 1).is_some() {
            // The link stays mapped, but its events are ignored from now on.
            if let Some(fd) = link.wait_fd() {
                let _ = epoll::delete(&self.epoll, fd);
            }
            way.last_direct = Some(link);
        }
        way.in_flight = 0;
        // The connection may have broken some time after the appliance stopped answering.
        let stopped = way.connector.as_ref().and_then(|connector| connector.silent_since());
        way.down_since = stopped.unwrap_or_else(Instant::now);
        for (id, leg) in self.legs.iter_mut() {
            if leg.grant as usize == grant && std::mem::take(&mut leg.posted) {
                way.held.push_back(id);
            }
        }
        let legs = &mut self.legs;
        way.held.make_contiguous().sort_unstable_by_key(|id| legs.get_mut(*id).map_or(0, |leg| leg.number));
        true
    }

    fn lose(&mut self, grant: usize) {
        self.disconnect(grant);
        self.ways[grant].lost = true;
        self.give_up(grant, IoError::Lost);
    }

    fn give_up(&mut self, grant: usize, error: IoError) {
        if self.ways[grant].retired {
            self.turn_to_new();
        }
        while let Some(id) = self.ways[grant].held.pop_front() {
            self.end_leg(id, Err(error));
        }
    }

    /// Polls the links that have work; links over sockets only when epoll reported an event (`told`), or may
    /// have one. A single link is polled without epoll, because polling it is cheaper than querying epoll.
    fn poll_links(&mut self, told: bool) {
        if let Some(only) = self.only {
            let way = &mut self.ways[only];
            if told || !way.has_socket() {
                way.early = false;
                self.poll_link(only);
            }
            return;
        }
        // Links that complete operations at once have no events, and quiet links report events only to a
        // waiting thread.
        let mut silent = true;
        for grant in 0..self.ways.len() {
            let way = &mut self.ways[grant];
            let early = std::mem::take(&mut way.early);
            if way.has_socket() {
                silent = false;
            } else if early || way.in_flight > 0 {
                self.poll_link(grant);
            }
        }
        if !told {
            return;
        }
        let armed = std::mem::take(&mut self.armed);
        self.polls += 1;
        if !silent || armed || self.polls >= ASK_EVERY {
            self.polls = 0;
            self.poll_told();
        }
    }

    /// Polls the links that epoll reports.
    fn poll_told(&mut self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut room = [MaybeUninit::uninit(); EVENTS_MAX];
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut room, Some(&now)) else { return };
        for event in events {
            let grant = event.data.u64() as usize;
            if grant < self.ways.len() {
                self.poll_link(grant);
            }
        }
    }

    fn poll_link(&mut self, grant: usize) {
        let Some(link) = &mut self.ways[grant].link else { return };
        let mut completions = std::mem::take(&mut self.link_completions);
        let polled = link.poll(&mut completions);
        for Completion { token, result } in completions.drain(..) {
            self.end_leg(token as u32, result);
        }
        self.link_completions = completions;
        match polled {
            Ok(()) => self.post_held(grant),
            Err(LinkDown::Broken | LinkDown::Protocol | LinkDown::Revoked) => self.disconnect(grant),
        }
    }

    /// Gives up the legs that were held for longer than the operator's limit.
    fn give_up_late(&mut self) {
        let Some(hold) = self.hold else { return };
        let _ = rustix::io::read(&self.timer, &mut [0_u8; 8]);
        for grant in 0..self.ways.len() {
            let way = &mut self.ways[grant];
            if way.connector.as_ref().is_some_and(|connector| connector.suspends_limit()) {
                // The time limit begins when the suspension ends.
                way.down_since = Instant::now();
                continue;
            }
            if way.link.is_none() && way.down_since.elapsed() >= hold {
                self.give_up(grant, IoError::Unreachable);
            }
        }
    }

    /// Runs the timer while a path is down, unless I/O is held without a limit.
    fn set_timer(&mut self) {
        let down = |way: &Way| way.connector.is_some() && way.link.is_none() && !way.lost;
        let wanted = self.hold.is_some() && self.ways.iter().any(down);
        if wanted == self.timer_set {
            return;
        }
        let hold = self.hold.unwrap_or_default();
        let tick = (hold / 8).clamp(Duration::from_millis(5), Duration::from_millis(500));
        let tick = if wanted { tick } else { Duration::ZERO };
        let tick = Timespec { tv_sec: 0, tv_nsec: tick.subsec_nanos().into() };
        let spec = Itimerspec { it_interval: tick, it_value: tick };
        // The arguments are valid, so this cannot fail.
        self.timer_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec).is_ok() && wanted;
    }
}

impl Way {
    /// A path without a link, whose tables hold `legs` legs.
    fn new(port: Arc<Port>, connector: Option<Arc<Connector>>, legs: usize) -> Way {
        Way {
            port,
            connector,
            retired: false,
            link: None,
            last_direct: None,
            held: VecDeque::with_capacity(legs),
            in_flight: 0,
            lost: false,
            down_since: Instant::now(),
            submit: false,
            early: false,
        }
    }

    /// Whether completions arrive over a socket, which the link has to read.
    fn has_socket(&self) -> bool {
        self.link.as_ref().is_some_and(|link| !link.is_quiet() && link.direct(0, 1).is_none())
    }

    /// Stops requesting links.
    fn close(&self) {
        self.port.close();
        if let Some(connector) = &self.connector {
            connector.wake();
        }
    }

    /// Posts a leg; returns false when there is no link, or no room on it.
    fn post(&mut self, leg: &mut LegState, id: u32) -> bool {
        let Some(link) = &mut self.link else { return false };
        if link.post(Operation { token: u64::from(id), ..leg.operation }).is_err() {
            return false;
        }
        leg.posted = true;
        self.in_flight += 1;
        self.submit = true;
        true
    }
}

fn check(plan: &Plan, operation: &Operation) -> Result<(), IoError> {
    let buffer_fits = match (operation.kind, operation.buf) {
        (Kind::Read | Kind::Write, Some(buf)) => buf.len() as u64 == operation.len,
        (Kind::Trim | Kind::Zero, None) => true,
        // A flush is complete at once: a write that ended is in the appliance's memory.
        (Kind::Flush, None) => return Ok(()),
        _ => false,
    };
    let fits = operation.len > 0 && plan.contains(operation.offset, operation.len);
    if buffer_fits && fits { Ok(()) } else { Err(IoError::Invalid) }
}

fn leg_operation(request: &Request, leg: &Leg) -> Operation {
    let buf = request.buf.map(|buf| buf.part(leg.start as usize, leg.len as usize));
    Operation { kind: request.kind, offset: leg.offset, len: leg.len, buf, token: 0 }
}

impl Drop for Channel {
    fn drop(&mut self) {
        for way in &self.ways {
            way.close();
        }
        self.mailbox.close();
        self.shared.remove_tally(&self.tally);
    }
}
