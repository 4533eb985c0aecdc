//! A window of anonymous memory: pages are moved between window, shelf and blocks by UFFDIO_MOVE.
//!
//! A page is moved together with the last write to it, so no write can be lost. The kernel refuses to move a page that
//! is pinned (io_uring, O_DIRECT): it stays in place. The kernel also refuses to move a page between ranges with
//! different protection, or if only one side is locked. For these cases:
//!
//! - A locked page is moved over an intermediate page that is locked, too, so that the kernel still checks whether the
//!   page is pinned.
//! - A page that the program may not write to cannot be pinned for writing. It is write-protected, in case writes were
//!   allowed meanwhile, then copied, and removed.
//!
//! The kernel does not report pages that it continues to read without a pin (vmsplice, MSG_ZEROCOPY): when such a page
//! has left, its memory is reused for another page. `docs/mapping.md` forbids these calls.
//!
//! Source: mm/userfaultfd.c of Linux 6.12, validate_move_areas() and move_pages_pte().

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use xpm_transport::IoBuf;

use super::blocks::{Block, Blocks};
use super::{PAGE, Staging, dont_need, is_locked, lock_when_used};
use crate::page::uffd::{Partly, Refused, Uffd};
use crate::say::say;

pub(crate) struct Private {
    pub(crate) blocks: Blocks,
    /// The block that is being filled with departing pages.
    filling: Mutex<Option<Block>>,
    /// `/proc/self/mem`: a read of it also returns pages that the program may not read.
    memory: File,
    /// The addresses of the shelf, where only this library puts pages.
    shelf: Range<usize>,
    /// The intermediate page for locked pages, which is locked itself; none if the process may not lock memory. Absent
    /// while it is not in use.
    lock: Option<Mutex<Staging>>,
}

impl Private {
    pub(crate) fn new(
        uffd: &Uffd,
        parts: [NonNull<u8>; 2],
        len: usize,
        blocks: usize,
    ) -> io::Result<Private> {
        for part in parts {
            uffd.register_private(part.as_ptr() as usize, len)?;
        }
        let memory = File::open("/proc/self/mem")?;
        let blocks = Blocks::new(blocks, |address, len| uffd.register_private(address, len))?;
        let lock = Staging::new(PAGE)?;
        uffd.register_private(lock.all().as_ptr() as usize, PAGE)?;
        // A process that may not lock memory has no locked pages either.
        let lock = lock_when_used(&lock).then(|| Mutex::new(lock));
        let shelf = parts[1].as_ptr() as usize;
        Ok(Private { blocks, filling: Mutex::new(None), memory, shelf: shelf..shelf + len, lock })
    }

    /// The library's addresses besides the window and the shelf.
    pub(crate) fn reserved(&self) -> Vec<Range<usize>> {
        let lock = self.lock.as_ref().map(|lock| {
            let start = lock.lock().unwrap_or_else(PoisonError::into_inner).all().as_ptr() as usize;
            start..start + PAGE
        });
        [Some(self.blocks.addresses()), lock].into_iter().flatten().collect()
    }

    /// Copies content to absent pages, and wakes the threads that wait for them.
    pub(crate) fn copy(&self, uffd: &Uffd, to: usize, content: IoBuf) {
        let mut at = 0;
        while at < content.len() {
            let rest = content.part(at, content.len() - at);
            let Err(Partly { done, why }) = uffd.copy(to + at, rest) else { return };
            at += done;
            let why = match why {
                // A poison mark of `Window::refuse`: this library has no page there.
                Refused::Exists if self.shelf.contains(&(to + at)) => {
                    dont_need(to + at, PAGE);
                    match uffd.copy(to + at, content.part(at, PAGE)) {
                        Ok(()) => Refused::Exists,
                        Err(Partly { why, .. }) => why,
                    }
                }
                // Parts of the run have another protection, or are locked: page by page.
                Refused::Other(libc::ENOENT) => match uffd.copy(to + at, content.part(at, PAGE)) {
                    Ok(()) => Refused::Exists,
                    Err(Partly { why, .. }) => why,
                },
                why => why,
            };
            match why {
                // No memory now: the kernel will free some, or kill a process.
                Refused::Other(libc::ENOMEM) => std::thread::yield_now(),
                Refused::Exists => at += PAGE,
                // The program changed these addresses by a call of its own. The next access reports the page as
                // discarded; the kernel's reason is known here only.
                Refused::Nothing | Refused::Other(_) => {
                    say(format_args!("xpm: the kernel does not put a page at 0x{:x} ({why:?})", to + at));
                    at += PAGE;
                }
            }
        }
    }

    /// Copies the content of present pages. Returns false if one of them is absent: the program discarded it by a call
    /// of its own. To find that one among several, call this for each page.
    pub(crate) fn read(&self, uffd: &Uffd, from: usize, to: IoBuf) -> bool {
        // SAFETY: mapped by the contract of `IoBuf::new`, and used by the caller only, so it may be a slice during this
        // call.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to.as_ptr(), to.len()) };
        if self.memory.read_exact_at(bytes, from as u64).is_ok() {
            return true;
        }
        if to.len() > PAGE {
            return false;
        }
        // A touch of an absent page would be a fault that waits for the page's owner, which is the caller: a deadlock.
        // So the poison, which the kernel refuses for a present page, tests first.
        let there = uffd.poison(from, PAGE).is_err();
        if let Some(from) = NonNull::new(from as *mut u8).filter(|_| there) {
            // SAFETY: pages of the window, which are present as long as the caller owns them.
            unsafe { IoBuf::new(from, to.len()) }.copy_to(to);
        }
        there
    }

