//! Direct mapping: external memory at addresses of this process.
//!
//! A [`Space`] shows an allocation as one range of addresses, the *window*. Touching a page brings it
//! into local memory, of which no more than the [`Budget`] is used; what has not been used for longest leaves
//! again, and is written to external memory first if it changed. [`Mapping`]s are parts of the window:
//! slabs that are carved out with no message to anyone ([`Space::carve`]), ranges of the allocation whose content
//! stays ([`Space::map`]), and private copies of others ([`Space::private_copy`]).
//!
//! **Errors.** Calls return them. Where there is only an access, it waits while an appliance is out of reach (for
//! as long as the volume holds I/O), and is a SIGBUS when the content cannot be had any more: the
//! memory is lost, or belongs to another client. A program that has a handler of SIGBUS gets it there. In
//! [`Faults::Handled`] on kernels without UFFDIO_POISON (before Linux 6.6) such an access waits, and
//! is tried again each second.
//!
//! **fork and exec.** A child has nothing at the window's addresses: touching them is a SIGSEGV. Nothing of it
//! survives an exec.
//!
//! **Signals.** [`Faults::Inline`] installs a handler of SIGBUS, which passes on what is not its own. A program that
//! installs another one afterwards has to do the same.
//!
//! **System calls.** In [`Faults::Inline`], and where userfaultfd(2) is allowed for user mode only, a system call that
//! is given absent pages fails with EFAULT: touch or pin them before.

mod budget;
mod evict;
mod fetch;
mod heap;
mod inline;
mod io;
mod named;
mod pager;
mod pages;
mod policy;
mod prefetch;
mod sync;
mod tend;
mod uffd;
mod window;
mod worker;

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use xpm_transport::IoError;

pub use self::budget::Budget;
use self::evict::Evictor;
use self::fetch::Fetcher;
pub use self::heap::SpaceAllocator;
use self::inline::Registered;
use self::io::Io;
use self::named::Known;
pub use self::named::{NamedSlabError, NamedSlabs};
use self::pager::{CHUNK, Pager, Shared};
use self::prefetch::Habit;
use self::tend::Tender;
use self::uffd::{Backing, FEATURE_SIGBUS, Reach, Uffd};
use self::window::{BLOCK, PAGE, Window};
use crate::slab::{Slab, SlabAllocator, SlabError};
use crate::volume::Volume;

/// Bytes of 2 MiB: what parts of an allocation with different uses are multiples of.
pub const CHUNK_LEN: u64 = CHUNK as u64 * PAGE as u64;
/// Smallest and largest region of the slab allocator.
const REGION_MIN: u64 = 16 << 20;
const REGION_MAX: u64 = 64 << 30;

/// Who brings the page when one is touched that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// The thread that touched it, in a handler of SIGBUS: the quickest way, with no hand-over between threads. System
    /// calls that are given absent pages fail with EFAULT.
    Inline,
    /// So many threads of the library, at least one. Everything that can touch memory may touch it, system
    /// calls included.
    Handled(usize),
}

/// Blocks of pages that have left and are kept for the next ones: one of so many in the budget, and most of them (12 MiB).
const BLOCKS_PART: usize = 16;
const BLOCKS_MAX: usize = 48;

/// Threads that fetch ahead where those that fault do not.
const AHEAD_THREADS: usize = 2;

impl Faults {
    const fn has_handlers(self) -> bool {
        matches!(self, Faults::Handled(_))
    }
}

/// How a space is used.
#[derive(Debug, Clone)]
pub struct SpaceOptions {
    /// Local memory that it may use.
    pub budget: Budget,
    /// Who brings pages.
    pub faults: Faults,
    /// Bytes at the start of the allocation whose content stays, for [`Space::map`]; a multiple of 2 MiB, or all. What
    /// lies behind is for slabs.
    pub kept: u64,
}

/// What a mapping lets the program do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writing is a SIGSEGV.
    ReadOnly,
    /// What is written goes to external memory when it leaves local memory, or with a flush.
    ReadWrite,
}

/// How a range will be used; see madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Nothing is known.
    Normal,
    /// From the start to the end: it is fetched far ahead.
    Sequential,
    /// Here and there: nothing is fetched ahead.
    Random,
    /// Soon: it is brought into local memory as far as there is room, without waiting for it.
    WillNeed,
    /// Not soon: it leaves local memory; what was changed is written first. Blocks for that.
    DontNeed,
    /// It stays in local memory, which it is brought into before this returns. No more than half of the budget can be
    /// pinned.
    Pin,
    /// It need not stay any more.
    Unpin,
}

