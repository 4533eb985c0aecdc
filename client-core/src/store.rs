//! Maps of allocations on disk: all that is needed to use an allocation while the allocator is away.
//!
//! One file for each, `NAME.json`, of mode 0600, for it holds keys. A file is replaced as a whole:
//! written beside, synced, renamed, and the directory synced, so that after a crash it is the old one
//! or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xpm_protocol::Name;
use xpm_protocol::api::allocator::Map;
use xpm_protocol::api::blk::AttachDevice;

/// Version of the files: 1, a map and how it was attached.
pub const VERSION: u32 = 1;

/// What is kept of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The allocation.
    pub map: Map,
    /// How it was attached.
    pub attach: AttachDevice,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Why a file cannot be kept or read; names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file was written by a newer version of xpm.
    #[error(
        "{path} has version {found}, this program knows version {VERSION}: run the newer xpm, or move the file away",
        path = path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file is not what was written.
    #[error("{path} is damaged: {source}; move it away and attach the allocation anew", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// The maps in one directory.
#[derive(Debug, Clone)]
pub struct MapStore {
    directory: PathBuf,
}

impl MapStore {
    /// The store in this directory, which is made with mode 0700 if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(directory: &Path) -> Result<MapStore, StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| failed("cannot make the directory", directory, source))?;
        Ok(MapStore { directory: directory.to_owned() })
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// Keeps a map; returns when it is on disk. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what was kept before is unchanged.
    pub fn save(&self, kept: &Kept) -> Result<(), StoreError> {
        let path = self.path(&kept.map.name);
        let beside = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(&Envelope { version: VERSION, content: kept })
            .map_err(|source| failed("cannot write", &path, source.into()))?;
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&beside, &path))
            .and_then(|()| self.sync());
        written.map_err(|source| failed("cannot write", &path, source))
    }

    /// Forgets a map; nothing to do if there is none.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove(&self, name: &Name) -> Result<(), StoreError> {
        let path = self.path(name);
        match fs::remove_file(&path).and_then(|()| self.sync()) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(failed("cannot remove", &path, source))
            }
            _ => Ok(()),
        }
    }

    /// What is kept under this name.
    ///
    /// # Errors
    /// [`StoreError`] when there is something and it cannot be read.
    pub fn load(&self, name: &Name) -> Result<Option<Kept>, StoreError> {
        read(&self.path(name))
    }

    /// All that is kept, each with its own error: one bad file does not hide the others.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be read.
    pub fn load_all(&self) -> Result<Vec<Result<Kept, StoreError>>, StoreError> {
        let entries =
            fs::read_dir(&self.directory).map_err(|source| failed("cannot read", &self.directory, source))?;
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .collect();
        paths.sort();
        Ok(paths.iter().filter_map(|path| read(path).transpose()).collect())
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

fn read(path: &Path) -> Result<Option<Kept>, StoreError> {
    let text = match fs::read(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|source| failed("cannot read", path, source))?,
    };
    let damaged = |source| StoreError::Damaged { path: path.to_owned(), source };
    let VersionOnly { version } = serde_json::from_slice(&text).map_err(damaged)?;
    if version > VERSION {
        return Err(StoreError::Newer { path: path.to_owned(), found: version });
    }
    let envelope: Envelope<Kept> = serde_json::from_slice(&text).map_err(damaged)?;
    Ok(Some(envelope.content))
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use xpm_protocol::api::blk::Form;
    use xpm_protocol::{AllocationId, ByteSize, Epoch, Layout};

    use super::*;

    fn kept(name: &str) -> Kept {
        let name: Name = name.parse().unwrap();
        Kept {
            map: Map {
                name: name.clone(),
                id: AllocationId::from_u128(1),
                epoch: Epoch(3),
                size: ByteSize(1 << 24),
                layout: Layout::Linear,
                region_len: ByteSize(1 << 24),
                grants: Vec::new(),
                regions: Vec::new(),
            },
            attach: AttachDevice {
                name,
                form: Form::Ublk,
                queues: None,
                depth: None,
                transport: None,
                hold: None,
                force: false,
            },
        }
    }

    #[test]
    fn what_is_kept_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = MapStore::open(&dir.path().join("a/b")).unwrap();
        let (one, two) = (kept("one"), kept("two"));
        store.save(&one).unwrap();
        store.save(&two).unwrap();
        store.save(&one).unwrap();
        assert_eq!(store.load(&one.map.name).unwrap(), Some(one.clone()));
        let all: Vec<Kept> = store.load_all().unwrap().into_iter().map(Result::unwrap).collect();
        assert_eq!(all, [one.clone(), two.clone()]);
        let mode = fs::metadata(store.path(&one.map.name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        store.remove(&one.map.name).unwrap();
        store.remove(&one.map.name).unwrap();
        assert_eq!(store.load(&one.map.name).unwrap(), None);
    }

    #[test]
    fn newer_and_damaged_files_are_refused_and_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = MapStore::open(dir.path()).unwrap();
        store.save(&kept("good")).unwrap();
        fs::write(dir.path().join("newer.json"), "{\"version\": 2, \"future\": []}").unwrap();
        fs::write(dir.path().join("torn.json"), "{\"version\": 1, \"map\": {").unwrap();
        let all = store.load_all().unwrap();
        assert!(all[0].is_ok());
        assert!(matches!(all[1], Err(StoreError::Newer { found: 2, .. })));
        assert!(matches!(all[2], Err(StoreError::Damaged { .. })));
        assert!(dir.path().join("torn.json").exists());
    }
}
