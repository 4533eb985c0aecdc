//! [`Space`]: an allocation at addresses, and its mappings.

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

/// An allocation at addresses. Clones share the same space. The space ends when the last clone and the last mapping are
/// dropped; changed pages of mapped ranges are written before.
#[derive(Clone)]
pub struct Space {
    pub(crate) inner: Arc<Inner>,
}

/// The windows of this process. Other threads bring pages into a window, and a page may leave it at any time.
static WINDOWS: RwLock<Vec<Range<usize>>> = RwLock::new(Vec::new());

/// The entry of a window in [`WINDOWS`]; removed when dropped.
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

/// Whether at least one of these addresses lies in a window of this process.
pub(crate) fn is_external(addresses: Range<usize>) -> bool {
    let windows = WINDOWS.read().unwrap_or_else(PoisonError::into_inner);
    windows.iter().any(|window| addresses.start < window.end && addresses.end > window.start)
}

pub(crate) struct Inner {
    pub(crate) listed: Listed,
    pub(crate) pager: Shared,
    pub(crate) calls: Arc<Mutex<Calls>>,
    pub(crate) carver: Mutex<Carver>,
    /// Named slabs, whose places are taken in `carver`.
    pub(crate) named: Mutex<Known>,
    /// Mapped ranges, in pages: the first page, and the first page behind the range.
    pub(crate) mapped: Mutex<BTreeMap<u32, u32>>,
    pub(crate) kept: u64,
    pub(crate) size: u64,
    pub(crate) pinned: Mutex<usize>,
    pub(crate) inline: Option<Arc<Registered>>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) _volume: Volume,
}

impl Space {
    /// Carves a slab of at least `len` bytes out of the allocation, and maps it. The slab holds zeros, and its first
    /// page is local already if there is room. No message is sent. Dropping the mapping frees the slab and discards its
    /// content.
    ///
    /// # Errors
    /// [`MapError::Slab`] when no free run is that long.
    pub fn carve(&self, len: u64) -> Result<Mapping, MapError> {
        let (slab, offset) = self.inner.carver().carve(len)?;
        self.inner.pager.begin_slab((offset / PAGE as u64) as u32);
        Ok(self.mapping(offset, slab.len, Kind::Slab(slab)))
    }

    /// Maps a range of the allocation with its content, which stays in external memory. `range` is in bytes, consists
    /// of whole pages, and lies within the kept part ([`SpaceOptions::kept`](crate::SpaceOptions::kept)).
    ///
    /// # Errors
    /// [`MapError::Range`], [`MapError::Unaligned`], [`MapError::Mapped`], or [`MapError::System`].
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

    /// Maps pages with their content, which stays.
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

    /// Carves a slab that begins with the content of the mapping `of`. Pages are copied only when they are used, and
    /// writes go to the slab only. This call flushes `of`. As long as the copy exists, the program must not write to
    /// `of`: the copy may then show the old or the new content. The memory of `of` is freed only after the copy is
    /// dropped. Behind the length of `of` the slab holds zeros.
    ///
    /// # Errors
    /// [`MapError::Slab`]; [`MapError::Io`] when `of` cannot be flushed; [`MapError::Invalid`] when `of` is a private
    /// copy itself, or belongs to another space.
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
        // Discards zeros that were fetched ahead while the slab was free.
        self.inner.calls().forget(first, pages);
        Ok(self.copied(offset, slab.len, Kind::Copy(slab), Some(of.part.clone())))
    }

    /// Changes the local memory that may be used, in bytes; takes effect within moments. A [`Budget::Share`] that was
    /// chosen at the start continues to follow the available memory.
    ///
    /// # Errors
    /// [`MapError::Invalid`] below [`Budget::MIN`], or below twice the pinned memory.
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

    /// The counters since the start, and the present use of memory.
    pub fn stats(&self) -> MappingStats {
        self.inner.pager.stats()
    }

    /// The error of the last access or call that failed; if none failed, the error of the last page that could not be
    /// written; `None` if there was no such error. From this a program learns the cause of a SIGBUS. Takes no lock and
    /// allocates nothing, so a handler of that signal may call it. Failed fetches ahead of an access are not included,
    /// because they are tried again; [`MappingStats::causes`] counts them.
    pub fn last_error(&self) -> Option<PageError> {
        self.inner.pager.errors.last()
    }

    /// Writes all changed pages to external memory, and waits until they are written.
    ///
    /// # Errors
    /// [`MapError::Io`]; the next flush tries to write the failed pages again. [`MapError::Gone`] for pages that the
    /// program discarded.
    pub fn flush(&self) -> Result<(), MapError> {
        Ok(self.inner.calls().flush(0, self.inner.pager.pages.count())?)
    }

    /// Bytes of the allocation that belong to no slab, and not to the part that is kept for ranges.
    pub fn free_bytes(&self) -> u64 {
        self.inner.carver().slabs.free_bytes()
    }

    /// Size of the allocation in bytes, as of the time when the space was opened.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// The range of addresses of all mappings: the window.
    pub fn addresses(&self) -> Range<usize> {
        self.inner.listed.0.clone()
    }

    /// The addresses that the library has reserved: the window, and ranges that only the library may lock or touch.
    pub fn reserved(&self) -> Vec<Range<usize>> {
        self.inner.pager.window.reserved()
    }

    /// Whether system calls may access absent pages.
    pub fn serves_system_calls(&self) -> bool {
        self.inner.inline.is_none() && self.inner.pager.window.uffd.reach == Reach::Kernel
    }

    /// Carves a slab of at least `len` bytes where it can grow furthest, and copies the content of `from` to it. The
    /// program must not use `from` meanwhile.
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
        // Mapped ranges were flushed when they were dropped.
        end(&self.pager, std::mem::take(&mut self.threads));
    }
}
