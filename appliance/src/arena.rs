//! The lent memory: where regions come from, and how they are prepared.
//!
//! A region is *made* (a descriptor and a mapping, all zeros), then *faulted in* (each page is resident and
//! locked, so that no I/O ever waits for the host's memory management). When it is deleted, it is *cleared*,
//! after which it may be lent again.

mod bad;
mod carve;
mod file;
mod memory;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io::Errno;
use xpm_control::spare::{Limit, Spare};
use xpm_protocol::api::appliance::Medium;
use xpm_protocol::units::ByteSize;

pub(crate) use self::file::{BackingFile, Left, Superblock};
pub use self::memory::Memory;
use self::memory::{MOVE_LEN, Place, Way};
use crate::host::MemInfo;
use crate::keep::{MemfdId, Stored};

/// Prefix of the name of a region's memfd; the region's number follows.
const NAME: &str = "xpm-region-";

/// Bytes of the host's available memory that are never lent, whatever an order asks for: below this, the
/// kernel would rather kill processes than let the region be filled.
const HOST_MARGIN: u64 = 64 << 20;

/// The storage of lent memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A sealed memfd of base pages for each region.
    Memfd,
    /// A sealed memfd of huge pages for each region.
    HugeMemfd,
    /// One file or DAX device, carved into regions.
    File(PathBuf),
}

/// Why the memory of a region could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The kernel refused a step.
    #[error("cannot {step} for {len} of memory", len = ByteSize(*.len))]
    Kernel {
        /// The step that failed.
        step: &'static str,
        /// The length of the memory, in bytes.
        len: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The host has too little memory left.
    #[error(
        "this host has only {} of memory available, and {} is asked for: free some, or lower --memory",
        ByteSize(*.available), ByteSize(*.asked)
    )]
    Host {
        /// Available memory of the host, in bytes.
        available: u64,
        /// The requested length, in bytes.
        asked: u64,
    },
    /// A cgroup of this process has too low a limit.
    #[error(
        "the limit of {} that {} sets has {} left, and {} is asked for: raise it, or lower --memory",
        ByteSize(*.limit), .file.display(), ByteSize(*.available), ByteSize(*.asked)
    )]
    Limit {
        /// The file that contains the limit.
        file: PathBuf,
        /// The limit, in bytes.
        limit: u64,
        /// The unused part of the limit, in bytes.
        available: u64,
        /// The requested length, in bytes.
        asked: u64,
    },
    /// The host has too few free huge pages.
    #[error(
        "this host has {} of free huge pages, and {} is asked for: raise vm.nr_hugepages to {pages} or more, or leave \
         out --huge", ByteSize(*.free), ByteSize(*.asked)
    )]
    HugePages {
        /// Free huge pages, in bytes.
        free: u64,
        /// The requested length, in bytes.
        asked: u64,
        /// The number of huge pages that would suffice.
        pages: u64,
    },
    /// The backing file cannot be used.
    #[error("cannot use {path} as backing: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// The defect of the file, and the remedy.
        reason: String,
    },
    /// The backing file has no contiguous free range of this length.
    #[error(
        "no {} of the backing file are free in one piece; use regions of one size, or smaller ones",
        ByteSize(*.0)
    )]
    Fragmented(u64),
    /// Moving a region's content failed, and so did moving it back.
    #[error(
        "the content of {} was lost in part when it was moved: this host ran out of memory on the way",
        ByteSize(*.0)
    )]
    Torn(u64),
}

enum Kind {
    Memfd,
    Huge,
    File(Arc<BackingFile>),
}

/// Makes the memory of regions. The arena does not count the memory that it made: the ledger of regions does.
pub struct Arena {
    kind: Kind,
    lock: AtomicBool,
    /// Memory that is made and not faulted in yet, in bytes: the host still counts it as available.
    promised: Arc<AtomicU64>,
}

impl Arena {
    /// Checks that this host can provide `capacity` bytes, and opens the backing file if there is one.
    /// Without `lock`, regions are faulted in but the host may swap them out.
    ///
    /// # Errors
    /// When this host cannot provide that much memory.
    pub fn new(backing: &Backing, capacity: u64, lock: bool) -> Result<Arena, ArenaError> {
        Arena::with_held(backing, capacity, lock, 0)
    }

