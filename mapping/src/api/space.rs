//! An allocation at addresses, and what is mapped of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use super::CHUNK_LEN;
use super::carver::Carver;
use super::error::{MapError, system};
use super::mapping::{Kind, Mapping, Part};
use super::named::Known;
use super::open::end;
use super::options::Access;
use crate::evict::budget::Budget;
use crate::fault::calls::Calls;
use crate::fault::sigbus::Registered;
use crate::page::uffd::Reach;
use crate::page::window::{PAGE, Window};
use crate::pager::errors::PageError;
use crate::pager::stats::MappingStats;
use crate::pager::{CHUNK, Shared};
use xpm_client_core::volume::Volume;

/// An allocation at addresses. Clones are the same; it ends with the last of them and of its mappings, and writes
/// what was changed of what stays before that.
#[derive(Clone)]
pub struct Space {
    pub(crate) inner: Arc<Inner>,
}

/// Windows of this process. What lies in one is brought by others, and may leave at any time.
static WINDOWS: RwLock<Vec<Range<usize>>> = RwLock::new(Vec::new());

/// A window that is in the list until this is dropped.
pub(crate) struct Listed(Range<usize>);

impl Listed {
    pub(crate) fn new(window: &Window) -> Listed {
        let addresses = window.address()..window.address() + window.len();
        WINDOWS.write().unwrap_or_else(PoisonError::into_inner).push(addresses.clone());
        Listed(addresses)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        WINDOWS.write().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != self.0);
    }
}

/// Whether any of these addresses is in a window of this process.
pub(crate) fn is_external(addresses: Range<usize>) -> bool {
    let windows = WINDOWS.read().unwrap_or_else(PoisonError::into_inner);
    windows.iter().any(|window| addresses.start < window.end && addresses.end > window.start)
}

pub(crate) struct Inner {
    pub(crate) listed: Listed,
    pub(crate) pager: Shared,
    pub(crate) calls: Arc<Mutex<Calls>>,
    pub(crate) carver: Mutex<Carver>,
    /// Slabs with names; nothing else is carved where they are.
    pub(crate) named: Mutex<Known>,
    /// Ranges that are mapped by range, in pages: the first, and the first behind it.
    pub(crate) mapped: Mutex<BTreeMap<u32, u32>>,
    pub(crate) kept: u64,
    pub(crate) size: u64,
    pub(crate) pinned: Mutex<usize>,
    pub(crate) inline: Option<Arc<Registered>>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) _volume: Volume,
}

impl Space {
    /// Carves a slab of at least `len` bytes out of the allocation and shows it. It holds zeros, and its first page is
    /// local already where there is room. No message to anyone. It is given back when the mapping is dropped; what it
    /// held is forgotten.
    ///
    /// # Errors
    /// [`MapError::Slab`] when no free run is that long.
    pub fn carve(&self, len: u64) -> Result<Mapping, MapError> {
        let (slab, offset) = self.inner.carver().carve(len)?;
        self.inner.pager.begin_slab((offset / PAGE as u64) as u32);
        Ok(self.mapping(offset, slab.len, Kind::Slab(slab)))
    }

    /// Shows a range of the allocation with what it holds, which stays. `range` is in bytes, of whole pages, within the
    /// part that is kept.
    ///
    /// # Errors
    /// [`MapError::Range`], [`MapError::Unaligned`], [`MapError::Mapped`], or what the system refuses.
    pub fn map(&self, range: Range<u64>, access: Access) -> Result<Mapping, MapError> {
        let (start, end) = (range.start, range.end);
        if let Some(odd) = [start, end].into_iter().find(|edge| !edge.is_multiple_of(PAGE as u64)) {
            return Err(MapError::Unaligned(odd));
        }
        if start >= end || end > self.inner.kept {
            let (kept, size) = (self.inner.kept, self.inner.size);
            return Err(MapError::Range { start, end, kept, size });
        }
        let (first, behind) = ((start / PAGE as u64) as u32, (end / PAGE as u64) as u32);
        self.map_pages(first, behind, access)
    }

    /// Maps pages with what they hold, which stays.
    pub(crate) fn map_pages(&self, first: u32, behind: u32, access: Access) -> Result<Mapping, MapError> {
        let mut mapped = self.inner.mapped();
        let before = mapped.range(..behind).next_back().filter(|(_, other)| **other > first);
        if let Some((other, other_behind)) = before {
            let (start, end) = (u64::from(*other) * PAGE as u64, u64::from(*other_behind) * PAGE as u64);
            return Err(MapError::Mapped { start, end });
        }
        if access == Access::ReadOnly {
            self.protect(first, behind - first, true).map_err(system("make the range read-only"))?;
        }
        mapped.insert(first, behind);
        drop(mapped);
        let (start, len) = (u64::from(first) * PAGE as u64, u64::from(behind - first) * PAGE as u64);
        Ok(self.mapping(start, len, Kind::Range(access)))
    }

