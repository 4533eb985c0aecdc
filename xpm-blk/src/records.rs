//! The state that is kept across restarts, in the state directory:
//!
//! * `client-id`: the id of this client for the allocator.
//! * `identity.json`: the machine and the installation that used the directory last, and the number of the
//!   last life.
//! * `devices/NAME.json`: each allocation that is shown, with its map. Contains keys: mode 0600.
//! * `owed/NAME.json`: an allocation that is detached and that the allocator does not know of yet; see
//!   [`crate::owed`].
//! * `lock`: locked by the process that uses the directory.
//!
//! A file is written beside its place, synced and renamed over it, so that it is complete at any time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use xpm_control::state;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Map, MapChange};
use xpm_protocol::api::blk::{AttachDevice, DeviceRole, Form};
use xpm_protocol::{ApplianceId, BlockSize, ClientId, HandoverId, Life, Name};

use crate::error::{DeviceError, Step};
use crate::frontend::first_generation;
use crate::frontend::fuse::Mounted;
use crate::identity;

/// Version 1: the first. 2: with a change in progress. 3: with a generation, and ublk devices that outlive
/// their server. 4: for an allocation that this client may not own, see [`Role`].
pub(crate) const VERSION: u32 = 4;
/// The version of an owner's record, which older programs understand.
const VERSION_OF_OWNER: u32 = 3;

/// Least distance between the first generations of two lives of a device. The first generation is also at least the
/// present time in seconds, so a life of n seconds may use n generations more than this without a collision. A life
/// uses more than that only if a reachable appliance disconnects it again and again.
const LIFE_GENERATIONS: u32 = 1 << 12;
/// As [`LIFE_GENERATIONS`], if lives may have begun that were not recorded.
const LIVES_GENERATIONS: u32 = 1 << 16;

/// A shown allocation, with all information to show it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    /// The request that attached it.
    pub(crate) request: AttachDevice,
    /// The map of the allocation.
    pub(crate) map: Map,
    /// Session number of the device's connections, for forms whose connections outlive the process.
    pub(crate) session: u128,
    /// Generation of the first connection of this life of the device: higher than all earlier ones.
    #[serde(default)]
    pub(crate) generation: u32,
    /// Number of the kernel's device, which a later life requests again.
    pub(crate) number: Option<u32>,
    /// A firm change of the map, if it is not known yet whether it is valid: all data are copied, and writes
    /// go to both places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) change: Option<Box<MapChange>>,
    /// The life that showed it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) life: Option<Life>,
    /// Whether it was never shown: the client that requested it waits, or received an error. A later life
    /// undoes it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) pending: bool,
    /// Appliances that the operator has given up, with the displayed reasons: they are never used again, even
    /// if they come back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) given_up: BTreeMap<ApplianceId, String>,
    /// Of a file: the parameters of its mount; none before it is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mounted: Option<Mounted>,
    /// This client's role for the allocation.
    #[serde(default, skip_serializing_if = "Role::is_owner")]
    pub(crate) role: Role,
}

/// The role of this client for an allocation that it shows.
///
/// ```text
///    attach                                        attach --standby
///      v            a client stands by                   v           handed over to this client
///   [owner] <---------------------------> [contested]  [stands by] -----------------------------> [contested]
///                                           |     ^        ^      <-----------------------------
///                              handed over  v     | rolled back                rolled back
///                                      [handed over] --committed--> no device
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// The client owns the allocation.
    #[default]
    Owner,
    /// The client owns the allocation, and another client may get it one day and give it back: refusals by
    /// appliances prove nothing.
    Contested,
    /// The client stands by, and has no keys.
    StandsBy,
    /// The client was the owner, and may be again. Its keys are the old ones.
    HandedOver {
        /// The hand-over.
        handover: HandoverId,
        /// The new owner's host, for display.
        to: String,
    },
}

