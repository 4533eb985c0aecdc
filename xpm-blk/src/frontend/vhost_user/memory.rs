//! The guest's memory in this process.
//!
//! The front end passes the files that contain guest memory; this module maps their pages, which are the
//! buffers of the guest's I/O. Both the guest and its monitor can change them at any time, so they are
//! accessed by address only: as an [`IoBuf`], or by the atomic and copying accessors of a [`Window`].
//!
//! An access behind the end of a file raises SIGBUS. So a file has to be as long as its description says, and
//! sealed against shrinking (`F_SEAL_SHRINK`; QEMU's `memory-backend-memfd` does that), unless the operator
//! allows other files (`allow-unsealed`). If memory is lost nevertheless, its device fails, and no other
//! (`fault.rs`).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munlock, munmap};
use rustix::param::page_size;
use xpm_transport::io::IoBuf;

use super::fault::Guarded;

/// Type of a hugetlbfs file system (statfs(2)).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A contiguous range of guest memory, as a front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegionInfo {
    /// First address in the guest.
    pub(super) guest: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// First address in the front end's process.
    pub(super) user: u64,
    /// First byte within the file.
    pub(super) offset: u64,
}

/// The requirements on guest memory, and the flag that reports its loss.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    /// Whether files that their owner can truncate are accepted.
    pub(super) allow_unsealed: bool,
    /// Set when a page of the memory is lost: it reads as zeros from then on.
    pub(super) failed: Arc<AtomicBool>,
}

impl Terms {
    fn check(&self, file: &OwnedFd) -> io::Result<()> {
        let is_sealed = fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        match self.allow_unsealed || is_sealed {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "memory that can be cut off while it is used (a file without F_SEAL_SHRINK): give the machine its memory by a \
                 sealed memfd, as QEMU's memory-backend-memfd does, or set `allow-unsealed = true` for xpm-blk",
            )),
        }
    }
}

/// A mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    /// Dropped before the memory is unmapped.
    guarded: Option<Guarded>,
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it; its content is accessed by
// address only.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; through a shared reference only the memory behind it changes, by atomic or copying
// accesses.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a part of a file, neither locked nor faulted in: the memory belongs to the guest's monitor, and
    /// this process locks its mappings.
    fn of(file: &OwnedFd, offset: u64, len: usize, page: usize, terms: &Terms) -> io::Result<Mapping> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses; it aliases no other memory.
        let address =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::empty(), flags, file.as_fd(), offset) }?;
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut mapping = Mapping { guarded: None, address, len };
        mapping.guarded = Some(Guarded::new(address.addr().get(), len, page, &terms.failed)?);
        // Accessible only after it is unlocked: a locked mapping that can be accessed is faulted in
        // completely.
        // SAFETY: the range is the mapping that was just created.
        unsafe {
            munlock(address.as_ptr().cast(), len)?;
            mprotect(address.as_ptr().cast(), len, MprotectFlags::READ | MprotectFlags::WRITE)?;
        }
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guarded = None;
        // SAFETY: address and length are those of the mapping that this value owns. An error would mean that
        // it is not mapped, and needs no action.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.len) };
    }
}

/// A mapped range of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    info: RegionInfo,
    /// Offset of its start within the mapping.
    lead: usize,
    mapping: Mapping,
}

