//! A queue of a device: a thread that owns its ring and its channel.
//!
//! A request is identified by the head of its chain. The thread takes requests from the ring, posts their
//! parts, with the guest's memory as buffers, and puts them into the used ring when all parts have ended. On
//! the path of a request, it never takes a lock, allocates or logs, and it waits at one place only, for the
//! guest, the channel and orders alike.
//!
//! When a guest violates the rules, its ring is broken: requests in flight end, and no more are taken until
//! the device is reset. A panic ends the queue, not the process, because the guest of this one device may
//! have caused it.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use xpm_client_core::Channel;
use xpm_transport::io::{Completion, IoBuf, IoError, Operation};
use xpm_transport::spin::Spin;

use super::chain::Pieces;
use super::inflight::Tracker;
use super::memory::GuestMemory;
use super::request::{self, ID_LEN, Outcome, PARTS_MAX, Part, Status};
use super::ring::{Broken, Parts, Ring};
use crate::lifecycle;
use crate::watch::Pulse;

/// The reason for breaking a ring whose guest has lost memory.
const MEMORY_GONE: Broken =
    Broken("guest memory is gone under it: the machine has to connect again with whole memory");
/// The channel's token among the events.
const CHANNEL: u64 = 1;

/// The parts of a queue.
pub(super) struct QueueParts {
    pub(super) name: String,
    pub(super) ring: Ring,
    pub(super) memory: Arc<GuestMemory>,
    /// Set when some of the memory is lost.
    pub(super) memory_failed: Arc<AtomicBool>,
    /// Readable when the guest has made requests available.
    pub(super) kick: Arc<OwnedFd>,
    /// Written when requests were used.
    pub(super) call: Option<Arc<OwnedFd>>,
    /// Written when the ring breaks.
    pub(super) error: Option<Arc<OwnedFd>>,
    /// The marks of requests in flight, and the heads that an earlier life left in flight.
    pub(super) tracker: Option<Tracker>,
    pub(super) left: Vec<u16>,
    pub(super) channel: Channel,
    pub(super) device: Arc<DeviceFacts>,
    pub(super) spin: Spin,
    pub(super) pulse: Arc<Pulse>,
}

/// The properties of a device that its queues need.
#[derive(Debug)]
pub(super) struct DeviceFacts {
    /// Size in bytes.
    pub(super) size: AtomicU64,
    /// The name that guests see.
    pub(super) id: [u8; ID_LEN],
}

/// An order to a running queue.
pub(super) enum Order {
    Call(Option<Arc<OwnedFd>>),
    Error(Option<Arc<OwnedFd>>),
    /// Guest memory was replaced, and the ring lies in the new one. Acknowledged when the queue takes no more
    /// requests from the old memory.
    Memory(Arc<GuestMemory>, Parts, SyncSender<()>),
    /// Take no more requests, and end: when no request is in flight any more, or after this time.
    Stop(Duration),
}

/// Orders that were not executed yet.
struct Inbox {
    orders: Mutex<VecDeque<Order>>,
    told: AtomicBool,
    event: OwnedFd,
}

/// A running queue.
pub(super) struct Worker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<u16>,
    next_available: u16,
}

impl Worker {
    /// Starts a queue.
    ///
    /// # Errors
    /// When the system provides no thread or descriptor, or the kick descriptor cannot be polled.
    pub(super) fn start(parts: QueueParts) -> io::Result<Worker> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let inbox = Arc::new(Inbox { orders: Mutex::default(), told: AtomicBool::new(false), event });
        let name = parts.name.clone();
        let next_available = parts.ring.next_available();
        let left = parts.left.clone();
        let queue = Queue::new(parts, Arc::clone(&inbox))?;
        let thread = thread::Builder::new()
            .name(name)
            .stack_size(lifecycle::STACK_LEN)
            .spawn(move || queue.run(&left))?;
        Ok(Worker { inbox, thread, next_available })
    }

    /// Sends an order.
    pub(super) fn tell(&self, order: Order) {
        self.inbox.orders.lock().unwrap_or_else(PoisonError::into_inner).push_back(order);
        self.inbox.told.store(true, Ordering::Release);
        // The write could fail only on an overflow, after 2^64 - 2 orders.
        let _ = rustix::io::write(&self.inbox.event, &1_u64.to_ne_bytes());
    }

    /// Whether the queue has not ended.
    pub(super) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits for the end of the queue, after [`Order::Stop`]; returns the next entry to be taken of its ring.
    pub(super) fn join(self) -> u16 {
        self.thread.join().unwrap_or_else(|_| {
            tracing::error!("a queue of a vhost-user device failed; its requests in flight stay marked");
            self.next_available
        })
    }
}

/// A request in flight.
struct Slot {
    busy: bool,
    parts: Vec<Part>,
    /// Number of parts that were posted.
    posted: usize,
    /// Number of posted parts that have not ended.
    open: usize,
    status: Option<IoBuf>,
    written: u32,
    result: Result<(), IoError>,
}

