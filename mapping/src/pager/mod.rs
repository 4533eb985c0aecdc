//! The state that all threads of a pager share: the window, the words of its pages, the amount of free local memory,
//! and the properties of the mapped ranges.

pub(crate) mod errors;
pub(crate) mod prefetch;
pub(crate) mod room;
pub(crate) mod stats;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex};

use crossbeam_queue::ArrayQueue;
use rustix::thread::futex;
use xpm_transport::{IoBuf, IoError};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use self::errors::{Cause, Errors, Once};
use self::prefetch::{Ahead, Habit, Prefetcher};
use self::room::Room;
use self::stats::{MappingStats, Tallies, count};
use crate::page::window::{self, PAGE, Window};
use crate::page::word::{Claim, DIRTY, MARK, POISONED, Pages, QUEUED, Residency, State, TOUCHED, WRITTEN};
use crate::wake::Bell;

/// Pages that share one entry of range properties (see `Chunk`): 2 MiB.
pub(crate) const CHUNK: u32 = 512;
/// Most pages that have arrived in local memory and that the evictor has not taken into its queues yet.
const ARRIVALS: usize = 1 << 14;
/// Most pending requests to fetch pages ahead.
const ASKED: usize = 64;

/// The chunk belongs to slabs: an unwritten page holds zeros, whatever external memory contains.
const FRESH: u32 = 1 << 0;
/// The chunk is mapped read-only, so its pages never become dirty.
const READ_ONLY: u32 = 1 << 1;
const SEQUENTIAL: u32 = 1 << 2;
const RANDOM: u32 = 1 << 3;

/// Which thread fetches a page when an absent page is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// The thread that touched the page, in a handler of SIGBUS: the fastest way, without a hand-over between threads.
    /// A system call that accesses an absent page fails with EFAULT.
    Inline,
    /// This number of threads of the library, at least one. Every access may touch an absent page, also one by a
    /// system call.
    Handled(usize),
}

impl Faults {
    pub(crate) const fn has_handlers(self) -> bool {
        matches!(self, Faults::Handled(_))
    }
}

/// The place of an absent page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// No place: the content is zeros.
    Zeros,
    /// In external memory, at this page.
    At(u32),
}

impl Source {
    /// Whether `page`, the source of the page that lies `count` pages behind the page with this source, continues
    /// this source, so that one operation can cover both.
    pub(crate) fn goes_on(self, page: Source, count: u32) -> bool {
        match (self, page) {
            (Source::Zeros, Source::Zeros) => true,
            (Source::At(first), Source::At(page)) => page == first + count,
            _ => false,
        }
    }
}

#[derive(Default)]
struct Chunk {
    flags: AtomicU32,
    /// For a private copy: one more than the number of the page that has the content of the chunk's first page, for
    /// as long as the copy's page is unwritten. 0: the chunk is no copy.
    lent: AtomicU32,
    /// First page behind the copied range: pages of the copy from there on are zeros.
    lent_end: AtomicU32,
}

/// How far a fault is served. What the claim of a page word returns is [`Claim`]; this is what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The page is in the window.
    Done,
    /// Its content has to come from this page of external memory. From the pager: the caller owns the page and has to
    /// read it; from a fetcher: the read is in flight.
    Coming(u32),
    /// Another thread owns the page, and wakes the threads that wait for it.
    Busy,
    /// No room is left in local memory, or too many reads are in flight: try again when some room is free.
    Later,
    /// The content of the page is lost.
    Poisoned,
    /// No room is left and none can be made: the program has pinned all local pages, and the machine has no more
    /// memory.
    Choked,
}

/// No room is left in local memory for pages that no access waits for.
pub(crate) struct NoRoom;

pub(crate) struct Pager {
    /// Name of the allocation.
    pub(crate) name: Box<str>,
    pub(crate) window: Window,
    pub(crate) pages: Pages,
    pub(crate) faults: Faults,
    chunks: Box<[Chunk]>,
    pub(crate) room: Room,
    /// Pages that arrived: the low 32 bits have the page's number, the high 32 bits the stamp of its last departure.
    pub(crate) arrivals: ArrayQueue<u64>,
    pub(crate) asked: ArrayQueue<Ahead>,
    pub(crate) evictor: Bell,
    /// One bell for each thread that fetches.
    pub(crate) fetchers: Vec<Bell>,
    prefetcher: Mutex<Prefetcher>,
    pub(crate) tallies: Tallies,
    stopped: AtomicBool,
    pub(crate) errors: Errors,
    /// Random, so that a program which chooses page contents cannot construct two with the same digest.
    seed: u64,
    /// The digest of a page of zeros.
    zeros: u64,
}

