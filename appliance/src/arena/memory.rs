//! The mapped memory of one region.

#![allow(unsafe_code)]

use std::os::fd::{AsFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, seek};
use rustix::io::{Errno, pread};
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags, madvise, mlock_with, mmap, munmap};
use xpm_protocol::units::PAGE_LEN;
use xpm_transport::IoBuf;
use xpm_transport::store::Extent;

use super::file::Kept;
use crate::keep::{MemfdId, SavedPlace, Stored, Vault};

/// How much is faulted in at a time, in bytes: some milliseconds of work.
const STEP_LEN: u64 = 8 << 20;

/// How much is moved at a time, in bytes.
const MOVE_LEN: u64 = 4 << 20;

/// Where a region lies in its file, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// How a part of a region becomes zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A hole is punched; its pages go back to the host.
    Punch,
    /// Zeros are written. For huge pages: a hole would give its page back to the pool, which may be
    /// empty when the page is touched again, and that would end the process (SIGBUS).
    Overwrite,
    /// The file's blocks are marked as zeros but stay reserved, for the same reason; a file system
    /// that cannot do that punches a hole, and what cannot do either is overwritten.
    File,
}

/// The memory of one region, mapped as long as this lives.
pub struct Memory {
    base: NonNull<u8>,
    place: Place,
    fd: Arc<OwnedFd>,
    way: Way,
    /// Bytes from the start that are faulted in.
    faulted: AtomicU64,
    /// Of all regions of the arena, what is not faulted in yet, in bytes.
    promised: Arc<AtomicU64>,
    /// Its descriptor was given to another process.
    shared: AtomicBool,
    /// Devices that have its pages registered: as long as there are any, no page may be exchanged.
    pins: AtomicU32,
    /// Processes may have it mapped that connected to an earlier life of this appliance.
    has_strays: bool,
    /// Something was trimmed, or may have been in an earlier life, so that holes are not faulted in: they were given back.
    holes_stay: AtomicBool,
    /// The number in the name of its memfd.
    memfd: Option<MemfdId>,
    /// Its place in the store of the service manager.
    stored: OnceLock<Stored>,
    /// Its part of a backing file.
    _kept: Option<Kept>,
}

