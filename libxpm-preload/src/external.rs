//! Pieces of external memory that the program has, each in a slab of its own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use xpm_mapping::{Advice, Attachment, Mapping, Space};
use xpm_protocol::api::run::Account;

use crate::adopted::{self, Copied};
use crate::lease::Lease;
use crate::service::Service;
use crate::{process, start, threads};

pub(crate) const PAGE: usize = 4096;
/// Bytes that are copied in one go.
const COPY_LEN: usize = 256 << 10;
/// How often it is said what is used, where something has changed.
const SAY_EVERY: Duration = Duration::from_millis(500);

/// None until this process has some.
static EXTERNAL: AtomicPtr<External> = AtomicPtr::new(null_mut());
/// Addresses that may be external; none until there are some.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
/// Shorter pieces are local: all of them, unless `xpm run` started the program.
static THRESHOLD: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The external memory of this process.
pub(crate) struct External {
    space: Space,
    /// Carries orders of the allocator out, for as long as the process lives.
    _attachment: Attachment,
    lease: Lease,
    pub(crate) service: Service,
    pieces: Mutex<BTreeMap<usize, Piece>>,
    verbose: bool,
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

/// Why a large piece is local that nobody refused.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Local {
    Shared,
    Fixed,
    Reserved,
    Other,
}

const WHY: [&str; 4] =
    ["shared with other processes", "at addresses of the program's choice", "reserved only", "other"];
/// Bytes that were asked for so, by [`Local`].
static STAYED: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// A large piece is asked for that cannot be external.
pub(crate) fn stays_local(why: Local, len: usize) {
    if len >= THRESHOLD.load(Ordering::Relaxed) {
        STAYED[why as usize].fetch_add(len as u64, Ordering::Relaxed);
    }
}

pub(crate) fn set_threshold(threshold: usize) {
    THRESHOLD.store(threshold.max(PAGE), Ordering::Relaxed);
}

/// The name of this process's program.
pub(crate) fn program() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    name.trim_end().to_owned()
}

/// The external memory, in a process that has it.
pub(crate) fn get() -> Option<&'static External> {
    process::look();
    // SAFETY: made by `install`, and never freed.
    unsafe { EXTERNAL.load(Ordering::Acquire).as_ref() }
}

/// In a new child: what the parent had is not this process's. The addresses that it had.
pub(crate) fn forget() -> Range<usize> {
    EXTERNAL.store(null_mut(), Ordering::Release);
    STAYED.iter().for_each(|bytes| bytes.store(0, Ordering::Relaxed));
    let start = START.swap(0, Ordering::Relaxed);
    start..END.swap(0, Ordering::Relaxed)
}

/// Whether an address is one of external memory.
pub(crate) fn is_external(address: usize) -> bool {
    let within = |address| address < END.load(Ordering::Relaxed) && address >= START.load(Ordering::Relaxed);
    if !within(address) {
        return false;
    }
    // In a new child it is not.
    process::look();
    within(address)
}

/// A piece for `len` bytes, if that much is to be external, and can be. `heap`: for malloc(3).
pub(crate) fn allocate(len: usize, heap: bool) -> Option<*mut u8> {
    if len < THRESHOLD.load(Ordering::Relaxed) || threads::is_own() {
        return None;
    }
    process::look();
    start::get_or_ask()?.allocate(len, heap)
}

/// Whether malloc(3) of this library gave an address, in this process.
pub(crate) fn is_heap(address: usize) -> bool {
    if !is_external(address) || !address.is_multiple_of(PAGE) {
        return false;
    }
    get().is_some_and(|external| external.pieces().get(&address).is_some_and(|piece| piece.heap))
}

