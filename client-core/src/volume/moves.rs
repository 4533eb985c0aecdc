//! Regions that move to other places while they are in use: determines the places that each write goes to.
//!
//! Regions move one after the other, and each from its start to its end, in runs. Bytes below the current run
//! are copied already, so writes to them go to both places. The current run is locked while it is copied, so
//! writes to it wait. Writes above it go to the old place only. Reads go to the old place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use xpm_protocol::api::allocator::RegionSlot;

use super::plan::Leg;

/// A region that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    /// The region, by its place in the allocation.
    pub(super) region: u32,
    /// The old place: number of the path, and region within the grant.
    pub(super) from: RegionSlot,
    /// The new place.
    pub(super) to: RegionSlot,
}

/// The regions that move in one change; shared by all channels.
#[derive(Debug)]
pub(super) struct Moves {
    /// Numbers of the moves, by the region's place in the allocation.
    numbers: Box<[Option<u32>]>,
    moves: Box<[Move]>,
    /// Whether a write to a new place failed, so that the change cannot continue.
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

    /// The new place of the region at the old place `from`.
    pub(super) fn target(&self, from: RegionSlot) -> Option<RegionSlot> {
        self.moves.iter().find(|one| one.from == from).map(|one| one.to)
    }
}

/// The progress of a change: the region that is being copied, its bytes that are copied, and the locked run.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    pub(super) moves: Arc<Moves>,
    /// Number of the region among those that move; when no region has this number, all are copied.
    pub(super) number: u32,
    /// Bytes of the region that are copied.
    pub(super) done: u64,
    /// End of the locked run, which begins at `done`; equal to `done` when no run is locked.
    pub(super) locked: u64,
}

/// The treatment of a leg that changes data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The leg goes to the old place only.
    Old,
    /// The leg goes to the old place, and the contained leg to the new place.
    Both(Leg),
    /// The leg waits.
    Later,
}

impl Progress {
    pub(super) fn new(moves: Arc<Moves>) -> Progress {
        Progress { moves, number: 0, done: 0, locked: 0 }
    }

    /// The treatment of a leg that changes data.
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

    /// Whether a leg of this region and range within the region touches the locked run.
    pub(super) fn touches_lock(&self, region: u32, start: u64, len: u64) -> bool {
        let current = self.moves.moves.get(self.number as usize);
        current.is_some_and(|one| one.region == region && overlaps(start, len, self.done, self.locked))
    }

    /// The same progress without a locked run.
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
    fn copied_bytes_are_written_to_both_places() {
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
