//! The orders by which a change of the volume instructs a channel. A channel reads its orders only when its
//! bell rings: while no change is in progress, no I/O touches this state.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::connector::Connector;
use super::moves::Progress;
use super::plan::Plan;
use super::port::{Bell, Port};

/// A path to an additional grant.
pub(super) struct NewWay {
    /// The number of the path.
    pub(super) number: u32,
    pub(super) port: Arc<Port>,
    pub(super) connector: Arc<Connector>,
}

/// An order to a channel. Orders are executed one after the other; the channel reports each one as done.
pub(super) enum Order {
    /// A change begins, with these paths to new grants. From now on no memory is accessed in place. Done when
    /// no access that began in place is unfinished.
    Begin(Vec<NewWay>),
    /// The change has made this progress. Done when no write to the locked run is in flight.
    Progress(Progress),
    /// From now on a write ends only when both places have it, and no I/O goes beyond this offset in bytes.
    /// Done when no operation is in flight beyond it.
    Firm(u64),
    /// Reads follow this plan, whose places have all data; writes still go to both places.
    Read(Arc<Plan>),
    /// This is the plan now, and all channels already read by it. Done when no operation is in flight on
    /// paths without regions; these paths then end.
    Switch(Arc<Plan>),
    /// The change is cancelled: the state before it is restored.
    Abort,
}

#[derive(Default)]
struct Inbox {
    orders: VecDeque<Order>,
    told: u64,
    done: u64,
}

/// The meeting place of a channel and the thread that changes the volume.
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    /// Whether the channel was dropped.
    closed: AtomicBool,
    bell: Arc<Bell>,
}

impl Mailbox {
    pub(super) fn new(bell: Arc<Bell>) -> Mailbox {
        Mailbox { inbox: Mutex::default(), changed: Condvar::new(), closed: AtomicBool::new(false), bell }
    }

    /// Critical sections consist of assignments only, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an order to the channel. Returns the number to pass to [`Mailbox::wait`].
    pub(super) fn tell(&self, order: Order) -> u64 {
        let mut inbox = self.lock();
        inbox.orders.push_back(order);
        inbox.told += 1;
        let number = inbox.told;
        drop(inbox);
        self.bell.ring();
        number
    }

    /// Whether an order was sent that is not done yet.
    pub(super) fn is_waited_for(&self) -> bool {
        let inbox = self.lock();
        inbox.done < inbox.told && !self.is_closed()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits until the order with this number is done, or the channel is dropped. Returns false on a timeout.
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

    /// Called by the channel: takes the next order.
    pub(super) fn next(&self) -> Option<Order> {
        self.lock().orders.pop_front()
    }

    /// Called by the channel: whether the next order cancels the one that is being waited for.
    pub(super) fn is_aborted(&self) -> bool {
        matches!(self.lock().orders.front(), Some(Order::Abort))
    }

    /// Called by the channel: one more order is done.
    pub(super) fn done(&self) {
        self.lock().done += 1;
        self.changed.notify_all();
    }

    /// Called by the channel when it is dropped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        drop(self.lock());
        self.changed.notify_all();
    }
}