    /// A slab with what another mapping holds now, page by page as it is used: writes go to the slab only. The other
    /// one must be flushed, must not be written to while this one is there, or this one may show either, and is not
    /// given back before it. Behind the length of the other one are zeros.
    ///
    /// # Errors
    /// [`MapError::Slab`], [`MapError::Io`] when the other one cannot be flushed; [`MapError::Invalid`] when it is
    /// a private copy itself.
    pub fn private_copy(&self, of: &Mapping) -> Result<Mapping, MapError> {
        if !Arc::ptr_eq(&self.inner, &of.space().inner) || matches!(of.part.kind, Kind::Copy(_)) {
            return Err(MapError::Invalid(
                "only a mapping of the same space that is no private copy can be copied".to_owned(),
            ));
        }
        of.flush()?;
        let (slab, offset) = self.inner.carver().carve(of.part.len.max(CHUNK_LEN))?;
        let (first, pages) = ((offset / PAGE as u64) as u32, (slab.len / PAGE as u64) as u32);
        let source = of.part.first()..of.part.first() + of.part.pages();
        self.inner.pager.set_lent(first, pages, Some(&source));
        // Zeros that were brought ahead of need when it was nobody's.
        self.inner.calls().forget(first, pages);
        Ok(self.copied(offset, slab.len, Kind::Copy(slab), Some(of.part.clone())))
    }

    /// Changes how much local memory may be used; takes effect within moments. A [`Budget::Share`] that
    /// was chosen at the start goes on to follow what is available.
    ///
    /// # Errors
    /// [`MapError::Invalid`] below [`Budget::MIN`], or below twice of what is pinned.
    pub fn set_budget(&self, bytes: u64) -> Result<(), MapError> {
        Budget::Fixed(bytes).check().map_err(MapError::Invalid)?;
        let pinned = self.inner.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if (bytes as usize / PAGE) < *pinned * 2 {
            let least = *pinned * 2 * PAGE;
            return Err(MapError::Invalid(format!(
                "what is pinned needs a budget of {least} bytes: unpin some of it"
            )));
        }
        self.inner.pager.room.set_budget(bytes as usize / PAGE);
        self.inner.pager.evictor.ring();
        self.inner.pager.wake_starving();
        Ok(())
    }

    /// What happened so far, and what is there.
    pub fn stats(&self) -> MappingStats {
        self.inner.pager.stats()
    }

    /// Why an access or a call could last not be served, or, where all could, a page not be written; none: nothing
    /// failed. This is how a program learns the cause of a SIGBUS. Takes no lock and allocates nothing, so a handler
    /// of that signal may call it. Content that was only fetched ahead and failed is not here, for it is tried again;
    /// [`MappingStats::causes`] counts it.
    pub fn last_error(&self) -> Option<PageError> {
        self.inner.pager.errors.last()
    }

    /// Writes all that was changed to external memory, and waits until it is there.
    ///
    /// # Errors
    /// [`MapError::Io`]; what could not be written is tried again with the next flush. [`MapError::Gone`].
    pub fn flush(&self) -> Result<(), MapError> {
        Ok(self.inner.calls().flush(0, self.inner.pager.pages.count())?)
    }

    /// Bytes of the allocation that are in no slab, and are not kept for ranges.
    pub fn free_bytes(&self) -> u64 {
        self.inner.carver().slabs.free_bytes()
    }

    /// Size of the allocation in bytes, as it was when it was opened.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// All addresses that its mappings can have.
    pub fn addresses(&self) -> Range<usize> {
        self.inner.listed.0.clone()
    }

    /// Addresses that the library has reserved, besides those of its mappings: nobody else may lock or touch them.
    pub fn reserved(&self) -> Vec<Range<usize>> {
        self.inner.pager.window.reserved()
    }

    /// Whether system calls may be given absent pages.
    pub fn serves_system_calls(&self) -> bool {
        self.inner.inline.is_none() && self.inner.pager.window.uffd.reach == Reach::Kernel
    }

    /// A slab that is longer than another one, with what that one holds, where it can grow furthest. Nobody may use
    /// the other one meanwhile.
    pub(crate) fn moved_to_grow(&self, from: &Mapping, len: u64) -> Result<Mapping, MapError> {
        let (slab, offset) = self.inner.carver().carve_to_grow(len)?;
        let to = self.mapping(offset, slab.len, Kind::Slab(slab));
        let pages = from.part.pages().min(to.part.pages());
        self.inner.calls().transfer(from.part.first(), to.part.first(), pages)?;
        Ok(to)
    }

    fn mapping(&self, offset: u64, len: u64, kind: Kind) -> Mapping {
        self.copied(offset, len, kind, None)
    }

    fn copied(&self, offset: u64, len: u64, kind: Kind, of: Option<Arc<Part>>) -> Mapping {
        Mapping { part: Arc::new(Part { space: self.clone(), offset, len, kind, _of: of }) }
    }

    pub(crate) fn protect(&self, first: u32, count: u32, read_only: bool) -> std::io::Result<()> {
        let pager = &self.inner.pager;
        let whole = first.is_multiple_of(CHUNK) && count.is_multiple_of(CHUNK);
        if whole && !read_only {
            pager.set_read_only(first, count, false);
        }
        pager.window.set_writable(first, count, !read_only)?;
        if whole && read_only {
            pager.set_read_only(first, count, true);
        }
        Ok(())
    }
}

impl Inner {
    pub(crate) fn calls(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn carver(&self) -> std::sync::MutexGuard<'_, Carver> {
        self.carver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn mapped(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, u32>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pinned(&self) -> std::sync::MutexGuard<'_, usize> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Mappings that stay were flushed when they were dropped.
        end(&self.pager, std::mem::take(&mut self.threads));
    }
}
