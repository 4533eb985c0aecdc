//! A file or a device that contains all regions, behind a superblock that identifies its content.
//!
//! The superblock, all numbers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 16 | `xpm appliance v1` |
//! | 16 | 16 | the content's number: random; a new one each time that the previous content is discarded |
//! | 32 | 8 | 1: in use; 2: closed, with all data on the disk |
//! | 40 | 16 | in use: the id of the running kernel; closed: XXH3-64 of the record of grants |
//! | 56 | 8 | XXH3-64 of the preceding 56 bytes |

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{
    FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, fallocate, fchmod, flock, fstat, fsync,
    ftruncate, major, minor, seek,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use xpm_protocol::units::ByteSize;
use xxhash_rust::xxh3::xxh3_64;

use super::ArenaError;
use super::carve::Carver;
use super::memory::{Memory, Place, Way};

/// Length of the area before the regions, in bytes: one mapping unit of a DAX device.
const HEAD_LEN: u64 = 2 << 20;
const MAGIC: &[u8; 16] = b"xpm appliance v1";
const SUPERBLOCK_LEN: usize = 64;

/// Identifies the content of the file, and its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// The content's number.
    pub(crate) content: u128,
    /// The state in which it was left.
    pub(crate) left: Left,
}

/// The state in which content was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// In use: the content is complete as long as the kernel with this id runs, and possibly not after that.
    Open(u128),
    /// All data are on the disk; the number is the digest of the record of grants.
    Closed(u64),
}

pub(crate) struct BackingFile {
    path: PathBuf,
    fd: Arc<OwnedFd>,
    head: Memory,
    carver: Arc<Mutex<Carver>>,
}

/// A part of the file that is in use; dropping it frees the part.
pub(super) struct Kept {
    carver: Arc<Mutex<Carver>>,
    start: u64,
    len: u64,
}

impl BackingFile {
    /// Opens the file exclusively, and extends a regular file to `capacity`.
    pub(super) fn open(path: &Path, capacity: u64) -> Result<BackingFile, ArenaError> {
        let unfit = |reason: String| ArenaError::File { path: path.to_owned(), reason };
        let file = open_own(path).map_err(unfit)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => {
                unfit("another process uses it; stop that one, or choose another file".into())
            }
            error => unfit(format!("cannot lock it: {error}")),
        })?;
        let len = prepare(&file, capacity + HEAD_LEN).map_err(unfit)?;
        if len < capacity + HEAD_LEN {
            return Err(unfit(format!(
                "it has {}, of which {} are xpm's own, and --memory is {}: lower --memory",
                ByteSize(len),
                ByteSize(HEAD_LEN),
                ByteSize(capacity)
            )));
        }
        let fd: Arc<OwnedFd> = Arc::new(file.into());
        let place = Place { start: 0, len: HEAD_LEN };
        let head = Memory::map(fd.clone(), place, Way::File, Arc::default(), None)
            .map_err(|error| unfit(format!("cannot map it: {error}")))?;
        // The whole file: regions of an earlier life that lent more may lie behind the capacity.
        let carver = Arc::new(Mutex::new(Carver::new(len - HEAD_LEN)));
        Ok(BackingFile { path: path.to_owned(), fd, head, carver })
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its pages are copies in this host's memory, as opposed to those of a DAX device.
    pub(super) fn is_cached(&self) -> bool {
        fstat(&*self.fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice)
    }

    /// The superblock, if there is a valid one.
    pub(crate) fn superblock(&self) -> Option<Superblock> {
        let mut bytes = [0; SUPERBLOCK_LEN];
        self.head.at(0, SUPERBLOCK_LEN).copy_to_slice(&mut bytes);
        Superblock::decode(&bytes)
    }

    /// Writes the superblock, also to the disk. Content counts as closed only if the disk can be told to
    /// store it: returns whether it was stored.
    pub(crate) fn set_superblock(&self, superblock: Superblock) -> io::Result<bool> {
        let closed = matches!(superblock.left, Left::Closed(_));
        if closed && !self.sync()? {
            return Ok(false);
        }
        self.head.at(0, SUPERBLOCK_LEN).copy_from_slice(&superblock.encode());
        self.sync()
    }

    /// Writes all data to the disk; returns false when the file has no way to do that (a DAX device).
    fn sync(&self) -> io::Result<bool> {
        match fsync(&*self.fd) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes these bytes of the file, if they are free.
    pub(super) fn take_at(&self, start: u64, len: u64) -> Option<Kept> {
        let start = start.checked_sub(HEAD_LEN)?;
        let taken = self.carver.lock().unwrap_or_else(PoisonError::into_inner).take_at(start, len);
        taken.then(|| Kept { carver: self.carver.clone(), start, len })
    }

    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Takes `len` contiguous bytes: returns their start, and the value that frees them.
    pub(super) fn take(&self, len: u64) -> Result<(u64, Kept), ArenaError> {
        let mut carver = self.carver.lock().unwrap_or_else(PoisonError::into_inner);
        let start = carver.take(len).ok_or(ArenaError::Fragmented(len))?;
        Ok((start + HEAD_LEN, Kept { carver: self.carver.clone(), start, len }))
    }
}

