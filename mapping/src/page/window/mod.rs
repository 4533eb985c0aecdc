//! The window of an allocation: its bytes at addresses, and the local memory behind them.
//!
//! The program accesses the *window*, in which pages appear and disappear. A page that was taken out of the window and
//! is still in local memory is on the *shelf* (the inactive list), at addresses that only the library knows: the
//! program can no longer write to it. How a page gets from one to the other depends on the kernel:
//!
//! - [`Memory::Private`] (Linux 6.8 and later): both are anonymous memory, and pages are moved between them. Pages that
//!   leave local memory form blocks, into which later pages are read, so that the kernel need not allocate new pages.
//! - [`Memory::Shared`]: both are mappings of one memfd. A page is removed from the window's page table and stays in
//!   the file.

#![allow(unsafe_code)]

mod blocks;
mod private;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags, madvise, mlock_with, mmap, mmap_anonymous,
    mprotect, munlock, munmap,
};
use xpm_protocol::units::PAGE_LEN;
use xpm_transport::IoBuf;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub(crate) use self::blocks::{BLOCK, Block};
use self::private::Private;
use crate::page::anchor::Anchor;
use crate::page::uffd::{Backing, Partly, Uffd};

/// Length of a page of memory in bytes.
pub(crate) const PAGE: usize = PAGE_LEN as usize;

/// Like MADV_DONTNEED, also for locked pages; see madvise(2).
const MADV_DONTNEED_LOCKED: i32 = 24;
/// Most pages that one call fills with zeros.
const ZEROS: usize = 16;
static ZERO_PAGES: [u8; ZEROS * PAGE] = [0; ZEROS * PAGE];

pub(crate) struct Window {
    pub(crate) uffd: Uffd,
    window: NonNull<u8>,
    shelf: NonNull<u8>,
    len: usize,
    memory: Memory,
    /// Dropped last: until then a touch of an absent page is a fault.
    _anchor: Option<Anchor>,
}

enum Memory {
    Shared(OwnedFd),
    Private(Box<Private>),
}

