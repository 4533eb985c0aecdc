//! A window of anonymous memory: pages are moved from place to place, by UFFDIO_MOVE.
//!
//! A page is moved with what was last written to it, so nothing can be lost between. The kernel does not move what
//! somebody has pinned (io_uring, O_DIRECT), which stays where it is; nor from or to memory of other protection, or
//! that is locked on one side only. What is locked is moved by way of a page that is locked, too, so that the kernel
//! sees whether somebody has pinned it. What may not be written to, and so is pinned by nobody who writes, is
//! protected against writes that were allowed meanwhile, copied, and let go.
//!
//! What the kernel goes on reading without having pinned it (vmsplice, MSG_ZEROCOPY) nobody tells us: its memory is
//! the next page's when it has left. `docs/mapping.md` forbids that.
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

pub(crate) struct Private {
    pub(crate) blocks: Blocks,
    /// The block that is being filled with pages that left.
    filling: Mutex<Option<Block>>,
    /// All of this process: reading here finds pages that the program may not read, too.
    memory: File,
    /// Where nobody but this library should have put anything.
    shelf: Range<usize>,
    /// A page that is locked, where the process may lock one: what is locked comes by there. Missing when nobody has
    /// it.
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
        // A process that may not lock has no locked pages, either.
        let lock = lock_when_used(&lock).then(|| Mutex::new(lock));
        let shelf = parts[1].as_ptr() as usize;
        Ok(Private { blocks, filling: Mutex::new(None), memory, shelf: shelf..shelf + len, lock })
    }

    /// Addresses of its own besides the window and the shelf.
    pub(crate) fn reserved(&self) -> Vec<Range<usize>> {
        let lock = self.lock.as_ref().map(|lock| {
            let start = lock.lock().unwrap_or_else(PoisonError::into_inner).all().as_ptr() as usize;
            start..start + PAGE
        });
        [Some(self.blocks.addresses()), lock].into_iter().flatten().collect()
    }

    /// Copies content to missing pages, and wakes who waits for them.
    pub(crate) fn copy(&self, uffd: &Uffd, to: usize, content: IoBuf) {
        let mut at = 0;
        while at < content.len() {
            let rest = content.part(at, content.len() - at);
            let Err(Partly { done, why }) = uffd.copy(to + at, rest) else { return };
            at += done;
            let why = match why {
                // A mark that there is nothing (`Window::refuse`), for there is no page of this library's.
                Refused::Exists if self.shelf.contains(&(to + at)) => {
                    dont_need(to + at, PAGE);
                    match uffd.copy(to + at, content.part(at, PAGE)) {
                        Ok(()) => Refused::Exists,
                        Err(Partly { why, .. }) => why,
                    }
                }
                // Parts of the run are of different protection, or locked: one by one.
                Refused::Other(libc::ENOENT) => match uffd.copy(to + at, content.part(at, PAGE)) {
                    Ok(()) => Refused::Exists,
                    Err(Partly { why, .. }) => why,
                },
                why => why,
            };
            match why {
                // No memory just now: the kernel makes some, or ends somebody.
                Refused::Other(libc::ENOMEM) => std::thread::yield_now(),
                // Done, or the program did something to these addresses by itself, which is told when they are touched.
                _ => at += PAGE,
            }
        }
    }

    /// Copies from pages that are there. False where one is not: the program threw it away by a call of its own. Of
    /// several, one by one tells which.
    pub(crate) fn read(&self, uffd: &Uffd, from: usize, to: IoBuf) -> bool {
        // SAFETY: mapped by the contract of `IoBuf::new`, and the caller's alone, so it may be a slice for this moment.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to.as_ptr(), to.len()) };
        if self.memory.read_exact_at(bytes, from as u64).is_ok() {
            return true;
        }
        if to.len() > PAGE {
            return false;
        }
        // Touching what is not there would be a fault that waits for the caller, who has the page to itself.
        let there = uffd.poison(from, PAGE).is_err();
        if let Some(from) = NonNull::new(from as *mut u8).filter(|_| there) {
            // SAFETY: pages of the window, which are there as long as they are the caller's.
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
            // SAFETY: a page of the shelf that is the caller's.
            self.copy(uffd, to + at, unsafe { IoBuf::new(page, PAGE) });
            dont_need(from + at, PAGE);
            at += PAGE;
        }
    }

    /// Moves pages from the window to the shelf; says how many bytes.
    pub(crate) fn hide(&self, uffd: &Uffd, from: usize, to: usize, len: usize) -> usize {
        let mut at = 0;
        while at < len {
            let Err(Partly { done, why }) = uffd.move_pages(to + at, from + at, len - at) else { return len };
            at += done;
            if why == Refused::Exists {
                // A mark that there is nothing, as in `copy`.
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

    /// Takes one page to the shelf that the program has locked.
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
            // It is locked and may not be written to.
            Err(Partly { why: Refused::Other(libc::EINVAL), .. }) => self.take_out(uffd, from, to),
            Err(_) => false,
        }
    }

    /// Takes one page to the shelf that is of another protection.
    fn take_out(&self, uffd: &Uffd, from: usize, to: usize) -> bool {
        if uffd.protect(from, PAGE, true).is_err() {
            return false;
        }
        let mut content = [0; PAGE];
        let read = self.memory.read_exact_at(&mut content, from as u64).is_ok();
        // SAFETY: it is there until this function ends.
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

    /// Makes blocks of pages of the shelf.
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

    /// Moves the first pages of a block to missing pages, and gives the block back.
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
