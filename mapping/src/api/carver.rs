//! Carves slabs out of the part of the allocation behind the kept part.

use super::slab::{Slab, SlabAllocator, SlabError};

/// Smallest and largest region of the slab allocator, in bytes.
const REGION_MIN: u64 = 16 << 20;
const REGION_MAX: u64 = 64 << 30;

/// The slab allocator, and the offsets of its regions in the window.
pub(crate) struct Carver {
    pub(crate) slabs: SlabAllocator,
    bases: Vec<u64>,
}

impl Carver {
    /// Divides the part behind the first `kept` bytes into regions, the largest first.
    pub(crate) fn new(kept: u64, size: u64) -> Carver {
        let mut carver = Carver { slabs: SlabAllocator::new(), bases: Vec::new() };
        let mut base = kept;
        while size - base >= REGION_MIN {
            let len = (1_u64 << (size - base).ilog2()).min(REGION_MAX);
            if carver.slabs.add_region(len).is_err() {
                break;
            }
            carver.bases.push(base);
            base += len;
        }
        carver
    }

    /// Carves the slab at this offset of the window.
    pub(crate) fn carve_at(&mut self, offset: u64, len: u64) -> Result<Slab, SlabError> {
        let region = self.bases.iter().rposition(|base| *base <= offset).ok_or(SlabError::NotAllocated)?;
        self.slabs.allocate_at(region as u32, offset - self.bases[region], len)
    }

    /// Carves a slab; returns it with its offset in the window.
    pub(crate) fn carve(&mut self, len: u64) -> Result<(Slab, u64), SlabError> {
        let slab = self.slabs.allocate(len)?;
        Ok((slab, self.bases[slab.region as usize] + slab.offset))
    }

    /// As [`Carver::carve`], where the slab can grow furthest.
    pub(crate) fn carve_to_grow(&mut self, len: u64) -> Result<(Slab, u64), SlabError> {
        let slab = self.slabs.allocate_to_grow(len)?;
        Ok((slab, self.bases[slab.region as usize] + slab.offset))
    }
}