impl External {
    /// Makes external memory available to the program.
    pub(crate) fn install(
        space: Space,
        attachment: Attachment,
        lease: Lease,
        verbose: bool,
    ) -> &'static External {
        let addresses = space.addresses();
        let external = &*Box::leak(Box::new(External {
            space,
            _attachment: attachment,
            lease,
            service: Service::default(),
            pieces: Mutex::default(),
            verbose,
            used: AtomicU64::new(0),
            most: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }));
        START.store(addresses.start, Ordering::Relaxed);
        END.store(addresses.end, Ordering::Relaxed);
        EXTERNAL.store(std::ptr::from_ref(external).cast_mut(), Ordering::Release);
        external
    }

    /// Does what threads of the program ask for, and says what is used. By the thread that opened the space.
    pub(crate) fn serve(&'static self) -> ! {
        let mut said = (0, std::time::Instant::now());
        self.service.run(SAY_EVERY, || {
            let most = self.most.load(Ordering::Relaxed);
            // The first use at once: a process may end without a word.
            if said.0 != most && (said.0 == 0 || said.1.elapsed() >= SAY_EVERY) {
                said = (most, std::time::Instant::now());
                self.say();
            }
        })
    }

    fn pieces(&self) -> MutexGuard<'_, BTreeMap<usize, Piece>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&'static self, len: usize, heap: bool) -> Option<*mut u8> {
        let address = self.service.call(move || self.carve(len, heap))?;
        Some(std::ptr::with_exposed_provenance_mut(address))
    }

    fn carve(&self, len: usize, heap: bool) -> Option<usize> {
        let Ok(mapping) = self.space.carve(len as u64) else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let used = self.used.fetch_add(mapping.len() as u64, Ordering::Relaxed) + mapping.len() as u64;
        self.most.fetch_max(used, Ordering::Relaxed);
        let address = mapping.as_ptr().as_ptr().expose_provenance();
        // The length that malloc_usable_size(3) returns may be used.
        let len = if heap { mapping.len() } else { len.next_multiple_of(PAGE) };
        let piece = Piece { mapping, len, gone: Vec::new(), protected: false, heap };
        self.pieces().insert(address, piece);
        Some(address)
    }

    /// Addresses that are external, and those that the library has for that.
    pub(crate) fn reserved(&self) -> Vec<Range<usize>> {
        self.space.reserved()
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
    pub(crate) fn set_len(&'static self, address: usize, len: usize) {
        self.service.call(move || {
            let len = len.next_multiple_of(PAGE);
            let mut pieces = self.pieces();
            let Some(piece) = pieces.get_mut(&address) else { return };
            if len < piece.len {
                // Memory that is allocated again later has to be zeros.
                let _ = piece.mapping.clear(len..piece.len);
            }
            piece.len = len;
        });
    }

    /// Gives a whole piece back. Jobs are done in their order: what is asked for next finds it free.
    pub(crate) fn free(&'static self, address: usize) {
        if let Some(piece) = self.pieces().remove(&address) {
            self.service.post(move || self.drop_piece(piece));
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
    pub(crate) fn unmap(&'static self, addresses: Range<usize>) {
        self.service.call(move || {
            let mut ended = Vec::new();
            let mut pieces = self.pieces();
            for (address, part) in parts(&pieces, &addresses) {
                let Some(piece) = pieces.get_mut(&address) else { continue };
                let _ = piece.mapping.clear(part.clone());
                piece.give_back(part);
                if piece.is_gone() {
                    ended.extend(pieces.remove(&address));
                }
            }
            drop(pieces);
            ended.into_iter().for_each(|piece| self.drop_piece(piece));
        });
    }

    /// Makes parts zeros, as MADV_DONTNEED does with anonymous memory.
    pub(crate) fn clear(&'static self, addresses: Range<usize>) -> bool {
        self.service.call(move || {
            let pieces = self.pieces();
            let mut parts = parts(&pieces, &addresses).into_iter();
            parts.all(|(address, part)| pieces[&address].mapping.clear(part).is_ok())
        })
    }

    /// Passes advice on.
    pub(crate) fn advise(&'static self, addresses: Range<usize>, advice: Advice) {
        self.service.call(move || {
            let pieces = self.pieces();
            for (address, part) in parts(&pieces, &addresses) {
                // Advice may be ignored.
                let _ = pieces[&address].mapping.advise(part, advice);
            }
        });
    }

    /// The protection of parts has changed.
    pub(crate) fn set_protected(&self, addresses: &Range<usize>) {
        let mut pieces = self.pieces();
        for (address, _) in parts(&pieces, addresses) {
            if let Some(piece) = pieces.get_mut(&address) {
                piece.protected = true;
            }
        }
    }

    /// Copies of all pieces, for a child; none where they are more than may be local. By the thread that serves.
    pub(crate) fn copies(&self) -> Option<Vec<Copied>> {
        let mut bytes = vec![0; COPY_LEN];
        let pieces = self.pieces();
        let all: usize = pieces.values().map(|piece| piece.len).sum();
        if all as u64 > self.space.stats().budget {
            return None;
        }
        let copy = |(address, piece): (&usize, &Piece)| {
            let mut copy = adopted::Local::new(piece.len)?;
            for at in (0..piece.len).step_by(COPY_LEN) {
                let part = &mut bytes[..COPY_LEN.min(piece.len - at)];
                piece.mapping.get(at, part).ok()?;
                copy.put(at, part);
            }
            Some(Copied { address: *address, len: piece.len, heap: piece.heap, copy })
        };
        pieces.iter().map(copy).collect()
    }

    /// Says what was used. By the thread that serves.
    pub(crate) fn say(&self) {
        let external = self.most.load(Ordering::Relaxed);
        let line = if self.verbose { self.summary() } else { String::new() };
        self.lease.say(&Account { program: program(), external, line, failed: None });
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
        for (bytes, why) in STAYED.iter().zip(WHY) {
            let bytes = bytes.load(Ordering::Relaxed);
            if bytes > 0 {
                let _ = write!(line, "; {} MiB were asked for that stay local: {why}", mib(bytes));
            }
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