// SAFETY: the addresses stay mapped until the value is dropped, and are used only by system calls and by `IoBuf`s.
unsafe impl Send for Window {}
// SAFETY: as for `Send`.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves addresses for `len` bytes, a multiple of the page length, and registers them. Takes no memory.
    /// `blocks`: number of blocks that keep pages for reuse, with [`Memory::Private`].
    pub(crate) fn new(len: usize, uffd: Uffd, backing: Backing, blocks: usize) -> io::Result<Window> {
        let file = match backing {
            Backing::Shared => {
                let file = memfd_create("xpm-mapping", MemfdFlags::CLOEXEC)?;
                ftruncate(&file, len as u64)?;
                Some(file)
            }
            Backing::Private => None,
        };
        let window = map(len, file.as_ref())?;
        let shelf = map(len, file.as_ref()).inspect_err(|_| unmap(window, len))?;
        let memory = match file {
            Some(file) => uffd.register_shared(window.as_ptr() as usize, len).map(|()| Memory::Shared(file)),
            None => Private::new(&uffd, [window, shelf], len, blocks)
                .map(|private| Memory::Private(Box::new(private))),
        };
        match memory {
            Ok(memory) => {
                let anchor = Anchor::new(uffd.as_fd());
                Ok(Window { uffd, window, shelf, len, memory, _anchor: anchor })
            }
            Err(error) => {
                unmap(window, len);
                unmap(shelf, len);
                Err(error)
            }
        }
    }

    pub(crate) fn address(&self) -> usize {
        self.window.as_ptr() as usize
    }

    pub(crate) fn pointer(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.len, "outside of the window");
        // SAFETY: within the mapping, or one behind its end.
        unsafe { self.window.add(offset) }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The page at an address; none outside of the window.
    pub(crate) fn page_of(&self, address: usize) -> Option<u32> {
        let offset = address.checked_sub(self.address()).filter(|offset| *offset < self.len)?;
        Some((offset / PAGE) as u32)
    }

    pub(crate) fn address_of(&self, page: u32) -> usize {
        self.address() + page as usize * PAGE
    }

    /// Puts content into absent pages of the window, and wakes the threads that wait for them.
    pub(crate) fn fill(&self, first: u32, content: IoBuf) {
        match &self.memory {
            Memory::Private(private) => private.copy(&self.uffd, self.address_of(first), content),
            Memory::Shared(_) => {
                let Err(Partly { done, .. }) = self.uffd.copy(self.address_of(first), content) else {
                    return;
                };
                // The file has a page there already, which only a read-ahead of the kernel can have put there. So the
                // rest is filled page by page. The first `done` bytes are in the window already, where the program may
                // have written to them.
                for index in done / PAGE..content.len() / PAGE {
                    let page = first + index as u32;
                    self.keep(page, content.part(index * PAGE, PAGE));
                    self.show(page, 1);
                }
            }
        }
    }

    /// Puts zeros into absent pages of the window, and wakes the threads that wait for them.
    pub(crate) fn fill_zeros(&self, first: u32, count: u32) {
        match &self.memory {
            Memory::Private(_) => {
                for at in (0..count).step_by(ZEROS) {
                    self.fill(first + at, zeros((count - at) as usize));
                }
            }
            Memory::Shared(_) => {
                let zeroed = self.uffd.zero(self.address_of(first), count as usize * PAGE);
                let Err(Partly { done, .. }) = zeroed else { return };
                for page in first + (done / PAGE) as u32..first + count {
                    self.shelved(page, 1).zero();
                    self.show(page, 1);
                }
            }
        }
    }

    /// Takes a block to read pages into; none if no block is full, or with [`Memory::Shared`].
    pub(crate) fn take_block(&self) -> Option<Block> {
        match &self.memory {
            Memory::Private(private) => private.blocks.take_full(),
            Memory::Shared(_) => None,
        }
    }

    /// Returns an unused block.
    pub(crate) fn give_block(&self, block: Block) {
        if let Memory::Private(private) = &self.memory {
            private.blocks.give(block);
        }
    }

    /// Moves the pages of a block to absent pages of the window, except page `shelved`, which goes to the shelf. Wakes
    /// the threads that wait for them.
    pub(crate) fn fill_from(&self, first: u32, count: u32, shelved: Option<u32>, block: Block) {
        let Memory::Private(private) = &self.memory else { return };
        private.empty(&self.uffd, block, count, |index| match shelved == Some(first + index) {
            true => self.shelf_of(first + index),
            false => self.address_of(first + index),
        });
    }

    /// Puts the content of an absent page onto the shelf.
    pub(crate) fn keep(&self, page: u32, content: IoBuf) {
        match &self.memory {
            Memory::Private(private) => private.copy(&self.uffd, self.shelf_of(page), content),
            Memory::Shared(_) => content.copy_to(self.shelved(page, 1)),
        }
    }

    /// The content of pages on the shelf; only for their owner.
    pub(crate) fn shelved(&self, first: u32, count: u32) -> IoBuf {
        let (start, len) = self.bytes(first, count);
        // SAFETY: the shelf stays mapped as long as the window lives, and a thread that posts I/O on it keeps the
        // window alive.
        unsafe { IoBuf::new(self.shelf.add(start), len) }
    }

    /// Copies the content of pages in the window that the caller owns. The program may write to them meanwhile. Returns
    /// false if the program discarded one of them, see [`Window::settle`].
    #[must_use]
    pub(crate) fn read(&self, first: u32, to: IoBuf) -> bool {
        let count = (to.len() / PAGE) as u32;
        match &self.memory {
            Memory::Private(private) => private.read(&self.uffd, self.address_of(first), to),
            Memory::Shared(_) => {
                self.shelved(first, count).copy_to(to);
                true
            }
        }
    }

    /// Writes `bytes` into a page in the window that the caller owns. Returns false if the program discarded the page.
    #[must_use]
    pub(crate) fn write(&self, page: u32, within: usize, bytes: IoBuf) -> bool {
        let (start, len) = self.bytes(page, 1);
        if matches!(self.memory, Memory::Private(_)) && !self.settle(page) {
            return false;
        }
        let base = if matches!(self.memory, Memory::Private(_)) { self.window } else { self.shelf };
        // SAFETY: mapped as long as the window lives, and the page is present as long as the caller owns it.
        bytes.copy_to(unsafe { IoBuf::new(base.add(start), len) }.part(within, bytes.len()));
        true
    }

    /// Moves pages from the shelf to the window, and wakes the threads that wait for them.
    pub(crate) fn show(&self, first: u32, count: u32) {
        match &self.memory {
            Memory::Private(private) => {
                let len = count as usize * PAGE;
                private.show(&self.uffd, self.address_of(first), self.shelf_of(first), len);
            }
            Memory::Shared(_) => {
                let mapped = self.uffd.map(self.address_of(first), count as usize * PAGE);
                debug_assert!(
                    matches!(mapped, Ok(()) | Err(crate::page::uffd::Refused::Exists)),
                    "{mapped:?}"
                );
            }
        }
    }

    /// Ensures that a page whose state is [`Residency::Mapped`](crate::page::word::Residency::Mapped) can be accessed,
    /// and wakes the threads that wait for it. Returns false if the page is gone: the program discarded it by a call
    /// of its own. This is returned only once; from then on an access raises SIGBUS, because zeros would be wrong
    /// content.
    #[must_use]
    pub(crate) fn settle(&self, page: u32) -> bool {
        match &self.memory {
            Memory::Private(_) => {
                let _ = self.uffd.protect(self.address_of(page), PAGE, false);
                // The kernel refuses to poison a page that is present.
                self.uffd.poison(self.address_of(page), PAGE).is_err()
            }
            // The kernel may have swapped the page out.
            Memory::Shared(_) => {
                self.show(page, 1);
                true
            }
        }
    }

    /// Moves pages from the window to the shelf, also pages that the program has locked. Returns how many it moved,
    /// starting with the first; the next page cannot be moved now.
    #[must_use]
    pub(crate) fn hide(&self, first: u32, count: u32) -> u32 {
        match &self.memory {
            Memory::Private(private) => {
                let len = count as usize * PAGE;
                (private.hide(&self.uffd, self.address_of(first), self.shelf_of(first), len) / PAGE) as u32
            }
            // With a shared mapping of a file, this removes the page table entries only.
            Memory::Shared(_) if dont_need(self.address_of(first), count as usize * PAGE) => count,
            Memory::Shared(_) => 0,
        }
    }

    /// Removes pages from the shelf, and keeps their memory for later pages if possible. Only for one thread at a time.
    pub(crate) fn recycle(&self, first: u32, count: u32) {
        match &self.memory {
            Memory::Private(private) => {
                private.recycle(&self.uffd, self.shelf_of(first), count as usize * PAGE);
            }
            Memory::Shared(_) => self.punch(first, count),
        }
    }

    /// Frees the memory that is kept for later pages.
    pub(crate) fn trim(&self) {
        if let Memory::Private(private) = &self.memory {
            private.blocks.trim();
        }
    }

    /// Frees the memory of pages, in the window or on the shelf.
    pub(crate) fn discard(&self, first: u32, count: u32) {
        match &self.memory {
            Memory::Private(_) => {
                for address in [self.address_of(first), self.shelf_of(first)] {
                    let gone = dont_need(address, count as usize * PAGE);
                    debug_assert!(gone, "{}", io::Error::last_os_error());
                }
            }
            Memory::Shared(_) => self.punch(first, count),
        }
    }

    /// Answers a touch of registered addresses outside of the window, by the kernel when it locks all memory of the
    /// process, or by a debugger: it fails, as if no memory were there.
    pub(crate) fn refuse(&self, address: usize) {
        let page = address / PAGE * PAGE;
        let _ = self.uffd.poison(page, PAGE);
        self.uffd.wake(page, PAGE);
    }

    /// All addresses that only the library may lock or touch, and those of the window.
    pub(crate) fn reserved(&self) -> Vec<Range<usize>> {
        let of = |start: NonNull<u8>| start.as_ptr() as usize..start.as_ptr() as usize + self.len;
        let mut all = vec![of(self.window), of(self.shelf)];
        if let Memory::Private(private) = &self.memory {
            all.extend(private.reserved());
        }
        all
    }

    /// Removes the poison from an absent page.
    pub(crate) fn heal(&self, page: u32) {
        dont_need(self.address_of(page), PAGE);
    }

    fn punch(&self, first: u32, count: u32) {
        let Memory::Shared(file) = &self.memory else { return };
        let (start, len) = self.bytes(first, count);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = fallocate(file, flags, start as u64, len as u64);
        debug_assert!(punched.is_ok(), "{punched:?}");
    }

    fn shelf_of(&self, page: u32) -> usize {
        self.shelf.as_ptr() as usize + page as usize * PAGE
    }

    /// Sets whether the program may write to these pages of the window.
    pub(crate) fn set_writable(&self, first: u32, count: u32, writable: bool) -> io::Result<()> {
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
        unmap(self.window, self.len);
        unmap(self.shelf, self.len);
    }
}

