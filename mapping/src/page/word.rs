//! The state of each page: one word, and a stamp.
//!
//! **Ownership.** A thread that turns a page's residency to [`Residency::Busy`] has it to itself until it turns it to
//! something else; only then may its content, its place in the window, and its stamp change. A thread that finds a
//! page busy marks it as waited for, and is woken by the thread that has claimed it. No thread waits for a second
//! page while it has one, except calls (`fault/calls.rs`), of which there is one at a time.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Where a page's content is.
///
/// ```text
///                     fault: zeros, or a READ and UFFDIO_COPY
///          +------------------------ Busy ----------------------> Mapped (in the window)
///          |                                                        |      ^
///          |                                      evictor: S3-FIFO  |      | touched again: a cheap
///        Absent                                   names the page    v      | fault, so it is used
///          ^                                                       Shelved (inactive list)
///          |                                                          |
///          +------------------------ Busy <---------------------------+
///             written first if its digest differs from its stamp        not touched there
/// ```
///
/// Every arrow passes through `Busy`: a thread claims the page, changes it, and releases it into its next state. If
/// the fetch for a fault fails, the page is released as `Absent` with [`POISONED`]; if a fetch ahead of a fault
/// fails, it is released as plain `Absent`, and the next fault tries again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// In external memory only, or it was never written.
    Absent,
    /// A thread owns the page.
    Busy,
    /// In local memory, and in the window.
    Mapped,
    /// In local memory, and not in the window: a touch is a fault, which shows that the page is in use.
    Shelved,
}

const RESIDENCY: u32 = 0b11;
/// The page has to be written before it may leave local memory. Without this bit, the stamp of a local page is the
/// digest of its content in external memory.
pub(crate) const DIRTY: u32 = 1 << 2;
/// The page was written to its own place in external memory at least once.
pub(crate) const WRITTEN: u32 = 1 << 3;
/// The page was touched while it was on the shelf.
pub(crate) const TOUCHED: u32 = 1 << 4;
/// A touch of this page starts fetching the pages behind it.
pub(crate) const MARK: u32 = 1 << 5;
/// At least one thread waits until the page is not busy.
const WAITED: u32 = 1 << 6;
/// The content of the page is lost, or could not be fetched: an access raises SIGBUS.
pub(crate) const POISONED: u32 = 1 << 7;
/// The page must stay in local memory.
pub(crate) const PINNED: u32 = 1 << 8;
/// The page is in a queue of the eviction policy.
pub(crate) const QUEUED: u32 = 1 << 9;

/// The value of a page's word at the time of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State(u32);

impl State {
    pub(crate) const fn residency(self) -> Residency {
        match self.0 & RESIDENCY {
            0 => Residency::Absent,
            1 => Residency::Busy,
            2 => Residency::Mapped,
            _ => Residency::Shelved,
        }
    }

    pub(crate) const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    pub(crate) const fn with(self, bit: u32) -> State {
        State(self.0 | bit)
    }

    pub(crate) const fn without(self, bit: u32) -> State {
        State(self.0 & !bit)
    }

    const fn at(self, residency: Residency) -> State {
        let bits = match residency {
            Residency::Absent => 0,
            Residency::Busy => 1,
            Residency::Mapped => 2,
            Residency::Shelved => 3,
        };
        State(self.0 & !RESIDENCY | bits)
    }
}

/// The result of claiming a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The caller owns the page now; this was its state.
    Yours(State),
    /// The page is not in a wanted state.
    Not(State),
    /// Another thread owns the page, and wakes the threads that wait for it.
    Busy,
}

pub(crate) struct Pages {
    states: Box<[AtomicU32]>,
    /// For a local page that is not dirty, the digest of its content in external memory. For an absent page, the
    /// stamp of its last departure (see `s3fifo::Policy::goes`); 0 for none.
    stamps: Box<[AtomicU64]>,
}

impl Pages {
    pub(crate) fn new(states: Box<[AtomicU32]>, stamps: Box<[AtomicU64]>) -> Pages {
        Pages { states, stamps }
    }

    pub(crate) fn count(&self) -> u32 {
        self.states.len() as u32
    }

    pub(crate) fn state(&self, page: u32) -> State {
        State(self.states[page as usize].load(Ordering::Acquire))
    }

    /// Claims a page if `wanted` accepts its state. With `wait`, a busy page is marked as waited for.
    pub(crate) fn claim(&self, page: u32, wanted: impl Fn(State) -> bool, wait: bool) -> Claim {
        let word = &self.states[page as usize];
        let mut now = word.load(Ordering::Acquire);
        loop {
            let state = State(now);
            let next = match state.residency() {
                Residency::Busy if wait => state.with(WAITED),
                Residency::Busy => return Claim::Busy,
                _ if wanted(state) => state.at(Residency::Busy),
                _ => return Claim::Not(state),
            };
            match word.compare_exchange_weak(now, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) if state.residency() == Residency::Busy => return Claim::Busy,
                Ok(_) => return Claim::Yours(state),
                Err(other) => now = other,
            }
        }
    }

    /// Releases a page that the caller owns; `change` determines its other bits. Returns true when a thread waits for
    /// the page.
    #[must_use]
    pub(crate) fn release(&self, page: u32, residency: Residency, change: impl Fn(State) -> State) -> bool {
        let word = &self.states[page as usize];
        let mut now = word.load(Ordering::Relaxed);
        loop {
            debug_assert_eq!(State(now).residency(), Residency::Busy, "only who has it gives it back");
            let next = change(State(now)).without(WAITED).at(residency);
            match word.compare_exchange_weak(now, next.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return State(now).has(WAITED),
                Err(other) => now = other,
            }
        }
    }

    /// Sets and clears bits of a page, whose word other threads may change concurrently. Returns the state before.
    pub(crate) fn mark(&self, page: u32, set: u32, clear: u32) -> State {
        let word = &self.states[page as usize];
        let mut now = word.load(Ordering::Relaxed);
        loop {
            let next = now & !clear | set;
            match word.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return State(now),
                Err(other) => now = other,
            }
        }
    }

    pub(crate) fn stamp(&self, page: u32) -> u64 {
        self.stamps[page as usize].load(Ordering::Relaxed)
    }

    /// Sets the stamp; only for the owner of the page.
    pub(crate) fn set_stamp(&self, page: u32, stamp: u64) {
        self.stamps[page as usize].store(stamp, Ordering::Relaxed);
    }

    /// The word, for a futex wait until it changes.
    pub(crate) fn word(&self, page: u32) -> &AtomicU32 {
        &self.states[page as usize]
    }
}

/// Splits sorted page numbers into runs of consecutive pages: pairs of first page and count.
pub(crate) fn runs(sorted: &[u32], longest: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
    let mut rest = sorted;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let count = (0..longest).zip(rest).take_while(|(index, page)| **page == first + *index).count();
        rest = &rest[count..];
        Some((first, count as u32))
    })
}
