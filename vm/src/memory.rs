//! The files that are a machine's RAM, and this host's page cache of them. All functions here block.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use xpm_protocol::ByteSize;

use crate::Error;
use crate::hot::{self, Runs};

/// Most rounds of write-back while the guest runs.
const ROUNDS_MAX: u32 = 8;
/// After a round as short as this, little is left to write once the guest is stopped.
const ROUND_SHORT: Duration = Duration::from_millis(5);

/// A file of RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub size: ByteSize,
}

/// The RAM of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// RAM at the start.
    pub memory: ByteSize,
    /// Largest total RAM after [`crate::resize`].
    pub maximum: Option<ByteSize>,
}

impl Sizes {
    /// The sizes of the machine's files: one for the RAM at the start, and one for memory that can be plugged.
    pub fn of_files(self) -> Vec<ByteSize> {
        let more = self.maximum.map(|maximum| ByteSize(maximum.0.saturating_sub(self.memory.0)));
        std::iter::once(self.memory).chain(more).collect()
    }
}

/// Ordinary files as a machine's RAM, which are made if they are missing: `path`, and a second one whose name adds
/// `.plugged`. Both hosts of a migration must see the same content in them at any time: this is for tests with two
/// machines on one host.
///
/// # Errors
/// When a file cannot be made, or an existing file has another size.
pub fn plain_files(path: &Path, sizes: Sizes) -> Result<Vec<MemoryFile>, Error> {
    let path = absolute(path)?;
    let mut more = path.clone().into_os_string();
    more.push(".plugged");
    let paths = [path, more.into()].into_iter();
    let files: Vec<MemoryFile> =
        paths.zip(sizes.of_files()).map(|(path, size)| MemoryFile { path, size }).collect();
    files.iter().try_for_each(ensure_plain)?;
    Ok(files)
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::io("use", path))
}

fn ensure_plain(file: &MemoryFile) -> Result<(), Error> {
    let path = &file.path;
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let opened = opened.map_err(Error::io("open", path))?;
    let metadata = opened.metadata().map_err(Error::io("look at", path))?;
    if metadata.file_type().is_block_device() || metadata.len() == file.size.0 {
        return Ok(());
    }
    if metadata.len() != 0 {
        return Err(Error::Usage(format!(
            "{} has {}, and the machine's RAM is {}: give another file, or the size that it has",
            path.display(),
            ByteSize(metadata.len()),
            file.size
        )));
    }
    opened.set_len(file.size.0).map_err(Error::io("set the size of", path))
}

/// The files of a machine, open for write-back.
#[derive(Debug)]
pub struct Cache {
    files: Vec<(PathBuf, File)>,
}

/// This host's page cache of a machine's RAM, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cached {
    /// All cached pages.
    pub pages: u64,
    /// Pages that are not written back.
    pub dirty: u64,
    /// Pages that are being written back.
    pub writeback: u64,
}

impl Cache {
    /// Opens the files.
    ///
    /// # Errors
    /// When one of them cannot be opened.
    pub fn open(files: &[MemoryFile]) -> Result<Cache, Error> {
        let open = |file: &MemoryFile| {
            let opened = File::open(&file.path).map_err(Error::io("open", &file.path))?;
            Ok((file.path.clone(), opened))
        };
        Ok(Cache { files: files.iter().map(open).collect::<Result<_, Error>>()? })
    }

    /// Writes dirty pages back while the guest runs, until a round is short or no longer improves, so that little is
    /// left to write once the guest is stopped. Returns the number of rounds.
    ///
    /// # Errors
    /// When the kernel reports a failed write-back.
    pub fn flush_ahead(&self) -> Result<u32, Error> {
        let mut before = Duration::MAX;
        for round in 1..=ROUNDS_MAX {
            let begun = Instant::now();
            self.flush()?;
            let took = begun.elapsed();
            if took <= ROUND_SHORT || took > before / 4 * 3 {
                return Ok(round);
            }
            before = took;
        }
        Ok(ROUNDS_MAX)
    }

    /// Writes all dirty pages back.
    ///
    /// # Errors
    /// When the kernel reports a failed write-back.
    pub fn flush(&self) -> Result<(), Error> {
        self.files.iter().try_for_each(|(path, file)| file.sync_all().map_err(Error::io("write back", path)))
    }

