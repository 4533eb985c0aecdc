//! Bytes at addresses: what can be done with a part of the window.

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

/// Bytes at addresses. See [`Space`].
pub struct Mapping {
    pub(crate) part: Arc<Part>,
}

/// A part of the window that somebody has. It ends with its mapping and with the copies that are read from it.
pub(crate) struct Part {
    pub(crate) space: Space,
    /// First byte in the allocation.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    /// The source of the copy.
    pub(crate) _of: Option<Arc<Part>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Slab(Slab),
    Copy(Slab),
    Range(Access),
}

impl Mapping {
    /// Its first byte, at the start of a page. Valid, for reads and, unless it is read-only, for writes, until the
    /// mapping is dropped; nothing else in Rust refers to this memory.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.part.space.inner.pager.window.pointer(self.part.offset as usize)
    }

    /// Its length in bytes: of a slab what was asked for, rounded up to a power of two.
    pub fn len(&self) -> usize {
        self.part.len as usize
    }

    /// Whether it has no bytes: never.
    pub fn is_empty(&self) -> bool {
        self.part.len == 0
    }

    /// The space that it is a part of.
    pub fn space(&self) -> &Space {
        &self.part.space
    }

    /// Writes what was changed of it to external memory, and waits until it is there.
    ///
    /// # Errors
    /// [`MapError::Io`]; what could not be written is tried again with the next flush. [`MapError::Gone`].
    pub fn flush(&self) -> Result<(), MapError> {
        self.flush_range(0..self.len())
    }

    /// The same of some of its bytes, in whole pages.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, and those of [`Mapping::flush`].
    pub fn flush_range(&self, range: Range<usize>) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        Ok(self.part.space.inner.calls().flush(first, pages)?)
    }

    /// Makes a slab at least `len` bytes long, or shorter, where it is: its address stays, and so does what it holds.
    /// A part that is added holds zeros; a part that is cut off is discarded. No message to anyone but for giving
    /// memory back.
    ///
    /// # Errors
    /// [`MapError::Slab`] where what is behind it is in another slab, or it does not lie where one of that length
    /// can: it is as before. [`MapError::Invalid`] where it is no slab, or a private copy is read from it.
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

    /// The same mapping once more, for a call on it by somebody who has what is in it.
    pub(crate) fn shared(&self) -> Mapping {
        Mapping { part: self.part.clone() }
    }

    /// Says how bytes of it will be used; whole pages, those at the edges included.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Io`], and [`MapError::Invalid`] where so much cannot be pinned.
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

    /// Makes bytes of a slab zeros again, in whole pages: those at the edges are included. Local memory that they had
    /// is free then, and external memory, too.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Invalid`] where it is no slab.
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

    /// Copies bytes out of it, without a fault: what is not in local memory is read into `buf` itself, up to 256 KiB
    /// at a time, and takes no room. Over RDMA it is copied once more unless it is a [`Buffer`](crate::Buffer).
    /// Blocks until they are there.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, or [`MapError::Io`].
    pub fn get(&self, offset: usize, buf: &mut [u8]) -> Result<(), MapError> {
        self.get_into(offset, buf)
    }

    /// The same into memory that nobody wrote to so far; all of it holds something when this is well.
    ///
    /// # Errors
    /// Those of [`Mapping::get`].
    pub fn get_uninit(&self, offset: usize, buf: &mut [MaybeUninit<u8>]) -> Result<(), MapError> {
        self.get_into(offset, buf)
    }

    fn get_into<B: Copy>(&self, offset: usize, buf: &mut [B]) -> Result<(), MapError> {
        self.check_call(offset, buf)?;
        let mut calls = self.part.space.inner.calls();
        Ok(with_target(buf, |buf| calls.get(self.part.offset as usize + offset, buf))?)
    }

    /// Copies bytes into it, without a fault: what is not in local memory is written to external memory from where it
    /// is, as [`Mapping::get`] reads. Blocks until it is there.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Invalid`] when it is read-only, or [`MapError::Io`].
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

    /// Pages that the call has to itself must not be touched by it, and others of windows may be away when a
    /// transport does.
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
