//! How much local memory is used, how much may be, and waiting for some.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use rustix::thread::futex;

/// How much local memory is used, and how much may be.
pub(crate) struct Room {
    resident: AtomicUsize,
    budget: AtomicUsize,
    /// Pages that stay.
    pinned: AtomicUsize,
    /// A fault found no room.
    starving: AtomicBool,
    /// What is fetched ahead did.
    wanting: AtomicBool,
    /// Pages beyond the budget that are used for now, since the program has pinned what is within.
    excess: AtomicUsize,
    /// Nor are there any.
    exhausted: AtomicBool,
    /// Counts up whenever there is room again.
    sequence: AtomicU32,
    /// Pages that should be free: few, so that what fits stays, and more while that is not enough.
    reserve: AtomicUsize,
}

impl Room {
    pub(crate) fn new(budget: usize) -> Room {
        Room {
            resident: AtomicUsize::new(0),
            budget: AtomicUsize::new(budget),
            pinned: AtomicUsize::new(0),
            starving: AtomicBool::new(false),
            wanting: AtomicBool::new(false),
            excess: AtomicUsize::new(0),
            exhausted: AtomicBool::new(false),
            sequence: AtomicU32::new(0),
            reserve: AtomicUsize::new(0),
        }
    }

    pub(crate) fn budget(&self) -> usize {
        self.budget.load(Ordering::Relaxed)
    }

    pub(crate) fn pinned(&self) -> usize {
        self.pinned.load(Ordering::Relaxed)
    }

    pub(crate) fn set_pinned(&self, pages: usize) {
        self.pinned.store(pages, Ordering::Relaxed);
    }

    pub(crate) fn set_budget(&self, pages: usize) {
        self.reserve.store(0, Ordering::Relaxed);
        self.budget.store(pages, Ordering::Relaxed);
    }

    pub(crate) fn resident(&self) -> usize {
        self.resident.load(Ordering::Relaxed)
    }

    /// Room for one page.
    pub(crate) fn take(&self) -> bool {
        self.take_below(self.limit(), &self.starving)
    }

    fn limit(&self) -> usize {
        self.budget() + self.excess()
    }

    pub(crate) fn excess(&self) -> usize {
        self.excess.load(Ordering::Relaxed)
    }

    /// How many pages may be used beyond the budget.
    pub(crate) fn set_excess(&self, pages: usize) {
        self.exhausted.store(false, Ordering::Relaxed);
        self.excess.store(pages, Ordering::Relaxed);
    }

    /// No room can be made for those who wait for some.
    pub(crate) fn set_exhausted(&self) {
        self.exhausted.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }

    /// Whether somebody waits for room.
    pub(crate) fn is_starving(&self) -> bool {
        self.starving.load(Ordering::Relaxed)
    }

    /// The same, for what can do without: leaves some.
    pub(crate) fn take_spare(&self) -> bool {
        let budget = self.budget();
        self.take_below(budget - self.reserve(budget) / 2, &self.wanting)
    }

    fn take_below(&self, limit: usize, waits: &AtomicBool) -> bool {
        let more = |resident: usize| (resident < limit).then_some(resident + 1);
        let taken = self.resident.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if !taken {
            waits.store(true, Ordering::SeqCst);
        }
        taken
    }

    pub(crate) fn give(&self, pages: usize) {
        self.resident.fetch_sub(pages, Ordering::SeqCst);
    }

    /// Whether the evictor has to make room.
    pub(crate) fn is_short(&self) -> bool {
        let budget = self.budget();
        self.resident() + self.reserve(budget) > budget
    }

    /// Whether it has made enough.
    pub(crate) fn is_ample(&self) -> bool {
        let budget = self.budget();
        self.resident() + 2 * self.reserve(budget) <= budget
    }

    fn reserve(&self, budget: usize) -> usize {
        self.reserve.load(Ordering::Relaxed).clamp(reserve_min(budget), reserve_max(budget))
    }

    /// Whether less of a reserve is enough shows when there is less.
    pub(crate) fn relax(&self) {
        self.reserve.store(self.reserve(self.budget()) / 2, Ordering::Relaxed);
    }

    /// Tells the threads of the program that found no room. True when anybody did.
    pub(crate) fn freed(&self) -> bool {
        let starving = self.starving.swap(false, Ordering::SeqCst);
        if starving {
            self.sequence.fetch_add(1, Ordering::Release);
            let _ = futex::wake(&self.sequence, futex::Flags::PRIVATE, u32::MAX);
        }
        let any = self.wanting.swap(false, Ordering::SeqCst) || starving;
        if any {
            self.reserve.store(self.reserve(self.budget()) * 2, Ordering::Relaxed);
        }
        any
    }

    /// Waits until there may be room again, for a moment at most.
    pub(crate) fn wait(&self) {
        let now = self.sequence.load(Ordering::Acquire);
        // After `take` said that somebody starves: whoever gave room back before sees that, or this sees the room.
        if self.resident.load(Ordering::SeqCst) >= self.limit() {
            let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = futex::wait(&self.sequence, futex::Flags::PRIVATE, now, Some(&limit));
        }
    }
}

/// Fewest pages that should be free of so many.
fn reserve_min(budget: usize) -> usize {
    (budget / 1024).clamp(4, 64)
}

/// Most of them.
fn reserve_max(budget: usize) -> usize {
    (budget / 32).clamp(4, 1024)
}