/// What happened in a space, and what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MappingStats {
    /// Local memory that may be used, in bytes.
    pub budget: u64,
    /// Local memory that is used, in bytes.
    pub resident: u64,
    /// Pages that were touched and were not in local memory.
    pub faults: u64,
    /// Pages fetched from external memory.
    pub fetched: u64,
    /// Those of them that were fetched ahead.
    pub prefetched: u64,
    /// Pages that were never written, and so filled with zeros.
    pub zeroed: u64,
    /// Pages that were touched after they had been taken out of the window, and before they left.
    pub touched: u64,
    /// Pages that left local memory unchanged.
    pub dropped: u64,
    /// Pages that were written to external memory.
    pub written: u64,
    /// Faults that found no room in local memory, and waited.
    pub waits: u64,
    /// Operations on external memory that failed.
    pub errors: u64,
}

/// Why something cannot be mapped, or a call on a mapping failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// An option cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The range is not within the part of the allocation that is mapped by range.
    #[error(
        "{start} to {end} is not within what is mapped by range: the allocation has {size} bytes, the first {kept} of them for this; \
         choose a shorter range, a larger allocation, or more to keep"
    )]
    Range {
        /// First byte.
        start: u64,
        /// First byte behind it.
        end: u64,
        /// Bytes that are mapped by range.
        kept: u64,
        /// Size of the allocation.
        size: u64,
    },
    /// The start or the length is no multiple of the page length.
    #[error("{0} is no multiple of 4096 bytes")]
    Unaligned(u64),
    /// Something else maps a part of it.
    #[error("{start} to {end} is mapped already: use that mapping, or drop it first")]
    Mapped {
        /// First byte of the mapping that is there.
        start: u64,
        /// First byte behind it.
        end: u64,
    },
    /// No slab can be had.
    #[error("{0}; free slabs, or resize the allocation and open it again")]
    Slab(#[from] SlabError),
    /// userfaultfd(2) is not allowed, or not there.
    #[error(
        "userfaultfd cannot be used: {0}. Give this user access to /dev/userfaultfd (a udev rule, or chmod), or set \
         vm.unprivileged_userfaultfd to 1, or use faults in line"
    )]
    Userfaultfd(std::io::Error),
    /// The system refused something else.
    #[error("cannot {what}: {error}")]
    System {
        /// What was about to be done.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
    /// The operation on external memory failed.
    #[error("{0}")]
    Io(#[from] IoError),
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> MapError {
    move |error| MapError::System { what, error }
}

/// An allocation at addresses. Clones are the same; it ends with the last of them and of its mappings, and writes
/// what was changed of what stays before that.
#[derive(Clone)]
pub struct Space {
    inner: Arc<Inner>,
}

struct Inner {
    pager: Shared,
    io: Arc<Mutex<Io>>,
    carver: Mutex<Carver>,
    /// Slabs with names; nothing else is carved where they are.
    named: Mutex<Known>,
    /// Ranges that are mapped by range, in pages: the first, and the first behind it.
    mapped: Mutex<BTreeMap<u32, u32>>,
    kept: u64,
    size: u64,
    pinned: Mutex<usize>,
    inline: Option<Arc<Registered>>,
    threads: Vec<JoinHandle<()>>,
    _volume: Volume,
}

/// Slabs, and where their regions begin in the window.
struct Carver {
    slabs: SlabAllocator,
    bases: Vec<u64>,
}

impl Space {
    /// Shows an allocation at addresses. Reserves addresses, and memory for what is known of each page (12 bytes, where
    /// pages are used); starts threads. Brings no page.
    ///
    /// # Errors
    /// [`MapError::Invalid`] for options that cannot be, [`MapError::Userfaultfd`], or what the system refuses.
    pub fn open(volume: Volume, options: &SpaceOptions) -> Result<Space, MapError> {
        let size = volume.size();
        options.budget.check().map_err(MapError::Invalid)?;
        if volume.depth() < evict::DEPTH {
            let (depth, least) = (volume.depth(), evict::DEPTH);
            return Err(MapError::Invalid(format!(
                "a volume of depth {depth} cannot be mapped: open it with {least} or more"
            )));
        }
        check_kept(options.kept, size)?;
        let mut carver = Carver::new(options.kept, size);
        let named = Known::place(volume.slabs(), &mut carver)?;
        let handlers = match options.faults {
            Faults::Handled(0) => {
                return Err(MapError::Invalid("no threads to bring pages: choose one or more".to_owned()));
            }
            Faults::Handled(threads) => threads.min(64),
            // They fetch ahead.
            Faults::Inline => std::thread::available_parallelism().map_or(1, usize::from).min(AHEAD_THREADS),
        };
        let pages = size / PAGE as u64;
        if pages == 0 || pages > u64::from(u32::MAX / 2) {
            return Err(MapError::Invalid(format!(
                "an allocation of {size} bytes cannot be mapped: choose 4 KiB to 8 TiB"
            )));
        }
        let wanted = if options.faults == Faults::Inline { FEATURE_SIGBUS } else { uffd::FEATURE_POISON };
        let budget = options.budget.first();
        let window = window(pages as usize * PAGE, wanted, budget)?;
        let seed = rand_seed().map_err(system("get a random number"))?;
        let pager = Pager::new(window, options.faults, budget, handlers, seed)
            .map_err(system("make the bells of the threads that bring pages"))?;
        let pager = Arc::new(pager);
        let kept_pages = (options.kept / PAGE as u64) as u32;
        let behind = pages as u32 - kept_pages;
        if behind > 0 {
            pager.set_fresh(kept_pages, behind);
        }
        named.parts().for_each(|(first, pages)| pager.set_kept(first, pages));
        let io = Arc::new(Mutex::new(Io::new(pager.clone(), &volume).map_err(system("open a channel"))?));
        let inline = match options.faults {
            Faults::Handled(_) => None,
            Faults::Inline => Some(Arc::new(seats(&pager, &volume)?)),
        };
        let tender =
            Tender { pager: pager.clone(), volume: volume.clone(), io: io.clone(), inline: inline.clone() };
        let threads = crate::signals::blocked(|| start(&pager, &volume, options.budget, handlers, tender))?;
        let inner = Inner {
            io,
            carver: Mutex::new(carver),
            named: Mutex::new(named),
            mapped: Mutex::default(),
            kept: options.kept,
            size,
            pinned: Mutex::new(0),
            inline,
            threads,
            pager,
            _volume: volume,
        };
        Ok(Space { inner: Arc::new(inner) })
    }

    /// Carves a slab of at least `len` bytes out of the allocation and shows it. It holds zeros. No message to anyone, and
    /// no system call. It is given back when the mapping is dropped; what it held is forgotten.
    ///
    /// # Errors
    /// [`MapError::Slab`] when no free run is that long.
    pub fn carve(&self, len: u64) -> Result<Mapping, MapError> {
        let (slab, offset) = self.inner.carver().carve(len)?;
        Ok(self.mapping(offset, slab.len, Kind::Slab(slab)))
    }

    /// Shows a range of the allocation with what it holds, which stays. `range` is in bytes, of whole pages, within the
    /// part that is kept.
    ///
    /// # Errors
    /// [`MapError::Range`], [`MapError::Unaligned`], [`MapError::Mapped`], or what the system refuses.
    pub fn map(&self, range: Range<u64>, access: Access) -> Result<Mapping, MapError> {
        let (start, end) = (range.start, range.end);
        if let Some(odd) = [start, end].into_iter().find(|edge| !edge.is_multiple_of(PAGE as u64)) {
            return Err(MapError::Unaligned(odd));
        }
        if start >= end || end > self.inner.kept {
            let (kept, size) = (self.inner.kept, self.inner.size);
            return Err(MapError::Range { start, end, kept, size });
        }
        let (first, behind) = ((start / PAGE as u64) as u32, (end / PAGE as u64) as u32);
        self.map_pages(first, behind, access)
    }

    /// Maps pages with what they hold, which stays.
    fn map_pages(&self, first: u32, behind: u32, access: Access) -> Result<Mapping, MapError> {
        let mut mapped = self.inner.mapped();
        let before = mapped.range(..behind).next_back().filter(|(_, other)| **other > first);
        if let Some((other, other_behind)) = before {
            let (start, end) = (u64::from(*other) * PAGE as u64, u64::from(*other_behind) * PAGE as u64);
            return Err(MapError::Mapped { start, end });
        }
        if access == Access::ReadOnly {
            self.protect(first, behind - first, true).map_err(system("make the range read-only"))?;
        }
        mapped.insert(first, behind);
        drop(mapped);
        let (start, len) = (u64::from(first) * PAGE as u64, u64::from(behind - first) * PAGE as u64);
        Ok(self.mapping(start, len, Kind::Range(access)))
    }

    /// A slab with what another mapping holds now, page by page as it is used: writes go to the slab only. The other one must
    /// be flushed, must not be written to while this one is there, or this one may show either, and is not given back before it. Behind
    /// the length of the other one are zeros.
    ///
    /// # Errors
    /// [`MapError::Slab`], [`MapError::Io`] when the other one cannot be flushed; [`MapError::Invalid`] when it is
    /// a private copy itself.
    pub fn private_copy(&self, of: &Mapping) -> Result<Mapping, MapError> {
        if !Arc::ptr_eq(&self.inner, &of.space().inner) || matches!(of.part.kind, Kind::Copy(_)) {
            return Err(MapError::Invalid(
                "only a mapping of the same space that is no private copy can be copied".to_owned(),
            ));
        }
        of.flush()?;
        let (slab, offset) = self.inner.carver().carve(of.part.len.max(CHUNK_LEN))?;
        let (first, pages) = ((offset / PAGE as u64) as u32, (slab.len / PAGE as u64) as u32);
        let source = of.part.first()..of.part.first() + of.part.pages();
        self.inner.pager.set_lent(first, pages, Some(&source));
        // Zeros that were brought ahead of need when it was nobody's.
        self.inner.io().forget(first, pages);
        Ok(self.copied(offset, slab.len, Kind::Copy(slab), Some(of.part.clone())))
    }

    /// Changes how much local memory may be used; takes effect within moments. A [`Budget::Share`] that
    /// was chosen at the start goes on to follow what is available.
    ///
    /// # Errors
    /// [`MapError::Invalid`] below [`Budget::MIN`], or below twice of what is pinned.
    pub fn set_budget(&self, bytes: u64) -> Result<(), MapError> {
        Budget::Fixed(bytes).check().map_err(MapError::Invalid)?;
        let pinned = self.inner.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if (bytes as usize / PAGE) < *pinned * 2 {
            let least = *pinned * 2 * PAGE;
            return Err(MapError::Invalid(format!(
                "what is pinned needs a budget of {least} bytes: unpin some of it"
            )));
        }
        self.inner.pager.room.set_budget(bytes as usize / PAGE);
        self.inner.pager.evictor.ring();
        self.inner.pager.wake_starving();
        Ok(())
    }

    /// What happened so far, and what is there.
    pub fn stats(&self) -> MappingStats {
        self.inner.pager.stats()
    }

    /// Writes all that was changed to external memory, and waits until it is there.
    ///
    /// # Errors
    /// [`MapError::Io`]; what could not be written is tried again with the next flush.
    pub fn flush(&self) -> Result<(), MapError> {
        Ok(self.inner.io().flush(0, self.inner.pager.pages.count())?)
    }

    /// Bytes of the allocation that are in no slab, and are not kept for ranges.
    pub fn free_bytes(&self) -> u64 {
        self.inner.carver().slabs.free_bytes()
    }

    /// Size of the allocation in bytes, as it was when it was opened.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// All addresses that its mappings can have.
    pub fn addresses(&self) -> Range<usize> {
        let window = &self.inner.pager.window;
        window.address()..window.address() + window.len()
    }

    /// Whether system calls may be given absent pages.
    pub fn serves_system_calls(&self) -> bool {
        self.inner.inline.is_none() && self.inner.pager.window.uffd.reach == Reach::Kernel
    }

    /// An allocator for containers whose memory is external; see [`SpaceAllocator`].
    pub fn allocator(&self) -> SpaceAllocator {
        SpaceAllocator::new(self.clone())
    }

    fn mapping(&self, offset: u64, len: u64, kind: Kind) -> Mapping {
        self.copied(offset, len, kind, None)
    }

    fn copied(&self, offset: u64, len: u64, kind: Kind, of: Option<Arc<Part>>) -> Mapping {
        Mapping { part: Arc::new(Part { space: self.clone(), offset, len, kind, _of: of }) }
    }

    fn protect(&self, first: u32, count: u32, read_only: bool) -> std::io::Result<()> {
        let pager = &self.inner.pager;
        let whole = first.is_multiple_of(CHUNK) && count.is_multiple_of(CHUNK);
        if whole && !read_only {
            pager.set_read_only(first, count, false);
        }
        pager.window.set_writable(first, count, !read_only)?;
        if whole && read_only {
            pager.set_read_only(first, count, true);
        }
        Ok(())
    }
}

fn check_kept(kept: u64, size: u64) -> Result<(), MapError> {
    match kept {
        _ if kept > size => Err(MapError::Range { start: 0, end: kept, kept: size, size }),
        _ if kept != size && !kept.is_multiple_of(CHUNK_LEN) => Err(MapError::Invalid(format!(
            "what is kept must be a multiple of 2 MiB, or all of {size} bytes: {kept} is not"
        ))),
        _ => Ok(()),
    }
}

/// Chooses what pages are in local memory: those that can be moved, where the kernel does that. `XPM_WINDOW` in the environment, `private` or
/// `shared`, has the one or the other, for tests and comparisons.
fn window(len: usize, wanted: u64, budget: usize) -> Result<Window, MapError> {
    let open = |backing| {
        let uffd = Uffd::new(wanted, backing).map_err(MapError::Userfaultfd)?;
        let blocks = (budget / BLOCK as usize / BLOCKS_PART).clamp(4, BLOCKS_MAX);
        Window::new(len, uffd, backing, blocks)
            .map_err(system("reserve addresses and register them with userfaultfd"))
    };
    match std::env::var("XPM_WINDOW").as_deref() {
        Ok("private") => open(Backing::Private),
        Ok("shared") => open(Backing::Shared),
        Ok(other) => Err(MapError::Invalid(format!("XPM_WINDOW is `{other}`: choose private or shared"))),
        // Limits of the process, too, can be such that there is the other one only.
        Err(_) => open(Backing::Private).or_else(|_| open(Backing::Shared)),
    }
}

fn rand_seed() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(u64::from_ne_bytes(bytes))
}

/// Starts the threads; all or none.
fn start(
    pager: &Shared,
    volume: &Volume,
    budget: Budget,
    handlers: usize,
    tender: Tender,
) -> Result<Vec<JoinHandle<()>>, MapError> {
    let mut threads = Vec::new();
    let made = (|| {
        threads.push(std::thread::Builder::new().name("xpm-tend".to_owned()).spawn(move || tender.run())?);
        let channel = volume.channel()?;
        let evictor = Evictor::new(pager.clone(), channel, budget::Governor(budget));
        threads.push(std::thread::Builder::new().name("xpm-evict".to_owned()).spawn(move || evictor.run())?);
        for number in 0..handlers {
            let fetcher = Fetcher::new(pager.clone(), volume, 8, BLOCK)?;
            let builder = std::thread::Builder::new().name(format!("xpm-fetch-{number}"));
            threads.push(builder.spawn(move || worker::run(fetcher, number))?);
        }
        Ok(())
    })();
    match made {
        Ok(()) => Ok(threads),
        Err(error) => {
            end(pager, threads);
            Err(MapError::System { what: "start the threads that bring pages", error })
        }
    }
}

fn seats(pager: &Shared, volume: &Volume) -> Result<Registered, MapError> {
    let count = std::thread::available_parallelism().map_or(4, usize::from).clamp(2, 32);
    let fetchers: std::io::Result<Vec<Fetcher>> =
        (0..count).map(|_| Fetcher::new(pager.clone(), volume, 2, 1)).collect();
    fetchers
        .and_then(|fetchers| Registered::new(pager.clone(), fetchers))
        .map_err(system("serve faults in line"))
}

fn end(pager: &Shared, threads: Vec<JoinHandle<()>>) {
    pager.stop();
    for thread in threads {
        // A panic of it has been told already.
        let _ = thread.join();
    }
}

impl Inner {
    fn io(&self) -> std::sync::MutexGuard<'_, Io> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carver(&self) -> std::sync::MutexGuard<'_, Carver> {
        self.carver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mapped(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, u32>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Mappings that stay were flushed when they were dropped.
        end(&self.pager, std::mem::take(&mut self.threads));
    }
}

impl Carver {
    /// Makes regions of what lies behind what is kept, the largest first.
    fn new(kept: u64, size: u64) -> Carver {
        let mut carver = Carver { slabs: SlabAllocator::new(), bases: Vec::new() };
        let mut base = kept;
        while size - base >= REGION_MIN {
            let len = (1_u64 << (size - base).ilog2()).min(REGION_MAX);
            if carver.slabs.add_region(len).is_err() {
                break;
            }
            carver.bases.push(base);
            base += len;
        }
        carver
    }

    /// The slab that is at this place of the window.
    fn carve_at(&mut self, offset: u64, len: u64) -> Result<Slab, SlabError> {
        let region = self.bases.iter().rposition(|base| *base <= offset).ok_or(SlabError::NotAllocated)?;
        self.slabs.allocate_at(region as u32, offset - self.bases[region], len)
    }

    /// A slab, and where it is in the window.
    fn carve(&mut self, len: u64) -> Result<(Slab, u64), SlabError> {
        let slab = self.slabs.allocate(len)?;
        Ok((slab, self.bases[slab.region as usize] + slab.offset))
    }
}

/// Bytes at addresses. See [`Space`].
pub struct Mapping {
    part: Arc<Part>,
}

/// A part of the window that somebody has. It ends with its mapping and with the copies that are read from it.
struct Part {
    space: Space,
    /// First byte in the allocation.
    offset: u64,
    len: u64,
    kind: Kind,
    /// What it is a copy of.
    _of: Option<Arc<Part>>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Slab(Slab),
    Copy(Slab),
    Range(Access),
}

impl Mapping {
    /// Its first byte, at the start of a page. Valid, for reads and, unless it is read-only, for writes, until the mapping is
    /// dropped; nothing else in Rust refers to this memory.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.part.space.inner.pager.window.pointer(self.part.offset as usize)
    }

    /// Its length in bytes: of a slab what was asked for, rounded up to a power of two.
    pub fn len(&self) -> usize {
        self.part.len as usize
    }

    /// Whether it has no bytes: never.
    pub fn is_empty(&self) -> bool {
        self.part.len == 0
    }

    /// The space that it is a part of.
    pub fn space(&self) -> &Space {
        &self.part.space
    }

    /// Writes what was changed of it to external memory, and waits until it is there.
    ///
    /// # Errors
    /// [`MapError::Io`]; what could not be written is tried again with the next flush.
    pub fn flush(&self) -> Result<(), MapError> {
        Ok(self.part.space.inner.io().flush(self.part.first(), self.part.pages())?)
    }

    /// Says how bytes of it will be used; whole pages, those at the edges included.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Io`], and [`MapError::Invalid`] where so much cannot be pinned.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        let pager = &self.part.space.inner.pager;
        match advice {
            Advice::Normal => pager.set_habit(first, pages, Habit::Normal),
            Advice::Sequential => pager.set_habit(first, pages, Habit::Sequential),
            Advice::Random => pager.set_habit(first, pages, Habit::Random),
            Advice::WillNeed => self.part.space.inner.io().will_need(first, pages)?,
            Advice::DontNeed => self.part.space.inner.io().dont_need(first, pages)?,
            Advice::Pin => self.pin(first, pages)?,
            Advice::Unpin => self.part.unpin(first, pages),
        }
        Ok(())
    }

    /// Makes bytes of a slab zeros again, in whole pages: those at the edges are included. Local memory that they had is
    /// free then, and external memory, too.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Invalid`] where it is no slab.
    pub fn clear(&self, range: Range<usize>) -> Result<(), MapError> {
        let (first, pages) = self.pages_of(&range)?;
        if !matches!(self.part.kind, Kind::Slab(_)) {
            return Err(MapError::Invalid(
                "only a slab can be made zeros: write zeros, or carve another one".to_owned(),
            ));
        }
        self.advise(range, Advice::Unpin)?;
        if pages > 0 {
            self.part.space.inner.io().forget(first, pages);
        }
        Ok(())
    }

    /// Copies bytes out of it, without a fault: what is not in local memory is read into `buf`, and takes no
    /// room. Blocks until they are there.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, or [`MapError::Io`].
    pub fn get(&self, offset: usize, buf: &mut [u8]) -> Result<(), MapError> {
        self.pages_of(&(offset..offset.saturating_add(buf.len())))?;
        self.check_apart(buf)?;
        Ok(self.part.space.inner.io().get(self.part.offset as usize + offset, buf)?)
    }

    /// Copies bytes into it, without a fault: what is not in local memory is written to external memory. Blocks until
    /// it is there.
    ///
    /// # Errors
    /// [`MapError::Range`] outside of it, [`MapError::Invalid`] when it is read-only, or [`MapError::Io`].
    pub fn put(&self, offset: usize, bytes: &[u8]) -> Result<(), MapError> {
        self.pages_of(&(offset..offset.saturating_add(bytes.len())))?;
        self.check_apart(bytes)?;
        if matches!(self.part.kind, Kind::Range(Access::ReadOnly)) {
            return Err(MapError::Invalid("the mapping is read-only: map it for writing, too".to_owned()));
        }
        Ok(self.part.space.inner.io().put(self.part.offset as usize + offset, bytes)?)
    }

    fn pin(&self, first: u32, pages: u32) -> Result<(), MapError> {
        let inner = &self.part.space.inner;
        let mut pinned = inner.pinned();
        let new =
            (first..first + pages).filter(|page| !inner.pager.pages.state(*page).has(pages::PINNED)).count();
        let most = inner.pager.room.budget() / 2;
        if *pinned + new > most {
            let line = format!(
                "{new} more pages cannot be pinned: {pinned} are, and {most}, half of the budget, can be; unpin some, or raise the budget"
            );
            return Err(MapError::Invalid(line));
        }
        inner.io().pin(first, pages)?;
        *pinned += new;
        inner.pager.room.set_pinned(*pinned);
        Ok(())
    }

    /// Pages that the call has to itself must not be touched by it.
    fn check_apart(&self, bytes: &[u8]) -> Result<(), MapError> {
        let (external, own) = (self.space().addresses(), bytes.as_ptr_range());
        match (own.start as usize) < external.end && own.end as usize > external.start {
            true => Err(MapError::Invalid(
                "the buffer is external memory itself: copy by accesses, or through a buffer that is not"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }

    fn pages_of(&self, range: &Range<usize>) -> Result<(u32, u32), MapError> {
        if range.start > range.end || range.end > self.len() {
            let (start, end) = (range.start as u64, range.end as u64);
            return Err(MapError::Range {
                start,
                end,
                kept: self.part.len,
                size: self.part.space.inner.size,
            });
        }
        let first = self.part.first() + (range.start / PAGE) as u32;
        let behind = self.part.first() + range.end.div_ceil(PAGE) as u32;
        Ok((first, behind - first))
    }
}

impl Inner {
    fn pinned(&self) -> std::sync::MutexGuard<'_, usize> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    fn first(&self) -> u32 {
        (self.offset / PAGE as u64) as u32
    }

    fn pages(&self) -> u32 {
        (self.len / PAGE as u64) as u32
    }

    fn unpin(&self, first: u32, pages: u32) {
        let pager = &self.space.inner.pager;
        let mut pinned = self.space.inner.pinned();
        let was = |page: &u32| pager.pages.mark(*page, 0, pages::PINNED).has(pages::PINNED);
        *pinned -= (first..first + pages).filter(was).count();
        pager.room.set_pinned(*pinned);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let inner = &self.space.inner;
        let (first, pages) = (self.first(), self.pages());
        self.unpin(first, pages);
        inner.pager.set_habit(first, pages, Habit::Normal);
        match self.kind {
            Kind::Range(access) => {
                // What cannot be written is gone with its appliance; flush tells whoever wants to know.
                let _ = inner.io().dont_need(first, pages);
                inner.io().heal(first, pages);
                if access == Access::ReadOnly {
                    let _ = self.space.protect(first, pages, false);
                }
                inner.mapped().remove(&first);
            }
            Kind::Slab(slab) | Kind::Copy(slab) => {
                if matches!(self.kind, Kind::Copy(_)) {
                    inner.pager.set_lent(first, pages, None);
                }
                inner.io().forget(first, pages);
                let freed = inner.carver().slabs.free(slab);
                debug_assert!(freed.is_ok(), "{freed:?}");
            }
        }
    }
}