struct Queue {
    // Dropped before the memory, which ends the use of guest memory.
    channel: Channel,
    ring: Ring,
    memory: Arc<GuestMemory>,
    memory_failed: Arc<AtomicBool>,
    /// Memory that was replaced while requests in flight could use it.
    replaced: Vec<Arc<GuestMemory>>,
    tracker: Option<Tracker>,
    /// Indexed by the heads of their chains.
    slots: Vec<Slot>,
    in_flight: usize,
    /// Requests with parts for which the channel had no room, oldest first.
    waiting: VecDeque<u16>,
    completions: Vec<Completion>,
    pieces: Pieces,
    scratch: Vec<Part>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    device: Arc<DeviceFacts>,
    inbox: Arc<Inbox>,
    epoll: OwnedFd,
    /// Keeps the descriptor open that the epoll set watches.
    _kick: Arc<OwnedFd>,
    spin: Spin,
    pulse: Arc<Pulse>,
    used: bool,
    broken: bool,
    stop_at: Option<Instant>,
}

impl Queue {
    fn new(parts: QueueParts, inbox: Arc<Inbox>) -> io::Result<Queue> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered: then the descriptor need not be read, which could block, since its owner may have
        // made it blocking.
        epoll::add(&epoll, parts.kick.as_fd(), EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        epoll::add(&epoll, parts.channel.wait_fd(), EventData::new_u64(CHANNEL), EventFlags::IN)?;
        epoll::add(&epoll, &inbox.event, EventData::new_u64(2), EventFlags::IN)?;
        epoll::add(&epoll, parts.pulse.poked(), EventData::new_u64(3), EventFlags::IN)?;
        let size = usize::from(parts.ring.size());
        let slot = || Slot {
            busy: false,
            parts: Vec::with_capacity(PARTS_MAX),
            posted: 0,
            open: 0,
            status: None,
            written: 0,
            result: Ok(()),
        };
        Ok(Queue {
            channel: parts.channel,
            ring: parts.ring,
            memory: parts.memory,
            memory_failed: parts.memory_failed,
            replaced: Vec::new(),
            tracker: parts.tracker,
            slots: std::iter::repeat_with(slot).take(size).collect(),
            in_flight: 0,
            waiting: VecDeque::with_capacity(size),
            completions: Vec::with_capacity(size),
            pieces: Pieces::new(),
            scratch: Vec::with_capacity(PARTS_MAX),
            call: parts.call,
            error: parts.error,
            device: parts.device,
            inbox,
            epoll,
            _kick: parts.kick,
            spin: parts.spin,
            pulse: parts.pulse,
            // The guest may not have been notified of requests that an earlier life used.
            used: true,
            broken: false,
            stop_at: None,
        })
    }

    fn run(mut self, left: &[u16]) -> u16 {
        self.ring.decline_kicks();
        for &head in left {
            if let Err(broken) = self.begin(head) {
                self.break_ring(broken);
            }
        }
        // Whether the channel's sockets may be ready without a reported event.
        let mut looking = true;
        loop {
            let taken = self.take_available();
            let ended = self.take_completions(looking);
            if !self.broken && self.memory_failed.load(Ordering::Acquire) {
                self.break_ring(MEMORY_GONE);
            }
            self.tell_guest();
            self.take_orders();
            self.pulse.answer_if_asked();
            if self.stop_at.is_some_and(|at| self.in_flight == 0 || Instant::now() >= at) {
                // Requests that are still in flight stay marked; dropping the channel ends its use of guest
                // memory.
                return self.ring.next_available();
            }
            looking = self.spin.looks_again(taken || ended) || self.wait();
        }
    }

    /// Takes the requests that the guest made available; returns whether there were any.
    fn take_available(&mut self) -> bool {
        if self.broken || self.stop_at.is_some() {
            return false;
        }
        let mut any = false;
        // At most as many as the ring has, so that a guest which adds requests continuously does not delay
        // orders.
        for _ in 0..self.ring.size() {
            let taken = match self.ring.pop() {
                Ok(None) => return any,
                Ok(Some(head)) => self.take(head),
                Err(broken) => Err(broken),
            };
            any = true;
            if let Err(broken) = taken {
                self.break_ring(broken);
                return any;
            }
        }
        any
    }

    fn take(&mut self, head: u16) -> Result<(), Broken> {
        if self.slots[usize::from(head)].busy {
            return Err(Broken("a chain that is in flight was made available again"));
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.begin(head);
        }
        self.begin(head)
    }

    fn begin(&mut self, head: u16) -> Result<(), Broken> {
        let status = self.pieces.walk(&self.ring, &self.memory, head)?;
        let size = self.device.size.load(Ordering::Relaxed);
        let outcome = request::decode(&self.pieces, size, &self.device.id, &mut self.scratch);
        let slot = &mut self.slots[usize::from(head)];
        // The slot gets the request's parts, and the scratch list becomes the empty one.
        std::mem::swap(&mut slot.parts, &mut self.scratch);
        (slot.busy, slot.posted, slot.open) = (true, 0, 0);
        (slot.status, slot.result) = (Some(status), Ok(()));
        self.in_flight += 1;
        match outcome {
            Outcome::Post { written } => {
                slot.written = written;
                if !self.waiting.is_empty() || !self.post(head) {
                    self.waiting.push_back(head);
                }
            }
            Outcome::Ended { status, written } => {
                slot.written = written;
                self.finish(head, status);
            }
        }
        Ok(())
    }

