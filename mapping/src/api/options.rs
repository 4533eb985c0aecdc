//! How a space and its ranges are used.

use crate::evict::budget::Budget;
use crate::pager::Faults;

/// How a space is used.
#[derive(Debug, Clone)]
pub struct SpaceOptions {
    /// Local memory that the space may use.
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
    /// The use is unknown.
    Normal,
    /// The range is used from its start to its end: pages are fetched far ahead.
    Sequential,
    /// The range is used in no order: no page is fetched ahead.
    Random,
    /// The range is used soon: it is brought into local memory as far as there is room. Does not wait for it.
    WillNeed,
    /// The range is not used soon: it leaves local memory, after changed pages were written. Blocks until then.
    DontNeed,
    /// The range is brought into local memory before the call returns, and stays there. At most half of the budget can
    /// be pinned.
    Pin,
    /// The range need not stay in local memory any more.
    Unpin,
}
