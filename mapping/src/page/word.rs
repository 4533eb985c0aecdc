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
    /// Somebody has it to itself.
    Busy,
    /// In local memory, and in the window.
    Mapped,
    /// In local memory, and not in the window: touching it tells that it is used.
    Shelved,
}

const RESIDENCY: u32 = 0b11;
/// It has to be written before it may go. Without, its stamp is the digest of what external memory holds.
pub(crate) const DIRTY: u32 = 1 << 2;
/// Its own place in external memory holds its content, or did once.
pub(crate) const WRITTEN: u32 = 1 << 3;
/// It was touched while it was on the shelf.
pub(crate) const TOUCHED: u32 = 1 << 4;
/// Touching it asks for the pages behind it.
pub(crate) const MARK: u32 = 1 << 5;
/// Somebody waits until it is not busy.
const WAITED: u32 = 1 << 6;
/// Its content cannot be had.
pub(crate) const POISONED: u32 = 1 << 7;
/// It stays in local memory.
pub(crate) const PINNED: u32 = 1 << 8;
/// It is in a queue of the policy.
pub(crate) const QUEUED: u32 = 1 << 9;

/// The word of a page, as it was when it was looked at.
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

/// How it went to claim a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is the caller's; this is what it was.
    Yours(State),
    /// It is not what the caller wanted.
    Not(State),
    /// Somebody else has it, and will wake those who wait.
    Busy,
}

pub(crate) struct Pages {
    states: Box<[AtomicU32]>,
    /// Of a page in local memory that is not dirty, the digest of what external memory holds; of an absent
    /// one, when it left.
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

    /// Makes a page the caller's, if it is where the caller wants it. `wait`: a busy one is marked as waited for.
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

    /// Gives a page back that the caller has; `change` says how it is left. True when somebody waits for it.
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

    /// Sets and clears bits of a page that others may change at the same time.
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

    /// By the one who has the page.
    pub(crate) fn set_stamp(&self, page: u32, stamp: u64) {
        self.stamps[page as usize].store(stamp, Ordering::Relaxed);
    }

    /// The word, for those who wait until it changes.
    pub(crate) fn word(&self, page: u32) -> &AtomicU32 {
        &self.states[page as usize]
    }
}

/// Pages that lie one behind the other, as pairs of the first one and the count.
pub(crate) fn runs(sorted: &[u32], longest: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
    let mut rest = sorted;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let count = (0..longest).zip(rest).take_while(|(index, page)| **page == first + *index).count();
        rest = &rest[count..];
        Some((first, count as u32))
    })
}