impl Region {
    /// Maps a region.
    ///
    /// # Errors
    /// When the mapping fails, the file is shorter than described, or the terms do not allow it.
    pub(super) fn map(info: RegionInfo, file: &OwnedFd, terms: &Terms) -> io::Result<Region> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let end = info.offset.checked_add(info.len).ok_or_else(|| bad("a region beyond all addresses"))?;
        let wraps = info.guest.checked_add(info.len).is_none() || info.user.checked_add(info.len).is_none();
        if info.len == 0 || wraps {
            return Err(bad("a region that is empty or beyond all addresses"));
        }
        terms.check(file)?;
        let found = fstat(file)?;
        let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
        if is_file && u64::try_from(found.st_size).is_ok_and(|size| size < end) {
            return Err(bad("a region beyond the end of its file"));
        }
        let system = fstatfs(file)?;
        let page = match system.f_type as u64 {
            HUGETLBFS_MAGIC => system.f_bsize as u64,
            _ => page_size() as u64,
        };
        let first = info.offset / page * page;
        let len = (end - first).next_multiple_of(page);
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mapping = Mapping::of(file, first, len, page as usize, terms)?;
        Ok(Region { info, lead: (info.offset - first) as usize, mapping })
    }

    /// The front end's description.
    pub(super) const fn info(&self) -> RegionInfo {
        self.info
    }

    /// The address of `len` bytes from `start` of the region.
    fn at(&self, start: u64, len: usize) -> NonNull<u8> {
        let within = start.checked_add(len as u64).is_some_and(|end| end <= self.info.len);
        assert!(within, "{len} bytes at {start} of a region of {}", self.info.len);
        // SAFETY: within the region (asserted), which lies within the mapping from `lead` on.
        unsafe { self.mapping.address.add(self.lead + start as usize) }
    }

    fn buffer(&self, start: u64, len: usize) -> IoBuf {
        // SAFETY: the bytes are within the mapping (`at` asserts it), which is readable and writable. The
        // poster of an operation keeps the memory until the operation has ended: a queue keeps the
        // `GuestMemory` that its buffers come from until its channel has released all of them. No reference
        // to guest memory is ever made.
        unsafe { IoBuf::new(self.at(start, len), len) }
    }
}

/// All memory of a guest that the front end shares. Clones of its [`Arc`]s keep regions mapped.
#[derive(Debug, Clone, Default)]
pub(super) struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Memory of these regions.
    ///
    /// # Errors
    /// When two of them share a guest address.
    pub(super) fn new(mut regions: Vec<Arc<Region>>) -> io::Result<GuestMemory> {
        regions.sort_unstable_by_key(|region| region.info.guest);
        let overlap = |pair: &[Arc<Region>]| pair[0].info.guest + pair[0].info.len > pair[1].info.guest;
        match regions.windows(2).any(overlap) {
            true => Err(io::Error::new(io::ErrorKind::InvalidInput, "regions of guest memory that overlap")),
            false => Ok(GuestMemory { regions }),
        }
    }

    /// Its regions.
    pub(super) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    fn find(&self, guest: u64) -> Option<&Arc<Region>> {
        let after = self.regions.partition_point(|region| region.info.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (guest - region.info.guest < region.info.len).then_some(region)
    }

    /// The longest contiguous part of the `len` bytes at a guest address, from its start; none if there is no
    /// memory. `len` has to be more than 0. The buffer may be used while this memory is kept.
    pub(super) fn piece(&self, guest: u64, len: u64) -> Option<IoBuf> {
        let region = self.find(guest)?;
        let start = guest - region.info.guest;
        let len = len.min(region.info.len - start);
        Some(region.buffer(start, usize::try_from(len).ok()?))
    }

    /// The `len` bytes at a guest address, which have to be contiguous.
    pub(super) fn window_of_guest(&self, guest: u64, len: usize) -> Option<Window> {
        let region = self.find(guest)?;
        Window::new(region, guest - region.info.guest, len)
    }

    /// The `len` bytes at an address of the front end's process, which have to be contiguous.
    pub(super) fn window_of_user(&self, user: u64, len: usize) -> Option<Window> {
        let within = |region: &&Arc<Region>| {
            user.checked_sub(region.info.user).is_some_and(|start| start < region.info.len)
        };
        let region = self.regions.iter().find(within)?;
        Window::new(region, user - region.info.user, len)
    }
}

/// A piece of shared memory, for structures that another party accesses concurrently.
#[derive(Debug, Clone)]
pub(super) struct Window {
    region: Arc<Region>,
    start: u64,
    len: usize,
}

impl Window {
    /// `len` bytes from `start` of a region; none if the region is shorter.
    pub(super) fn new(region: &Arc<Region>, start: u64, len: usize) -> Option<Window> {
        let end = start.checked_add(len as u64)?;
        (end <= region.info.len).then(|| Window { region: Arc::clone(region), start, len })
    }

    /// Whether the address of its first byte in this process is a multiple of `alignment`.
    pub(super) fn is_aligned(&self, alignment: usize) -> bool {
        self.region.at(self.start, self.len).addr().get().is_multiple_of(alignment)
    }

