//! How a space and its ranges are used.

use crate::evict::budget::Budget;
use crate::pager::Faults;

/// How a space is used.
#[derive(Debug, Clone)]
pub struct SpaceOptions {
    /// Local memory that it may use.
    pub budget: Budget,
    /// The threads that fetch pages.
    pub faults: Faults,
    /// Bytes at the start of the allocation whose content stays, for [`Space::map`](crate::Space::map); a multiple of
    /// 2 MiB, or all. The rest is for slabs.
    pub kept: u64,
}

/// The accesses that a mapping permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writing is a SIGSEGV.
    ReadOnly,
    /// Writes go to external memory when their page leaves local memory, or with a flush.
    ReadWrite,
}

/// How a range will be used; see madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Nothing is known.
    Normal,
    /// From the start to the end: it is fetched far ahead.
    Sequential,
    /// Here and there: nothing is fetched ahead.
    Random,
    /// Soon: it is brought into local memory as far as there is room, without waiting for it.
    WillNeed,
    /// Not soon: it leaves local memory; what was changed is written first. Blocks for that.
    DontNeed,
    /// It stays in local memory, which it is brought into before this returns. No more than half of the budget can be
    /// pinned.
    Pin,
    /// It need not stay any more.
    Unpin,
}