impl Pager {
    pub(crate) fn new(
        name: &str,
        window: Window,
        faults: Faults,
        budget: usize,
        fetchers: usize,
        seed: u64,
    ) -> std::io::Result<Pager> {
        let count = window.len() / PAGE;
        let chunks = count.div_ceil(CHUNK as usize);
        Ok(Pager {
            name: name.into(),
            errors: Errors::default(),
            pages: Pages::new(window::zeros32(count), window::zeros64(count)),
            window,
            faults,
            chunks: (0..chunks).map(|_| Chunk::default()).collect(),
            room: Room::new(budget),
            arrivals: ArrayQueue::new(ARRIVALS),
            asked: ArrayQueue::new(ASKED),
            evictor: Bell::new()?,
            fetchers: (0..fetchers).map(|_| Bell::new()).collect::<std::io::Result<_>>()?,
            prefetcher: Mutex::default(),
            tallies: Tallies::default(),
            stopped: AtomicBool::new(false),
            seed,
            zeros: xxh3_64_with_seed(&[0; PAGE], seed),
        })
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.evictor.ring();
        self.fetchers.iter().for_each(Bell::ring);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn chunk(&self, page: u32) -> &Chunk {
        &self.chunks[(page / CHUNK) as usize]
    }

    fn flags(&self, page: u32) -> u32 {
        self.chunk(page).flags.load(Ordering::Relaxed)
    }

    fn flag(&self, first: u32, count: u32, set: u32, clear: u32) {
        if count == 0 {
            return;
        }
        for chunk in &self.chunks[(first / CHUNK) as usize..=((first + count - 1) / CHUNK) as usize] {
            let change = |flags: u32| Some(flags & !clear | set);
            let _ = chunk.flags.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        }
    }

    /// Marks pages of a slab: unwritten pages are zeros.
    pub(crate) fn set_fresh(&self, first: u32, count: u32) {
        self.flag(first, count, FRESH, 0);
    }

    /// Marks pages whose earlier content in external memory is valid.
    pub(crate) fn set_kept(&self, first: u32, count: u32) {
        self.flag(first, count, 0, FRESH);
        // As in `set_lent`.
        fence(Ordering::SeqCst);
    }

    /// Makes whole chunks a private copy of `source`: an unwritten page has the content of its counterpart in
    /// `source`, and zeros behind the end of `source`. None: the chunks are no copy any more. The caller has to
    /// forget the pages that are already local afterwards.
    pub(crate) fn set_lent(&self, first: u32, count: u32, source: Option<&Range<u32>>) {
        for chunk in first / CHUNK..=(first + count - 1) / CHUNK {
            let at = |source: &Range<u32>| source.start + (chunk * CHUNK - first) + 1;
            let known = &self.chunks[chunk as usize];
            known.lent_end.store(source.map_or(0, |source| source.end), Ordering::Relaxed);
            known.lent.store(source.map_or(0, at), Ordering::Release);
        }
        // Pairs with the fence in `source`: a thread that claims a page reads `lent` afterwards, and the caller reads
        // the page's word after this store. So either that thread sees the new value, or the caller sees the page
        // and forgets it.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn set_read_only(&self, first: u32, count: u32, read_only: bool) {
        let (set, clear) = if read_only { (READ_ONLY, 0) } else { (0, READ_ONLY) };
        self.flag(first, count, set, clear);
    }

    pub(crate) fn set_habit(&self, first: u32, count: u32, habit: Habit) {
        let set = match habit {
            Habit::Normal => 0,
            Habit::Sequential => SEQUENTIAL,
            Habit::Random => RANDOM,
        };
        self.flag(first, count, set, (SEQUENTIAL | RANDOM) & !set);
    }

    fn habit(&self, page: u32) -> Habit {
        match self.flags(page) & (SEQUENTIAL | RANDOM) {
            SEQUENTIAL => Habit::Sequential,
            RANDOM => Habit::Random,
            _ => Habit::Normal,
        }
    }

    pub(crate) fn source(&self, page: u32, state: State) -> Source {
        if state.has(WRITTEN) {
            return Source::At(page);
        }
        fence(Ordering::SeqCst);
        let chunk = self.chunk(page);
        match chunk.lent.load(Ordering::Acquire) {
            0 if self.flags(page) & FRESH != 0 => Source::Zeros,
            0 => Source::At(page),
            lent => self.lent_by(lent - 1 + page % CHUNK, chunk.lent_end.load(Ordering::Relaxed)),
        }
    }

    fn lent_by(&self, page: u32, end: u32) -> Source {
        if page >= end || !self.pages.state(page).has(WRITTEN) && self.flags(page) & FRESH != 0 {
            return Source::Zeros;
        }
        Source::At(page)
    }

    /// The digest of a page's content, which must not change meanwhile.
    pub(crate) fn digest_of(&self, content: IoBuf) -> u64 {
        window::digest(content, self.seed)
    }

    /// Whether a page on the shelf differs from external memory. The caller owns the page.
    pub(crate) fn is_dirty(&self, page: u32, state: State) -> bool {
        // A page that could not be written when its last mapping was dropped is still dirty, even if its range is
        // mapped read-only now.
        state.has(DIRTY)
            || self.may_be_dirty(page, state)
                && self.digest_of(self.window.shelved(page, 1)) != self.pages.stamp(page)
    }

    /// Whether the page can be dirty at all.
    pub(crate) fn may_be_dirty(&self, page: u32, state: State) -> bool {
        state.has(DIRTY) || self.flags(page) & READ_ONLY == 0
    }

    /// Serves a fault from local memory, or returns the next step. The second value are pages to fetch ahead.
    pub(crate) fn fault(&self, page: u32, write: bool) -> (Outcome, Option<Ahead>) {
        let state = match self.pages.claim(page, |_| true, true) {
            Claim::Yours(state) => state,
            Claim::Not(_) | Claim::Busy => return (Outcome::Busy, None),
        };
        match state.residency() {
            Residency::Absent => self.absent(page, write, state),
            _ => {
                let shelved = state.residency() == Residency::Shelved;
                if shelved {
                    self.window.show(page, 1);
                } else if state.has(POISONED) || !self.window.settle(page) {
                    self.release(page, Residency::Mapped, POISONED, 0);
                    return (Outcome::Poisoned, None);
                }
                let touched = if shelved { TOUCHED } else { 0 };
                let dirty = if write && shelved { DIRTY } else { 0 };
                self.release(page, Residency::Mapped, touched | dirty, MARK);
                count(&self.tallies.touched, u64::from(shelved));
                let asks = state.has(MARK).then(|| self.prefetcher.try_lock().ok()?.touched(page));
                (Outcome::Done, asks.flatten().and_then(|ahead| self.bounded(page, ahead)))
            }
        }
    }

    fn absent(&self, page: u32, write: bool, state: State) -> (Outcome, Option<Ahead>) {
        if state.has(POISONED) {
            self.release(page, Residency::Absent, 0, 0);
            return (Outcome::Poisoned, None);
        }
        if !self.room.take() {
            let choked = self.room.is_exhausted();
            self.release(page, Residency::Absent, 0, 0);
            if choked {
                return (Outcome::Choked, None);
            }
            self.evictor.ring();
            count(&self.tallies.waits, 1);
            return (Outcome::Later, None);
        }
        if self.room.is_short() {
            self.evictor.ring();
        }
        count(&self.tallies.faults, 1);
        match self.source(page, state) {
            Source::At(at) => (Outcome::Coming(at), None),
            Source::Zeros => {
                self.put_zeros(page, 1, write);
                (Outcome::Done, self.ahead(page))
            }
        }
    }

    /// Claims an absent page before it is touched, and returns where its content is; none when the page is local
    /// already, or another thread owns it.
    pub(crate) fn claim_early(&self, page: u32) -> Result<Option<Source>, NoRoom> {
        if !self.room.take_spare() {
            return Err(NoRoom);
        }
        let absent = |state: State| state.residency() == Residency::Absent && !state.has(POISONED);
        match self.pages.claim(page, absent, false) {
            Claim::Yours(state) => Ok(Some(self.source(page, state))),
            Claim::Not(_) | Claim::Busy => {
                self.room.give(1);
                Ok(None)
            }
        }
    }

    /// Releases a page of [`Pager::claim_early`] unchanged.
    pub(crate) fn give_back(&self, page: u32) {
        self.release(page, Residency::Absent, 0, 0);
        self.room.give(1);
    }

    /// Makes the first page of a new slab local, if there is room, so that its first access causes no fault.
    pub(crate) fn begin_slab(&self, page: u32) {
        match self.claim_early(page) {
            Ok(Some(Source::Zeros)) => self.put_zeros(page, 1, false),
            Ok(Some(Source::At(_))) => self.give_back(page),
            Ok(None) | Err(NoRoom) => {}
        }
    }

    /// The pages to fetch ahead after a fault on `page`.
    pub(crate) fn ahead(&self, page: u32) -> Option<Ahead> {
        let mut prefetcher = self.prefetcher.try_lock().ok()?;
        prefetcher.limit(self.room.budget());
        prefetcher.fault(page, self.habit(page)).and_then(|ahead| self.bounded(page, ahead))
    }

    /// Cuts `ahead` at the border between the kept range and the slabs: pages behind the border have another use.
    fn bounded(&self, page: u32, ahead: Ahead) -> Option<Ahead> {
        let end = self.pages.count().min(ahead.first.saturating_add(ahead.count));
        let fresh = |page: u32| self.flags(page) & FRESH;
        if ahead.stride != 1 || ahead.first >= end {
            return Some(ahead);
        }
        let chunks = ahead.first / CHUNK..=(end - 1) / CHUNK;
        let bound = chunks.map(|chunk| chunk * CHUNK).find(|first| fresh(*first) != fresh(page));
        let count = bound.map_or(ahead.count, |bound| bound.saturating_sub(ahead.first));
        (count > 0).then_some(Ahead { count, ..ahead })
    }

    /// Asks the fetching threads for these pages. Pages for which their queue has no place are fetched when they are
    /// touched.
    pub(crate) fn ask(&self, ahead: Ahead) {
        let (first, second) = ahead.halves();
        for (part, fetcher) in [Some(first), second].into_iter().flatten().zip(self.fetchers.iter().cycle()) {
            if self.asked.push(part).is_ok() {
                fetcher.ring();
            }
        }
    }

    /// Tells the prefetcher that these pages are not fetched ahead.
    pub(crate) fn forgo(&self, ahead: Ahead) {
        if let Ok(mut prefetcher) = self.prefetcher.try_lock() {
            prefetcher.forgo(ahead);
        }
    }

    /// Fills pages that the caller owns with zeros, and releases them.
    pub(crate) fn put_zeros(&self, first: u32, run: u32, write: bool) {
        self.window.fill_zeros(first, run);
        for page in first..first + run {
            let left = self.pages.stamp(page);
            self.pages.set_stamp(page, self.zeros);
            self.came(page, Residency::Mapped, if write { DIRTY } else { 0 }, left);
        }
        count(&self.tallies.zeroed, u64::from(run));
    }

    /// Stores the digest of fetched content. To be called by the owner of the page before the content is put into
    /// the window. Returns the stamp of the page's last departure.
    pub(crate) fn comes(&self, page: u32, content: IoBuf, write: bool) -> u64 {
        let left = self.pages.stamp(page);
        if !write && self.flags(page) & READ_ONLY == 0 {
            self.pages.set_stamp(page, self.digest_of(content));
        }
        left
    }

    /// Releases a page that is in local memory from now on: with `mark` on the shelf, else in the window. `left` is
    /// the stamp that [`Pager::comes`] returned.
    pub(crate) fn is_here(&self, page: u32, write: bool, mark: bool, left: u64) {
        match mark {
            true => self.came(page, Residency::Shelved, MARK, left),
            false => self.came(page, Residency::Mapped, if write { DIRTY } else { 0 }, left),
        }
    }

    fn came(&self, page: u32, residency: Residency, set: u32, left: u64) {
        let queued = self.pages.mark(page, QUEUED, 0).has(QUEUED);
        self.release(page, residency, set, TOUCHED | if set & DIRTY == 0 { DIRTY } else { 0 });
        if queued {
            return;
        }
        let arrival = u64::from(page) | (left & 0xffff_ffff) << 32;
        while self.arrivals.push(arrival).is_err() && !self.is_stopped() {
            self.evictor.ring();
            std::thread::yield_now();
        }
        if self.arrivals.len() > ARRIVALS / 2 {
            self.evictor.ring();
        }
    }

    /// Handles a failed fetch of pages that the caller owns. For a fault the pages become poisoned; for a fetch ahead
    /// they only become absent again.
    pub(crate) fn fail(&self, first: u32, run: u32, error: IoError, prefetch: bool) {
        count(&self.tallies.errors, 1);
        match prefetch {
            true => self.errors.count(Cause::Io(error)),
            false => self.failed(first, error),
        }
        for page in first..first + run {
            if !prefetch && self.faults.has_handlers() {
                self.complain(page);
                let _ = self.window.uffd.poison(self.window.address_of(page), PAGE);
            }
            self.release(page, Residency::Absent, if prefetch { 0 } else { POISONED }, 0);
        }
        self.room.give(run as usize);
        self.wake_starving();
    }

    /// Removes the poison from an absent page that had no room. Returns false when another thread owns the page, so
    /// that the caller has to try again.
    pub(crate) fn unchoke(&self, page: u32) -> bool {
        match self.pages.claim(page, |state| state.residency() == Residency::Absent, false) {
            Claim::Yours(state) => {
                if !state.has(POISONED) {
                    self.window.heal(page);
                }
                self.release(page, Residency::Absent, 0, 0);
                true
            }
            Claim::Not(_) => true,
            Claim::Busy => false,
        }
    }

    /// Records why an operation on external memory for this page failed.
    pub(crate) fn failed(&self, page: u32, error: IoError) {
        self.errors.record(page, Cause::Io(error));
    }

    /// Logs why an access to a page will raise SIGBUS, or fail in a system call. Allocates nothing.
    pub(crate) fn complain(&self, page: u32) {
        // A page that should be in the window and is not was discarded there.
        if self.pages.state(page).residency() == Residency::Mapped {
            self.errors.record(page, Cause::Discarded);
        }
        match self.errors.cause_of(page) {
            Some(cause) => {
                self.errors.remember(page, cause);
                self.complain_of(page, &cause);
            }
            None => self.complain_of(page, &"its content cannot be had"),
        }
    }

    /// Logs once that an address was touched which only the library may touch: that access raises SIGBUS.
    pub(crate) fn complain_of_own(&self, address: usize) {
        let name = &self.name;
        self.errors.log_once(Once::OwnAddress, format_args!(
            "xpm: SIGBUS for an access to 0x{address:x}, which only the library may touch, beside allocation `{name}`"
        ));
    }

    /// As [`Pager::complain`], for a page without room.
    pub(crate) fn complain_of_room(&self, page: u32) {
        self.errors.record(page, Cause::NoRoom);
        self.complain_of(page, &Cause::NoRoom);
    }

    fn complain_of(&self, page: u32, why: &dyn std::fmt::Display) {
        let (address, name) = (self.window.address_of(page), &self.name);
        self.errors.log(format_args!(
            "xpm: SIGBUS for accesses to 0x{address:x}, page {page} of allocation `{name}`: {why}"
        ));
    }

    /// Releases a page that the caller owns, and wakes the threads that wait for it.
    pub(crate) fn release(&self, page: u32, residency: Residency, set: u32, clear: u32) {
        if self.pages.release(page, residency, |state| state.without(clear).with(set)) {
            self.window.uffd.wake(self.window.address_of(page), PAGE);
            let _ = futex::wake(self.pages.word(page), futex::Flags::PRIVATE, u32::MAX);
        }
    }

    /// Waits for a busy page, for at most 2 ms.
    pub(crate) fn wait_for(&self, page: u32) {
        let word = self.pages.word(page);
        for _ in 0..64 {
            if self.pages.state(page).residency() != Residency::Busy {
                return;
            }
            std::hint::spin_loop();
        }
        let now = word.load(Ordering::Acquire);
        if self.pages.state(page).residency() == Residency::Busy {
            let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
            let _ = futex::wait(word, futex::Flags::PRIVATE, now, Some(&limit));
        }
    }

    pub(crate) fn stats(&self) -> MappingStats {
        self.tallies.stats(&self.room, self.errors.counts())
    }

    /// Wakes the threads that wait for room, to be called after room was freed.
    pub(crate) fn wake_starving(&self) {
        if self.room.freed() {
            self.fetchers.iter().for_each(Bell::ring);
        }
    }
}

pub(crate) type Shared = Arc<Pager>;
