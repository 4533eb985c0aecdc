//! One queue of a device: a thread that owns its ring and its channel.
//!
//! A request is known by the head of its chain. The thread takes requests off the ring, posts their parts, with
//! the guest's memory as buffers, and puts them into the used ring when all parts have ended. It never takes a
//! lock, allocates or logs on the way of a request, and waits at one place only, for the guest, the channel and
//! orders alike.
//!
//! A guest that breaks the rules gets its ring broken: what is in flight ends, and nothing more is taken until the
//! device is reset. A panic ends the queue, not the process: of the devices that the process serves only this
//! one's guest has a part in it.

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
use xpm_client::Channel;
use xpm_transport::io::{Completion, IoBuf, IoError, Operation};
use xpm_transport::spin::Spin;

use super::chain::Pieces;
use super::inflight::Tracker;
use super::memory::GuestMemory;
use super::request::{self, ID_LEN, Outcome, PARTS_MAX, Part, Status};
use super::ring::{Broken, Parts, Ring};
use crate::lifecycle;
use crate::watch::Pulse;

/// Why a ring is broken whose guest has lost memory.
const MEMORY_GONE: Broken =
    Broken("guest memory is gone under it: the machine has to connect again with whole memory");
/// Marks the channel among the events.
const CHANNEL: u64 = 1;

/// What a queue is made of.
pub(super) struct QueueParts {
    pub(super) name: String,
    pub(super) ring: Ring,
    pub(super) memory: Arc<GuestMemory>,
    /// Set when some of it is gone.
    pub(super) memory_failed: Arc<AtomicBool>,
    /// Readable when the guest has made something available.
    pub(super) kick: Arc<OwnedFd>,
    /// To be written when something was used.
    pub(super) call: Option<Arc<OwnedFd>>,
    /// To be written when the ring breaks.
    pub(super) error: Option<Arc<OwnedFd>>,
    /// Marks of what is in flight, and what an earlier life left in flight.
    pub(super) tracker: Option<Tracker>,
    pub(super) left: Vec<u16>,
    pub(super) channel: Channel,
    pub(super) device: Arc<DeviceFacts>,
    pub(super) spin: Spin,
    pub(super) pulse: Arc<Pulse>,
}

/// What all queues of a device have to know.
#[derive(Debug)]
pub(super) struct DeviceFacts {
    /// Size in bytes.
    pub(super) size: AtomicU64,
    /// The name that guests see.
    pub(super) id: [u8; ID_LEN],
}

/// What a queue is told while it runs.
pub(super) enum Order {
    Call(Option<Arc<OwnedFd>>),
    Error(Option<Arc<OwnedFd>>),
    /// Guest memory is another one, and the ring lies there. Told when nothing more is taken by the old one.
    Memory(Arc<GuestMemory>, Parts, SyncSender<()>),
    /// Takes nothing more and ends: when nothing is in flight any more, or after this time.
    Stop(Duration),
}

/// Orders that were not carried out.
struct Inbox {
    orders: Mutex<VecDeque<Order>>,
    told: AtomicBool,
    event: OwnedFd,
}

/// A queue that runs.
pub(super) struct Worker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<u16>,
    next_available: u16,
}

impl Worker {
    /// Starts a queue.
    ///
    /// # Errors
    /// When there is no thread or no descriptor for it, or it cannot be kicked by its descriptor.
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

    /// Tells it something.
    pub(super) fn tell(&self, order: Order) {
        self.inbox.orders.lock().unwrap_or_else(PoisonError::into_inner).push_back(order);
        self.inbox.told.store(true, Ordering::Release);
        // Only an overflow after 2^64 - 2 orders could fail.
        let _ = rustix::io::write(&self.inbox.event, &1_u64.to_ne_bytes());
    }

    /// Whether it has not ended.
    pub(super) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits for its end, after [`Order::Stop`]; the next entry to be taken of its ring.
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
    /// Parts that were posted.
    posted: usize,
    /// Of these, those that have not ended.
    open: usize,
    status: Option<IoBuf>,
    written: u32,
    result: Result<(), IoError>,
}

struct Queue {
    // Before the memory: dropping it ends the use of guest memory.
    channel: Channel,
    ring: Ring,
    memory: Arc<GuestMemory>,
    memory_failed: Arc<AtomicBool>,
    /// Memory that was replaced while requests in flight could use it.
    replaced: Vec<Arc<GuestMemory>>,
    tracker: Option<Tracker>,
    /// By the head of their chains.
    slots: Vec<Slot>,
    in_flight: usize,
    /// Requests with parts that the channel had no room for, oldest first.
    waiting: VecDeque<u16>,
    completions: Vec<Completion>,
    pieces: Pieces,
    scratch: Vec<Part>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    device: Arc<DeviceFacts>,
    inbox: Arc<Inbox>,
    epoll: OwnedFd,
    /// Keeps what the epoll set watches.
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
        // By edge: then it need not be read, and its owner may have made it one that blocks.
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
            // What an earlier life used may not have been told.
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
        // Whether the channel's sockets may have something without having told.
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
                // What is in flight still stays marked; dropping the channel ends its use of guest memory.
                return self.ring.next_available();
            }
            looking = self.spin.looks_again(taken || ended) || self.wait();
        }
    }

    /// Takes what the guest made available; true when there was anything.
    fn take_available(&mut self) -> bool {
        if self.broken || self.stop_at.is_some() {
            return false;
        }
        let mut any = false;
        // No more at once than the ring has: a guest that goes on and on must not keep orders waiting.
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
        // By this the request's parts are in a slot, and an empty list is here.
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

    /// Posts what is left of a request's parts; false when the channel has no room for all of them.
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

    /// Submits what was posted, and takes what the channel has done, with what its sockets have if that was `told`
    /// or may be so; true when there was anything.
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

    /// Notifies the guest of what was used, if it wants to be.
    fn tell_guest(&mut self) {
        if std::mem::take(&mut self.used) && self.ring.wants_call() {
            signal(self.call.as_deref());
        }
    }

    fn break_ring(&mut self, broken: Broken) {
        self.broken = true;
        // Zeros in place of a ring break it as well.
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
                    // What was told to the one before may have been lost.
                    signal(self.call.as_deref());
                }
                Some(Order::Error(error)) => self.error = error,
                Some(Order::Memory(memory, parts, done)) => {
                    self.replaced.push(std::mem::replace(&mut self.memory, memory));
                    self.ring.replace(parts);
                    // It has room for this, or nobody waits any more.
                    let _ = done.try_send(());
                }
                Some(Order::Stop(limit)) => self.stop_at = Some(Instant::now() + limit),
            }
        }
    }

    /// Waits for anything; true when the channel may have something.
    fn wait(&mut self) -> bool {
        if self.in_flight == 0 {
            self.replaced.clear();
        }
        let serving = !self.broken && self.stop_at.is_none();
        if serving && self.ring.ask_for_kicks() {
            // Nobody was asked: a guest that goes on and on must not keep completions waiting either.
            return true;
        }
        self.channel.arm();
        let left = self.stop_at.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left
            .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        let mut room = [MaybeUninit::uninit(); 4];
        // Whatever it is, the next turn looks at everything else.
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
        // It fails when it is signalled as often as it can be, or was closed by its owner: as good.
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
    }
}
