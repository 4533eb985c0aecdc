//! The window of an allocation: its bytes at addresses, and what of them is in local memory.
//!
//! The local copies are the pages of a memfd of the allocation's length. The program sees it at the *window*,
//! where pages come and go; the pager alone sees it at the *alias*, where all pages are that the file
//! has. A page that is taken out of the window keeps its content in the file, and nobody can write it any more.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};
use xpm_protocol::units::PAGE_LEN;
use xpm_transport::IoBuf;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Length of a page of memory in bytes.
pub(super) const PAGE: usize = PAGE_LEN as usize;

/// As MADV_DONTNEED, of locked pages as well; see madvise(2).
const MADV_DONTNEED_LOCKED: i32 = 24;

pub(super) struct Window {
    file: OwnedFd,
    window: NonNull<u8>,
    alias: NonNull<u8>,
    len: usize,
}

// SAFETY: the addresses stay mapped until it is dropped; what is done with them is by system calls and by `IoBuf`s.
unsafe impl Send for Window {}
// SAFETY: as for `Send`.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves addresses for `len` bytes, a multiple of the page length. Takes no memory.
    pub(super) fn new(len: usize) -> io::Result<Window> {
        let file = memfd_create("xpm-mapping", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len as u64)?;
        let map = || {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
            // SAFETY: a new mapping at an address of the kernel's choice.
            let address = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, &file, 0) }?;
            let mapped = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
            // SAFETY: just mapped. A child would share the file, and fill holes of it with zeros: it gets nothing.
            unsafe { madvise(address, len, Advice::LinuxDontFork) }?;
            // A huge page would be more than the one that is counted. A kernel without them refuses.
            // SAFETY: just mapped.
            let _ = unsafe { madvise(address, len, Advice::LinuxNoHugepage) };
            Ok::<_, io::Error>(mapped)
        };
        let window = map()?;
        let alias = map().inspect_err(|_| {
            // SAFETY: mapped above, and seen by nobody.
            unsafe { munmap(window.as_ptr().cast(), len) }.ok();
        })?;
        Ok(Window { file, window, alias, len })
    }

    pub(super) fn address(&self) -> usize {
        self.window.as_ptr() as usize
    }

    pub(super) fn pointer(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.len, "outside of the window");
        // SAFETY: within the mapping, or one behind its end.
        unsafe { self.window.add(offset) }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The page at an address; none outside of the window.
    pub(super) fn page_of(&self, address: usize) -> Option<u32> {
        let offset = address.checked_sub(self.address()).filter(|offset| *offset < self.len)?;
        Some((offset / PAGE) as u32)
    }

    pub(super) fn address_of(&self, page: u32) -> usize {
        self.address() + page as usize * PAGE
    }

    /// The content of pages that the file has, for the one who has them to itself. Reading where the file
    /// has nothing puts zeros there.
    pub(super) fn content(&self, first: u32, count: u32) -> IoBuf {
        let (start, len) = self.bytes(first, count);
        // SAFETY: the alias stays mapped as long as the window, which whoever posts I/O on it keeps.
        unsafe { IoBuf::new(self.alias.add(start), len) }
    }

    /// Puts content into the file, without showing it.
    pub(super) fn keep(&self, page: u32, content: IoBuf) {
        content.copy_to(self.content(page, 1));
    }

    /// Takes pages out of the window, those that the program has locked, too. The file keeps them. False where the
    /// kernel does not do it (locked pages before Linux 5.18): some may still be there then.
    #[must_use]
    pub(super) fn hide(&self, first: u32, count: u32) -> bool {
        let (start, len) = self.bytes(first, count);
        // SAFETY: within the mapping.
        let address = unsafe { self.window.add(start) }.as_ptr().cast();
        // SAFETY: of a shared mapping of a file this takes page table entries only.
        unsafe { madvise(address, len, Advice::LinuxDontNeed) }.is_ok()
            // SAFETY: the same.
            || unsafe { libc::madvise(address, len, MADV_DONTNEED_LOCKED) } == 0
    }

    /// Takes pages out of the window and of the file.
    pub(super) fn drop_pages(&self, first: u32, count: u32) {
        let (start, len) = self.bytes(first, count);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = fallocate(&self.file, flags, start as u64, len as u64);
        debug_assert!(punched.is_ok(), "{punched:?}");
    }

    /// Whether the program may write to these pages of the window.
    pub(super) fn set_writable(&self, first: u32, count: u32, writable: bool) -> io::Result<()> {
        let (start, len) = self.bytes(first, count);
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        // SAFETY: pages of the window, about whose content Rust knows nothing.
        Ok(unsafe { mprotect(self.window.add(start).as_ptr().cast(), len, flags) }?)
    }

    fn bytes(&self, first: u32, count: u32) -> (usize, usize) {
        let (start, len) = (first as usize * PAGE, count as usize * PAGE);
        assert!(start + len <= self.len, "pages outside of the window");
        (start, len)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for address in [self.window, self.alias] {
            // SAFETY: mapped by `new`, and nobody uses it any more.
            unsafe { munmap(address.as_ptr().cast(), self.len) }.ok();
        }
    }
}

/// Memory for I/O, page-aligned.
pub(super) struct Staging {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: an address that stays mapped until it is dropped.
unsafe impl Send for Staging {}
// SAFETY: as for `Send`; it gives `IoBuf`s only.
unsafe impl Sync for Staging {}

impl Staging {
    pub(super) fn new(len: usize) -> io::Result<Staging> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        // SAFETY: just mapped.
        unsafe { madvise(address, len, Advice::LinuxDontFork) }?;
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Staging { address, len })
    }

    /// All of it.
    pub(super) fn all(&self) -> IoBuf {
        // SAFETY: mapped until it is dropped; whoever posts I/O on it keeps it longer.
        unsafe { IoBuf::new(self.address, self.len) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody uses it any more.
        unsafe { munmap(self.address.as_ptr().cast(), self.len) }.ok();
    }
}

/// XXH3 of a buffer that nobody changes meanwhile: staging memory, or pages that are in the file only.
pub(super) fn digest(content: IoBuf, seed: u64) -> u64 {
    // SAFETY: mapped and readable by the contract of `IoBuf::new`. Nobody changes it, for the caller has the pages
    // to itself, and none of them is in the window, or it is a copy; so it may be a slice for this moment.
    let bytes = unsafe { std::slice::from_raw_parts(content.as_ptr(), content.len()) };
    xxh3_64_with_seed(bytes, seed)
}

/// Words of zero, which take memory only where they are written.
pub(super) fn zeros32(count: usize) -> Box<[AtomicU32]> {
    let words = Box::into_raw(vec![0_u32; count].into_boxed_slice());
    // SAFETY: `AtomicU32` has the size, alignment and bit validity of `u32`.
    unsafe { Box::from_raw(words as *mut [AtomicU32]) }
}

/// The same of 64 bits.
pub(super) fn zeros64(count: usize) -> Box<[AtomicU64]> {
    let words = Box::into_raw(vec![0_u64; count].into_boxed_slice());
    // SAFETY: `AtomicU64` has the size, alignment and bit validity of `u64` (on all 64-bit Linux).
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}