    /// As [`Arena::new`], where `held` bytes of the capacity exist already: the memory of an earlier life.
    /// Clients use it, so a host without as much additional memory is no error then.
    ///
    /// # Errors
    /// When this host cannot provide that much memory.
    pub fn with_held(backing: &Backing, capacity: u64, lock: bool, held: u64) -> Result<Arena, ArenaError> {
        let more = capacity.saturating_sub(held);
        let kind = match backing {
            Backing::Memfd => {
                unless_held(check_host(more, 0, 0), held)?;
                unless_held(check_limits(more, HOST_MARGIN, 0), held)?;
                Kind::Memfd
            }
            Backing::HugeMemfd => {
                unless_held(check_huge(more), held)?;
                Kind::Huge
            }
            Backing::File(path) => {
                let file = BackingFile::open(path, capacity)?;
                if lock && file.is_cached() {
                    // The pages of the file are page cache, and locked there.
                    check_limits(capacity, HOST_MARGIN, 0)?;
                }
                Kind::File(Arc::new(file))
            }
        };
        Ok(Arena { kind, lock: AtomicBool::new(lock), promised: Arc::default() })
    }

    /// The backing file, where there is one.
    pub(crate) fn file(&self) -> Option<&Arc<BackingFile>> {
        match &self.kind {
            Kind::File(file) => Some(file),
            Kind::Memfd | Kind::Huge => None,
        }
    }

    /// Takes back a region's memfd from an earlier life.
    ///
    /// # Errors
    /// When it is no memfd of that length, as one line.
    pub(crate) fn take_back(
        &self,
        (id, fd): (MemfdId, OwnedFd),
        len: u64,
        shared: bool,
        stored: Option<Stored>,
    ) -> Result<Memory, String> {
        let failed = |error: Errno| format!("a memfd that was kept cannot be used: {error}");
        let found = fstat(&fd).map_err(failed)?.st_size.cast_unsigned();
        if found != len {
            return Err(format!(
                "a memfd that was kept has {} in place of {}",
                ByteSize(found),
                ByteSize(len)
            ));
        }
        let sealed = SealFlags::SHRINK | SealFlags::GROW;
        if !fcntl_get_seals(&fd).map_err(failed)?.contains(sealed) {
            return Err("a memfd that was kept is not sealed".to_owned());
        }
        let way = if is_huge(&fd).map_err(failed)? { Way::Overwrite } else { Way::Punch };
        // Faulting it in again needs no new memory of the host, so nothing is added to the promised memory.
        let memory = Memory::map(Arc::new(fd), Place { start: 0, len }, way, Arc::default(), None);
        Ok(memory.map_err(failed)?.taken_back(id, shared, stored))
    }

    /// Takes back the part of the backing file that holds a region of an earlier life.
    ///
    /// # Errors
    /// The reason why this is impossible, as one line.
    pub(crate) fn take_back_part(&self, start: u64, len: u64) -> Result<Memory, String> {
        let file = self.file().ok_or("it lies in a file, and `--backing` names no file")?;
        let kept = file.take_at(start, len).ok_or("the backing file is too short for it")?;
        Memory::map(file.fd(), Place { start, len }, Way::File, Arc::default(), Some(kept))
            .map_err(|error| format!("its part of the backing file cannot be mapped: {error}"))
    }

    /// Checks that the limits of this process's cgroups leave room for the promised memory that is not
    /// resident yet, `missing` bytes.
    ///
    /// # Errors
    /// The limit that is too low.
    pub fn check_limits(&self, missing: u64) -> Result<(), ArenaError> {
        match &self.kind {
            Kind::Memfd => check_limits(missing, HOST_MARGIN / 2, 0),
            // Huge pages are not counted by these limits, and a file is locked before any of it is lent.
            Kind::Huge | Kind::File(_) => Ok(()),
        }
    }

    /// The kind of storage, for the allocator.
    pub fn medium(&self) -> Medium {
        match self.kind {
            Kind::Memfd => Medium::Memory,
            Kind::Huge => Medium::HugePages,
            Kind::File(_) => Medium::File,
        }
    }

    /// Whether a region's descriptor may be passed to another process. The descriptor of a backing file would
    /// give access to all other regions, too.
    pub fn is_shareable(&self) -> bool {
        !matches!(self.kind, Kind::File(_))
    }

