//! The accounting of local memory, and waiting for free memory.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use rustix::thread::futex;

/// The local memory in use and its limits, in pages.
pub(crate) struct Room {
    resident: AtomicUsize,
    budget: AtomicUsize,
    /// Pages that must stay in local memory.
    pinned: AtomicUsize,
    /// Whether a fault found no room.
    starving: AtomicBool,
    /// Whether a fetch ahead found no room.
    wanting: AtomicBool,
    /// Pages that may be used beyond the budget for now, because the program has pinned the pages within the budget.
    excess: AtomicUsize,
    /// Whether the machine has no memory for `excess` either.
    exhausted: AtomicBool,
    /// Incremented whenever room is free again; waiting threads sleep on it (futex).
    sequence: AtomicU32,
    /// Pages that the evictor keeps free. Few, so that as many pages as possible stay local; it grows while threads
    /// find no room, and is halved regularly.
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

    /// Takes room for one page, for a fault. Returns false when there is none.
    pub(crate) fn take(&self) -> bool {
        self.take_below(self.limit(), &self.starving)
    }

    fn limit(&self) -> usize {
        self.budget() + self.excess()
    }

    pub(crate) fn excess(&self) -> usize {
        self.excess.load(Ordering::Relaxed)
    }

    /// Sets how many pages may be used beyond the budget.
    pub(crate) fn set_excess(&self, pages: usize) {
        self.exhausted.store(false, Ordering::Relaxed);
        self.excess.store(pages, Ordering::Relaxed);
    }

    /// Records that no room can be made for the waiting faults.
    pub(crate) fn set_exhausted(&self) {
        self.exhausted.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }

    /// Whether a fault waits for room.
    pub(crate) fn is_starving(&self) -> bool {
        self.starving.load(Ordering::Relaxed)
    }

    /// Takes room for one page that no access waits for. Leaves half of the reserve for faults.
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

    /// Whether the evictor has made enough room.
    pub(crate) fn is_ample(&self) -> bool {
        let budget = self.budget();
        self.resident() + 2 * self.reserve(budget) <= budget
    }

    fn reserve(&self, budget: usize) -> usize {
        self.reserve.load(Ordering::Relaxed).clamp(reserve_min(budget), reserve_max(budget))
    }

    /// Halves the reserve: only a smaller reserve shows whether it is large enough.
    pub(crate) fn relax(&self) {
        self.reserve.store(self.reserve(self.budget()) / 2, Ordering::Relaxed);
    }

    /// Wakes the program's threads that found no room. Returns true when a fault or a fetch ahead found none; then the
    /// reserve doubles.
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

    /// Waits until there may be room again, for at most 1 ms.
    pub(crate) fn wait(&self) {
        let now = self.sequence.load(Ordering::Acquire);
        // `take` set `starving` before this load. So either the thread that frees room sees `starving`, or this load
        // sees the freed room.
        if self.resident.load(Ordering::SeqCst) >= self.limit() {
            let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = futex::wait(&self.sequence, futex::Flags::PRIVATE, now, Some(&limit));
        }
    }
}

/// Lower limit of the reserve, for a budget in pages.
fn reserve_min(budget: usize) -> usize {
    (budget / 1024).clamp(4, 64)
}

/// Upper limit of the reserve, for a budget in pages.
fn reserve_max(budget: usize) -> usize {
    (budget / 32).clamp(4, 1024)
}
