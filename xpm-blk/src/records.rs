//! What is kept across restarts, in the state directory:
//!
//! * `client-id`: who this client is to the allocator.
//! * `devices/NAME.json`: each allocation that is shown, with its map. Holds keys: mode 0600.
//! * `lock`: held by the process that uses the directory.
//!
//! A file is written beside its place, synced and renamed over it, so that it is whole at any time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Map, MapChange};
use xpm_protocol::api::blk::AttachDevice;
use xpm_protocol::{ClientId, Name};

use crate::error::{DeviceError, Step};

/// Version 1: the first. 2: with a change that is being carried out.
const VERSION: u32 = 2;

/// An allocation that is shown, with all that is needed to show it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    /// What was asked for.
    pub(crate) request: AttachDevice,
    /// Where the allocation lies.
    pub(crate) map: Map,
    /// Number of the device's connections, for forms whose connections outlive the process.
    pub(crate) session: u128,
    /// Number of the kernel's device, to be had again.
    pub(crate) number: Option<u32>,
    /// A change of the map of which it is not known whether it holds: all is copied, and writes go to both places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) change: Option<Box<MapChange>>,
}

impl Record {
    pub(crate) fn new(request: AttachDevice, map: Map, session: u128) -> Record {
        Record { version: VERSION, request, map, session, number: None, change: None }
    }
}

#[derive(Deserialize)]
struct AnyRecord {
    version: u32,
}

/// The state directory, held by this process alone.
#[derive(Debug)]
pub(crate) struct Records {
    directory: PathBuf,
    _lock: File,
}

impl Records {
    /// Opens the directory, which is made with mode 0700 if it is not there. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when another process uses it.
    pub(crate) fn open(directory: &Path) -> Result<Records, DeviceError> {
        let at = || format!("open the state directory {}", directory.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory.join("devices")).at(at())?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(directory.join("lock"))
            .at(at())?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Records { directory: directory.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!(
                    "the state directory {} is in use by another xpm-blk: give each its own `state`",
                    directory.display()
                );
                Err(DeviceError::new(ErrorKind::Conflict, what))
            }
            Err(error) => Err(io::Error::from(error).at(at())),
        }
    }

    /// This client's id; made from `random` the first time. Blocks.
    pub(crate) fn client_id(&self, random: u128) -> Result<ClientId, DeviceError> {
        let path = self.directory.join("client-id");
        let at = || format!("read {}", path.display());
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|error| {
                let what = format!("{}: {error}; remove the file to become a new client", path.display());
                DeviceError::new(ErrorKind::Internal, what)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = ClientId::from_u128(random);
                self.write(&path, format!("{id}\n").as_bytes())?;
                Ok(id)
            }
            Err(error) => Err(error.at(at())),
        }
    }

    /// Every record. A file that is none is left where it is, and logged. Blocks.
    ///
    /// # Errors
    /// When a record is of a newer version of xpm-blk.
    pub(crate) fn load(&self) -> Result<Vec<Record>, DeviceError> {
        let directory = self.directory.join("devices");
        let entries = fs::read_dir(&directory).at(format!("read {}", directory.display()))?;
        let paths = entries.flatten().map(|entry| entry.path());
        let mut records = Vec::new();
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
            let text = fs::read_to_string(&path).at(format!("read {}", path.display()))?;
            match parse(&text) {
                Ok(record) => records.push(record),
                Err(Unreadable::Newer(version)) => {
                    let what = format!(
                        "{} was written by a newer xpm-blk (version {version} of the format, this one knows {VERSION}): \
                         use that one, or another `state`",
                        path.display()
                    );
                    return Err(DeviceError::new(ErrorKind::Invalid, what));
                }
                Err(Unreadable::Malformed(error)) => {
                    tracing::error!("{}: {error}; its device is not shown", path.display());
                }
            }
        }
        Ok(records)
    }

    /// Keeps a record. Blocks until it is on disk.
    pub(crate) fn save(&self, record: &Record) -> Result<(), DeviceError> {
        let path = self.path(&record.request.name);
        let record = Record { version: VERSION, ..record.clone() };
        let text = serde_json::to_vec_pretty(&record).map_err(io::Error::from).at("write a record")?;
        self.write(&path, &text)
    }

    /// Forgets a record. Blocks.
    pub(crate) fn remove(&self, name: &Name) -> Result<(), DeviceError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error.at(format!("remove {}", path.display())))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join("devices").join(format!("{name}.json"))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), DeviceError> {
        let new = path.with_extension("new");
        let written = || -> io::Result<()> {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            File::open(path.parent().unwrap_or(&self.directory))?.sync_all()
        };
        written().at(format!("write {}", path.display()))
    }
}

enum Unreadable {
    Newer(u32),
    Malformed(serde_json::Error),
}

fn parse(text: &str) -> Result<Record, Unreadable> {
    let AnyRecord { version } = serde_json::from_str(text).map_err(Unreadable::Malformed)?;
    if version > VERSION {
        return Err(Unreadable::Newer(version));
    }
    serde_json::from_str(text).map_err(Unreadable::Malformed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use xpm_protocol::units::ByteSize;
    use xpm_protocol::{AllocationId, Epoch, Layout};

    use super::*;

    fn record(name: &str) -> Record {
        let text = format!("{{\"name\":\"{name}\",\"as\":\"ublk\"}}");
        let map = Map {
            name: name.parse().unwrap(),
            id: AllocationId::from_u128(1),
            epoch: Epoch(2),
            version: 0,
            size: ByteSize(4096),
            layout: Layout::Linear,
            region_len: ByteSize(1 << 24),
            grants: Vec::new(),
            regions: Vec::new(),
            slabs: Default::default(),
        };
        Record::new(serde_json::from_str(&text).unwrap(), map, u128::MAX)
    }

    #[test]
    fn what_is_kept_comes_back_and_is_secret() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        records.save(&record("a")).unwrap();
        records.save(&Record { number: Some(3), ..record("a") }).unwrap();
        records.save(&record("b")).unwrap();
        records.remove(&"b".parse().unwrap()).unwrap();
        records.remove(&"b".parse().unwrap()).unwrap();
        assert_eq!(records.load().unwrap(), [Record { number: Some(3), ..record("a") }]);
        let file = directory.path().join("devices/a.json");
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_client_keeps_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        assert_eq!(records.client_id(7).unwrap(), ClientId::from_u128(7));
        assert_eq!(records.client_id(8).unwrap(), ClientId::from_u128(7));
    }

    #[test]
    fn two_processes_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Records::open(directory.path()).unwrap();
        let error = Records::open(directory.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }

    #[test]
    fn a_newer_format_is_refused_and_a_broken_file_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let broken = directory.path().join("devices/broken.json");
        fs::write(&broken, "{").unwrap();
        assert_eq!(records.load().unwrap(), []);
        assert_eq!(fs::read(&broken).unwrap(), b"{");
        fs::write(&broken, "{\"version\":9,\"anything\":{}}").unwrap();
        assert!(records.load().unwrap_err().to_string().contains("newer"));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,120}") {
            let _ = parse(&text);
        }
    }
}