    /// Makes a region of `len` bytes, all zeros, not faulted in yet. `leaving` counts the bytes of other
    /// regions that are just being returned to the host.
    ///
    /// # Errors
    /// When the host has no memory, address space or descriptor left for it.
    pub fn make(&self, len: u64, leaving: u64) -> Result<Memory, ArenaError> {
        match &self.kind {
            Kind::Memfd => {
                check_host(len + self.promised.load(Relaxed), HOST_MARGIN, leaving)?;
                self.make_memfd(len, MemfdFlags::empty(), Way::Punch)
            }
            Kind::Huge => self.make_memfd(len, MemfdFlags::HUGETLB, Way::Overwrite).map_err(|error| {
                // The mapping reserves its huge pages; ENOMEM means that too few are left.
                check_huge(len).err().unwrap_or(error)
            }),
            Kind::File(file) => {
                let (start, kept) = file.take(len)?;
                let memory = Memory::map(
                    file.fd(),
                    Place { start, len },
                    Way::File,
                    self.promised.clone(),
                    Some(kept),
                )
                .map_err(|error| kernel("map a part of the backing file", len, error))?;
                memory.clear();
                Ok(memory)
            }
        }
    }

    /// Checks, as far as possible in advance, that a region of `len` bytes can be moved now.
    ///
    /// # Errors
    /// The reason why it cannot be moved.
    pub fn can_move(&self, len: u64) -> Result<(), ArenaError> {
        match self.kind {
            // Each piece takes the memory that the previous piece freed.
            Kind::Memfd => check_host(MOVE_LEN, HOST_MARGIN, 0),
            Kind::Huge => check_huge(len),
            // Never shared, because its descriptor would give access to all other regions, too.
            Kind::File(_) => Ok(()),
        }
    }

    /// Most regions that may be moved at the same time.
    pub(crate) fn moves_max(&self) -> usize {
        match self.kind {
            Kind::Memfd => usize::MAX,
            // Each region needs all of its new pages before the old ones are free.
            Kind::Huge | Kind::File(_) => 1,
        }
    }

    /// Moves a region's content to new memory, a piece at a time, so that the move needs little additional
    /// memory; the old memory is all zeros afterwards. Blocks for about a second per GiB.
    ///
    /// # Errors
    /// When there is no new memory; then the content is unmoved, unless the error is [`ArenaError::Torn`].
    pub fn relocate(&self, old: &Memory) -> Result<Memory, ArenaError> {
        if old.is_torn() {
            return Err(ArenaError::Torn(old.len()));
        }
        self.can_move(old.len())?;
        let new = self.make_for_move(old.len())?;
        old.move_to(&new).map_err(|error| match old.is_torn() {
            true => ArenaError::Torn(old.len()),
            false => kernel("find new memory for a region", old.len(), error),
        })?;
        Ok(new)
    }

    /// Makes new memory, all zeros, for a region whose content is discarded.
    ///
    /// # Errors
    /// When there is no new memory; the content is discarded all the same.
    pub fn replace(&self, old: &Memory) -> Result<Memory, ArenaError> {
        old.give_up();
        self.make_for_move(old.len())
    }

    /// The new memory takes the pages that the old memory frees, so this does not check whether the host has
    /// as much again.
    fn make_for_move(&self, len: u64) -> Result<Memory, ArenaError> {
        match self.kind {
            Kind::Memfd => self.make_memfd(len, MemfdFlags::empty(), Way::Punch),
            Kind::Huge | Kind::File(_) => self.make(len, 0),
        }
    }

    /// Faults the region in and locks it, in steps, until it is done (true) or `until` has passed (false; the
    /// next call continues). The content does not change. Blocks for about a second per GiB.
    ///
    /// # Errors
    /// When the host has no memory left for it.
    pub fn fault_in(&self, memory: &Memory, until: Option<Instant>) -> Result<bool, ArenaError> {
        let done = memory
            .fault_in(until)
            .map_err(|error| kernel("fault in the pages of a region", memory.len(), error))?;
        if done && self.lock.load(Relaxed) {
            self.lock(memory);
        }
        Ok(done)
    }

    /// Warns once if the kernel refuses to lock: memory that is swapped out is slow, not lost.
    fn lock(&self, memory: &Memory) {
        match memory.lock() {
            Ok(()) => {}
            Err(error) if self.lock.swap(false, Relaxed) => tracing::warn!(
                "lent memory is NOT LOCKED ({error}): this host may swap it out, and then its users wait for this \
                 host's disk; raise the limit (LimitMEMLOCK=infinity, ulimit -l unlimited), or accept it with --no-lock"
            ),
            Err(_) => {}
        }
    }

