//! Regions that move to other places while they are in use: what has to be written where.
//!
//! Regions move one after the other, and each from its start to its end, in runs. What is below the
//! run has been copied, so it is written to both places; the run itself is locked while it is copied,
//! so writes to it wait; what lies above is written to the old place only. Reads go to the old place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use xpm_protocol::api::allocator::RegionSlot;

use super::plan::Leg;

/// A region that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    /// Its place in the allocation.
    pub(super) region: u32,
    /// Where it is: way, and place in the grant.
    pub(super) from: RegionSlot,
    /// Where it goes.
    pub(super) to: RegionSlot,
}

/// The regions that move in one change; the same for every channel.
#[derive(Debug)]
pub(super) struct Moves {
    /// By place in the allocation.
    numbers: Box<[Option<u32>]>,
    moves: Box<[Move]>,
    /// A write to a new place failed: the change cannot go on.
    failed: AtomicBool,
}

impl Moves {
    pub(super) fn new(regions: usize, moves: Vec<Move>) -> Moves {
        let mut numbers = vec![None; regions].into_boxed_slice();
        for (number, one) in (0..).zip(&moves) {
            numbers[one.region as usize] = Some(number);
        }
        Moves { numbers, moves: moves.into_boxed_slice(), failed: AtomicBool::new(false) }
    }

    pub(super) fn all(&self) -> &[Move] {
        &self.moves
    }

    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    pub(super) fn have_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Where a region goes that was at this place.
    pub(super) fn target(&self, from: RegionSlot) -> Option<RegionSlot> {
        self.moves.iter().find(|one| one.from == from).map(|one| one.to)
    }
}

/// How far a change is: the region that is being copied, what of it has been, and the run that is
/// locked.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    pub(super) moves: Arc<Moves>,
    /// Number of the region among those that move; all are copied when there is no such number.
    pub(super) number: u32,
    /// Bytes of it that are copied.
    pub(super) done: u64,
    /// End of the locked run, which begins at `done`; the same where nothing is locked.
    pub(super) locked: u64,
}

/// What becomes of a leg that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes to the old place only.
    Old,
    /// It goes to the old place, and this leg to the new one.
    Both(Leg),
    /// It waits.
    Later,
}

impl Progress {
    pub(super) fn new(moves: Arc<Moves>) -> Progress {
        Progress { moves, number: 0, done: 0, locked: 0 }
    }

    /// What becomes of a leg that changes something.
    pub(super) fn fate(&self, leg: &Leg, region_len: u64) -> Fate {
        let number = self.moves.numbers.get(leg.region as usize).copied().flatten();
        let Some(number) = number else { return Fate::Old };
        let start = leg.offset % region_len;
        let (done, locked) = match number.cmp(&self.number) {
            std::cmp::Ordering::Less => (region_len, region_len),
            std::cmp::Ordering::Equal => (self.done, self.locked),
            std::cmp::Ordering::Greater => (0, 0),
        };
        if overlaps(start, leg.len, done, locked) {
            return Fate::Later;
        }
        if start >= done {
            return Fate::Old;
        }
        let RegionSlot { grant, slot } = self.moves.moves[number as usize].to;
        let offset = u64::from(slot) * region_len + start;
        Fate::Both(Leg { grant, offset, len: leg.len.min(done - start), ..*leg })
    }

    /// Whether a leg of this region and range within it touches the locked run.
    pub(super) fn touches_lock(&self, region: u32, start: u64, len: u64) -> bool {
        let current = self.moves.moves.get(self.number as usize);
        current.is_some_and(|one| one.region == region && overlaps(start, len, self.done, self.locked))
    }

    /// The same without a lock.
    pub(super) fn unlocked(&self) -> Progress {
        Progress { locked: self.done, ..self.clone() }
    }
}

/// Whether `len` bytes at `start` touch the run from `done` to `locked`, which may be empty.
const fn overlaps(start: u64, len: u64, done: u64, locked: u64) -> bool {
    done < locked && start < locked && start + len > done
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1 << 24;

    fn leg(region: u32, start: u64, len: u64) -> Leg {
        Leg { region, grant: 0, offset: u64::from(region) * LEN + start, len, start: 0 }
    }

    fn progress(number: u32, done: u64, locked: u64) -> Progress {
        let at = |grant, slot| RegionSlot { grant, slot };
        let one = |region, slot| Move { region, from: at(0, region), to: at(3, slot) };
        Progress { moves: Arc::new(Moves::new(3, vec![one(2, 0), one(0, 1)])), number, done, locked }
    }

    #[test]
    fn what_is_copied_is_written_to_both_places() {
        let both = |region: u32, slot: u64, start: u64, len: u64| {
            Fate::Both(Leg { region, grant: 3, offset: slot * LEN + start, len, start: 0 })
        };
        let progress = progress(1, 8192, 12288);
        assert_eq!(progress.fate(&leg(1, 0, 4096), LEN), Fate::Old, "it does not move");
        assert_eq!(
            progress.fate(&leg(2, LEN - 4096, 4096), LEN),
            both(2, 0, LEN - 4096, 4096),
            "it was first"
        );
        assert_eq!(progress.fate(&leg(0, 0, 8192), LEN), both(0, 1, 0, 8192));
        assert_eq!(progress.fate(&leg(0, 4096, 8192), LEN), Fate::Later);
        assert_eq!(progress.fate(&leg(0, 12287, 1), LEN), Fate::Later);
        assert_eq!(progress.fate(&leg(0, 12288, 4096), LEN), Fate::Old);
        assert_eq!(
            progress.unlocked().fate(&leg(0, 4096, 8192), LEN),
            both(0, 1, 4096, 4096),
            "as far as it is copied"
        );
        assert!(progress.touches_lock(0, 0, 8193) && progress.touches_lock(0, 12287, 9));
        assert!(!progress.touches_lock(0, 0, 8192) && !progress.touches_lock(0, 12288, 1));
        assert!(!progress.touches_lock(2, 8192, 4096));
    }
}
