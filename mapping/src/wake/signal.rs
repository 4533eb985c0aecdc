//! A flag that notifies a thread, and shows whether the thread has to be woken for it.
//!
//! The notifying thread sets `told` and then reads `asleep`. The waiting thread sets `asleep` and then reads `told`.
//! So at least one of the two sees the other's flag (as in Dekker's algorithm), and no notification is lost.

use crate::sync::{AtomicBool, Ordering, fence};

pub(crate) struct Signal {
    told: AtomicBool,
    asleep: AtomicBool,
}

impl Signal {
    pub(crate) fn new() -> Signal {
        Signal { told: AtomicBool::new(false), asleep: AtomicBool::new(false) }
    }

    /// Notifies the waiting thread. Returns true when that thread has to be woken: it sleeps, or is about to.
    #[must_use]
    pub(crate) fn tell(&self) -> bool {
        // A swap and not a store: when two threads notify, the waiting thread has to see the writes that both made
        // before.
        self.told.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed)
    }

    /// Whether a notification arrived since the last call.
    pub(crate) fn take(&self) -> bool {
        self.told.load(Ordering::Relaxed) && self.told.swap(false, Ordering::AcqRel)
    }

    /// Announces that the waiting thread is about to sleep. Returns false when a notification is pending: then it must
    /// not sleep.
    #[must_use]
    pub(crate) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let told = self.told.load(Ordering::Relaxed);
        if told {
            self.is_awake();
        }
        !told
    }

    pub(crate) fn is_awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}
