//! Counters of the events in a space.

use std::sync::atomic::{AtomicU64, Ordering};

use super::errors::ErrorCounts;
use super::room::Room;
use crate::page::window::PAGE;

/// The counters of a space, and its present use of local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MappingStats {
    /// Local memory that may be used, in bytes.
    pub budget: u64,
    /// Local memory that is used, in bytes.
    pub resident: u64,
    /// Pages that were touched and were not in local memory.
    pub faults: u64,
    /// Pages fetched from external memory.
    pub fetched: u64,
    /// Fetched pages that were fetched ahead of an access.
    pub prefetched: u64,
    /// Pages that were never written, and so filled with zeros.
    pub zeroed: u64,
    /// Pages that were touched after they had been taken out of the window, and before they left local memory.
    pub touched: u64,
    /// Pages that left local memory unchanged.
    pub dropped: u64,
    /// Pages that were written to external memory.
    pub written: u64,
    /// Faults that found no room in local memory, and waited.
    pub waits: u64,
    /// Operations on external memory that failed.
    pub errors: u64,
    /// Failures by cause: failed operations on external memory, and accesses that failed for another cause.
    pub causes: ErrorCounts,
}

#[derive(Default)]
pub(crate) struct Tallies {
    pub(crate) faults: AtomicU64,
    pub(crate) fetched: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) zeroed: AtomicU64,
    pub(crate) touched: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) written: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) waits: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Tallies {
    pub(crate) fn stats(&self, room: &Room, causes: ErrorCounts) -> MappingStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MappingStats {
            budget: (room.budget() * PAGE) as u64,
            resident: (room.resident() * PAGE) as u64,
            faults: get(&self.faults),
            fetched: get(&self.fetched),
            prefetched: get(&self.prefetched),
            zeroed: get(&self.zeroed),
            touched: get(&self.touched),
            dropped: get(&self.dropped),
            written: get(&self.written),
            waits: get(&self.waits),
            errors: get(&self.errors),
            causes,
        }
    }
}