    /// The pages that are cached now.
    ///
    /// # Errors
    /// When the kernel does not support cachestat(2), which needs Linux 6.5.
    pub fn look(&self) -> Result<Cached, Error> {
        let mut sum = Cached::default();
        for (path, file) in &self.files {
            let one = cachestat(file, 0, 0).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOSYS) => Error::Machine(
                    "this kernel cannot tell what is cached of a file (cachestat(2)): Linux 6.5 is needed"
                        .to_owned(),
                ),
                _ => Error::io("look at the cache of", path)(error),
            })?;
            sum.pages += one.pages;
            sum.dirty += one.dirty;
            sum.writeback += one.writeback;
        }
        Ok(sum)
    }

    /// The cached pages of each file, as messages for the destination of a move.
    ///
    /// # Errors
    /// As for [`Cache::look`].
    pub(crate) fn hot(&self) -> Result<Vec<Runs>, Error> {
        let of_file = |(path, file): &(PathBuf, File)| {
            let failed = |error| Error::io("look at the cache of", path)(error);
            let len = file.metadata().map_err(failed)?.len();
            let count = |first: u64, end: u64| {
                Ok(cachestat(file, first * hot::PAGE, (end - first) * hot::PAGE)?.pages)
            };
            hot::cached_ranges(len / hot::PAGE, count).map_err(failed)
        };
        let files: Result<Vec<_>, Error> = self.files.iter().map(of_file).collect();
        Ok(hot::messages(files?))
    }

    /// Proves that no page of the RAM is only in this host's cache.
    ///
    /// # Errors
    /// When some page is, or the kernel cannot report it.
    pub fn prove_clean(&self) -> Result<(), Error> {
        let cached = self.look()?;
        match (cached.dirty, cached.writeback) {
            (0, 0) => Ok(()),
            (dirty, writeback) => Err(Error::Machine(format!(
                "{dirty} pages of the stopped machine are dirty after they were written back, and {writeback} are being \
                 written: something else writes to {}",
                self.files[0].0.display()
            ))),
        }
    }
}

/// struct cachestat_range of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// struct cachestat of linux/mman.h, in pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Number of cachestat(2), on all architectures except alpha.
const SYS_CACHESTAT: libc::c_long = 451;

/// The cached pages of a part of a file, in bytes; a length of 0 means "up to the end".
#[expect(unsafe_code, reason = "neither the standard library nor rustix has cachestat(2)")]
fn cachestat(file: &File, off: u64, len: u64) -> io::Result<Cached> {
    let range = CachestatRange { off, len };
    let mut stat = Cachestat::default();
    // SAFETY: the kernel reads `range` and writes `stat`, which have its layouts and live longer than the call.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0 as libc::c_uint)
    };
    match result {
        0 => Ok(Cached { pages: stat.cache, dirty: stat.dirty, writeback: stat.writeback }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const SIZES: Sizes = Sizes { memory: ByteSize(4 << 20), maximum: Some(ByteSize(6 << 20)) };

    #[test]
    fn files_are_made_once_and_keep_their_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        let files = plain_files(&path, SIZES).unwrap();
        let of = |file: &MemoryFile| (file.path.file_name().unwrap().to_owned(), file.size.0);
        assert_eq!(
            files.iter().map(of).collect::<Vec<_>>(),
            [("ram".into(), 4 << 20), ("ram.plugged".into(), 2 << 20)]
        );
        assert_eq!(files[0].path.metadata().unwrap().len(), 4 << 20);
        assert_eq!(plain_files(&path, SIZES).unwrap(), files);
        let other = Sizes { memory: ByteSize(8 << 20), maximum: None };
        let error = plain_files(&path, other).unwrap_err().to_string();
        assert!(error.contains("has 4MiB, and the machine's RAM is 8MiB"), "{error}");
    }

    #[test]
    fn dirty_pages_are_seen_and_written_back() {
        // Not in /dev/shm, whose pages are never dirty.
        let directory = tempfile::tempdir().unwrap();
        let files = plain_files(&directory.path().join("ram"), SIZES).unwrap();
        let cache = Cache::open(&files).unwrap();
        File::options().write(true).open(&files[0].path).unwrap().write_all(&[1; 64 << 10]).unwrap();
        let cached = match cache.look() {
            Ok(cached) => cached,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        if cached.dirty == 0 {
            return eprintln!("skipped: pages of {} are never dirty", directory.path().display());
        }
        assert!(cached.pages >= 16, "{cached:?}");
        let error = cache.prove_clean().unwrap_err().to_string();
        assert!(error.contains("pages of the stopped machine are dirty"), "{error}");
        assert!((1..=ROUNDS_MAX).contains(&cache.flush_ahead().unwrap()));
        cache.prove_clean().unwrap();
    }
}
