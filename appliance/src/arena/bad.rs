//! The pages of a region whose content is lost: by an uncorrectable error of the hardware, or because another
//! process truncated the file. Only the content of these pages is lost.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use xpm_protocol::units::PAGE_LEN;

/// The numbers of bad pages.
#[derive(Debug, Default)]
pub(super) struct Bad {
    /// Read by the data path, which takes the lock only when this is true.
    any: AtomicBool,
    pages: Mutex<BTreeSet<u64>>,
}

impl Bad {
    pub(super) fn has_any(&self) -> bool {
        self.any.load(SeqCst)
    }

    /// The bad pages that overlap the range.
    pub(super) fn within(&self, offset: u64, len: u64) -> Vec<u64> {
        if !self.has_any() || len == 0 {
            return Vec::new();
        }
        let last = (offset + len - 1) / PAGE_LEN;
        self.lock().range(offset / PAGE_LEN..=last).copied().collect()
    }

    /// Adds a page; returns whether it was not known before.
    pub(super) fn add(&self, page: u64) -> bool {
        let is_new = self.lock().insert(page);
        self.any.store(true, SeqCst);
        is_new
    }

    pub(super) fn remove(&self, page: u64) {
        let mut pages = self.lock();
        pages.remove(&page);
        self.any.store(!pages.is_empty(), SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
