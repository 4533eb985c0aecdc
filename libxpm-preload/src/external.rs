//! Pieces of external memory that the program has, each in a slab of its own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use xpm_client::Attachment;
use xpm_client::mapping::{Advice, Mapping, Space};

pub(crate) const PAGE: usize = 4096;

static EXTERNAL: OnceLock<External> = OnceLock::new();
/// Addresses that may be external; none until there are some.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// This is a child of the process that had it.
static FORKED: AtomicBool = AtomicBool::new(false);

/// What is external in this process.
pub(crate) struct External {
    space: Space,
    /// Carries orders of the allocator out, for as long as the process lives.
    _attachment: Attachment,
    pieces: Mutex<BTreeMap<usize, Piece>>,
    threshold: usize,
    /// Where it is said at the end what was used.
    account: Option<File>,
    used: AtomicU64,
    most: AtomicU64,
    /// Pieces that were made local for want of external memory.
    refused: AtomicU64,
}

struct Piece {
    mapping: Mapping,
    /// Bytes that the program asked for, in whole pages.
    len: usize,
    /// Parts that it gave back, in order, none touching another.
    gone: Vec<Range<usize>>,
    /// It changed what may be done with it.
    protected: bool,
    /// malloc(3) gave it, and not mmap(2): an allocator of the program may give parts of what it mapped.
    heap: bool,
}

/// What there is, in a process that has it.
pub(crate) fn get() -> Option<&'static External> {
    EXTERNAL.get().filter(|_| !FORKED.load(Ordering::Relaxed))
}

/// In a child after fork(2).
pub(crate) extern "C" fn in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Whether an address is, or was in the parent, one of external memory.
pub(crate) fn is_external(address: usize) -> bool {
    address < END.load(Ordering::Relaxed) && address >= START.load(Ordering::Relaxed)
}

/// A piece for `len` bytes, if that much is to be external, and can be. `heap`: for malloc(3).
pub(crate) fn allocate(len: usize, heap: bool) -> Option<*mut u8> {
    get().filter(|external| len >= external.threshold)?.allocate(len, heap)
}

/// Whether malloc(3) of this library gave an address, in this process or in its parent.
pub(crate) fn is_heap(address: usize) -> bool {
    if !is_external(address) || !address.is_multiple_of(PAGE) {
        return false;
    }
    let Some(external) = EXTERNAL.get() else { return false };
    let of = |pieces: &BTreeMap<usize, Piece>| pieces.get(&address).is_some_and(|piece| piece.heap);
    if !FORKED.load(Ordering::Relaxed) {
        return of(&external.pieces());
    }
    // A thread that is not in the child may have had the lock.
    external.pieces.try_lock().is_ok_and(|pieces| of(&pieces))
}

impl External {
    /// Makes external memory available to the program.
    pub(crate) fn install(space: Space, attachment: Attachment, threshold: usize, account: Option<File>) {
        let addresses = space.addresses();
        let external = External {
            space,
            _attachment: attachment,
            pieces: Mutex::default(),
            threshold,
            account,
            used: AtomicU64::new(0),
            most: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        };
        if EXTERNAL.set(external).is_ok() {
            START.store(addresses.start, Ordering::Relaxed);
            END.store(addresses.end, Ordering::Relaxed);
        }
    }