impl Role {
    pub(crate) fn is_owner(&self) -> bool {
        *self == Role::Owner
    }

    /// Why all I/O of the device waits, if it does.
    pub(crate) fn waits(&self) -> Option<String> {
        match self {
            Role::Owner | Role::Contested => None,
            Role::StandsBy => {
                Some("it stands by: I/O waits until the allocation is handed over to this host".to_owned())
            }
            Role::HandedOver { handover, to } => Some(format!(
                "it is handed over to {to}: I/O waits until hand-over {handover} is committed or rolled back"
            )),
        }
    }

    /// The role as the status shows it.
    pub(crate) fn shown(&self) -> Option<DeviceRole> {
        match self {
            Role::Owner | Role::Contested => None,
            Role::StandsBy => Some(DeviceRole::StandsBy),
            Role::HandedOver { .. } => Some(DeviceRole::HandedOver),
        }
    }
}

impl Record {
    pub(crate) fn new(request: AttachDevice, map: Map, session: u128) -> Record {
        let generation = first_generation();
        let given_up = BTreeMap::new();
        Record {
            version: VERSION_OF_OWNER,
            request,
            map,
            session,
            generation,
            number: None,
            change: None,
            life: None,
            pending: false,
            given_up,
            mounted: None,
            role: Role::Owner,
        }
    }

    /// Whether this state directory, on this machine, showed it last: then it may be shown again without the
    /// allocator.
    pub(crate) fn is_of(&self, life: Option<&Life>) -> bool {
        // A record from before lives existed does not say.
        let (Some(shown), Some(life)) = (&self.life, life) else { return true };
        (shown.machine, shown.installation) == (life.machine, life.installation)
    }

    /// The logical block size: the allocation's, or the operator's choice, or the one of the form, with which
    /// the device was written to before there was a choice. None where clients choose.
    pub(crate) fn block_size(&self) -> Option<BlockSize> {
        let of_form = || self.request.form.block_size_of_before();
        self.map.block_size.or(self.request.block_size).or_else(of_form)
    }

    /// The kernel's disk that it was shown as, if that may still exist.
    pub(crate) fn left_disk(&self) -> Option<String> {
        let number = self.number?;
        let disk = match self.request.form {
            Form::Ublk => format!("ublkb{number}"),
            Form::Nbd | Form::NbdDirect => format!("nbd{number}"),
            Form::NbdSocket(_) | Form::VhostUser(_) | Form::File(_) | Form::Tree(_) | Form::InTree(_) => {
                return None;
            }
        };
        crate::sysfs::path(&disk, "").exists().then_some(disk)
    }

    /// Another process shows it from here on. `told` is the source of its knowledge about the previous life.
    pub(crate) fn begin_life(&mut self, told: Told) {
        let past = match told {
            Told::ByItself => LIFE_GENERATIONS,
            Told::ByDisk => LIVES_GENERATIONS,
        };
        self.generation = first_generation().max(self.generation.saturating_add(past));
    }
}

/// The source of a process's knowledge about the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The previous process.
    ByItself,
    /// The disk, where the last lives may be missing.
    ByDisk,
}

#[derive(Deserialize)]
struct AnyRecord {
    version: u32,
}

/// The state directory, used by this process alone, or by it and the one standby that takes over when it
/// dies.
pub(crate) struct Records {
    directory: PathBuf,
    lock: File,
    client: OnceLock<ClientId>,
    life: Option<Life>,
    kept: Mutex<Kept>,
}

/// The state on disk, and its followers.
#[derive(Default)]
struct Kept {
    records: BTreeMap<Name, Record>,
    /// Descriptors that devices are served by.
    descriptors: BTreeMap<Name, OwnedFd>,
    followers: Vec<Box<dyn Follower>>,
}

