//! What a channel is told to change, by who changes the volume. A channel looks only when its bell
//! rings: no I/O touches any of this while nothing changes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::connector::Connector;
use super::moves::Progress;
use super::plan::Plan;
use super::port::{Bell, Port};

/// A way to one more grant.
pub(super) struct NewWay {
    /// Its number.
    pub(super) number: u32,
    pub(super) port: Arc<Port>,
    pub(super) connector: Arc<Connector>,
}

/// What a channel is told. It is carried out when the channel says so; each one after the other.
pub(super) enum Order {
    /// A change begins: here are ways to new grants. Nothing is done in place from now on; carried out
    /// when nothing that was begun so is unfinished.
    Begin(Vec<NewWay>),
    /// The change is so far; carried out when no write to the locked run is in flight.
    Progress(Progress),
    /// From now on a write counts only when it is at both places, and nothing goes beyond so many bytes; carried
    /// out when nothing is in flight there.
    Firm(u64),
    /// Reads go where this plan says, for it has all; writes still go to both places.
    Read(Arc<Plan>),
    /// This is the plan now, and all channels read by it; carried out when nothing is in flight at ways without regions, which end.
    Switch(Arc<Plan>),
    /// The change is off: all is as before it.
    Abort,
}

#[derive(Default)]
struct Inbox {
    orders: VecDeque<Order>,
    told: u64,
    done: u64,
}

/// The meeting place of one channel and who changes the volume.
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    /// The channel is gone.
    closed: AtomicBool,
    bell: Arc<Bell>,
}

impl Mailbox {
    pub(super) fn new(bell: Arc<Bell>) -> Mailbox {
        Mailbox { inbox: Mutex::default(), changed: Condvar::new(), closed: AtomicBool::new(false), bell }
    }

    /// Only assignments happen under the lock.
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the channel. What [`Mailbox::wait`] is to be given.
    pub(super) fn tell(&self, order: Order) -> u64 {
        let mut inbox = self.lock();
        inbox.orders.push_back(order);
        inbox.told += 1;
        let number = inbox.told;
        drop(inbox);
        self.bell.ring();
        number
    }

    /// Whether it was told something that is not carried out.
    pub(super) fn is_waited_for(&self) -> bool {
        let inbox = self.lock();
        inbox.done < inbox.told && !self.is_closed()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits until so many orders are carried out, or the channel is gone. False when it is too late.
    pub(super) fn wait(&self, number: u64, until: Instant) -> bool {
        let mut inbox = self.lock();
        while inbox.done < number && !self.closed.load(Ordering::Acquire) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inbox = self.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// The channel's side: the next order.
    pub(super) fn next(&self) -> Option<Order> {
        self.lock().orders.pop_front()
    }

    /// The channel's side: whether the next order ends whatever is being waited for.
    pub(super) fn is_aborted(&self) -> bool {
        matches!(self.lock().orders.front(), Some(Order::Abort))
    }

    /// The channel's side: one more order is carried out.
    pub(super) fn done(&self) {
        self.lock().done += 1;
        self.changed.notify_all();
    }

    /// The channel's side: it is dropped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        drop(self.lock());
        self.changed.notify_all();
    }
}
