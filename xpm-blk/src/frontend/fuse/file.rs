//! The only file of a mount: the answers to the kernel's requests other than data.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use xpm_fuse::wire::reply::{self, Opened, Statfs, Validity};
use xpm_fuse::wire::{
    Attr, Lseek, OpenFlags, Operation, ROOT_ID, Request, Setattr, TimeOrNow, Timestamp, Whence,
};
use xpm_fuse::{Errno, Negotiated, Wanted};

use super::Mounted;

/// The block length that stat(2) reports: a page.
const BLOCK_LEN: u32 = 4096;
/// Most background requests of the kernel in flight (no program waits for them): write-back and read-ahead of a whole
/// machine.
const BACKGROUND_MAX: u16 = 1024;

/// The file. Shared by all queues; none of its fields takes a lock.
#[derive(Debug)]
pub(super) struct File {
    /// The size in bytes.
    size: AtomicU64,
    mounted: Mounted,
    made: Timestamp,
    /// Times in nanoseconds since 1970, as the kernel sets them: it maintains them itself while the file is cached.
    modified: AtomicU64,
    changed: AtomicU64,
}

/// An answer as bytes. The array is long enough for every answer of a file.
pub(super) struct Answer {
    bytes: [u8; 160],
    len: usize,
}

impl Answer {
    fn of<const N: usize>(reply: [u8; N]) -> Answer {
        let mut bytes = [0; 160];
        bytes[..N].copy_from_slice(&reply);
        Answer { bytes, len: N }
    }

    /// The bytes to send; empty if the request has no answer.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl File {
    pub(super) fn new(size: u64, mounted: Mounted) -> File {
        let now = now();
        let nanoseconds = AtomicU64::new(to_nanoseconds(now));
        File {
            size: AtomicU64::new(size),
            mounted,
            made: now,
            modified: AtomicU64::new(nanoseconds.load(Ordering::Relaxed)),
            changed: nanoseconds,
        }
    }

    /// The size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Answers all requests except those that read, write, free or flush data.
    pub(super) fn answer(&self, request: &Request<'_>) -> Answer {
        let unique = request.header.unique;
        let done = || Answer::of(reply::empty(unique));
        let refuse = |errno| Answer::of(reply::error(unique, errno));
        let attributes = || Answer::of(reply::attr(unique, &self.attributes(), Validity::FOREVER));
        if request.header.nodeid > ROOT_ID {
            return refuse(Errno::STALE);
        }
        match request.operation {
            Operation::Init(init) => match Negotiated::new(&init, &wanted(self.mounted.io_len)) {
                Ok(negotiated) => Answer::of(reply::init(unique, &negotiated.reply())),
                Err(refused) => {
                    tracing::error!("{refused}");
                    refuse(Errno::PROTO)
                }
            },
            Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Interrupt { .. }
            | Operation::NotifyReply { .. } => Answer { bytes: [0; 160], len: 0 },
            Operation::Getattr { .. } => attributes(),
            Operation::Setattr(change) => match self.change(&change) {
                Ok(()) => attributes(),
                Err(errno) => refuse(errno),
            },
            Operation::Open(_) => Answer::of(reply::open(
                unique,
                Opened { fh: 0, flags: OpenFlags::KEEP_CACHE.with(OpenFlags::PARALLEL_DIRECT_WRITES) },
            )),
            Operation::Flush { .. } | Operation::Release(_) | Operation::Destroy => done(),
            Operation::Statfs => Answer::of(reply::statfs(unique, &self.sizes())),
            Operation::Lseek(seek) => match self.seek(seek) {
                Ok(offset) => Answer::of(reply::lseek(unique, offset)),
                Err(errno) => refuse(errno),
            },
            Operation::Lookup { .. }
            | Operation::Create(_)
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Opendir(_) => refuse(Errno::NOTDIR),
            _ => refuse(Errno::NOSYS),
        }
    }

    /// Changes times. Refuses other changes: the size is the allocation's, and permissions and owner are those of the
    /// file that the mount lies on.
    fn change(&self, change: &Setattr) -> Result<(), Errno> {
        let mounted = &self.mounted;
        let kept = change.size.is_none_or(|size| size == self.size())
            && change.mode.is_none_or(|mode| mode & 0o7777 == mounted.mode)
            && change.uid.is_none_or(|uid| uid == mounted.uid)
            && change.gid.is_none_or(|gid| gid == mounted.gid);
        if !kept {
            return Err(Errno::PERM);
        }
        let at = |time: Option<TimeOrNow>| match time {
            Some(TimeOrNow::Now) => Some(now()),
            Some(TimeOrNow::At(time)) => Some(time),
            None => None,
        };
        if let Some(time) = at(change.mtime) {
            self.modified.store(to_nanoseconds(time), Ordering::Relaxed);
        }
        if let Some(time) = change.ctime {
            self.changed.store(to_nanoseconds(time), Ordering::Relaxed);
        }
        Ok(())
    }

    fn attributes(&self) -> Attr {
        Attr {
            ino: ROOT_ID,
            size: self.size(),
            blocks: self.size().div_ceil(512),
            atime: self.made,
            mtime: from_nanoseconds(self.modified.load(Ordering::Relaxed)),
            ctime: from_nanoseconds(self.changed.load(Ordering::Relaxed)),
            mode: libc::S_IFREG | self.mounted.mode,
            nlink: 1,
            uid: self.mounted.uid,
            gid: self.mounted.gid,
            blksize: BLOCK_LEN,
        }
    }

    /// The sizes for statfs(2). The whole allocation is reserved, so no block is free.
    fn sizes(&self) -> Statfs {
        Statfs {
            blocks: self.size() / u64::from(BLOCK_LEN),
            files: 1,
            bsize: BLOCK_LEN,
            frsize: BLOCK_LEN,
            namelen: 255,
            ..Statfs::default()
        }
    }

    /// Answers lseek(2) for data and holes. The holes of external memory are not known here, so the whole file counts
    /// as data, and the only hole is behind its end (lseek(2) allows that).
    fn seek(&self, seek: Lseek) -> Result<u64, Errno> {
        let offset =
            u64::try_from(seek.offset).ok().filter(|&offset| offset < self.size()).ok_or(Errno::NXIO)?;
        Ok(match seek.whence {
            Whence::Data => offset,
            Whence::Hole => self.size(),
        })
    }
}

/// The parameters to negotiate for a mount whose requests have at most `io_len` bytes of data.
pub(super) fn wanted(io_len: u32) -> Wanted {
    Wanted {
        max_write: io_len,
        max_pages: (io_len / BLOCK_LEN) as u16,
        max_readahead: 0,
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_MAX,
    }
}

pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs().cast_signed(), nanoseconds: since.subsec_nanos() }
}

/// Nanoseconds since 1970. Times before 1970 and after 2554 become the nearest time that can be represented.
pub(super) fn to_nanoseconds(time: Timestamp) -> u64 {
    let seconds = u64::try_from(time.seconds).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::from(time.nanoseconds))
}

pub(super) fn from_nanoseconds(nanoseconds: u64) -> Timestamp {
    Timestamp {
        seconds: (nanoseconds / 1_000_000_000).cast_signed(),
        nanoseconds: (nanoseconds % 1_000_000_000) as u32,
    }
}
