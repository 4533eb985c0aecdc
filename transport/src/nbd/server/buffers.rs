//! The buffers of one connection to a store that is not direct: an arena of pages, mapped and
//! faulted in when the connection is made, so that nothing is allocated while it serves.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::io::IoBuf;

const PAGE_LEN: usize = xpm_protocol::units::PAGE_LEN as usize;

/// Runs of pages out of one mapping.
pub(super) struct Buffers {
    base: NonNull<u8>,
    used: Box<[bool]>,
    /// Where the next search starts: freed runs are found again after one round.
    next: usize,
}

// SAFETY: the mapping belongs to this value alone, and is reached through it only.
unsafe impl Send for Buffers {}

/// A run of pages; goes back with [`Buffers::free`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    first: u32,
    pages: u32,
}

impl Buffers {
    /// An arena of `len` bytes, rounded up to pages.
    pub(super) fn new(len: usize) -> io::Result<Buffers> {
        let pages = len.div_ceil(PAGE_LEN).max(1);
        // SAFETY: a new private mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                pages * PAGE_LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Buffers { base, used: vec![false; pages].into_boxed_slice(), next: 0 })
    }

    /// Longest run that can ever be had, in bytes: half the arena, so that one request that waits
    /// for it does not have to wait for all others.
    pub(super) const fn run_len_max(&self) -> usize {
        let half = self.used.len() / 2 * PAGE_LEN;
        if half == 0 { PAGE_LEN } else { half }
    }

    /// A run of at least `len` bytes, and the buffer of exactly `len`. None: wait for a `free`.
    pub(super) fn take(&mut self, len: usize) -> Option<(Run, IoBuf)> {
        let pages = len.div_ceil(PAGE_LEN).max(1);
        let first = self.find(self.next, pages).or_else(|| self.find(0, pages))?;
        self.used[first..first + pages].fill(true);
        self.next = first + pages;
        // SAFETY: `first + pages` is within the mapping, so the address is too.
        let address = unsafe { self.base.add(first * PAGE_LEN) };
        // SAFETY: the run is mapped, and given to nobody else until it is freed; this value, and so
        // the mapping, is kept by the connection for as long as its store.
        let buf = unsafe { IoBuf::new(address, len) };
        Some((Run { first: first as u32, pages: pages as u32 }, buf))
    }

    pub(super) fn free(&mut self, run: Run) {
        let range = run.first as usize..(run.first + run.pages) as usize;
        debug_assert!(self.used[range.clone()].iter().all(|used| *used), "a run is freed once");
        self.used[range].fill(false);
    }

    fn find(&self, from: usize, pages: usize) -> Option<usize> {
        let mut first = from;
        while first + pages <= self.used.len() {
            match self.used[first..first + pages].iter().rposition(|used| *used) {
                Some(taken) => first += taken + 1,
                None => return Some(first),
            }
        }
        None
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no buffer of it is in use:
        // the connection drops its store, which may hold some, before its buffers.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.used.len() * PAGE_LEN) };
        debug_assert!(unmapped.is_ok(), "the mapping is this value's own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_do_not_overlap_and_come_back() {
        let mut buffers = Buffers::new(8 * PAGE_LEN).unwrap();
        assert_eq!(buffers.run_len_max(), 4 * PAGE_LEN);
        let (a, first) = buffers.take(3 * PAGE_LEN).unwrap();
        let (_b, second) = buffers.take(3 * PAGE_LEN + 1).unwrap();
        assert!(second.as_ptr() >= first.as_ptr().wrapping_add(3 * PAGE_LEN));
        assert!(buffers.take(2 * PAGE_LEN).is_none());
        buffers.free(a);
        let (_c, third) = buffers.take(2 * PAGE_LEN).unwrap();
        assert_eq!(third.as_ptr(), first.as_ptr());
        assert_eq!(buffers.take(1).unwrap().1.len(), 1);
    }
}