// SAFETY: the mapping belongs to no thread, and is accessed through raw pointers and the kernel only,
// never through references: races on the bytes of a region are between its users, as on any disk.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn map(
        fd: Arc<OwnedFd>,
        place: Place,
        way: Way,
        promised: Arc<AtomicU64>,
        kept: Option<Kept>,
    ) -> Result<Memory, Errno> {
        let len = usize::try_from(place.len).map_err(|_| Errno::NOMEM)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &*fd, place.start) }?;
        let base: NonNull<u8> = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        // Other people's memory has no business in a core dump, and writing it would hold up the next life.
        // SAFETY: the range is the mapping, and the advice changes nothing that can be read there.
        if let Err(error) = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxDontDump) } {
            tracing::debug!(%error, "a region would be part of a core dump");
        }
        promised.fetch_add(place.len, Relaxed);
        Ok(Memory {
            base,
            place,
            fd,
            way,
            faulted: AtomicU64::new(0),
            promised,
            shared: AtomicBool::new(false),
            pins: AtomicU32::new(0),
            has_strays: false,
            holes_stay: AtomicBool::new(false),
            memfd: None,
            stored: OnceLock::new(),
            _kept: kept,
        })
    }

    /// The same, of a memfd with this number in its name.
    pub(super) fn of_memfd(mut self, id: MemfdId) -> Memory {
        self.memfd = Some(id);
        self
    }

    /// The same, taken back from an earlier life, with its place in the store.
    pub(super) fn taken_back(mut self, id: MemfdId, shared: bool, stored: Option<Stored>) -> Memory {
        self.memfd = Some(id);
        self.holes_stay = AtomicBool::new(self.way == Way::Punch);
        self.shared = AtomicBool::new(shared);
        self.has_strays = shared;
        self.stored = stored.map_or_else(OnceLock::new, OnceLock::from);
        self
    }

    /// Where a later life finds it, after it was put where it is kept; none where that cannot be.
    pub(crate) fn keep(&self, vault: Option<&Arc<Vault>>) -> Option<SavedPlace> {
        if self.way == Way::File {
            return Some(SavedPlace::File(self.place.start));
        }
        let (id, vault) = (self.memfd?, vault?);
        if self.stored.get().is_none() {
            // Under the lock of the table, so that nobody else has it stored meanwhile.
            let _ = self.stored.set(vault.store(self.fd.as_fd())?);
        }
        Some(SavedPlace::Memfd(id))
    }

    /// The number in the name of its memfd, if it is one.
    pub(crate) fn memfd(&self) -> Option<MemfdId> {
        self.memfd
    }

    /// Whether processes may have it mapped of which no connection tells.
    pub fn has_strays(&self) -> bool {
        self.has_strays
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "no region is empty")]
    pub fn len(&self) -> u64 {
        self.place.len
    }

    /// The memory from `offset` (below the region's length), as far as it goes and at most `len`
    /// bytes. The caller keeps this object alive for as long as it uses it.
    pub fn at(&self, offset: u64, len: usize) -> IoBuf {
        assert!(offset < self.place.len, "offset outside of the region");
        let len = (self.place.len - offset).min(len as u64) as usize;
        // SAFETY: `offset + len` is within the mapping, which is readable and writable and lives as
        // long as `self`; no reference to it is ever made.
        unsafe { IoBuf::new(self.base.add(offset as usize), len) }
    }

    /// Reads from `offset` (below the region's length) into `bytes`, up to the end of the region at most. Other than a look through the
    /// mapping this takes no memory where nothing was ever written. Blocks while the kernel brings pages in.
    ///
    /// # Errors
    /// What pread(2) says.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let len = self.place.len.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (mut done, rest) = (0, &mut bytes[..len]);
        while done < len {
            match pread(&*self.fd, &mut rest[done..], self.place.start + offset + done as u64) {
                // A file that was made shorter behind our back.
                Ok(0) => return Err(Errno::IO),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                // A DAX device can be mapped only; it has no holes either.
                Err(Errno::INVAL) if done == 0 => {
                    self.at(offset, len).copy_to_slice(rest);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The region's descriptor, to be passed to another process. From now on the region counts as
    /// shared: it is never lent to anyone else.
    pub fn share(&self) -> Arc<OwnedFd> {
        self.shared.store(true, SeqCst);
        self.fd.clone()
    }

    /// Whether another process may have it mapped.
    pub fn is_shared(&self) -> bool {
        self.shared.load(SeqCst)
    }

    /// From now until [`Memory::unpin`], its pages stay what they are, also when they are trimmed: a
    /// device goes on with those that it was told.
    pub fn pin(&self) {
        self.pins.fetch_add(1, SeqCst);
    }

    /// Undoes one [`Memory::pin`].
    pub fn unpin(&self) {
        self.pins.fetch_sub(1, SeqCst);
    }

    /// Memory that it really holds, in bytes: the pages of a memfd that are there, else all.
    pub fn resident(&self) -> u64 {
        match self.way {
            Way::Punch => {
                fstat(&*self.fd).map_or(self.len(), |stat| (stat.st_blocks as u64) * 512).min(self.len())
            }
            Way::Overwrite | Way::File => self.len(),
        }
    }

    /// Makes the range read as zeros and gives its memory back where the backing can and no device has
    /// it registered. What is not faulted in yet is not faulted in after that, but for the step that is under way.
    pub fn trim(&self, offset: u64, len: u64) {
        self.holes_stay.store(true, SeqCst);
        let end = offset + len;
        let (inner, inner_end) = (offset.next_multiple_of(PAGE_LEN), end - end % PAGE_LEN);
        if inner >= inner_end {
            return self.zero(offset, len);
        }
        self.zero(offset, inner - offset);
        if !self.give_back(inner, inner_end - inner) {
            self.zero(inner, inner_end - inner);
        }
        self.zero(inner_end, end - inner_end);
    }

    /// Writes zeros over the range.
    pub fn zero(&self, offset: u64, len: u64) {
        if len > 0 {
            self.at(offset, len as usize).zero();
        }
    }

    /// Makes the whole region zeros, for processes that still have it mapped too. It has to be
    /// faulted in again.
    pub fn clear(&self) {
        if self.way != Way::Overwrite {
            self.set_faulted(0);
        }
        self.trim(0, self.len());
        self.holes_stay.store(false, SeqCst);
    }

    /// Moves the content to `target`, which is of the same length and all zeros, and leaves zeros.
    /// Holes stay holes; the target counts as faulted in where the content was.
    pub(super) fn move_to(&self, target: &Memory) {
        let mut offset = 0;
        while offset < self.len() {
            let extent = self.extent(offset, MOVE_LEN);
            if !extent.hole {
                let len = extent.len as usize;
                self.at(offset, len).copy_to(target.at(offset, len));
                self.trim(offset, extent.len);
            }
            offset += extent.len;
        }
        target.set_faulted(target.len());
    }

    /// Whether the range now is zeros without its memory.
    fn give_back(&self, offset: u64, len: u64) -> bool {
        if self.pins.load(SeqCst) > 0 {
            return false;
        }
        let start = self.place.start + offset;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.way {
            Way::Overwrite => false,
            Way::Punch => fallocate(&*self.fd, punch, start, len).is_ok(),
            Way::File => {
                let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                fallocate(&*self.fd, zero, start, len).is_ok()
                    || fallocate(&*self.fd, punch, start, len).is_ok()
            }
        }
    }

    /// How the bytes at `offset` are held, for at most `len` bytes.
    pub fn extent(&self, offset: u64, len: u64) -> Extent {
        let len = len.min(self.len() - offset);
        let data = Extent { len, hole: false };
        // Where every page is there, the kernel need not look for one that is not.
        if self.way == Way::Overwrite || (self.way == Way::Punch && self.resident() == self.len()) {
            return data;
        }
        let start = self.place.start + offset;
        match seek(&*self.fd, SeekFrom::Data(start)) {
            Ok(found) if found > start => Extent { len: len.min(found - start), hole: true },
            // No data up to the end of the file.
            Err(Errno::NXIO) => Extent { len, hole: true },
            Ok(_) => match seek(&*self.fd, SeekFrom::Hole(start)) {
                Ok(found) if found > start => Extent { len: len.min(found - start), hole: false },
                _ => data,
            },
            Err(_) => data,
        }
    }

    /// See [`super::Arena::fault_in`].
    pub(super) fn fault_in(&self, until: Option<Instant>) -> Result<bool, Errno> {
        loop {
            let done = self.faulted.load(Relaxed);
            if done >= self.len() {
                return Ok(true);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(false);
            }
            let len = STEP_LEN.min(self.len() - done);
            let extent = match self.holes_stay.load(SeqCst) {
                true => self.extent(done, len),
                false => Extent { len, hole: false },
            };
            if !extent.hole {
                self.populate(done, extent.len)?;
            }
            self.set_faulted(done + extent.len);
        }
    }

    fn set_faulted(&self, now: u64) {
        let before = self.faulted.swap(now, Relaxed);
        // Modulo 2^64, so that it grows when less is faulted in than before.
        self.promised.fetch_sub(now.wrapping_sub(before), Relaxed);
    }

    fn populate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        // The pages of a file are read, not written: writing would send the whole file to its disk
        // once more for nothing.
        let advice = match self.way {
            Way::File => Advice::LinuxPopulateRead,
            Way::Punch | Way::Overwrite => Advice::LinuxPopulateWrite,
        };
        let buffer = self.at(offset, len as usize);
        // SAFETY: the range is within the mapping; populating does not change its content.
        match unsafe { madvise(buffer.as_ptr().cast(), buffer.len(), advice) } {
            // Before Linux 5.14 the advice is not known.
            Err(Errno::INVAL) => {
                touch(buffer);
                Ok(())
            }
            result => result,
        }
    }

    /// Keeps the pages that are there, and those that come, in memory. A hole stays a hole.
    pub(super) fn lock(&self) -> Result<(), Errno> {
        let all = self.at(0, self.len() as usize);
        // SAFETY: the range is the mapping.
        unsafe { mlock_with(all.as_ptr().cast(), all.len(), MlockFlags::ONFAULT) }
    }
}

/// Faults each page in without changing it, also while others write there.
fn touch(buffer: IoBuf) {
    for offset in (0..buffer.len()).step_by(PAGE_LEN as usize) {
        // SAFETY: the address is within the buffer, which is mapped and writable by the contract of
        // `IoBuf::new`, and an atomic byte has no alignment; others access it as raw memory.
        let byte = unsafe { AtomicU8::from_ptr(buffer.part(offset, 1).as_ptr()) };
        byte.fetch_or(0, Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.set_faulted(self.len());
        // SAFETY: the mapping was made with this address and length, and whoever uses its memory
        // keeps this object alive.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.place.len as usize) } {
            tracing::error!("cannot unmap a region: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, Backing};

    #[test]
    fn pinned_memory_is_zeroed_and_kept() {
        let memory = Arena::new(&Backing::Memfd, 16 << 20, false).unwrap().make(16 << 20, 0).unwrap();
        memory.at(0, 4).copy_from_slice(b"page");
        memory.pin();
        memory.trim(0, 4096);
        assert_eq!(memory.resident(), 4096, "a device would go on with a page that nobody else sees");
        let mut found = [1; 4];
        memory.at(0, 4).copy_to_slice(&mut found);
        assert_eq!(found, [0; 4]);
        memory.unpin();
        memory.trim(0, 4096);
        assert_eq!(memory.resident(), 0);
    }

    #[test]
    fn touching_faults_in_and_changes_nothing() {
        let memory = Arena::new(&Backing::Memfd, 16 << 20, false).unwrap().make(16 << 20, 0).unwrap();
        memory.at(8192, 4).copy_from_slice(b"page");
        touch(memory.at(0, 1 << 20));
        assert_eq!(memory.resident(), 1 << 20);
        let mut found = [0; 4];
        rustix::io::pread(&*memory.share(), &mut found, 8192).unwrap();
        assert_eq!(&found, b"page");
    }
}
