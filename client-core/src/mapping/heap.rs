//! Containers whose memory is external.
//!
//! Blocks of half a page and more are slabs. Smaller ones are pieces of slabs of 64 KiB, of one length each,
//! whose free pieces are remembered in local memory: freeing one touches no external page.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use allocator_api2::alloc::{AllocError, Allocator};

use super::{Mapping, Space};

/// Shortest and longest piece.
const PIECE_MIN: usize = 16;
const PIECE_MAX: usize = 2048;
/// Length of the slabs that pieces are of.
const POOL_LEN: u64 = 64 << 10;
/// Lengths of pieces: powers of two.
const CLASSES: usize = (PIECE_MAX / PIECE_MIN).ilog2() as usize + 1;
/// Greatest alignment: that of a page.
const ALIGN_MAX: usize = 4096;

/// Gives memory of a [`Space`] to containers, by the interface of the crate `allocator-api2`:
/// `allocator_api2::vec::Vec::new_in(space.allocator())` is an array that grows in external memory. Clones give from
/// the same. Alignments of more than a page cannot be had. Memory that was never written holds zeros, so
/// `allocate_zeroed` of long blocks costs nothing.
#[derive(Clone)]
pub struct SpaceAllocator {
    inner: Arc<Heap>,
}

struct Heap {
    space: Space,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// Slabs by their address.
    long: BTreeMap<usize, Mapping>,
    pools: BTreeMap<usize, Pool>,
    /// Pools with free pieces, by class.
    open: [Vec<usize>; CLASSES],
}

/// A slab cut into pieces of one length.
struct Pool {
    slab: Mapping,
    free: Vec<u16>,
    pieces: u16,
}

impl SpaceAllocator {
    pub(super) fn new(space: Space) -> SpaceAllocator {
        SpaceAllocator { inner: Arc::new(Heap { space, blocks: Mutex::default() }) }
    }

    /// The space that the memory is of.
    pub fn space(&self) -> &Space {
        &self.inner.space
    }
}

/// The class of a piece that holds so much; none where it takes a slab.
fn class_of(layout: Layout) -> Option<usize> {
    let len = layout.size().max(layout.align()).max(PIECE_MIN).next_power_of_two();
    (len <= PIECE_MAX).then(|| (len / PIECE_MIN).ilog2() as usize)
}

const fn piece_len(class: usize) -> usize {
    PIECE_MIN << class
}

impl Heap {
    fn blocks(&self) -> std::sync::MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn long(&self, layout: Layout) -> Option<NonNull<[u8]>> {
        let mapping = self.space.carve(layout.size() as u64).ok()?;
        let block = NonNull::slice_from_raw_parts(mapping.as_ptr(), mapping.len());
        self.blocks().long.insert(mapping.as_ptr().as_ptr() as usize, mapping);
        Some(block)
    }

    fn piece(&self, class: usize) -> Option<NonNull<[u8]>> {
        let len = piece_len(class);
        let mut blocks = self.blocks();
        let blocks = &mut *blocks;
        if blocks.open[class].is_empty() {
            let slab = self.space.carve(POOL_LEN).ok()?;
            let pieces = (POOL_LEN as usize / len) as u16;
            let address = slab.as_ptr().as_ptr() as usize;
            blocks.pools.insert(address, Pool { slab, free: (0..pieces).rev().collect(), pieces });
            blocks.open[class].push(address);
        }
        let address = *blocks.open[class].last()?;
        let pool = blocks.pools.get_mut(&address)?;
        let piece = pool.free.pop()?;
        if pool.free.is_empty() {
            blocks.open[class].pop();
        }
        // SAFETY: the piece is within the slab.
        let start = unsafe { pool.slab.as_ptr().add(usize::from(piece) * len) };
        Some(NonNull::slice_from_raw_parts(start, len))
    }

    fn free_piece(&self, address: usize, class: usize) {
        let mut blocks = self.blocks();
        let blocks = &mut *blocks;
        let Some((&base, pool)) = blocks.pools.range_mut(..=address).next_back() else { return };
        if pool.free.is_empty() {
            blocks.open[class].push(base);
        }
        pool.free.push(((address - base) / piece_len(class)) as u16);
        // One that nobody uses goes, unless it is the last of its class.
        if pool.free.len() == usize::from(pool.pieces) && blocks.open[class].len() > 1 {
            blocks.open[class].retain(|other| *other != base);
            blocks.pools.remove(&base);
        }
    }
}

// SAFETY: blocks are parts of slabs that stay where they are until they are given back, or the last clone is
// dropped; no two overlap, for slabs do not, and a piece is in one hand or in one free list.
unsafe impl Allocator for SpaceAllocator {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.align() > ALIGN_MAX {
            return Err(AllocError);
        }
        if layout.size() == 0 {
            let dangling =
                NonNull::without_provenance(std::num::NonZero::new(layout.align()).ok_or(AllocError)?);
            return Ok(NonNull::slice_from_raw_parts(dangling, 0));
        }
        match class_of(layout) {
            Some(class) => self.inner.piece(class),
            None => self.inner.long(layout),
        }
        .ok_or(AllocError)
    }

    fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let block = self.allocate(layout)?;
        if class_of(layout).is_some() && layout.size() > 0 {
            // SAFETY: just allocated; long blocks are new slabs, which hold zeros.
            unsafe { block.cast::<u8>().write_bytes(0, block.len()) };
        }
        Ok(block)
    }

    unsafe fn deallocate(&self, pointer: NonNull<u8>, layout: Layout) {
        if layout.size() == 0 {
            return;
        }
        let address = pointer.as_ptr() as usize;
        match class_of(layout) {
            Some(class) => self.inner.free_piece(address, class),
            None => {
                let slab = self.inner.blocks().long.remove(&address);
                // Not under the lock: giving memory back takes its time.
                drop(slab);
            }
        }
    }
}