/// Receives every change before its author continues.
pub(crate) trait Follower: Send {
    /// A record has this content from now on. Returns false when the follower is gone.
    fn kept(&mut self, record: &Record) -> bool;
    /// A device is served by this descriptor, which the next process needs to take the device over.
    fn descriptor(&mut self, name: &Name, descriptor: BorrowedFd<'_>) -> bool;
    /// A record and its descriptor are removed.
    fn removed(&mut self, name: &Name) -> bool;
}

/// The user of the state directory.
pub(crate) enum Taken {
    /// This process.
    Mine(Box<Records>),
    /// Another process.
    Others,
}

impl Records {
    /// Opens the directory, which is created with mode 0700 if it does not exist. Blocks.
    pub(crate) fn open(directory: &Path) -> Result<Taken, DeviceError> {
        let at = || format!("open the state directory {}", directory.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory.join("devices")).at(at())?;
        let Some(lock) = state::lock(directory).at(at())? else { return Ok(Taken::Others) };
        let life = identity::begin_life(directory, &lock)?;
        let directory = directory.to_owned();
        let (client, kept) = (OnceLock::new(), Mutex::default());
        Ok(Taken::Mine(Box::new(Records { directory, lock, client, life: Some(life), kept })))
    }

    /// The life of this client that this process is part of; none when an xpm-blk from before lives existed
    /// handed over.
    pub(crate) const fn life(&self) -> Option<&Life> {
        self.life.as_ref()
    }

    /// The directory as a dead process left it, with the lock that it gave to this process. Reads no file.
    pub(crate) fn inherit(
        directory: &Path,
        lock: OwnedFd,
        (client, life): (ClientId, Option<Life>),
        (records, descriptors): (BTreeMap<Name, Record>, BTreeMap<Name, OwnedFd>),
    ) -> Records {
        let kept = Mutex::new(Kept { records, descriptors, followers: Vec::new() });
        Records {
            directory: directory.to_owned(),
            lock: lock.into(),
            client: OnceLock::from(client),
            life,
            kept,
        }
    }

    /// The lock of the directory: a process that has it, or received it from the process that had it, may
    /// take over when that one is dead.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Sends all records, and each later change, to a follower.
    pub(crate) fn follow(&self, mut follower: Box<dyn Follower>) {
        let mut kept = self.kept();
        let told = kept.records.values().all(|record| follower.kept(record))
            && kept
                .descriptors
                .iter()
                .all(|(name, descriptor)| follower.descriptor(name, descriptor.as_fd()));
        if told {
            kept.followers.push(follower);
        }
    }

    /// Takes over descriptors that an earlier process left, by the name of the allocation.
    pub(crate) fn adopt(&self, left: impl IntoIterator<Item = (Name, OwnedFd)>) {
        self.kept().descriptors.extend(left);
    }

    /// The descriptor that a device is served by; none when no process has left one.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(crate) fn descriptor(&self, name: &Name) -> io::Result<Option<OwnedFd>> {
        self.kept().descriptors.get(name).map(OwnedFd::try_clone).transpose()
    }

