//! [`Mapping`]: a part of the window, and the calls on it.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::error::MapError;
use super::options::{Access, Advice};
use super::slab::Slab;
use super::space::{Space, is_external};
use crate::page::window::{PAGE, with_source, with_target};
use crate::page::word::PINNED;
use crate::pager::prefetch::Habit;

/// External memory at addresses of this process; see [`Space`].
pub struct Mapping {
    pub(crate) part: Arc<Part>,
}

/// A part of the window in use. It ends when its mapping and the private copies of it are dropped.
pub(crate) struct Part {
    pub(crate) space: Space,
    /// First byte in the allocation.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    /// For a private copy, the part that it copies, which must not end before the copy.
    pub(crate) _of: Option<Arc<Part>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Slab(Slab),
    Copy(Slab),
    Range(Access),
}

impl Mapping {
    /// The address of the first byte, at the start of a page. It is valid for reads, and for writes unless the mapping
    /// is read-only, until the mapping is dropped. The library never makes a reference to this memory.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.part.space.inner.pager.window.pointer(self.part.offset as usize)
    }

    /// The length in bytes: for a slab the requested length, rounded up to a power of two.
    pub fn len(&self) -> usize {
        self.part.len as usize
    }

    /// Whether the mapping has no bytes: never true.
    pub fn is_empty(&self) -> bool {
        self.part.len == 0
    }

    /// The space that the mapping is a part of.
    pub fn space(&self) -> &Space {
        &self.part.space
    }

    /// Writes the changed pages of the mapping to external memory, and waits until they are written.
    ///
    /// # Errors
    /// [`MapError::Io`]; the next flush tries to write the failed pages again. [`MapError::Gone`] for pages that the
    /// program discarded.
    pub fn flush(&self) -> Result<(), MapError> {
        self.flush_range(0..self.len())
    }

    /// As [`Mapping::flush`], for a range of bytes of the mapping; pages at the edges are included.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of the mapping, and the errors of [`Mapping::flush`].
    pub fn flush_range(&self, range: Range<usize>) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        Ok(self.part.space.inner.calls().flush(first, pages)?)
    }

    /// Resizes a slab in place to at least `len` bytes: its address stays, and so does its content. An added part holds
    /// zeros; a part that is cut off is discarded. No message is sent, except to free external memory.
    ///
    /// # Errors
    /// [`MapError::Slab`] if another slab lies behind this one, or if a slab of the new length cannot begin at its
    /// address; the slab is unchanged then. [`MapError::Invalid`] if the mapping is no slab, or a private copy of it
    /// exists.
    pub fn resize(&mut self, len: u64) -> Result<(), MapError> {
        let (Kind::Slab(slab), now) = (self.part.kind, self.part.len) else {
            return Err(MapError::Invalid("only a slab can be resized: map a longer range".to_owned()));
        };
        let Some(part) = Arc::get_mut(&mut self.part) else {
            return Err(MapError::Invalid(
                "a private copy is read from this slab: drop that first".to_owned(),
            ));
        };
        let cut =
            len.div_ceil(PAGE as u64).checked_next_power_of_two().map_or(now, |pages| pages * PAGE as u64);
        if len > 0 && cut < now {
            let (first, pages) =
                (part.first() + (cut / PAGE as u64) as u32, ((now - cut) / PAGE as u64) as u32);
            part.unpin(first, pages);
            part.space.inner.calls().forget(first, pages);
        }
        let slab = part.space.inner.carver().slabs.resize(slab, len)?;
        (part.len, part.kind) = (slab.len, Kind::Slab(slab));
        Ok(())
    }

    /// A second handle of the same mapping, for a call on a container's memory.
    pub(crate) fn shared(&self) -> Mapping {
        Mapping { part: self.part.clone() }
    }

    /// Gives advice about a range of bytes of the mapping; pages at the edges are included.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of the mapping, [`MapError::Io`], and [`MapError::Invalid`] if more would be pinned
    /// than allowed.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        let pager = &self.part.space.inner.pager;
        match advice {
            Advice::Normal => pager.set_habit(first, pages, Habit::Normal),
            Advice::Sequential => pager.set_habit(first, pages, Habit::Sequential),
            Advice::Random => pager.set_habit(first, pages, Habit::Random),
            Advice::WillNeed => self.part.space.inner.calls().will_need(first, pages)?,
            Advice::DontNeed => self.part.space.inner.calls().dont_need(first, pages)?,
            Advice::Pin => self.pin(first, pages)?,
            Advice::Unpin => self.part.unpin(first, pages),
        }
        Ok(())
    }

    /// Sets a range of a slab to zeros, extended to whole pages at both edges. This frees the range's local memory and
    /// its external memory.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of the mapping, [`MapError::Invalid`] if it is no slab.
    pub fn clear(&self, range: Range<usize>) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        if !matches!(self.part.kind, Kind::Slab(_)) {
            return Err(MapError::Invalid(
                "only a slab can be made zeros: write zeros, or carve another one".to_owned(),
            ));
        }
        self.advise(range, Advice::Unpin)?;
        if pages > 0 {
            self.part.space.inner.calls().clear(first, pages);
        }
        Ok(())
    }

    /// Copies bytes from the mapping without a fault: absent pages are read into `buf` directly, up to 256 KiB at a
    /// time, and take no room in local memory. Over RDMA they are copied once more unless `buf` is a
    /// [`Buffer`](crate::Buffer). Blocks until all bytes are copied.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of the mapping, [`MapError::Invalid`] if `buf` is external memory itself, or
    /// [`MapError::Io`].
    pub fn get(&self, offset: usize, buf: &mut [u8]) -> Result<(), MapError> {
        self.get_into(offset, buf)
    }

    /// As [`Mapping::get`], into uninitialized memory; all of it is initialized on success.
    ///
    /// # Errors
    /// The errors of [`Mapping::get`].
    pub fn get_uninit(&self, offset: usize, buf: &mut [MaybeUninit<u8>]) -> Result<(), MapError> {
        self.get_into(offset, buf)
    }

    fn get_into<B: Copy>(&self, offset: usize, buf: &mut [B]) -> Result<(), MapError> {
        self.check_call(offset, buf)?;
        let mut calls = self.part.space.inner.calls();
        Ok(with_target(buf, |buf| calls.get(self.part.offset as usize + offset, buf))?)
    }

    /// Copies bytes to the mapping without a fault: the bytes of absent pages are written to external memory directly
    /// from `bytes`, as [`Mapping::get`] reads them. Blocks until all bytes are written.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of the mapping, [`MapError::Invalid`] if it is read-only or if `bytes` is external
    /// memory itself, or [`MapError::Io`].
    pub fn put(&self, offset: usize, bytes: &[u8]) -> Result<(), MapError> {
        self.check_call(offset, bytes)?;
        if matches!(self.part.kind, Kind::Range(Access::ReadOnly)) {
            return Err(MapError::Invalid("the mapping is read-only: map it for writing, too".to_owned()));
        }
        let mut calls = self.part.space.inner.calls();
        Ok(with_source(bytes, |bytes| calls.put(self.part.offset as usize + offset, bytes))?)
    }

    fn pin(&self, first: u32, pages: u32) -> Result<(), MapError> {
        let inner = &self.part.space.inner;
        let mut pinned = inner.pinned();
        let new = (first..first + pages).filter(|page| !inner.pager.pages.state(*page).has(PINNED)).count();
        let most = inner.pager.room.budget() / 2;
        if *pinned + new > most {
            let line = format!(
                "{new} more pages cannot be pinned: {pinned} are, and {most}, half of the budget, can be; unpin some, or raise the budget"
            );
            return Err(MapError::Invalid(line));
        }
        inner.calls().pin(first, pages)?;
        *pinned += new;
        inner.pager.room.set_pinned(*pinned);
        Ok(())
    }

    /// Checks the range, and that the buffer is not external memory: a call that touched a page that it owns itself
    /// would wait for itself, and any other page of a window may be absent when a transport accesses it.
    fn check_call<B>(&self, offset: usize, buf: &[B]) -> Result<(), MapError> {
        self.pages_of(&(offset..offset.saturating_add(buf.len())))?;
        let addresses = buf.as_ptr_range();
        match is_external(addresses.start as usize..addresses.end as usize) {
            true => Err(MapError::Invalid(
                "the buffer is external memory itself: copy by accesses, or through a buffer that is not"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }

    fn pages_of(&self, range: &Range<usize>) -> Result<(u32, u32), MapError> {
        if range.start > range.end || range.end > self.len() {
            let (start, end) = (range.start as u64, range.end as u64);
            return Err(MapError::Range {
                start,
                end,
                kept: self.part.len,
                size: self.part.space.inner.size,
            });
        }
        let first = self.part.first() + (range.start / PAGE) as u32;
        let behind = self.part.first() + range.end.div_ceil(PAGE) as u32;
        Ok((first, behind - first))
    }
}

impl Part {
    pub(crate) fn first(&self) -> u32 {
        (self.offset / PAGE as u64) as u32
    }

    pub(crate) fn pages(&self) -> u32 {
        (self.len / PAGE as u64) as u32
    }

    fn unpin(&self, first: u32, pages: u32) {
        let pager = &self.space.inner.pager;
        let mut pinned = self.space.inner.pinned();
        let was = |page: &u32| pager.pages.mark(*page, 0, PINNED).has(PINNED);
        *pinned -= (first..first + pages).filter(was).count();
        pager.room.set_pinned(*pinned);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let inner = &self.space.inner;
        let (first, pages) = (self.first(), self.pages());
        self.unpin(first, pages);
        inner.pager.set_habit(first, pages, Habit::Normal);
        match self.kind {
            Kind::Range(access) => {
                // Pages that cannot be written are lost with their appliance; `flush` reports that.
                let _ = inner.calls().dont_need(first, pages);
                inner.calls().heal(first, pages);
                if access == Access::ReadOnly {
                    let _ = self.space.protect(first, pages, false);
                }
                inner.mapped().remove(&first);
            }
            Kind::Slab(slab) | Kind::Copy(slab) => {
                if matches!(self.kind, Kind::Copy(_)) {
                    inner.pager.set_lent(first, pages, None);
                }
                inner.calls().forget(first, pages);
                let freed = inner.carver().slabs.free(slab);
                debug_assert!(freed.is_ok(), "{freed:?}");
            }
        }
    }
}
