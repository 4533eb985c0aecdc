//! Pages of a region of which the content is gone: an uncorrectable error of the hardware, or a file that was made
//! shorter behind this process's back. They cost what was in them and no more.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use xpm_protocol::units::PAGE_LEN;

/// Bad pages, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Bad {
    /// Looked at by the data path, which takes the lock only where there are some.
    any: AtomicBool,
    pages: Mutex<BTreeSet<u64>>,
}

impl Bad {
    pub(super) fn has_any(&self) -> bool {
        self.any.load(SeqCst)
    }

    /// Those that have bytes in a range.
    pub(super) fn within(&self, offset: u64, len: u64) -> Vec<u64> {
        if !self.has_any() || len == 0 {
            return Vec::new();
        }
        let last = (offset + len - 1) / PAGE_LEN;
        self.lock().range(offset / PAGE_LEN..=last).copied().collect()
    }

    /// Whether it is new.
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
