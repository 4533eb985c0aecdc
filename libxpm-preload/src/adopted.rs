//! The parent's external memory in a child of fork(2): a copy in local memory, at the same addresses, where
//! that is no more than may be local. Otherwise nothing is there ([`crate::process`]).
//!
//! The copies are made before the fork, by the thread that serves, at addresses that the child inherits; the child
//! moves them to where they belong, and the parent lets them go.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::external::{self, PAGE};

/// One piece, and where its copy is.
pub(crate) struct Copied {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) heap: bool,
    pub(crate) copy: Local,
}

/// Local memory, until this is dropped.
pub(crate) struct Local {
    at: usize,
    len: usize,
}

impl Local {
    /// Zeros, which take memory only where they are written to.
    pub(crate) fn new(len: usize) -> Option<Local> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::syscall(libc::SYS_mmap, 0, len, prot, flags, -1, 0) };
        (at != -1).then_some(Local { at: at as usize, len })
    }

    /// Takes bytes that belong at an offset, whole pages; zeros are there already.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len, "within the copy");
        for (index, page) in
            bytes.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0))
        {
            let to = (self.at + offset + index * PAGE) as *mut u8;
            // SAFETY: mapped by `new`, this one's alone, and within.
            unsafe { to.copy_from_nonoverlapping(page.as_ptr(), page.len()) };
        }
    }

    /// Moves it to an address at which there is nothing that counts. It stays there for ever.
    fn move_to(self, address: usize) -> bool {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: mapped by `new`; at the other address there is no more than a reservation.
        let moved = unsafe { libc::syscall(libc::SYS_mremap, self.at, self.len, self.len, flags, address) };
        let done = moved as usize == address;
        if done {
            std::mem::forget(self);
        }
        done
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody's.
        unsafe { libc::syscall(libc::SYS_munmap, self.at, self.len) };
    }
}

thread_local! {
    /// The copy for the fork that this thread is about to make.
    static COPIED: Cell<Option<Vec<Copied>>> = const { Cell::new(None) };
}

/// A piece that this process has of a parent's, in local memory.
#[derive(Clone, Copy)]
struct Piece {
    len: usize,
    heap: bool,
}

type Pieces = Mutex<BTreeMap<usize, Piece>>;
static PIECES: AtomicPtr<Pieces> = AtomicPtr::new(null_mut());

/// Before fork(3).
pub(crate) extern "C" fn before_fork() {
    if crate::threads::is_own() {
        return;
    }
    let copied = external::get().and_then(|external| external.service.call(move || external.copies()));
    COPIED.with(|place| place.set(copied));
}

/// After it, in the parent.
pub(crate) extern "C" fn in_parent() {
    COPIED.with(|place| drop(place.take()));
}

/// In a new child, when the addresses of its parent's external memory are reserved.
pub(crate) fn adopt() {
    // Another thread may have had the lock: what earlier parents had cannot be given back then.
    let before = pieces().and_then(|pieces| Some(std::mem::take(&mut *pieces.try_lock().ok()?)));
    let mut all = before.unwrap_or_default();
    for Copied { address, len, heap, copy } in COPIED.with(Cell::take).into_iter().flatten() {
        if copy.move_to(address) {
            all.insert(address, Piece { len, heap });
        }
    }
    if !all.is_empty() {
        PIECES.store(Box::into_raw(Box::new(Mutex::new(all))), Ordering::Release);
    }
}

fn pieces() -> Option<&'static Pieces> {
    // SAFETY: made by `adopt`, and never freed.
    unsafe { PIECES.load(Ordering::Acquire).as_ref() }
}

fn with<T>(act: impl FnOnce(&mut BTreeMap<usize, Piece>) -> T) -> Option<T> {
    let mut pieces = pieces()?.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Some(act(&mut pieces))
}

/// Whether these addresses are all of one piece.
pub(crate) fn holds(addresses: &Range<usize>) -> bool {
    let holds = |pieces: &mut BTreeMap<usize, Piece>| {
        let piece = pieces.range(..=addresses.start).next_back();
        piece.is_some_and(|(address, piece)| addresses.end <= address + piece.len)
    };
    with(holds).unwrap_or(false)
}

/// Length of a piece that begins at an address, of malloc(3)'s or of mmap(2)'s.
pub(crate) fn len(address: usize, heap: bool) -> Option<usize> {
    with(|pieces| pieces.get(&address).filter(|piece| piece.heap == heap).map(|piece| piece.len)).flatten()
}

/// Gives a piece of malloc(3)'s back, if there is one.
pub(crate) fn free(address: usize) {
    if let Some(len) = len(address, true) {
        with(|pieces| pieces.remove(&address));
        reserve(&(address..address + len));
    }
}

/// Lets addresses be reserved again, without any memory.
pub(crate) fn reserve(addresses: &Range<usize>) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let (start, len) = (addresses.start, (addresses.end - addresses.start).next_multiple_of(PAGE));
    // SAFETY: addresses of a parent's window, which this process gives back.
    unsafe { libc::syscall(libc::SYS_mmap, start, len, libc::PROT_NONE, flags, -1, 0) != -1 }
}
