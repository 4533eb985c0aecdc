//! The file and its database: opened with checks, shared by the writer and readers, and reopened after a lack of
//! room.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::backends::{FileBackend, InMemoryBackend};
use redb::{Database, DatabaseError, StorageBackend, StorageError};

use super::super::StoreError;
use super::super::guard::{guarded, let_go};
use super::{FILE_NAME, MARK_NAME, number_in};

/// Memory for the database's pages, in bytes. A small cache suffices: everything is read once, at the start, and
/// writes are small.
const CACHE_LEN: usize = 32 << 20;
/// Longest file that is checked as a whole at each start, in bytes: a second of reading on a slow disk.
const CHECKED_LEN_MAX: u64 = 256 << 20;

/// The database and its path; see the module.
#[derive(Debug)]
pub(super) struct Base {
    path: PathBuf,
    opened: RwLock<Opened>,
}

#[derive(Debug)]
enum Opened {
    /// Readable and writable.
    File(Held),
    /// A copy in memory: there was no room to open the file.
    Copy(Held),
    /// Reopening failed.
    Not,
}

#[derive(Debug)]
struct Held(Option<Database>);

impl Drop for Held {
    fn drop(&mut self) {
        let_go(self.0.take());
    }
}

impl Base {
    /// Opens the file in the directory; if there is none, makes one and lets `fill` write its content.
    pub(super) fn open(
        directory: &Path,
        fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
    ) -> Result<Base, StoreError> {
        let path = directory.join(FILE_NAME);
        let opened = match fs::metadata(&path) {
            Ok(found) if found.len() == 0 => {
                let what = "it is empty, and a new pool never leaves it so".to_owned();
                return Err(StoreError::Damaged { path, what });
            }
            Ok(_) => match open_file(&path) {
                Ok(database) => Opened::File(Held(Some(database))),
                Err(StoreError::Full { .. }) => Opened::Copy(Held(Some(copy(&path)?))),
                Err(error) => return Err(error),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if directory.join(MARK_NAME).exists() {
                    return Err(StoreError::Gone { path, mark: directory.join(MARK_NAME) });
                }
                Opened::File(Held(Some(make(directory, &path, fill)?)))
            }
            Err(source) => return Err(StoreError::Directory { path: directory.to_owned(), source }),
        };
        Ok(Base { path, opened: RwLock::new(opened) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// If the database is a copy in memory: why it cannot be written.
    pub(super) fn is_copy(&self) -> Option<String> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        matches!(&*opened, Opened::Copy(_)).then(|| full(&self.path).to_string())
    }

    /// Runs a read.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        match &*opened {
            Opened::File(held) | Opened::Copy(held) => self.with(held, "read", work),
            Opened::Not => Err(full(&self.path)),
        }
    }

    /// Runs a write. After a write failed for lack of room, all writes fail until [`Base::reopen`].
    pub(super) fn write<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        match &*opened {
            Opened::File(held) => self.with(held, "write", work),
            Opened::Copy(_) | Opened::Not => Err(full(&self.path)),
        }
    }

    /// Reopens the file, because redb refuses further writes after a failed one.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        // The old database has to be dropped first, because it holds the lock of the file.
        if let Opened::File(_) = &*opened {
            *opened = Opened::Not;
        }
        *opened = Opened::File(Held(Some(open_file(&self.path)?)));
        Ok(())
    }

    fn with<T>(
        &self,
        held: &Held,
        doing: &'static str,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let Some(database) = &held.0 else { return Err(full(&self.path)) };
        guarded(&self.path, doing, || work(database).map_err(|error| failed(&self.path, doing, error)))
    }
}

/// Makes a new file under another name, and renames it to its place when it is complete.
fn make(
    directory: &Path,
    path: &Path,
    fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<Database, StoreError> {
    let unusable = |source| StoreError::Directory { path: directory.to_owned(), source };
    let beside = path.with_extension("redb.new");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&beside);
    let file = file.map_err(unusable)?;
    let database = guarded(path, "make", || open_with(path, file))?;
    guarded(path, "make", || fill(&database).map_err(|error| failed(path, "write", error)))?;
    fs::rename(&beside, path).map_err(unusable)?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(unusable)?;
    Ok(database)
}

fn open_file(path: &Path) -> Result<Database, StoreError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(|source| StoreError::Directory { path: directory.to_owned(), source })?;
    let len = file.metadata().map_or(0, |found| found.len());
    guarded(path, "open", || {
        let mut database = open_with(path, file)?;
        if len <= CHECKED_LEN_MAX {
            check(path, &mut database)?;
        }
        Ok(database)
    })
}

fn open_with(path: &Path, file: File) -> Result<Database, StoreError> {
    let backend = FileBackend::new(file);
    let opened = backend
        .and_then(|backend| Database::builder().set_cache_size(CACHE_LEN).create_with_backend(backend));
    opened.map_err(|error| open_failed(path, error))
}

fn open_failed(path: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path: path.to_owned() },
        other => failed(path, "open", other.into()),
    }
}

/// Checks the whole file. A repair by redb is accepted, unless it lost commits.
fn check(path: &Path, database: &mut Database) -> Result<(), StoreError> {
    let number = number_in(database).map_err(|error| failed(path, "read", error))?;
    match database.check_integrity() {
        Ok(true) => Ok(()),
        Ok(false) => {
            let left = number_in(database).map_err(|error| failed(path, "read", error))?;
            tracing::warn!("{} was damaged and is repaired", path.display());
            match left >= number {
                true => Ok(()),
                false => {
                    let what = "its newest state cannot be read, an older one can".to_owned();
                    Err(StoreError::Damaged { path: path.to_owned(), what })
                }
            }
        }
        // Lack of room says nothing about the file.
        Err(DatabaseError::Storage(StorageError::Io(error))) if is_full(&error) => Ok(()),
        Err(error) => Err(open_failed(path, error)),
    }
}

/// A copy in memory, for a file that cannot be opened because a repair would need room.
fn copy(path: &Path) -> Result<Database, StoreError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let bytes =
        fs::read(path).map_err(|source| StoreError::Directory { path: directory.to_owned(), source })?;
    guarded(path, "open", || {
        let backend = InMemoryBackend::new();
        let filled = backend.set_len(bytes.len() as u64).and_then(|()| backend.write(0, &bytes));
        filled.map_err(|error| failed(path, "open", redb::Error::Io(error)))?;
        let opened = Database::builder().set_cache_size(CACHE_LEN).create_with_backend(backend);
        opened.map_err(|error| open_failed(path, error))
    })
}

fn failed(path: &Path, doing: &'static str, error: redb::Error) -> StoreError {
    match error {
        redb::Error::Io(error) if is_full(&error) => full(path),
        error => StoreError::Database { doing, path: path.to_owned(), source: Box::new(error) },
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn full(path: &Path) -> StoreError {
    StoreError::Full {
        why: format!(
            "the file system of {} is full: the allocator answers and changes nothing until there is room; remove something else \
             there",
            path.display()
        ),
    }
}