    fn make_memfd(&self, len: u64, kind: MemfdFlags, way: Way) -> Result<Memory, ArenaError> {
        let id = xpm_control::random::u128().map(MemfdId);
        let id = id.map_err(|source| ArenaError::Kernel { step: "get a random number", len, source })?;
        let name = format!("{NAME}{}", String::from(id));
        let fd = open_memfd(&name, kind).map_err(|error| kernel("make a memfd", len, error))?;
        ftruncate(&fd, len).map_err(|error| kernel("set the size of a memfd", len, error))?;
        // Sealed, so that no process that receives the descriptor can truncate the memfd and make this
        // process fault (SIGBUS).
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| kernel("seal a memfd", len, error))?;
        let memory = Memory::map(Arc::new(fd), Place { start: 0, len }, way, self.promised.clone(), None);
        Ok(memory.map_err(|error| kernel("map a memfd", len, error))?.of_memfd(id))
    }
}

/// The number in the name of a region's memfd, as `/proc/PID/fd` shows the name; none for any other name.
pub(crate) fn memfd_id(name: &str) -> Option<MemfdId> {
    let number = name.strip_prefix("/memfd:")?.strip_prefix(NAME)?.strip_suffix(" (deleted)")?;
    MemfdId::try_from(number.to_owned()).ok()
}

fn is_huge(fd: &OwnedFd) -> Result<bool, Errno> {
    /// `HUGETLBFS_MAGIC` of linux/magic.h.
    const HUGETLBFS: u64 = 0x9584_58f6;
    Ok(fstatfs(fd)?.f_type.cast_unsigned() == HUGETLBFS)
}

/// With memory of an earlier life, an error is only logged: the clients of that memory wait for it.
fn unless_held(found: Result<(), ArenaError>, held: u64) -> Result<(), ArenaError> {
    match found {
        Err(error) if held > 0 => {
            tracing::warn!("{error}; continuing to serve the memory that is lent already");
            Ok(())
        }
        result => result,
    }
}

pub(crate) fn open_memfd(name: &str, kind: MemfdFlags) -> Result<OwnedFd, Errno> {
    /// `MFD_NOEXEC_SEAL` of linux/memfd.h: the content cannot be executed as a program.
    const NOEXEC_SEAL: MemfdFlags = MemfdFlags::from_bits_retain(8);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    match memfd_create(name, flags | NOEXEC_SEAL) {
        // The flag is unknown before Linux 6.3.
        Err(Errno::INVAL) => memfd_create(name, flags),
        result => result,
    }
}

fn kernel(step: &'static str, len: u64, error: Errno) -> ArenaError {
    ArenaError::Kernel { step, len, source: error.into() }
}

/// Checks in advance that the host has the memory and that the cgroups allow it: filling memory beyond that
/// ends with the kernel killing processes, not with an error.
fn check_host(asked: u64, margin: u64, leaving: u64) -> Result<(), ArenaError> {
    match MemInfo::read() {
        Ok(info) if info.available.saturating_add(leaving) < asked.saturating_add(margin) => {
            Err(ArenaError::Host { available: info.available, asked })
        }
        // Without /proc the available memory is unknown, and the kernel decides.
        _ => check_limits(asked, margin, leaving),
    }
}

/// Checks the limits of the cgroups that this process is in.
fn check_limits(asked: u64, margin: u64, leaving: u64) -> Result<(), ArenaError> {
    let limit = Spare::open().ok().and_then(|mut spare| spare.tightest());
    match limit {
        Some(Limit { file, limit, available })
            if available.saturating_add(leaving) < asked.saturating_add(margin) =>
        {
            Err(ArenaError::Limit { file, limit, available, asked })
        }
        _ => Ok(()),
    }
}

fn check_huge(asked: u64) -> Result<(), ArenaError> {
    match MemInfo::read() {
        Ok(info) if info.huge_free < asked => {
            let missing = (asked - info.huge_free).div_ceil(info.huge_len.max(1));
            Err(ArenaError::HugePages { free: info.huge_free, asked, pages: info.huge_total + missing })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