/// Maps `len` bytes, of a file or anonymous, which a child process does not inherit.
fn map(len: usize, file: Option<&OwnedFd>) -> io::Result<NonNull<u8>> {
    // Without access at first: after mlockall(2) with MCL_FUTURE the kernel would fault all of it in now.
    let (prot, flags) = (ProtFlags::empty(), MapFlags::NORESERVE);
    let address = match file {
        // SAFETY: a new mapping at an address of the kernel's choice.
        Some(file) => unsafe { mmap(std::ptr::null_mut(), len, prot, flags | MapFlags::SHARED, file, 0) }?,
        // SAFETY: the same.
        None => unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags | MapFlags::PRIVATE) }?,
    };
    let mapped = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
    // A child must not inherit it: the child would share the file and fill its holes with zeros, and pages that two
    // processes share cannot be moved.
    // SAFETY: just mapped.
    unsafe { madvise(address, len, Advice::LinuxDontFork) }.inspect_err(|_| unmap(mapped, len))?;
    let access = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: just mapped.
    unsafe { munlock(address, len).and_then(|()| mprotect(address, len, access)) }
        .inspect_err(|_| unmap(mapped, len))?;
    // A huge page would use more memory than the single page that is counted. A kernel without huge pages refuses the
    // advice.
    // SAFETY: just mapped.
    let _ = unsafe { madvise(address, len, Advice::LinuxNoHugepage) };
    Ok(mapped)
}

