//! Counters of the requests that a server handled: the only record that the data path keeps.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use xpm_protocol::api::appliance::Counters;

/// Counters that one loop thread increments and any thread reads.
#[derive(Debug, Default)]
pub(super) struct LoopCounters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) trims: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) refused: AtomicU64,
    /// Pokes that were answered.
    pub(super) answers: AtomicU64,
}

/// Adds without a locked instruction: each counter has one writer, its loop's thread.
pub(super) fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

impl LoopCounters {
    pub(super) fn add_to(&self, sum: &mut Counters) {
        sum.reads += self.reads.load(Relaxed);
        sum.read_bytes += self.read_bytes.load(Relaxed);
        sum.writes += self.writes.load(Relaxed);
        sum.write_bytes += self.write_bytes.load(Relaxed);
        sum.trims += self.trims.load(Relaxed);
        sum.errors += self.errors.load(Relaxed);
        sum.refused += self.refused.load(Relaxed);
    }
}
