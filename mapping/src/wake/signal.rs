//! Whether a thread was told something, and whether it has to be woken for that.
//!
//! Who tells looks whether the other one sleeps after it has told, and who goes to sleep looks whether it was told
//! after it has said so: one of them sees the other (as Dekker's algorithm has it).

use crate::sync::{AtomicBool, Ordering, fence};

pub(crate) struct Signal {
    told: AtomicBool,
    asleep: AtomicBool,
}

impl Signal {
    pub(crate) fn new() -> Signal {
        Signal { told: AtomicBool::new(false), asleep: AtomicBool::new(false) }
    }

    /// Tells. True when the other one has to be woken: it sleeps, or is about to.
    #[must_use]
    pub(crate) fn tell(&self) -> bool {
        // Not a store: who takes what two have told has to see what both did before.
        self.told.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed)
    }

    /// Whether it was told something since this was last asked.
    pub(crate) fn take(&self) -> bool {
        self.told.load(Ordering::Relaxed) && self.told.swap(false, Ordering::AcqRel)
    }

    /// Says that it is about to sleep. False when it was told something: then it must not.
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
