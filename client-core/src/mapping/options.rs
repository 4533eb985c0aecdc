//! How a space is used, and what is told of it.

use super::budget::Budget;

/// Who brings the page when one is touched that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// The thread that touched it, in a handler of SIGBUS: the quickest way, with no hand-over between threads. System
    /// calls that are given absent pages fail with EFAULT.
    Inline,
    /// So many threads of the library, at least one. Everything that can touch memory may touch it, system
    /// calls included.
    Handled(usize),
}

impl Faults {
    pub(super) const fn has_handlers(self) -> bool {
        matches!(self, Faults::Handled(_))
    }
}

/// How a space is used.
#[derive(Debug, Clone)]
pub struct SpaceOptions {
    /// Local memory that it may use.
    pub budget: Budget,
    /// Who brings pages.
    pub faults: Faults,
    /// Bytes at the start of the allocation whose content stays, for [`Space::map`](super::Space::map); a multiple of 2 MiB, or all. What
    /// lies behind is for slabs.
    pub kept: u64,
}

/// What a mapping lets the program do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writing is a SIGSEGV.
    ReadOnly,
    /// What is written goes to external memory when it leaves local memory, or with a flush.
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

/// What happened in a space, and what it has.
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
    /// Those of them that were fetched ahead.
    pub prefetched: u64,
    /// Pages that were never written, and so filled with zeros.
    pub zeroed: u64,
    /// Pages that were touched after they had been taken out of the window, and before they left.
    pub touched: u64,
    /// Pages that left local memory unchanged.
    pub dropped: u64,
    /// Pages that were written to external memory.
    pub written: u64,
    /// Faults that found no room in local memory, and waited.
    pub waits: u64,
    /// Operations on external memory that failed.
    pub errors: u64,
}