fn unmap(address: NonNull<u8>, len: usize) {
    // SAFETY: mapped by `map`, and not used any more.
    unsafe { munmap(address.as_ptr().cast(), len) }.ok();
}

/// Locks a page as soon as it is faulted in. Returns false if the process may not lock memory.
fn lock_when_used(page: &Staging) -> bool {
    // SAFETY: mapped, and not in use yet.
    unsafe { mlock_with(page.address.as_ptr().cast(), page.len, MlockFlags::ONFAULT) }.is_ok()
}

/// Whether the program has locked a page of a window by mlock(2).
fn is_locked(address: usize) -> bool {
    // MADV_COLD marks the page as rarely used. The kernel refuses that for locked pages (EINVAL,
    // `can_madv_lru_vma()` in mm/madvise.c), which shows the lock.
    // SAFETY: a page of a window; its content stays.
    let told = unsafe { madvise(address as *mut std::ffi::c_void, PAGE, Advice::LinuxCold) };
    told == Err(rustix::io::Errno::INVAL)
}

/// Removes pages from the page table, also pages that the program has locked. Returns false if the kernel refuses
/// (locked pages before Linux 5.18); some pages may still be present then.
fn dont_need(address: usize, len: usize) -> bool {
    let address = address as *mut std::ffi::c_void;
    // SAFETY: pages of a window, its shelf or its blocks, about whose content Rust knows nothing.
    unsafe { madvise(address, len, Advice::LinuxDontNeed) }.is_ok()
        // SAFETY: the same.
        || unsafe { libc::madvise(address, len, MADV_DONTNEED_LOCKED) } == 0
}

