//! The state that is kept across restarts: `state.json` in the state directory, and `lock`, which the process
//! that uses the directory locks.
//!
//! The file is written beside its place, synced and renamed over it, so that it is complete at any time. An
//! area is recorded before it is made, and its record is removed after the area is gone: so no crash leaves
//! an area behind that the next life does not know.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use xpm_control::state;
use xpm_protocol::api::swapd::Origin;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{HostId, Name};

use crate::error::{Error, Step as _};
use crate::os::header::Uuid;

/// Version 1: the first.
const VERSION: u32 = 1;

/// The whole stored state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// The areas.
    pub(crate) areas: Vec<Record>,
    /// Names that other users have taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) foreign: Vec<Name>,
    /// The next step, in bytes; 0: the first one.
    pub(crate) next_step: ByteSize,
    /// Set while the policy rests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rest: Option<Rest>,
    /// Changed settings, by their files.
    pub(crate) settings: BTreeMap<PathBuf, Changed>,
    /// The file that was created as the last resort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fallback: Option<Made>,
}

/// An area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The name of its allocation.
    pub(crate) name: Name,
    /// Its size.
    pub(crate) size: ByteSize,
    /// The id in its allocation's label and in its swap header, so that no other allocation or swap is
    /// mistaken for it.
    pub(crate) id: AreaId,
    /// Why it was made.
    pub(crate) origin: Origin,
    /// Its stage.
    pub(crate) stage: Stage,
}

/// The stage of an area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    /// It is being made, and was never on.
    Making,
    /// It was turned on while this kernel ran, at this path.
    On {
        /// The kernel.
        boot: HostId,
        /// The device.
        path: String,
    },
    /// It is being removed.
    Leaving {
        /// Whether it is only not needed; otherwise it has to be removed.
        calm: bool,
        /// The path where it was last on.
        path: Option<String>,
    },
}

/// Id of an area: 128 random bits, which are the UUID in its header and the label of its allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AreaId(#[serde(with = "hex")] pub(crate) Uuid);

/// The policy's rest, valid while this kernel runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rest {
    /// The reason.
    pub(crate) why: String,
    /// The kernel.
    pub(crate) boot: HostId,
    /// Whether it began with draining all areas; then it ends when that is cancelled.
    pub(crate) by_drain: bool,
}

/// A setting that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changed {
    /// The previous value.
    pub(crate) before: String,
    /// The written value.
    pub(crate) wrote: String,
}

/// A file that was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// Its path.
    pub(crate) path: PathBuf,
    /// The id in its header.
    pub(crate) id: AreaId,
}

mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(id: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", u128::from_be_bytes(*id)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u128::from_str_radix(&text, 16) {
            Ok(number) if digits => Ok(number.to_be_bytes()),
            _ => Err(de::Error::custom("it is no id of 32 hexadecimal digits")),
        }
    }
}

impl AreaId {
    /// A new random id.
    pub(crate) fn random() -> Result<AreaId, Error> {
        xpm_control::random::bytes().map(AreaId).at("make an id")
    }

    /// The id as the label of an allocation.
    pub(crate) fn label(self) -> Name {
        format!("{:032x}", u128::from_be_bytes(self.0)).parse().expect("digits are a name")
    }

    /// The id in the notation of a UUID.
    pub(crate) fn uuid(self) -> String {
        let hex = format!("{:032x}", u128::from_be_bytes(self.0));
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    }
}

impl State {
    fn new() -> State {
        State {
            version: VERSION,
            areas: Vec::new(),
            foreign: Vec::new(),
            next_step: ByteSize(0),
            rest: None,
            settings: BTreeMap::new(),
            fallback: None,
        }
    }

    /// The record of an area.
    pub(crate) fn area(&self, name: &Name) -> Option<&Record> {
        self.areas.iter().find(|area| area.name == *name)
    }

    /// Sets the stage of an area, if it still exists.
    pub(crate) fn set_stage(&mut self, name: &Name, stage: Stage) {
        if let Some(area) = self.areas.iter_mut().find(|area| area.name == *name) {
            area.stage = stage;
        }
    }
}

/// The state, on disk and in memory.
#[derive(Debug)]
pub(crate) struct Store {
    directory: PathBuf,
    state: Mutex<State>,
    _lock: File,
}

impl Store {
    /// Opens the directory, which is created with mode 0700 if it does not exist. Blocks.
    pub(crate) fn open(directory: &Path) -> Result<Store, Error> {
        let at = || format!("open the state directory {}", directory.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).at(at())?;
        let Some(lock) = state::lock(directory).at(at())? else {
            return Err(Error::conflict(format!(
                "the state directory {} is in use by another xpm-swapd: only one may manage a machine's \
                 swap",
                directory.display()
            )));
        };
        let state = read(&directory.join("state.json"))?;
        Ok(Store { directory: directory.to_owned(), state: Mutex::new(state), _lock: lock })
    }

    /// A copy of the state.
    pub(crate) fn get(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the state, on disk first. Blocks.
    ///
    /// # Errors
    /// When the state cannot be written; then it is unchanged.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = state.clone();
        let result = change(&mut next);
        if next != *state {
            let path = self.directory.join("state.json");
            write(&path, &next).at(format!("write {}", path.display()))?;
            *state = next;
        }
        Ok(result)
    }
}

fn write(path: &Path, state: &State) -> io::Result<()> {
    state::write(path, serde_json::to_string_pretty(state)?.as_bytes())
}

fn read(path: &Path) -> Result<State, Error> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::new()),
        text => text.at(format!("read {}", path.display()))?,
    };
    let state: State = serde_json::from_str(&text).map_err(|error| {
        Error::internal(format!(
            "{} cannot be read ({error}): put it right, or move it away after `swapoff`, `xpm blk detach` and `xpm alloc \
             delete` of this daemon's areas",
            path.display()
        ))
    })?;
    match state.version {
        VERSION => Ok(state),
        version => Err(Error::internal(format!(
            "{} is of version {version}, which this xpm-swapd does not know: start the newer version",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_there_in_the_next_life() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert!(Store::open(directory.path()).unwrap_err().to_string().contains("another xpm-swapd"));
        let record = Record {
            name: "swap-h-1".parse().unwrap(),
            size: ByteSize(1 << 30),
            id: AreaId::random().unwrap(),
            origin: Origin::Base,
            stage: Stage::Making,
        };
        store.change(|state| state.areas.push(record.clone())).unwrap();
        let stage = Stage::On { boot: HostId::from_u128(7), path: "/dev/ublkb0".to_owned() };
        store.change(|state| state.set_stage(&record.name, stage.clone())).unwrap();
        drop(store);
        let state = Store::open(directory.path()).unwrap().get();
        assert_eq!(state.area(&record.name).unwrap(), &Record { stage, ..record });
    }

    #[test]
    fn an_unreadable_state_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for text in ["", "{", "{\"version\":2,\"areas\":[],\"next_step\":0,\"settings\":{}}"] {
            fs::write(&path, text).unwrap();
            let error = Store::open(directory.path()).unwrap_err().to_string();
            assert!(error.contains("state.json"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