    /// Moves pages from the shelf to the window.
    pub(crate) fn show(&self, uffd: &Uffd, to: usize, from: usize, len: usize) {
        let mut at = 0;
        while at < len {
            let Err(Partly { done, .. }) = uffd.move_pages(to + at, from + at, len - at) else { return };
            at += done;
            let Some(page) = NonNull::new((from + at) as *mut u8) else { return };
            // SAFETY: a page of the shelf that the caller owns.
            self.copy(uffd, to + at, unsafe { IoBuf::new(page, PAGE) });
            dont_need(from + at, PAGE);
            at += PAGE;
        }
    }

    /// Moves pages from the window to the shelf; returns the number of bytes moved.
    pub(crate) fn hide(&self, uffd: &Uffd, from: usize, to: usize, len: usize) -> usize {
        let mut at = 0;
        while at < len {
            let Err(Partly { done, why }) = uffd.move_pages(to + at, from + at, len - at) else { return len };
            at += done;
            if why == Refused::Exists {
                // A poison mark, as in `copy`.
                dont_need(to + at, PAGE);
                if uffd.move_pages(to + at, from + at, PAGE).is_err() {
                    return at;
                }
                at += PAGE;
                continue;
            }
            let taken = why == Refused::Other(libc::EINVAL)
                && match is_locked(from + at) {
                    true => self.move_locked(uffd, from + at, to + at),
                    false => self.take_out(uffd, from + at, to + at),
                };
            if !taken {
                return at;
            }
            at += PAGE;
        }
        len
    }

    /// Moves one page that the program has locked to the shelf.
    fn move_locked(&self, uffd: &Uffd, from: usize, to: usize) -> bool {
        let Some(lock) = &self.lock else { return false };
        let lock = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let between = lock.all();
        match uffd.move_pages(between.as_ptr() as usize, from, PAGE) {
            Ok(()) => {
                self.copy(uffd, to, between);
                dont_need(between.as_ptr() as usize, PAGE);
                true
            }
            Err(Partly { why: Refused::Exists, .. }) => {
                dont_need(between.as_ptr() as usize, PAGE);
                false
            }
            // The page is locked, and the program may not write to it.
            Err(Partly { why: Refused::Other(libc::EINVAL), .. }) => self.take_out(uffd, from, to),
            Err(_) => false,
        }
    }

    /// Moves one page that has another protection to the shelf.
    fn take_out(&self, uffd: &Uffd, from: usize, to: usize) -> bool {
        if uffd.protect(from, PAGE, true).is_err() {
            return false;
        }
        let mut content = [0; PAGE];
        let read = self.memory.read_exact_at(&mut content, from as u64).is_ok();
        // SAFETY: `content` lives until the end of this function.
        let taken =
            read && uffd.copy(to, unsafe { IoBuf::new(NonNull::from(&mut content).cast(), PAGE) }).is_ok();
        if taken && dont_need(from, PAGE) {
            return true;
        }
        if taken {
            dont_need(to, PAGE);
        }
        let _ = uffd.protect(from, PAGE, false);
        false
    }

    /// Moves pages of the shelf into blocks; pages for which there is no block are freed.
    pub(crate) fn recycle(&self, uffd: &Uffd, from: usize, len: usize) {
        let mut filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        while at < len {
            let Some(mut block) = filling.take().or_else(|| self.blocks.take_hollow()) else { break };
            let count = block.missing.min(((len - at) / PAGE) as u32);
            let to = block.address_of(block.missing - count);
            match uffd.move_pages(to, from + at, count as usize * PAGE) {
                Ok(()) => {
                    block.missing -= count;
                    at += count as usize * PAGE;
                }
                Err(_) => {
                    block.wipe();
                    self.blocks.give(block);
                    break;
                }
            }
            match block.missing {
                0 => self.blocks.give(block),
                _ => *filling = Some(block),
            }
        }
        if at < len {
            dont_need(from + at, len - at);
        }
    }

    /// Moves the first `count` pages of a block to absent pages at the addresses `to`, and returns the block.
    pub(crate) fn empty(&self, uffd: &Uffd, mut block: Block, count: u32, to: impl Fn(u32) -> usize) {
        let (mut at, mut torn) = (0, false);
        while at < count {
            let run =
                (at..count).take_while(|index| to(*index) == to(at) + (index - at) as usize * PAGE).count();
            let moved = uffd.move_pages(to(at), block.address_of(at), run * PAGE);
            if let Err(Partly { done, .. }) = moved {
                let left = block.buffer(at + run as u32).part(at as usize * PAGE, run * PAGE);
                self.copy(uffd, to(at) + done, left.part(done, left.len() - done));
                torn = true;
            }
            at += run as u32;
        }
        block.missing = count;
        if torn {
            block.wipe();
        }
        self.blocks.give(block);
    }
}
