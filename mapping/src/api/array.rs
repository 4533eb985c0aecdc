//! Containers whose memory is external.
//!
//! Blocks of more than half a page are slabs. A smaller block is a piece of a slab of 64 KiB that is cut into pieces of
//! one length. The list of free pieces is in local memory, so freeing a piece touches no external page.
//!
//! A block grows in place as long as the memory behind it is free. Otherwise it moves to the longest free run, so that
//! this is rare. The library copies its content in runs that take no room in local memory: so a container of many times
//! the budget evicts no page when it grows, and causes no fault.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use allocator_api2::alloc::{AllocError, Allocator};
use allocator_api2::vec::Vec as VecIn;

use super::error::MapError;
use super::mapping::Mapping;
use super::options::Advice;
use super::slab::SlabError;
use super::space::Space;

/// A growable array in external memory, made by [`Space::array`]. It is a `Vec` with all of its methods.
///
/// Growing brings no page of the array into local memory: the array grows in place, at no cost, while the addresses
/// behind it are free, and is copied by the library otherwise. [`Space::array`] with a capacity reserves addresses from
/// the start. `push` and similar methods end the program when the allocation is full, as everywhere in Rust; a
/// `try_reserve` before them returns that as an error.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let space: xpm_mapping::Space = unimplemented!();
/// use xpm_mapping::{Advice, Array};
///
/// let mut numbers: Array<u64> = space.array(1 << 30)?; // 8 GiB of addresses, and no memory so far
/// for number in 0..1 << 20 {
///     numbers.try_reserve(1).map_err(|_| "the allocation is full")?;
///     numbers.push(number);
/// }
/// numbers.allocator().advise(&numbers, Advice::Sequential)?;
/// assert_eq!(numbers.iter().sum::<u64>(), (1 << 20) * ((1 << 20) - 1) / 2);
/// # Ok(())
/// # }
/// ```
pub type Array<T> = VecIn<T, SpaceAllocator>;

/// Shortest and longest piece.
const PIECE_MIN: usize = 16;
const PIECE_MAX: usize = 2048;
/// Length of the slabs that are cut into pieces, in bytes.
const POOL_LEN: u64 = 64 << 10;
/// Number of piece lengths, which are powers of two.
const CLASSES: usize = (PIECE_MAX / PIECE_MIN).ilog2() as usize + 1;
/// Greatest alignment: that of a page.
const ALIGN_MAX: usize = 4096;

/// Gives memory of a [`Space`] to containers, by the interface of the crate `allocator-api2`:
/// `allocator_api2::vec::Vec::new_in(space.allocator())` is an array that grows in external memory. Clones share the
/// same memory. The largest alignment is a page. Unwritten memory holds zeros, so `allocate_zeroed` of long blocks
/// costs nothing. Blocks of more than half a page grow like an [`Array`], and free the part by which they shrink.
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
    /// The space that the memory belongs to.
    pub fn space(&self) -> &Space {
        &self.inner.space
    }

    /// Gives advice about elements in memory of this allocator: [`Mapping::advise`] for all pages that contain them.
    ///
    /// # Errors
    /// The errors of [`Mapping::advise`], and [`MapError::Invalid`] if the elements are in other memory.
    pub fn advise<T>(&self, elements: &[T], advice: Advice) -> Result<(), MapError> {
        self.inner.part_of(elements)?.map_or(Ok(()), |(mapping, range)| mapping.advise(range, advice))
    }

    /// Writes the changed pages of elements in memory of this allocator to external memory, and waits until they are
    /// written: these pages need no write when they leave local memory.
    ///
    /// # Errors
    /// [`MapError::Io`], and [`MapError::Invalid`] if the elements are in other memory.
    pub fn flush<T>(&self, elements: &[T]) -> Result<(), MapError> {
        self.inner.part_of(elements)?.map_or(Ok(()), |(mapping, range)| mapping.flush_range(range))
    }
}

impl Space {
    /// An allocator for containers whose memory is external; see [`SpaceAllocator`].
    pub fn allocator(&self) -> SpaceAllocator {
        SpaceAllocator { inner: Arc::new(Heap { space: self.clone(), blocks: Mutex::default() }) }
    }

    /// An empty array with addresses for `capacity` elements. Sends no message, and uses no page.
    ///
    /// # Errors
    /// [`MapError::Slab`] when no free run is that long; [`MapError::Invalid`] for elements with an alignment above a
    /// page.
    pub fn array<T>(&self, capacity: usize) -> Result<Array<T>, MapError> {
        if align_of::<T>() > ALIGN_MAX {
            return Err(MapError::Invalid(format!(
                "elements aligned to {} bytes cannot be had: no more than {ALIGN_MAX} can",
                align_of::<T>()
            )));
        }
        let mut array = Array::new_in(self.allocator());
        let len = (capacity as u64).saturating_mul(size_of::<T>() as u64);
        array.try_reserve_exact(capacity).map_err(|_| SlabError::NoSpace(len))?;
        Ok(array)
    }
}

