//! Whether this process is the one that it was: a child of fork(2) has a copy of this library's tables, and nothing of
//! the external memory that they are about.
//!
//! A page that the kernel wipes in children tells, whatever made the child: fork(3), _Fork(3) or clone(2). The
//! addresses of the parent's external memory are *dead* in the child: they are reserved without any access, so that
//! nothing else comes to lie there, which would be taken for external memory.

use std::ops::Range;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use crate::external::{self, PAGE};
use crate::{adopted, start};

static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(null_mut());
/// In a process that began by execve(2), or that knows that it is a child.
const KNOWN: u32 = 1;

/// Windows of this process's parents.
static DEAD: [(AtomicUsize, AtomicUsize); 8] = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 8];

/// Before `main`.
pub(crate) fn begin() {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, which stays for ever; zeros are an AtomicU32.
    unsafe {
        let page = libc::syscall(libc::SYS_mmap, 0, PAGE, prot, flags, -1, 0) as *mut libc::c_void;
        if page != libc::MAP_FAILED
            && libc::syscall(libc::SYS_madvise, page, PAGE, libc::MADV_WIPEONFORK) == 0
        {
            let mark: *mut AtomicU32 = page.cast();
            (*mark).store(KNOWN, Ordering::Relaxed);
            MARK.store(mark, Ordering::Release);
        }
        // Without the page (before Linux 4.14) this finds the children of fork(3).
        libc::pthread_atfork(Some(adopted::before_fork), Some(adopted::in_parent), Some(in_child));
    }
}

extern "C" fn in_child() {
    // SAFETY: made by `begin`, and never freed.
    if let Some(mark) = unsafe { MARK.load(Ordering::Acquire).as_ref() } {
        mark.store(0, Ordering::Relaxed);
    }
    look();
}

/// To be called before anything of this library's tables is used: in a new child it forgets what was the parent's.
pub(crate) fn look() {
    // SAFETY: made by `begin`, and never freed.
    let Some(mark) = (unsafe { MARK.load(Ordering::Acquire).as_ref() }) else { return };
    let known = mark.load(Ordering::Relaxed) == KNOWN;
    if known || mark.swap(KNOWN, Ordering::Relaxed) == KNOWN {
        return;
    }
    let window = external::forget();
    start::forget();
    if !window.is_empty() {
        reserve(&window);
        adopted::adopt();
        crate::fallen::watch();
    }
}

fn reserve(window: &Range<usize>) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: takes addresses at which there is nothing, and nothing else.
    unsafe {
        let len = window.end - window.start;
        let made = libc::syscall(libc::SYS_mmap, window.start, len, libc::PROT_NONE, flags, -1, 0);
        libc::syscall(libc::SYS_madvise, made, len, libc::MADV_DONTDUMP);
    }
    let free = DEAD.iter().find(|(_, end)| end.load(Ordering::Relaxed) == 0);
    if let Some((start, end)) = free {
        start.store(window.start, Ordering::Relaxed);
        end.store(window.end, Ordering::Release);
    }
}

/// Whether an address was one of external memory in a parent.
pub(crate) fn is_dead(address: usize) -> bool {
    let holds = |(start, end): &(AtomicUsize, AtomicUsize)| {
        address < end.load(Ordering::Acquire) && address >= start.load(Ordering::Relaxed)
    };
    DEAD.iter().any(holds)
}
