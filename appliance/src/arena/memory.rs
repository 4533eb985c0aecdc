//! The mapped memory of one region.

#![allow(unsafe_code)]

use std::os::fd::{AsFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, seek};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags, madvise, mlock_with, mmap, munmap};
use xpm_protocol::units::{ByteSize, PAGE_LEN};
use xpm_transport::IoBuf;
use xpm_transport::store::Extent;

use super::bad::Bad;
use super::file::Kept;
use crate::keep::{MemfdId, SavedPlace, Stored, Vault};

/// Bytes that are faulted in at a time: some milliseconds of work.
const STEP_LEN: u64 = 8 << 20;

/// Bytes that are moved at a time.
pub(super) const MOVE_LEN: u64 = 4 << 20;
/// Bytes of these that one call copies.
const COPY_LEN: usize = 256 << 10;

/// The place of a region in its file, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// How a part of a region is set to zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By punching a hole; the pages return to the host.
    Punch,
    /// By writing zeros. For huge pages: a hole would return its page to the pool, which may be empty when
    /// the page is touched again, and that would end the process (SIGBUS).
    Overwrite,
    /// By marking the file's blocks as zeros while they stay reserved, for the same reason. A file system
    /// without that operation punches a hole, and without both operations zeros are written.
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
    /// Memory of all regions of the arena that is not faulted in yet, in bytes.
    promised: Arc<AtomicU64>,
    /// Whether its descriptor was given to another process.
    shared: AtomicBool,
    /// Number of devices with its pages registered: unless it is 0, no page may be replaced.
    pins: AtomicU32,
    /// Whether its content lies partly in other memory and cannot be reassembled.
    torn: AtomicBool,
    /// Whether some of it was trimmed, or may have been in an earlier life: then holes are not faulted in,
    /// because they were freed on purpose.
    holes_stay: AtomicBool,
    /// The number in the name of its memfd.
    memfd: Option<MemfdId>,
    /// Its place in the store of the service manager.
    stored: OnceLock<Stored>,
    /// Pages whose content is lost.
    bad: Bad,
    /// Its part of the backing file.
    kept: Option<Kept>,
}