/// The class of pieces that fit this layout; none if the layout needs a slab.
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
        Some(self.keep(self.space.carve(layout.size() as u64).ok()?))
    }

    fn keep(&self, mapping: Mapping) -> NonNull<[u8]> {
        let block = NonNull::slice_from_raw_parts(mapping.as_ptr(), mapping.len());
        self.blocks().long.insert(mapping.as_ptr().as_ptr() as usize, mapping);
        block
    }

    /// Resizes a slab, in place if possible. An added part holds zeros.
    fn resize_long(&self, address: usize, len: u64) -> Option<NonNull<[u8]>> {
        // Not under the lock, because copying takes long; no other thread can use this block meanwhile.
        let mut mapping = self.blocks().long.remove(&address)?;
        if mapping.resize(len).is_ok() {
            return Some(self.keep(mapping));
        }
        match self.space.moved_to_grow(&mapping, len) {
            Ok(longer) => Some(self.keep(longer)),
            Err(_) => {
                self.keep(mapping);
                None
            }
        }
    }

    /// The slab that contains the elements, and their range in it; none for elements without bytes.
    fn part_of<T>(&self, elements: &[T]) -> Result<Option<(Mapping, Range<usize>)>, MapError> {
        let (start, len) = (elements.as_ptr() as usize, size_of_val(elements));
        if len == 0 {
            return Ok(None);
        }
        let blocks = self.blocks();
        let long = blocks.long.range(..=start).next_back().map(|(base, slab)| (*base, slab));
        let pool = blocks.pools.range(..=start).next_back().map(|(base, pool)| (*base, &pool.slab));
        let found = [long, pool].into_iter().flatten().find(|(base, slab)| start + len <= base + slab.len());
        let (base, slab) = found.ok_or_else(|| {
            MapError::Invalid(
                "these elements are not in memory of this allocator: ask the one that they are of".to_owned(),
            )
        })?;
        Ok(Some((slab.shared(), start - base..start - base + len)))
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
        // An unused pool is freed, unless it is the only one of its class with free pieces.
        if pool.free.len() == usize::from(pool.pieces) && blocks.open[class].len() > 1 {
            blocks.open[class].retain(|other| *other != base);
            blocks.pools.remove(&base);
        }
    }
}

// SAFETY: blocks are parts of slabs, which stay in place until they are freed or the last clone is dropped. No two
// blocks overlap, because slabs do not overlap, and a piece is either in use once or in one free list.
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
                // Not under the lock, because freeing memory takes long.
                drop(slab);
            }
        }
    }

    unsafe fn grow(
        &self,
        pointer: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: by the caller's word.
        unsafe { self.resize(pointer, old, new, |new| self.allocate(new)) }
    }

    unsafe fn grow_zeroed(
        &self,
        pointer: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        // The added part of a slab holds zeros.
        // SAFETY: by the caller's word.
        unsafe { self.resize(pointer, old, new, |new| self.allocate_zeroed(new)) }
    }

    unsafe fn shrink(
        &self,
        pointer: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: by the caller's word.
        unsafe { self.resize(pointer, old, new, |new| self.allocate(new)) }
    }
}

impl SpaceAllocator {
    /// Resizes a block; `allocate` makes the new block if the kind (piece or slab) changes.
    ///
    /// # Safety
    /// `pointer` must point to a block of this allocator that `old` fits.
    unsafe fn resize(
        &self,
        pointer: NonNull<u8>,
        old: Layout,
        new: Layout,
        allocate: impl FnOnce(Layout) -> Result<NonNull<[u8]>, AllocError>,
    ) -> Result<NonNull<[u8]>, AllocError> {
        if new.align() > ALIGN_MAX {
            return Err(AllocError);
        }
        if old.size() > 0 && new.size() > 0 {
            match (class_of(old), class_of(new)) {
                (None, None) => {
                    let address = pointer.as_ptr() as usize;
                    return self.inner.resize_long(address, new.size() as u64).ok_or(AllocError);
                }
                (Some(old), Some(new)) if old == new => {
                    return Ok(NonNull::slice_from_raw_parts(pointer, piece_len(old)));
                }
                _ => {}
            }
        }
        let block = allocate(new)?;
        // SAFETY: both blocks are at least as long as their layouts and do not overlap; the old one is not used any
        // more.
        unsafe {
            block.cast::<u8>().copy_from_nonoverlapping(pointer, old.size().min(new.size()));
            self.deallocate(pointer, old);
        }
        Ok(block)
    }
}
