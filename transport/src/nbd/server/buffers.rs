//! The buffers of one connection whose store is not direct: an arena of pages, mapped and faulted in when the
//! connection is created, so that serving allocates no memory.

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
    /// Start of the next search: freed runs are found again when the search wraps around.
    next: usize,
}

// SAFETY: the mapping belongs to this value alone, and every access goes through this value.
unsafe impl Send for Buffers {}

/// A run of pages; [`Buffers::free`] takes it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    first: u32,
    pages: u32,
}

impl Buffers {
    /// An arena of `len` bytes, rounded up to pages.
    pub(super) fn new(len: usize) -> io::Result<Buffers> {
        let pages = len.div_ceil(PAGE_LEN).max(1);
        // SAFETY: a new private mapping at an address that the kernel chooses aliases no other memory.
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

    /// Longest run that [`Buffers::take`] can return, in bytes: half the arena, so that a request that waits
    /// for the longest run does not have to wait for all other requests.
    pub(super) const fn run_len_max(&self) -> usize {
        let half = self.used.len() / 2 * PAGE_LEN;
        if half == 0 { PAGE_LEN } else { half }
    }

    /// Takes a run of at least `len` bytes; the buffer has exactly `len`. With `None` the caller has to wait
    /// for a `free`.
    pub(super) fn take(&mut self, len: usize) -> Option<(Run, IoBuf)> {
        let pages = len.div_ceil(PAGE_LEN).max(1);
        let first = self.find(self.next, pages).or_else(|| self.find(0, pages))?;
        self.used[first..first + pages].fill(true);
        self.next = first + pages;
        // SAFETY: `first + pages` is within the mapping, so the address is within it too.
        let address = unsafe { self.base.add(first * PAGE_LEN) };
        // SAFETY: the run is mapped, and not given out again until it is freed; the connection keeps this
        // value, and so the mapping, for as long as its store.
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
        // SAFETY: `new` created the mapping with this length, and no buffer of it is in use: the connection
        // drops its store, which may hold some, before its buffers.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.used.len() * PAGE_LEN) };
        debug_assert!(unmapped.is_ok(), "the mapping is this value's own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_do_not_overlap_and_can_be_freed() {
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