impl Superblock {
    fn encode(self) -> [u8; SUPERBLOCK_LEN] {
        let mut bytes = [0; SUPERBLOCK_LEN];
        bytes[..16].copy_from_slice(MAGIC);
        bytes[16..32].copy_from_slice(&self.content.to_le_bytes());
        let (state, detail) = match self.left {
            Left::Open(kernel) => (1_u64, kernel),
            Left::Closed(digest) => (2, u128::from(digest)),
        };
        bytes[32..40].copy_from_slice(&state.to_le_bytes());
        bytes[40..56].copy_from_slice(&detail.to_le_bytes());
        let digest = xxh3_64(&bytes[..56]);
        bytes[56..].copy_from_slice(&digest.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; SUPERBLOCK_LEN]) -> Option<Superblock> {
        let number = |from: usize| {
            let mut number = [0; 16];
            number.copy_from_slice(&bytes[from..from + 16]);
            u128::from_le_bytes(number)
        };
        let left = match bytes[32] {
            1 => Left::Open(number(40)),
            2 => Left::Closed(u64::try_from(number(40)).ok()?),
            _ => return None,
        };
        let found = Superblock { content: number(16), left };
        (found.encode() == *bytes).then_some(found)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.carver.lock().unwrap_or_else(PoisonError::into_inner).give(self.start, self.len);
    }
}

/// Opens or creates a file that belongs to this user alone. The file holds other clients' memory: no other
/// user may read or write it, and no other user may have chosen its place by a symbolic link.
fn open_own(path: &Path) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    // A link made by udev leads to a device by its name.
    let is_link_to_device = path.starts_with("/dev")
        && std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir());
    if !is_link_to_device {
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    }
    let file = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(code) if code == Errno::LOOP.raw_os_error() => {
            "it is a symbolic link, which is not followed: give the path that it leads to".to_owned()
        }
        _ => error.to_string(),
    })?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    let (mode, owner, me) = (metadata.mode() & 0o777, metadata.uid(), geteuid().as_raw());
    if owner != me && owner != 0 {
        return Err(format!(
            "it belongs to user {owner}, who could read and change all lent memory: chown it to user {me}, \
             or choose another file"
        ));
    }
    let path = path.display();
    if !metadata.is_file() {
        return Ok(file);
    }
    if mode & 0o022 != 0 {
        return Err(format!(
            "others can change it (mode {mode:04o}), and may have it open: chmod 600 {path} when nobody has"
        ));
    }
    if mode & 0o055 != 0 {
        tracing::warn!("{path} has mode {mode:04o}, so others could read all lent memory: it is 0600 now");
        fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|error| format!("cannot chmod it: {error}"))?;
    }
    Ok(file)
}

/// The file's length in bytes; a regular file is extended first.
fn prepare(file: &File, capacity: u64) -> Result<u64, String> {
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    let kind = metadata.file_type();
    if kind.is_file() {
        if metadata.len() < capacity {
            reserve(file, capacity)?;
        }
        Ok(metadata.len().max(capacity))
    } else if kind.is_block_device() {
        check_device(metadata.mode())?;
        seek(file, SeekFrom::End(0)).map_err(|error| format!("cannot find its size: {error}"))
    } else if kind.is_char_device() {
        let len = dax_len(metadata.rdev())?;
        check_device(metadata.mode())?;
        Ok(len)
    } else {
        Err("it is neither a file nor a device".into())
    }
}

/// The group of a device is chosen by an administrator, as `disk` is.
fn check_device(mode: u32) -> Result<(), String> {
    match mode & 0o007 {
        0 => Ok(()),
        _ => Err(format!("every user can access this device (mode {:04o}): chmod o= it", mode & 0o777)),
    }
}

/// Reserves the blocks of the file system now: a page of a file that finds no block later ends the process
/// that touches it (SIGBUS).
fn reserve(file: &File, capacity: u64) -> Result<(), String> {
    match fallocate(file, FallocateFlags::empty(), 0, capacity) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => ftruncate(file, capacity).map_err(|error| error.to_string()),
        Err(error) => Err(format!("its file system has no {} for it: {error}", ByteSize(capacity))),
    }
}

/// The size of a DAX character device, which cannot be found by seeking (ABI/testing/sysfs-bus-dax).
fn dax_len(device: u64) -> Result<u64, String> {
    let path = format!("/sys/dev/char/{}:{}/size", major(device), minor(device));
    let text = std::fs::read_to_string(&path)
        .map_err(|_| "it is a character device, but no DAX device".to_owned())?;
    text.trim().parse().map_err(|_| format!("{path} holds no size"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 16 << 20;

    #[test]
    fn the_superblock_is_kept_and_a_torn_one_is_invalid() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        for left in [Left::Open(u128::MAX), Left::Closed(u64::MAX)] {
            let superblock = Superblock { content: 5, left };
            assert!(BackingFile::open(&path, LEN).unwrap().set_superblock(superblock).unwrap());
            assert_eq!(BackingFile::open(&path, LEN).unwrap().superblock(), Some(superblock));
            for at in 0..SUPERBLOCK_LEN {
                let mut bytes = superblock.encode();
                bytes[at] ^= 1;
                assert_eq!(Superblock::decode(&bytes), None, "{at}");
            }
        }
        assert_eq!(Superblock::decode(&[0; SUPERBLOCK_LEN]), None);
    }

    #[test]
    fn regions_lie_behind_the_superblock() {
        let directory = tempfile::tempdir().unwrap();
        let file = BackingFile::open(&directory.path().join("memory"), 2 * LEN).unwrap();
        let (start, first) = file.take(LEN).unwrap();
        assert_eq!(start, HEAD_LEN);
        assert!(file.take_at(0, LEN).is_none() && file.take_at(start, LEN).is_none());
        drop(first);
        let _kept = file.take_at(start, LEN).unwrap();
        assert_eq!(file.take(LEN).unwrap().0, HEAD_LEN + LEN);
        assert!(file.take_at(HEAD_LEN + 2 * LEN, LEN).is_none(), "behind the end");
    }
}