// SAFETY: the mapping is not bound to a thread, and is accessed through raw pointers and the kernel only,
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
        // SAFETY: a new mapping at an address that the kernel chooses affects no memory in use.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &*fd, place.start) }?;
        let base: NonNull<u8> = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        // Memory of other clients must not be in a core dump, and writing it would delay the next life.
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
            torn: AtomicBool::new(false),
            holes_stay: AtomicBool::new(false),
            memfd: None,
            stored: OnceLock::new(),
            bad: Bad::default(),
            kept,
        })
    }

    /// Sets the number in the name of its memfd.
    pub(super) fn of_memfd(mut self, id: MemfdId) -> Memory {
        self.memfd = Some(id);
        self
    }

    /// Marks the memory as taken back from an earlier life, with its place in the store.
    pub(super) fn taken_back(mut self, id: MemfdId, shared: bool, stored: Option<Stored>) -> Memory {
        self.memfd = Some(id);
        self.holes_stay = AtomicBool::new(self.way == Way::Punch);
        self.shared = AtomicBool::new(shared);
        self.stored = stored.map_or_else(OnceLock::new, OnceLock::from);
        self
    }

    /// Stores its descriptor, if necessary. Returns the place where a later life finds the memory; none when
    /// it cannot be stored.
    pub(crate) fn keep(&self, vault: Option<&Arc<Vault>>) -> Option<SavedPlace> {
        if self.way == Way::File {
            return Some(SavedPlace::File(self.place.start));
        }
        let (id, vault) = (self.memfd?, vault?);
        if self.stored.get().is_none() {
            // The caller holds the table's lock, so no other thread stores it concurrently.
            let _ = self.stored.set(vault.store(self.fd.as_fd())?);
        }
        Some(SavedPlace::Memfd(id))
    }

    /// The number in the name of its memfd, if it is a memfd.
    pub(crate) fn memfd(&self) -> Option<MemfdId> {
        self.memfd
    }

    /// Whether its content is no longer complete.
    pub(crate) fn is_torn(&self) -> bool {
        self.torn.load(SeqCst)
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "no region is empty")]
    pub fn len(&self) -> u64 {
        self.place.len
    }

    /// The memory from `offset` (below the region's length) to the end of the region, at most `len` bytes.
    /// The caller keeps this object alive for as long as it uses the memory.
    pub fn at(&self, offset: u64, len: usize) -> IoBuf {
        assert!(offset < self.place.len, "offset outside of the region");
        let len = (self.place.len - offset).min(len as u64) as usize;
        // SAFETY: `offset + len` is within the mapping, which is readable and writable and lives as
        // long as `self`; no reference to it is ever made.
        unsafe { IoBuf::new(self.base.add(offset as usize), len) }
    }

    /// Reads from `offset` (below the region's length) into `bytes`, at most up to the end of the region.
    /// Unlike an access to the mapping, this allocates no memory where nothing was ever written. Blocks while
    /// the kernel brings pages in.
    ///
    /// # Errors
    /// The error of pread(2).
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let len = self.place.len.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (mut done, rest) = (0, &mut bytes[..len]);
        while done < len {
            match pread(&*self.fd, &mut rest[done..], self.place.start + offset + done as u64) {
                // Another process truncated the file.
                Ok(0) => return Err(Errno::IO),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                // A DAX device can be mapped only; it also has no holes.
                Err(Errno::INVAL) if done == 0 => {
                    return self.at(offset, len).try_copy_to_slice(rest).map_err(|_| Errno::IO);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether a read or write of these bytes is possible. A bad page can be written if the write covers all
    /// of it and the kernel can replace it.
    pub fn is_sound(&self, write: bool, offset: u64, len: u64) -> bool {
        let bad = self.bad.within(offset, len);
        let covers = |page: u64| page * PAGE_LEN >= offset && (page + 1) * PAGE_LEN <= offset + len;
        bad.into_iter().all(|page| write && covers(page) && self.renew_page(page))
    }

    /// Checks the pages of a range. Returns the bad ones that were not known before.
    pub fn find_bad(&self, offset: u64, len: u64) -> Vec<u64> {
        let last = (offset + len.max(1) - 1).min(self.len() - 1) / PAGE_LEN;
        (offset / PAGE_LEN..=last).filter(|page| !self.is_good(*page) && self.bad.add(*page)).collect()
    }

    /// Whether it has bad pages.
    pub fn has_bad(&self) -> bool {
        self.bad.has_any()
    }

    fn is_good(&self, page: u64) -> bool {
        let mut byte = [0];
        // For a page of a file the kernel returns an error; for a page that is only mapped the access itself
        // fails.
        self.read(page * PAGE_LEN, &mut byte).is_ok()
            && self.at(page * PAGE_LEN, 1).try_copy_to_slice(&mut byte).is_ok()
    }

    /// Makes the kernel replace a bad page. Returns whether the new page is good.
    fn renew_page(&self, page: u64) -> bool {
        if self.way == Way::Overwrite || !self.give_back(page * PAGE_LEN, PAGE_LEN) || !self.is_good(page) {
            return false;
        }
        self.bad.remove(page);
        true
    }

    /// The region's descriptor, to be passed to another process. From now on the region counts as shared: it
    /// is never lent to another client.
    pub fn share(&self) -> Arc<OwnedFd> {
        self.shared.store(true, SeqCst);
        self.fd.clone()
    }

    /// Whether another process may have it mapped, also a process that closed its connection, or that
    /// connected to an earlier life of this appliance: a mapping stays as long as that process wants.
    pub fn is_shared(&self) -> bool {
        self.shared.load(SeqCst)
    }

    /// Keeps all pages in place until [`Memory::unpin`], also when they are trimmed: a device continues to
    /// use the pages that it registered.
    pub fn pin(&self) {
        self.pins.fetch_add(1, SeqCst);
    }

    /// Undoes one [`Memory::pin`].
    pub fn unpin(&self) {
        self.pins.fetch_sub(1, SeqCst);
    }

    /// Memory that the region occupies, in bytes: the resident pages of a memfd, otherwise its length.
    pub fn resident(&self) -> u64 {
        match self.way {
            Way::Punch => {
                fstat(&*self.fd).map_or(self.len(), |stat| (stat.st_blocks as u64) * 512).min(self.len())
            }
            Way::Overwrite | Way::File => self.len(),
        }
    }

    /// Makes the range read as zeros, and frees its memory where the backing can and no device has it
    /// registered. Afterwards, pages that are not faulted in yet are not faulted in any more, except by the
    /// step in progress.
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
        for page in self.bad.within(inner, inner_end - inner) {
            if self.is_good(page) {
                self.bad.remove(page);
            }
        }
    }

    /// Writes zeros over the range; bad pages that this finds are recorded.
    pub fn zero(&self, offset: u64, len: u64) {
        if len > 0 && self.at(offset, len as usize).try_zero().is_err() {
            for page in self.find_bad(offset, len) {
                tracing::error!("page {page} of a region of {} is bad", ByteSize(self.len()));
            }
        }
    }

    /// Sets the whole region to zeros, also for processes that still have it mapped. It has to be faulted in
    /// again.
    pub fn clear(&self) {
        if self.way != Way::Overwrite {
            self.set_faulted(0);
        }
        self.trim(0, self.len());
        self.holes_stay.store(false, SeqCst);
    }

    /// Moves the content to `target`, which is a memfd of the same kind and length and all zeros, and leaves
    /// zeros. Holes stay holes.
    ///
    /// # Errors
    /// When there is no memory for it. The content is unmoved then, unless the memory is torn.
    pub(super) fn move_to(&self, target: &Memory) -> Result<(), Errno> {
        let mut moved = 0;
        let result = self.move_pieces(target, &mut moved, self.len());
        if result.is_err() && target.move_pieces(self, &mut 0, moved).is_err() {
            self.torn.store(true, SeqCst);
        }
        if result.is_ok() && self.way == Way::Overwrite {
            self.give_up();
        }
        // Present holes have to stay holes.
        target.holes_stay.store(true, SeqCst);
        if result.is_ok() {
            target.set_faulted(target.len());
        }
        result
    }

    /// Moves the bytes before `end`; `offset` is the progress.
    fn move_pieces(&self, target: &Memory, offset: &mut u64, end: u64) -> Result<(), Errno> {
        while *offset < end {
            let extent = self.extent(*offset, MOVE_LEN.min(end - *offset));
            if !extent.hole {
                self.copy_piece(target, *offset, extent.len)?;
                // The pages exist already; this locks them, too.
                target.populate(*offset, extent.len)?;
                match self.way {
                    Way::Punch => self.punch(*offset, extent.len)?,
                    Way::File => self.trim(*offset, extent.len),
                    Way::Overwrite => {}
                }
            }
            *offset += extent.len;
        }
        Ok(())
    }

    fn copy_piece(&self, target: &Memory, offset: u64, len: u64) -> Result<(), Errno> {
        if self.way == Way::Overwrite {
            // Huge pages cannot be written by a system call; all pages of the target's mapping are reserved.
            let copied = self.at(offset, len as usize).try_copy_to(target.at(offset, len as usize));
            return copied.map_err(|_| Errno::IO);
        }
        let mut local = vec![0; COPY_LEN];
        let (mut offset, end) = (offset, offset + len);
        while offset < end {
            let part = &mut local[..COPY_LEN.min((end - offset) as usize)];
            match self.read(offset, part) {
                Err(Errno::IO) if part.len() as u64 > PAGE_LEN => {
                    for page in (0..part.len() as u64).step_by(PAGE_LEN as usize) {
                        self.copy_piece(target, offset + page, PAGE_LEN)?;
                    }
                }
                // The content of the page is lost in both places.
                Err(Errno::IO) => drop(target.bad.add(offset / PAGE_LEN)),
                read => read.and_then(|()| target.write(offset, part))?,
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Writes without touching the mapping, so that a lack of memory is an error and no signal.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            match pwrite(&*self.fd, &bytes[done..], self.place.start + offset + done as u64) {
                Ok(0) => return Err(Errno::NOSPC),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns pages of a memfd to the host, whichever process has them mapped. Huge pages only when this
    /// process does not touch them any more: the pool may have no replacement.
    fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.holes_stay.store(true, SeqCst);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.fd, punch, self.place.start + offset, len)
    }

    /// Sets the memory to zeros for all processes that have it mapped, and returns its pages to the host.
    /// This process must not touch the memory any more.
    pub(crate) fn give_up(&self) {
        if self.way == Way::File || self.punch(0, self.len()).is_err() {
            self.clear();
        }
    }

    /// Frees the memory of the range; returns whether the range now reads as zeros without memory.
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

    /// How the bytes at `offset` are stored, for at most `len` bytes.
    pub fn extent(&self, offset: u64, len: u64) -> Extent {
        let len = len.min(self.len() - offset);
        let data = Extent { len, hole: false };
        // When all pages are resident, the kernel need not search for holes.
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
        // Modulo 2^64, so that the sum grows when less is faulted in than before.
        self.promised.fetch_sub(now.wrapping_sub(before), Relaxed);
    }

    fn populate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        // The pages of a file are read, not written: writing would send the whole file to its disk once more
        // for no benefit.
        let advice = match self.way {
            Way::File => Advice::LinuxPopulateRead,
            Way::Punch | Way::Overwrite => Advice::LinuxPopulateWrite,
        };
        let buffer = self.at(offset, len as usize);
        // SAFETY: the range is within the mapping; populating does not change its content.
        match unsafe { madvise(buffer.as_ptr().cast(), buffer.len(), advice) } {
            // The advice is unknown before Linux 5.14.
            Err(Errno::INVAL) => {
                touch(buffer);
                Ok(())
            }
            result => result,
        }
    }

    /// Locks the resident pages, and later ones when they are faulted in. A hole stays a hole.
    pub(super) fn lock(&self) -> Result<(), Errno> {
        let all = self.at(0, self.len() as usize);
        // SAFETY: the range is the mapping.
        unsafe { mlock_with(all.as_ptr().cast(), all.len(), MlockFlags::ONFAULT) }
    }
}

/// Faults each page in without changing it, even while other threads write there.
fn touch(buffer: IoBuf) {
    for offset in (0..buffer.len()).step_by(PAGE_LEN as usize) {
        // SAFETY: the address is within the buffer, which is mapped and writable by the contract of
        // `IoBuf::new`, and an atomic byte has no alignment; other parties access it as raw memory.
        let byte = unsafe { AtomicU8::from_ptr(buffer.part(offset, 1).as_ptr()) };
        byte.fetch_or(0, Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.set_faulted(self.len());
        if self.has_bad() {
            // A part with bad pages is never lent again.
            std::mem::forget(self.kept.take());
        }
        // SAFETY: the mapping was created with this address and length, and every user of the memory keeps
        // this object alive.
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
    fn a_replaced_bad_page_is_usable_again() {
        let memory = Arena::new(&Backing::Memfd, 16 << 20, false).unwrap().make(16 << 20, 0).unwrap();
        memory.at(4096, 4).copy_from_slice(b"page");
        memory.bad.add(1);
        memory.bad.add(3);
        assert!(memory.is_sound(false, 0, 4096) && memory.is_sound(false, 8192, 4096));
        assert!(!memory.is_sound(false, 0, 4097) && !memory.is_sound(true, 4100, 100), "only a part of it");
        assert!(memory.is_sound(true, 4096, 4096) && memory.is_sound(false, 0, 12_288));
        memory.trim(0, 1 << 20);
        assert!(!memory.has_bad());
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
