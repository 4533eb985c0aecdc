//! A file or a device that all regions lie in.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, ftruncate, major, minor, seek};
use rustix::io::Errno;
use xpm_protocol::units::ByteSize;

use super::ArenaError;
use super::carve::Carver;

pub(super) struct BackingFile {
    fd: Arc<OwnedFd>,
    carver: Arc<Mutex<Carver>>,
}

/// A part of the file that is in use; gives it back when dropped.
pub(super) struct Kept {
    carver: Arc<Mutex<Carver>>,
    start: u64,
    len: u64,
}

impl BackingFile {
    /// Opens it for this process alone, and makes a regular file as long as `capacity`.
    pub(super) fn open(path: &Path, capacity: u64) -> Result<BackingFile, ArenaError> {
        let unfit = |reason: String| ArenaError::File { path: path.to_owned(), reason };
        // A file that is made here holds other people's memory: for nobody else to read.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| unfit(error.to_string()))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => {
                unfit("another process uses it; stop that one, or choose another file".into())
            }
            error => unfit(format!("cannot lock it: {error}")),
        })?;
        let len = prepare(&file, capacity).map_err(unfit)?;
        if len < capacity {
            return Err(unfit(format!(
                "it has {}, and --memory is {}: lower --memory",
                ByteSize(len),
                ByteSize(capacity)
            )));
        }
        Ok(BackingFile { fd: Arc::new(file.into()), carver: Arc::new(Mutex::new(Carver::new(capacity))) })
    }

    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Takes `len` bytes in one piece: their start, and what gives them back.
    pub(super) fn take(&self, len: u64) -> Result<(u64, Kept), ArenaError> {
        let mut carver = self.carver.lock().unwrap_or_else(PoisonError::into_inner);
        let start = carver.take(len).ok_or(ArenaError::Fragmented(len))?;
        Ok((start, Kept { carver: self.carver.clone(), start, len }))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.carver.lock().unwrap_or_else(PoisonError::into_inner).give(self.start, self.len);
    }
}

/// Its length in bytes; a regular file is made long enough first.
fn prepare(file: &File, capacity: u64) -> Result<u64, String> {
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    let kind = metadata.file_type();
    if kind.is_file() {
        if metadata.len() < capacity {
            reserve(file, capacity)?;
        }
        Ok(metadata.len().max(capacity))
    } else if kind.is_block_device() {
        seek(file, SeekFrom::End(0)).map_err(|error| format!("cannot find its size: {error}"))
    } else if kind.is_char_device() {
        dax_len(metadata.rdev())
    } else {
        Err("it is neither a file nor a device".into())
    }
}

/// Takes the blocks of the file system now: a page of a file that finds no block later ends the
/// process that touches it (SIGBUS).
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
