//! The memory of a grant's regions, mapped at consecutive addresses.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munlock, munmap,
};

use crate::io::IoBuf;
use crate::sound::BadMemory;

/// Alignment of the first address in bytes: the largest page size, so that memory of any page size can be
/// mapped.
const ALIGNMENT: usize = 1 << 30;
/// Type of a hugetlbfs file system (statfs(2)).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Mapped memory of sealed memfds only: it stays accessible for as long as this value lives.
#[derive(Debug)]
pub(super) struct Mapping {
    /// The reserved addresses: the mapped range and the bytes needed to align it.
    reserved: (NonNull<u8>, usize),
    start: NonNull<u8>,
    len: usize,
    /// Bytes from `start` that are mapped.
    mapped: usize,
    /// Whether some of the regions are hugetlb memory.
    huge: bool,
    page: usize,
}

// SAFETY: the addresses are valid in all threads, and the memory behind them is accessed through `IoBuf`
// only, never by reference. Changes of the mapping itself need `&mut`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves addresses for `len` bytes; nothing is accessible yet.
    pub(super) fn reserve(len: u64) -> io::Result<Mapping> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let whole = len.checked_add(ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at addresses that the kernel chooses affects no other mapping.
        let address = unsafe { mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), flags) }?;
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the alignment needs at most `ALIGNMENT` bytes, and the reservation is larger than `len` by
        // that much.
        let start = unsafe { address.add(address.as_ptr().align_offset(ALIGNMENT)) };
        let page = page_size();
        let mapping = Mapping { reserved: (address, whole), start, len, mapped: 0, huge: false, page };
        mapping.unlock(mapping.reserved)?;
        Ok(mapping)
    }

    /// Maps the next region of `len` bytes behind the previous ones.
    ///
    /// The file must be a memfd of this length that cannot shrink: an access behind the end of a file raises
    /// SIGBUS, which kills the process.
    pub(super) fn append(&mut self, memory: BorrowedFd<'_>, len: u64) -> Result<(), AppendError> {
        let page = check(memory, len)?;
        let len = usize::try_from(len).map_err(|_| AppendError::Bad("a region of unreasonable length"))?;
        if len > self.len - self.mapped {
            return Err(AppendError::Bad("regions longer than their grant"));
        }
        if !self.mapped.is_multiple_of(page) {
            return Err(AppendError::Bad("a region that is not aligned to its pages"));
        }
        // SAFETY: `mapped` is at most `len`, so the result stays within the reservation.
        let target = unsafe { self.start.add(self.mapped) };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the reservation that has no file mapped and whose addresses were never
        // given out.
        unsafe { mmap(target.as_ptr().cast(), len, ProtFlags::empty(), flags, memory, 0) }
            .map_err(AppendError::system)?;
        // If the mapping were accessible from the start, the kernel would fault all of it in for a process
        // that locks its memory.
        self.unlock((target, len)).map_err(AppendError::System)?;
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: only widens access to the memory that was just mapped.
        unsafe { mprotect(target.as_ptr().cast(), len, access) }.map_err(AppendError::system)?;
        // SAFETY: affects only the contents of a core dump, which leaves this memory of another process out.
        unsafe { madvise(target.as_ptr().cast(), len, Advice::LinuxDontDump) }
            .map_err(AppendError::system)?;
        self.huge |= page > self.page;
        self.mapped += len;
        Ok(())
    }

    fn unlock(&self, (address, len): (NonNull<u8>, usize)) -> io::Result<()> {
        // SAFETY: allows the kernel to page out our own mapping; the content stays.
        Ok(unsafe { munlock(address.as_ptr().cast(), len) }?)
    }

    /// Mapped bytes.
    pub(super) const fn len(&self) -> u64 {
        self.mapped as u64
    }

    /// The `len` bytes at `offset`; none unless all of them are mapped.
    pub(super) fn part(&self, offset: u64, len: u64) -> Option<IoBuf> {
        let end = offset.checked_add(len)?;
        if end > self.mapped as u64 {
            return None;
        }
        // SAFETY: the part is mapped, readable and writable for as long as `self` lives, and every holder of
        // the `IoBuf` keeps `self` alive. No reference to the memory is ever made.
        Some(unsafe { IoBuf::new(self.start.add(offset as usize), len as usize) })
    }

    /// Frees the memory of `part`: its bytes read as zeros afterwards. Pages that the part covers only partly
    /// are zeroed and kept, and so is hugetlb memory: no huge page may be available when a freed one is
    /// needed again, and that access raises SIGBUS.
    pub(super) fn trim(&self, part: IoBuf) -> Result<(), BadMemory> {
        let address = part.as_ptr() as usize;
        let head = (address.next_multiple_of(self.page) - address).min(part.len());
        let pages = (part.len() - head) & !(self.page - 1);
        if self.huge || pages == 0 || self.remove(part.part(head, pages)).is_err() {
            return part.try_zero();
        }
        part.part(0, head).try_zero()?;
        part.part(head + pages, part.len() - head - pages).try_zero()
    }

    fn remove(&self, part: IoBuf) -> io::Result<()> {
        // SAFETY: MADV_REMOVE is fallocate(2) with PUNCH_HOLE and KEEP_SIZE on the memfds behind the range,
        // which is within the mapping; the bytes become zeros, as a write would do it.
        Ok(unsafe { madvise(part.as_ptr().cast(), part.len(), Advice::LinuxRemove) }?)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (address, len) = self.reserved;
        // SAFETY: the reservation is ours, and every holder of an address in it borrows `self` or keeps it
        // alive. munmap fails only for addresses that mmap cannot have returned.
        let _ = unsafe { munmap(address.as_ptr().cast(), len) };
    }
}

/// Why memory was not mapped.
#[derive(Debug)]
pub(super) enum AppendError {
    /// The memory violates the protocol's requirements.
    Bad(&'static str),
    /// The kernel refused the mapping.
    System(io::Error),
}

impl AppendError {
    fn system(errno: rustix::io::Errno) -> AppendError {
        AppendError::System(errno.into())
    }
}

fn page_size() -> usize {
    // SAFETY: reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("a system has a page size")
}

/// Checks that accesses to the descriptor's memory cannot fault; returns its page size.
fn check(memory: BorrowedFd<'_>, len: u64) -> Result<usize, AppendError> {
    let Ok(seals) = fcntl_get_seals(memory) else {
        return Err(AppendError::Bad("a region that is no memfd"));
    };
    if !seals.contains(SealFlags::SHRINK) {
        return Err(AppendError::Bad("a memfd that can shrink"));
    }
    let size = fstat(memory).map_err(AppendError::system)?.st_size;
    if len == 0 || u64::try_from(size) != Ok(len) {
        return Err(AppendError::Bad("a memfd of another length than announced"));
    }
    let file_system = fstatfs(memory).map_err(AppendError::system)?;
    let page =
        if file_system.f_type as u64 == HUGETLBFS_MAGIC { file_system.f_bsize as usize } else { page_size() };
    if !page.is_power_of_two() || page > ALIGNMENT || !len.is_multiple_of(page as u64) {
        return Err(AppendError::Bad("a memfd that is not made of whole pages"));
    }
    Ok(page)
}