    /// Stores the descriptor that a device is served by, and notifies the followers.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(crate) fn keep_descriptor(&self, name: &Name, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let kept_one = descriptor.try_clone_to_owned()?;
        let mut kept = self.kept();
        kept.followers.retain_mut(|follower| follower.descriptor(name, descriptor));
        kept.descriptors.insert(name.clone(), kept_one);
        Ok(())
    }

    /// While the returned value lives, no change is written or passed to followers: its author waits.
    pub(crate) fn freeze(&self) -> impl Sized + '_ {
        self.kept()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This client's id; created from `random` the first time. Blocks, unless it is known.
    pub(crate) fn client_id(&self, random: u128) -> Result<ClientId, DeviceError> {
        match self.client.get() {
            Some(client) => Ok(*client),
            None => {
                let client = self.read_client_id(random)?;
                Ok(*self.client.get_or_init(|| client))
            }
        }
    }

    fn read_client_id(&self, random: u128) -> Result<ClientId, DeviceError> {
        let path = self.directory.join("client-id");
        let at = || format!("read {}", path.display());
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|error| {
                let what = format!("{}: {error}; remove the file to become a new client", path.display());
                DeviceError::new(ErrorKind::Internal, what)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = ClientId::from_u128(random);
                write(&path, format!("{id}\n").as_bytes())?;
                Ok(id)
            }
            Err(error) => Err(error.at(at())),
        }
    }

    /// Every record: as this process received it, or else as it is on disk. An invalid file is left where it
    /// is, and logged. Blocks.
    ///
    /// # Errors
    /// When a record is of a newer version of xpm-blk.
    pub(crate) fn load(&self) -> Result<Vec<Record>, DeviceError> {
        let records = self.read()?;
        let mut kept = self.kept();
        for record in &records {
            kept.records.entry(record.request.name.clone()).or_insert_with(|| record.clone());
        }
        Ok(records)
    }

    /// The records that this process received from its predecessor.
    pub(crate) fn inherited(&self) -> Vec<Record> {
        self.kept().records.values().cloned().collect()
    }

    fn read(&self) -> Result<Vec<Record>, DeviceError> {
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

    /// Saves a record. Blocks until it is on disk, and until the followers have received it.
    pub(crate) fn save(&self, record: &Record) -> Result<(), DeviceError> {
        let name = &record.request.name;
        let version = if record.role.is_owner() { VERSION_OF_OWNER } else { VERSION };
        let record = Record { version, life: self.life.or(record.life), ..record.clone() };
        let text = serde_json::to_vec_pretty(&record).map_err(io::Error::from).at("write a record")?;
        let mut kept = self.kept();
        write(&self.path(name), &text)?;
        kept.followers.retain_mut(|follower| follower.kept(&record));
        kept.records.insert(name.clone(), record);
        Ok(())
    }

    /// Removes a record. Blocks.
    pub(crate) fn remove(&self, name: &Name) -> Result<(), DeviceError> {
        let path = self.path(name);
        let mut kept = self.kept();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error.at(format!("remove {}", path.display())));
            }
            _ => {}
        }
        kept.records.remove(name);
        kept.descriptors.remove(name);
        kept.followers.retain_mut(|follower| follower.removed(name));
        Ok(())
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join("devices").join(format!("{name}.json"))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), DeviceError> {
    state::write(path, bytes).at(format!("write {}", path.display()))
}

/// Why a text is no record for this program.
#[derive(Debug)]
pub(crate) enum Unreadable {
    Newer(u32),
    Malformed(serde_json::Error),
}