    fn at(&self, offset: usize, len: usize, alignment: usize) -> NonNull<u8> {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(within, "{len} bytes at {offset} of a window of {}", self.len);
        let address = self.region.at(self.start + offset as u64, len);
        assert!(address.addr().get().is_multiple_of(alignment), "an access that is not aligned");
        address
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: two bytes within the mapping, aligned (`at` asserts both), which this window keeps; other
        // parties may change an atomic at any time.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2, 2).as_ptr().cast()) }
    }

    fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as for `word`, eight bytes.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8, 8).as_ptr().cast()) }
    }

    /// The little-endian 16-bit word at `offset`, which has to be within the window and aligned.
    pub(super) fn load16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.word(offset).load(order))
    }

    /// Stores a little-endian 16-bit word.
    pub(super) fn store16(&self, offset: usize, value: u16, order: Ordering) {
        self.word(offset).store(value.to_le(), order);
    }

    /// The 64-bit word at `offset`, in this machine's byte order.
    pub(super) fn load64(&self, offset: usize) -> u64 {
        self.long(offset).load(Ordering::Acquire)
    }

    /// Stores a 64-bit word in this machine's byte order.
    pub(super) fn store64(&self, offset: usize, value: u64) {
        self.long(offset).store(value, Ordering::Release);
    }

    /// Copies the bytes at `offset`. Other parties may change them meanwhile.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.buffer(offset, bytes.len()).copy_to_slice(bytes);
    }

    /// Writes bytes at `offset`.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.buffer(offset, bytes.len()).copy_from_slice(bytes);
    }

    fn buffer(&self, offset: usize, len: usize) -> IoBuf {
        let address = self.at(offset, len, 1);
        // SAFETY: within the mapping (`at` asserts it), which this window keeps for as long as the buffer is
        // used: the buffer is private to the two methods above.
        unsafe { IoBuf::new(address, len) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    /// A memfd of this length that cannot shrink.
    pub(in super::super) fn memfd(len: u64) -> OwnedFd {
        let file = unsealed(len);
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        file
    }

    fn unsealed(len: u64) -> OwnedFd {
        let file = memfd_create("xpm-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    /// The default requirements.
    pub(in super::super) fn terms() -> Terms {
        Terms { allow_unsealed: false, failed: Arc::default() }
    }

    #[test]
    fn unsealed_memory_is_refused_and_if_allowed_its_loss_fails_only_its_device() {
        let file = unsealed(0x4000);
        let info = RegionInfo { guest: 0, len: 0x4000, user: 0, offset: 0 };
        let refused = Region::map(info, &file, &terms()).unwrap_err().to_string();
        assert!(refused.contains("allow-unsealed"), "{refused}");
        let allowing = Terms { allow_unsealed: true, ..terms() };
        let (others, other_file) = (terms(), memfd(0x1000));
        let map = |file, terms, len| {
            GuestMemory::new(vec![Arc::new(Region::map(RegionInfo { len, ..info }, file, terms).unwrap())])
                .unwrap()
        };
        let (memory, other) = (map(&file, &allowing, 0x4000), map(&other_file, &others, 0x1000));
        memory.piece(0, 0x4000).unwrap().copy_from_slice(&[7; 0x4000]);
        other.piece(0, 4).unwrap().copy_from_slice(b"here");
        ftruncate(&file, 0x1000).unwrap();
        let mut bytes = [1; 0x4000];
        memory.piece(0, 0x4000).unwrap().copy_to_slice(&mut bytes);
        assert!(
            bytes[..0x1000] == [7; 0x1000] && bytes[0x1000..] == [0; 0x3000],
            "zeros in place of what is gone"
        );
        memory.window_of_guest(0x2000, 2).unwrap().store16(0, 5, Ordering::Release);
        assert!(allowing.failed.load(Ordering::Acquire), "and its device is told");
        assert!(!others.failed.load(Ordering::Acquire));
        let mut there = [0; 4];
        other.piece(0, 4).unwrap().copy_to_slice(&mut there);
        assert_eq!(&there, b"here");
    }

    /// Guest memory of regions at these guest addresses with these lengths; in the front end, each region
    /// lies 1 TiB higher.
    pub(in super::super) fn memory(regions: &[(u64, u64)]) -> GuestMemory {
        let total = regions.iter().map(|(_, len)| len).sum();
        let file = memfd(total);
        let mut offset = 0;
        let regions = regions.iter().map(|&(guest, len)| {
            let info = RegionInfo { guest, len, user: guest + (1 << 40), offset };
            offset += len;
            Arc::new(Region::map(info, &file, &terms()).unwrap())
        });
        GuestMemory::new(regions.collect()).unwrap()
    }

    #[test]
    fn addresses_in_memory_are_found_and_others_are_not() {
        let memory = memory(&[(0x10_0000, 0x4000), (0, 0x3000), (0x10_4000, 0x1000)]);
        assert_eq!(memory.piece(0, 0x1000).unwrap().len(), 0x1000);
        assert_eq!(memory.piece(0x2fff, 0x1000).unwrap().len(), 1, "up to the end of its region");
        assert!(memory.piece(0x3000, 1).is_none());
        assert!(memory.piece(u64::MAX, u64::MAX).is_none());
        assert_eq!(
            memory.piece(0x10_3f00, 0x200).unwrap().len(),
            0x100,
            "the next region is another mapping"
        );
        assert!(memory.window_of_guest(0x10_3f00, 0x200).is_none(), "a window is one piece");
        assert!(memory.window_of_user((1 << 40) + 0x2ff0, 0x10).is_some());
        assert!(memory.window_of_user((1 << 40) + 0x2ff0, 0x11).is_none());
        assert!(memory.window_of_user(0, 1).is_none());
        memory.piece(0x10_4000, 4).unwrap().copy_from_slice(b"abcd");
        let mut bytes = [0; 4];
        memory.window_of_user((1 << 40) + 0x10_4000, 4).unwrap().read(0, &mut bytes);
        assert_eq!(&bytes, b"abcd");
    }

    #[test]
    fn files_that_are_too_short_and_regions_that_overlap_are_refused() {
        let file = memfd(0x2000);
        let info = RegionInfo { guest: 0, len: 0x1000, user: 0, offset: 0x1000 };
        assert!(Region::map(info, &file, &terms()).is_ok());
        for info in [
            RegionInfo { offset: 0x1001, ..info },
            RegionInfo { len: 0, ..info },
            RegionInfo { len: u64::MAX, ..info },
            RegionInfo { guest: u64::MAX, ..info },
            RegionInfo { user: u64::MAX, ..info },
        ] {
            assert!(Region::map(info, &file, &terms()).is_err(), "{info:?}");
        }
        let region = |guest| Arc::new(Region::map(RegionInfo { guest, ..info }, &file, &terms()).unwrap());
        assert!(GuestMemory::new(vec![region(0), region(0xfff)]).is_err());
        assert!(GuestMemory::new(vec![region(0), region(0x1000)]).is_ok());
    }

    #[test]
    fn a_region_that_starts_within_a_page_has_the_right_address() {
        let file = memfd(0x3000);
        let whole = RegionInfo { guest: 0, len: 0x3000, user: 0, offset: 0 };
        let whole = GuestMemory::new(vec![Arc::new(Region::map(whole, &file, &terms()).unwrap())]).unwrap();
        whole.piece(0x1234, 3).unwrap().copy_from_slice(b"xyz");
        let part = RegionInfo { guest: 0x9000, len: 0x100, user: 0, offset: 0x1234 };
        let part = GuestMemory::new(vec![Arc::new(Region::map(part, &file, &terms()).unwrap())]).unwrap();
        let mut bytes = [0; 3];
        part.piece(0x9000, 3).unwrap().copy_to_slice(&mut bytes);
        assert_eq!(&bytes, b"xyz");
    }

    #[test]
    fn words_are_little_endian_and_shared() {
        let memory = memory(&[(0, 0x1000)]);
        let window = memory.window_of_guest(0x10, 0x20).unwrap();
        assert!(window.is_aligned(16));
        window.store16(2, 0x1234, Ordering::Release);
        let mut bytes = [0; 2];
        window.read(2, &mut bytes);
        assert_eq!(bytes, [0x34, 0x12]);
        window.write(2, &[0xff, 0x00]);
        assert_eq!(window.load16(2, Ordering::Acquire), 0xff);
        window.store64(8, 7);
        assert_eq!(window.load64(8), 7);
    }

    #[test]
    #[should_panic(expected = "of a window of")]
    fn accesses_beyond_a_window_panic() {
        memory(&[(0, 0x1000)]).window_of_guest(0, 4).unwrap().load16(3, Ordering::Relaxed);
    }
}
