//! [`Lease`]: a grant's memory, as its servers hold it.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rustix::io::Errno;
use xpm_protocol::GrantId;
use xpm_protocol::units::PAGE_LEN;
use xpm_transport::IoBuf;
use xpm_transport::store::Extent;

use crate::arena::Memory;

/// The memory of one grant during one epoch. When the lease is revoked, the server closes its connections,
/// and background work ends by itself; after that, no code writes to the memory through this lease.
pub struct Lease {
    grant: GrantId,
    regions: Vec<Arc<Memory>>,
    /// Base-2 logarithm of the regions' length.
    shift: u32,
    revoked: AtomicBool,
    /// Read-locked by background work, for short steps.
    gate: RwLock<()>,
}

impl Lease {
    /// A lease of these regions (at least one, all of the same length) in this order.
    pub fn new(grant: GrantId, regions: Vec<Arc<Memory>>) -> Lease {
        let shift = regions[0].len().trailing_zeros();
        debug_assert!(regions.iter().all(|region| region.len() == 1 << shift), "regions of one length");
        Lease { grant, regions, shift, revoked: AtomicBool::new(false), gate: RwLock::new(()) }
    }

    /// The grant.
    pub fn grant(&self) -> GrantId {
        self.grant
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[Arc<Memory>] {
        &self.regions
    }

    /// Length of the export in bytes.
    pub fn len(&self) -> u64 {
        (self.regions.len() as u64) << self.shift
    }

    /// Whether the lease is still valid.
    pub fn is_alive(&self) -> bool {
        !self.revoked.load(SeqCst)
    }

    /// Revokes the lease, and waits until the background steps in progress have ended.
    pub fn revoke(&self) {
        self.revoked.store(true, SeqCst);
        drop(self.gate.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Begins a step of background work; none when the lease is revoked. The step ends when the guard is
    /// dropped, which should happen soon.
    pub fn begin_step(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let step = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        // If this load does not see a revocation, the revocation waits for the guard.
        self.is_alive().then_some(step)
    }

    /// The memory at `offset` of the export, as far as it is contiguous, at most `len` bytes.
    pub fn at(&self, offset: u64, len: usize) -> Option<IoBuf> {
        let region = self.regions.get((offset >> self.shift) as usize)?;
        Some(region.at(self.within(offset), len))
    }

    /// Reads from `offset` on, within one region; see [`Memory::read`].
    ///
    /// # Errors
    /// The kernel's error.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        match self.regions.get((offset >> self.shift) as usize) {
            Some(region) => region.read(self.within(offset), bytes),
            None => Err(Errno::INVAL),
        }
    }

    /// Whether a read or write of these bytes is possible; see [`Memory::is_sound`].
    pub fn is_sound(&self, write: bool, offset: u64, len: u64) -> bool {
        if !self.regions.iter().any(|memory| memory.has_bad()) {
            return true;
        }
        let mut sound = true;
        self.for_each_part(offset, len, |memory, offset, len| sound &= memory.is_sound(write, offset, len));
        sound
    }

    /// Checks the pages of a range. Returns the bad ones that were not known before, by their first bytes in
    /// the export.
    pub fn find_bad(&self, offset: u64, len: u64) -> Vec<u64> {
        let (mut found, mut start) = (Vec::new(), offset);
        self.for_each_part(offset, len, |memory, within, part| {
            let pages = memory.find_bad(within, part).into_iter();
            found.extend(pages.map(|page| start - within + page * PAGE_LEN));
            start += part;
        });
        found
    }

    /// How the bytes at `offset` are stored; the extent ends with the region at the latest.
    pub fn extent(&self, offset: u64, len: u64) -> Extent {
        match self.regions.get((offset >> self.shift) as usize) {
            Some(region) => region.extent(self.within(offset), len),
            None => Extent { len, hole: false },
        }
    }

    /// Calls `each` for the parts of a range, one region at a time, with the region, the offset in it, and
    /// the length.
    pub fn for_each_part(&self, offset: u64, len: u64, mut each: impl FnMut(&Memory, u64, u64)) {
        let (mut offset, end) = (offset, offset.saturating_add(len).min(self.len()));
        while offset < end {
            let Some(region) = self.regions.get((offset >> self.shift) as usize) else { return };
            let within = self.within(offset);
            let part = (region.len() - within).min(end - offset);
            each(region, within, part);
            offset += part;
        }
    }

    fn within(&self, offset: u64) -> u64 {
        offset & ((1 << self.shift) - 1)
    }
}