/// A record of this version, or of an older one.
pub(crate) fn parse(text: &str) -> Result<Record, Unreadable> {
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

    fn open(directory: &Path) -> Records {
        match Records::open(directory).unwrap() {
            Taken::Mine(records) => *records,
            Taken::Others => panic!("it is another one's"),
        }
    }

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
            block_size: None,
        };
        Record::new(serde_json::from_str(&text).unwrap(), map, u128::MAX)
    }

    #[test]
    fn saved_records_are_read_back_and_secret() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        records.save(&record("a")).unwrap();
        records.save(&Record { number: Some(3), ..record("a") }).unwrap();
        records.save(&record("b")).unwrap();
        records.remove(&"b".parse().unwrap()).unwrap();
        records.remove(&"b".parse().unwrap()).unwrap();
        assert_eq!(records.load().unwrap(), [Record { number: Some(3), life: records.life, ..record("a") }]);
        let file = directory.path().join("devices/a.json");
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_older_program_reads_only_versions_that_it_knows() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        let version = |role: Role| {
            records.save(&Record { role, ..record("a") }).unwrap();
            let text = fs::read_to_string(directory.path().join("devices/a.json")).unwrap();
            let AnyRecord { version } = serde_json::from_str(&text).unwrap();
            version
        };
        assert_eq!((version(Role::Owner), version(Role::StandsBy), version(Role::Owner)), (3, 4, 3));
        let handed = Role::HandedOver { handover: HandoverId::from_u128(7), to: "b".to_owned() };
        assert_eq!(version(handed.clone()), 4);
        assert_eq!(records.load().unwrap()[0].role, handed);
    }

    #[test]
    fn the_client_keeps_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        assert_eq!(records.client_id(7).unwrap(), ClientId::from_u128(7));
        assert_eq!(records.client_id(8).unwrap(), ClientId::from_u128(7));
    }

    #[test]
    fn two_processes_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let first = open(directory.path());
        assert!(matches!(Records::open(directory.path()).unwrap(), Taken::Others));
        // The process that received the lock holds it as well.
        let given = first.lock().try_clone_to_owned().unwrap();
        drop(first);
        assert!(matches!(Records::open(directory.path()).unwrap(), Taken::Others));
        drop(Records::inherit(directory.path(), given, (ClientId::from_u128(1), None), Default::default()));
        open(directory.path());
    }

    #[test]
    fn generations_of_lives_are_ordered_even_in_quick_succession() {
        let mut record = record("a");
        let mut last = record.generation;
        for told in [Told::ByItself, Told::ByItself, Told::ByDisk] {
            record.begin_life(told);
            assert!(record.generation >= last + LIFE_GENERATIONS);
            last = record.generation;
        }
        let old = Record { generation: 0, ..record };
        let text = serde_json::to_string(&old).unwrap();
        let without = text.replace("\"generation\":0,", "");
        assert_ne!(text, without);
        assert_eq!(parse(&without).unwrap(), old, "of a version that had none");
    }

    #[test]
    fn a_follower_receives_every_change_until_it_is_gone() {
        struct Heard(std::sync::mpsc::Sender<String>);
        impl Follower for Heard {
            fn kept(&mut self, record: &Record) -> bool {
                self.0.send(record.request.name.to_string()).is_ok()
            }
            fn descriptor(&mut self, name: &Name, _: BorrowedFd<'_>) -> bool {
                self.0.send(format!("{name} with a descriptor")).is_ok()
            }
            fn removed(&mut self, name: &Name) -> bool {
                self.0.send(format!("-{name}")).is_ok()
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        records.save(&record("a")).unwrap();
        let (sender, heard) = std::sync::mpsc::channel();
        records.follow(Box::new(Heard(sender)));
        records.save(&record("b")).unwrap();
        let (name, file) = ("b".parse().unwrap(), tempfile::tempfile().unwrap());
        records.keep_descriptor(&name, file.as_fd()).unwrap();
        records.remove(&"a".parse().unwrap()).unwrap();
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["a", "b", "b with a descriptor", "-a"]);
        let (sender, later) = std::sync::mpsc::channel();
        records.follow(Box::new(Heard(sender)));
        assert_eq!(later.try_iter().collect::<Vec<_>>(), ["b", "b with a descriptor"]);
        records.remove(&name).unwrap();
        assert!(records.descriptor(&name).unwrap().is_none());
        assert_eq!(heard.try_iter().chain(later.try_iter()).collect::<Vec<_>>(), ["-b", "-b"]);
        drop(later);
        drop(heard);
        records.save(&record("c")).unwrap();
        assert!(records.kept().followers.is_empty());
    }

    #[test]
    fn a_newer_format_is_refused_and_a_broken_file_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        let broken = directory.path().join("devices/broken.json");
        fs::write(&broken, "{").unwrap();
        assert_eq!(records.load().unwrap(), []);
        assert_eq!(fs::read(&broken).unwrap(), b"{");
        fs::write(&broken, "{\"version\":9,\"anything\":{}}").unwrap();
        assert!(records.load().unwrap_err().to_string().contains("newer"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,120}") {
            let _ = parse(&text);
        }
    }
}