/// Zeros for `pages` pages, at most [`ZEROS`].
fn zeros(pages: usize) -> IoBuf {
    let start = NonNull::from(&ZERO_PAGES).cast::<u8>();
    // SAFETY: the static lives for ever and is never written: the buffer is only copied from.
    unsafe { IoBuf::new(start, pages.min(ZEROS) * PAGE) }
}

/// Memory for I/O, page-aligned.
pub(crate) struct Staging {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: an address that stays mapped until the value is dropped.
unsafe impl Send for Staging {}
// SAFETY: as for `Send`; the value gives out `IoBuf`s only.
unsafe impl Sync for Staging {}

impl Staging {
    pub(crate) fn new(len: usize) -> io::Result<Staging> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        // SAFETY: just mapped.
        unsafe { madvise(address, len, Advice::LinuxDontFork) }?;
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Staging { address, len })
    }

    /// The whole memory.
    pub(crate) fn all(&self) -> IoBuf {
        // SAFETY: mapped until the value is dropped; a poster of I/O on it keeps the value longer.
        unsafe { IoBuf::new(self.address, self.len) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and not used any more.
        unsafe { munmap(self.address.as_ptr().cast(), self.len) }.ok();
    }
}

/// Calls `act` with memory to which it may write any bytes. `act` has to wait for the I/O that it begins.
pub(crate) fn with_target<B: Copy, T>(bytes: &mut [B], act: impl FnOnce(IoBuf) -> T) -> T {
    const { assert!(size_of::<B>() == 1, "bytes") };
    // SAFETY: borrowed exclusively until this returns, and no operation is in flight then.
    act(unsafe { IoBuf::new(NonNull::from(&mut *bytes).cast(), bytes.len()) })
}

/// As [`with_target`], with memory that `act` only reads, as writes to external memory do.
pub(crate) fn with_source<T>(bytes: &[u8], act: impl FnOnce(IoBuf) -> T) -> T {
    // Touches each page, so that unreadable memory raises SIGBUS or SIGSEGV here, as with any access, and does not
    // become an error of a connection.
    bytes.iter().step_by(PAGE).chain(bytes.last()).for_each(|byte| _ = std::hint::black_box(*byte));
    // SAFETY: borrowed, so unchanged until this returns, and no operation is in flight then.
    act(unsafe { IoBuf::new(NonNull::from(bytes).cast(), bytes.len()) })
}

/// XXH3 of a buffer that does not change meanwhile: staging memory, or pages that are not in the window.
pub(crate) fn digest(content: IoBuf, seed: u64) -> u64 {
    // SAFETY: mapped and readable by the contract of `IoBuf::new`. It does not change, because the caller owns the
    // pages and none of them is in the window, or because it is a copy; so it may be a slice during this call.
    let bytes = unsafe { std::slice::from_raw_parts(content.as_ptr(), content.len()) };
    xxh3_64_with_seed(bytes, seed)
}

/// Words of zero, which use memory only where they are written.
pub(crate) fn zeros32(count: usize) -> Box<[AtomicU32]> {
    let words = Box::into_raw(vec![0_u32; count].into_boxed_slice());
    // SAFETY: `AtomicU32` has the size, alignment and bit validity of `u32`.
    unsafe { Box::from_raw(words as *mut [AtomicU32]) }
}

/// As [`zeros32`], with words of 64 bits.
pub(crate) fn zeros64(count: usize) -> Box<[AtomicU64]> {
    let words = Box::into_raw(vec![0_u64; count].into_boxed_slice());
    // SAFETY: `AtomicU64` has the size, alignment and bit validity of `u64` (on all 64-bit Linux).
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}