    fn pieces(&self) -> MutexGuard<'_, BTreeMap<usize, Piece>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&self, len: usize, heap: bool) -> Option<*mut u8> {
        let Ok(mapping) = self.space.carve(len as u64) else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let used = self.used.fetch_add(mapping.len() as u64, Ordering::Relaxed) + mapping.len() as u64;
        self.most.fetch_max(used, Ordering::Relaxed);
        let address = mapping.as_ptr().as_ptr();
        // What malloc_usable_size(3) says may be used.
        let len = if heap { mapping.len() } else { len.next_multiple_of(PAGE) };
        let piece = Piece { mapping, len, gone: Vec::new(), protected: false, heap };
        self.pieces().insert(address as usize, piece);
        Some(address)
    }

    /// Bytes from an address that malloc(3) or mmap(2) gave to the end of its slab. 0: it is no such address.
    pub(crate) fn room(&self, address: usize) -> usize {
        self.pieces().get(&address).map_or(0, |piece| piece.mapping.len())
    }

    /// The bytes that were asked for at an address. 0: it is no such address.
    pub(crate) fn len(&self, address: usize) -> usize {
        self.pieces().get(&address).map_or(0, |piece| piece.len)
    }

    /// Makes a piece longer or shorter, within its slab.
    pub(crate) fn set_len(&self, address: usize, len: usize) {
        let len = len.next_multiple_of(PAGE);
        let mut pieces = self.pieces();
        let Some(piece) = pieces.get_mut(&address) else { return };
        if len < piece.len {
            // What is asked for again later has to be zeros.
            let _ = piece.mapping.clear(len..piece.len);
        }
        piece.len = len;
    }

    /// Gives a whole piece back.
    pub(crate) fn free(&self, address: usize) {
        let piece = self.pieces().remove(&address);
        if let Some(piece) = piece {
            self.drop_piece(piece);
        }
    }

    fn drop_piece(&self, piece: Piece) {
        self.used.fetch_sub(piece.mapping.len() as u64, Ordering::Relaxed);
        if piece.protected {
            let (address, len) = (piece.mapping.as_ptr().as_ptr(), piece.mapping.len());
            let all = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: addresses of the window, as they were at first.
            unsafe { libc::syscall(libc::SYS_mprotect, address, len, all) };
        }
        drop(piece.mapping);
    }

    /// Gives parts back, in whole pages; a piece of which nothing is left is gone.
    pub(crate) fn unmap(&self, addresses: &Range<usize>) {
        let mut ended = Vec::new();
        let mut pieces = self.pieces();
        for (address, part) in parts(&pieces, addresses) {
            let Some(piece) = pieces.get_mut(&address) else { continue };
            let _ = piece.mapping.clear(part.clone());
            piece.give_back(part);
            if piece.is_gone() {
                ended.extend(pieces.remove(&address));
            }
        }
        drop(pieces);
        ended.into_iter().for_each(|piece| self.drop_piece(piece));
    }

    /// Makes parts zeros, as MADV_DONTNEED does with anonymous memory.
    pub(crate) fn clear(&self, addresses: &Range<usize>) -> bool {
        let pieces = self.pieces();
        parts(&pieces, addresses)
            .into_iter()
            .all(|(address, part)| pieces[&address].mapping.clear(part).is_ok())
    }

    /// Passes advice on.
    pub(crate) fn advise(&self, addresses: &Range<usize>, advice: Advice) {
        let pieces = self.pieces();
        for (address, part) in parts(&pieces, addresses) {
            // Advice may be ignored.
            let _ = pieces[&address].mapping.advise(part, advice);
        }
    }

    /// What may be done with parts has changed.
    pub(crate) fn set_protected(&self, addresses: &Range<usize>) {
        let mut pieces = self.pieces();
        for (address, _) in parts(&pieces, addresses) {
            if let Some(piece) = pieces.get_mut(&address) {
                piece.protected = true;
            }
        }
    }

    /// Says what was used, where that was asked for.
    pub(crate) fn say(&self) {
        if let Some(mut account) = self.account.as_ref() {
            // Nobody is left who could be told.
            let _ = writeln!(account, "xpm run: {}", self.summary());
        }
    }

    fn summary(&self) -> String {
        let stats = self.space.stats();
        let mib = |bytes: u64| bytes >> 20;
        let most = self.most.load(Ordering::Relaxed);
        let mut line = format!(
            "up to {} MiB external, {} MiB of them local at the end, of {} MiB that could be",
            mib(most),
            mib(stats.resident),
            mib(stats.budget)
        );
        let (faults, fetched, written) = (stats.faults, stats.fetched, stats.written);
        let _ = write!(line, "; {faults} faults, {fetched} pages fetched, {written} written");
        let refused = self.refused.load(Ordering::Relaxed);
        if refused > 0 {
            let _ = write!(
                line,
                "; {refused} pieces were local, for external memory was used up: choose a larger --size"
            );
        }
        line
    }
}

/// Pieces that a range of addresses touches, and which of their bytes.
fn parts(pieces: &BTreeMap<usize, Piece>, addresses: &Range<usize>) -> Vec<(usize, Range<usize>)> {
    let before = pieces.range(..addresses.end).rev();
    let touched = before.take_while(|(address, piece)| *address + piece.mapping.len() > addresses.start);
    let part = |(address, piece): (&usize, &Piece)| {
        let start = addresses.start.saturating_sub(*address);
        let end = (addresses.end - address).next_multiple_of(PAGE).min(piece.len);
        (start < end).then_some((*address, start..end))
    };
    touched.filter_map(part).collect()
}

impl Piece {
    fn give_back(&mut self, part: Range<usize>) {
        let (mut start, mut end) = (part.start, part.end);
        self.gone.retain(|gone| {
            let apart = gone.end < start || gone.start > end;
            if !apart {
                (start, end) = (start.min(gone.start), end.max(gone.end));
            }
            apart
        });
        self.gone.push(start..end);
    }

    fn is_gone(&self) -> bool {
        self.gone.iter().any(|gone| gone.start == 0 && gone.end >= self.len)
    }
}