    /// Posts the remaining parts of a request; returns false when the channel has no room for all of them.
    fn post(&mut self, head: u16) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        while let Some(&Part { kind, offset, len, buf }) = slot.parts.get(slot.posted) {
            if self.channel.post(Operation { kind, offset, len, buf, token: u64::from(head) }).is_err() {
                return false;
            }
            slot.posted += 1;
            slot.open += 1;
        }
        true
    }

    /// Submits the posted operations, and handles the channel's completions; reads its sockets only if `told`
    /// says that the channel's descriptor was reported or may be ready. Returns whether there were any.
    fn take_completions(&mut self, told: bool) -> bool {
        let mut any = false;
        loop {
            self.channel.submit();
            match told && !any {
                true => self.channel.poll(&mut self.completions),
                false => self.channel.poll_untold(&mut self.completions),
            }
            if self.completions.is_empty() {
                return any;
            }
            any = true;
            while let Some(Completion { token, result }) = self.completions.pop() {
                let Some(slot) = self.slots.get_mut(token as usize) else { continue };
                slot.open -= 1;
                slot.result = slot.result.and(result);
                if slot.open == 0 && slot.posted == slot.parts.len() {
                    let status = Status::of(slot.result);
                    self.finish(token as u16, status);
                }
            }
            if self.waiting.is_empty() {
                return any;
            }
            self.post_waiting();
        }
    }

    fn post_waiting(&mut self) {
        while let Some(&head) = self.waiting.front() {
            if !self.post(head) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    fn finish(&mut self, head: u16, status: Status) {
        let slot = &mut self.slots[usize::from(head)];
        slot.busy = false;
        let written = if status == Status::OK { slot.written } else { 0 };
        if let Some(byte) = slot.status.take() {
            byte.copy_from_slice(&[status.0]);
        }
        self.in_flight -= 1;
        if let Some(tracker) = &mut self.tracker {
            tracker.ending(head);
        }
        self.ring.push(head, written + 1);
        if let Some(tracker) = &mut self.tracker {
            tracker.ended(head, self.ring.next_used());
        }
        self.used = true;
    }

    /// Notifies the guest of used requests, if it wants notifications.
    fn tell_guest(&mut self) {
        if std::mem::take(&mut self.used) && self.ring.wants_call() {
            signal(self.call.as_deref());
        }
    }

    fn break_ring(&mut self, broken: Broken) {
        self.broken = true;
        // Zeros in place of a ring break the ring as well.
        let broken = if self.memory_failed.load(Ordering::Acquire) { MEMORY_GONE } else { broken };
        tracing::warn!(
            "{}: the ring is broken: {broken}; it is not served until the guest resets the device",
            thread::current().name().unwrap_or_default()
        );
        signal(self.error.as_deref());
    }

    fn take_orders(&mut self) {
        if !self.inbox.told.swap(false, Ordering::AcqRel) {
            return;
        }
        let _ = rustix::io::read(&self.inbox.event, &mut [0_u8; 8]);
        loop {
            let order = self.inbox.orders.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match order {
                None => return,
                Some(Order::Call(call)) => {
                    self.call = call;
                    // A notification over the previous descriptor may have been lost.
                    signal(self.call.as_deref());
                }
                Some(Order::Error(error)) => self.error = error,
                Some(Order::Memory(memory, parts, done)) => {
                    self.replaced.push(std::mem::replace(&mut self.memory, memory));
                    self.ring.replace(parts);
                    // The channel has room for this message, unless its receiver no longer waits.
                    let _ = done.try_send(());
                }
                Some(Order::Stop(limit)) => self.stop_at = Some(Instant::now() + limit),
            }
        }
    }

    /// Waits for an event; returns whether the channel may be ready.
    fn wait(&mut self) -> bool {
        if self.in_flight == 0 {
            self.replaced.clear();
        }
        let serving = !self.broken && self.stop_at.is_none();
        if serving && self.ring.ask_for_kicks() {
            // Requests are available already. Returns without polling, so that a guest which adds requests
            // continuously does not delay completions.
            return true;
        }
        self.channel.arm();
        let left = self.stop_at.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left
            .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        let mut room = [MaybeUninit::uninit(); 4];
        // Whichever event it is, the next turn checks all other sources.
        let told = epoll::wait(&self.epoll, &mut room, left.as_ref())
            .is_ok_and(|(events, _)| events.iter().any(|event| event.data.u64() == CHANNEL));
        if serving {
            self.ring.decline_kicks();
        }
        told
    }
}

fn signal(event: Option<&OwnedFd>) {
    if let Some(event) = event {
        // An error is harmless: the counter is full, or the owner closed the descriptor.
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
    }
}
