//! Records of the machines of this host: a directory for each, with its record and its sockets. A record is written
//! before the step that it describes. All functions here block.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xpm_control::state;
use xpm_protocol::{ByteSize, Name};

use crate::Error;
use crate::disk::Disk;
use crate::memory::{MemoryFile, Sizes};
use crate::process::Process;

/// Directory that contains the machines' directories.
pub const DEFAULT: &str = "/run/xpm/vm";

const RECORD: &str = "machine.json";

/// The directory of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place(PathBuf);

/// The record of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: Name,
    /// Its stage on this host.
    pub stage: Stage,
    /// The process of QEMU; none before the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<Process>,
    /// The command that supervises it.
    pub command: Process,
    /// RAM at the start.
    pub size: ByteSize,
    /// Largest total RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum: Option<ByteSize>,
    /// Limit of its local memory, without QEMU's own; none: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<ByteSize>,
    /// The files of its RAM.
    pub files: Vec<MemoryFile>,
    /// The allocations behind these files; empty for ordinary files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allocations: Vec<Name>,
    /// Its disks that move with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Its memory cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// QEMU and its arguments.
    pub arguments: Vec<String>,
}

/// Stage of a machine on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Stage {
    /// QEMU is being started.
    Starting,
    /// The machine is here.
    Here,
    /// QEMU waits for the state of a machine, from another host or from a file. It runs nothing before it has the
    /// whole state.
    Incoming,
    /// The machine is being moved to another host, and may be stopped here. It does not run there.
    Leaving(Destination),
    /// The other host was ordered to run the machine. It is stopped here.
    Gone(Destination),
    /// The machine runs at the other host, or its state is in a file. QEMU is ending.
    Left,
}

/// Destination of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// Address and port of `xpm vm receive`, or a path.
    pub to: String,
    /// Id of the attempt: a random number as text.
    pub session: String,
}

impl Machine {
    /// RAM at the start, and largest total RAM.
    pub fn sizes(&self) -> Sizes {
        Sizes { memory: self.size, maximum: self.maximum }
    }

    /// Whether its QEMU runs.
    pub fn is_alive(&self) -> bool {
        self.qemu.is_some_and(Process::is_alive)
    }
}

impl Place {
    /// The directory of the machine `name`, below `root`.
    pub fn below(root: &Path, name: &Name) -> Place {
        Place(root.join(name.as_str()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Socket of QEMU's monitor for the command that changes the machine.
    pub fn drive(&self) -> PathBuf {
        self.0.join("drive.qmp")
    }

    /// Socket of QEMU's monitor for commands that only read.
    pub fn look(&self) -> PathBuf {
        self.0.join("look.qmp")
    }

    /// The socket by which QEMU sends or receives a machine's state.
    pub fn state(&self) -> PathBuf {
        self.0.join("state.sock")
    }

    /// Makes the directory, for this user alone, and locks it for the command that supervises the machine.
    ///
    /// # Errors
    /// When it cannot be made, or another command supervises a machine of this name.
    pub fn make(&self) -> Result<File, Error> {
        self.make_directory(&self.0)?;
        self.lock_in(&self.0, "looks after")
    }

    /// Locks the machine for a command that changes it.
    ///
    /// # Errors
    /// When another command has this lock.
    pub fn lock_to_change(&self) -> Result<File, Error> {
        let directory = self.0.join("change");
        self.make_directory(&directory)?;
        self.lock_in(&directory, "changes")
    }

    fn make_directory(&self, path: &Path) -> Result<(), Error> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("make", path))
    }

    fn lock_in(&self, directory: &Path, does: &str) -> Result<File, Error> {
        match state::lock(directory).map_err(Error::io("lock", directory))? {
            Some(lock) if is_at(&lock, &directory.join("lock")) => Ok(lock),
            // The machine ended between making the directory and locking it.
            Some(_) => {
                Err(Error::Machine(format!("the machine in {} has just ended: try again", self.0.display())))
            }
            None => Err(Error::Machine(format!(
                "another command {does} the machine in {}: wait for it, or end it",
                self.0.display()
            ))),
        }
    }

    /// Reads the record; none if there is no machine.
    ///
    /// # Errors
    /// When it cannot be read or parsed.
    pub fn load(&self) -> Result<Option<Machine>, Error> {
        let path = self.0.join(RECORD);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::Machine(format!(
                "{} is no record of a machine ({error}): remove its directory",
                path.display()
            ))
        })
    }

    /// Reads the record of a machine that must exist, with a running QEMU.
    ///
    /// # Errors
    /// As for [`Place::load`], and when there is no record or its QEMU has ended.
    pub fn load_alive(&self) -> Result<Machine, Error> {
        let shown = self.0.display();
        match self.load()? {
            Some(machine) if machine.is_alive() => Ok(machine),
            Some(machine) => {
                Err(Error::Machine(format!("the QEMU of machine `{}` has ended ({shown})", machine.name)))
            }
            None => Err(Error::Usage(format!(
                "there is no machine in {shown}: `xpm vm list` shows those of this host"
            ))),
        }
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, machine: &Machine) -> Result<(), Error> {
        let path = self.0.join(RECORD);
        let bytes = serde_json::to_vec_pretty(machine).map_err(|error| Error::Machine(error.to_string()))?;
        state::write(&path, &bytes).map_err(Error::io("write", &path))
    }

    /// Removes the files of a machine whose QEMU has ended, except the directory and its lock.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn clear(&self, machine: &Machine) -> Result<(), Error> {
        if let Some(cgroup) = &machine.cgroup {
            crate::cgroup::remove(cgroup)?;
        }
        for path in [self.drive(), self.look(), self.state(), self.0.join(RECORD)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(Error::io("remove", &path))?,
            }
        }
        Ok(())
    }

    /// Removes all files of a machine whose QEMU has ended, with the directory.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn remove(&self, machine: &Machine) -> Result<(), Error> {
        self.clear(machine)?;
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io("remove", &self.0)),
        }
    }
}

/// Whether an open file is the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(one), Ok(other)) if id(&one) == id(&other))
}

/// All machines of this host by name, except those whose record cannot be read.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(root: &Path) -> Result<Vec<Machine>, Error> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("read", root))?,
    };
    let mut machines: Vec<Machine> =
        entries.flatten().filter_map(|entry| Place(entry.path()).load().ok().flatten()).collect();
    machines.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(machines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(stage: Stage) -> Machine {
        Machine {
            name: "vm1".parse().unwrap(),
            stage,
            qemu: Some(Process { id: 1, started: u64::MAX }),
            command: Process::own().unwrap(),
            size: ByteSize(1 << 30),
            maximum: None,
            local: None,
            files: vec![MemoryFile { path: "/x".into(), size: ByteSize(1 << 30) }],
            allocations: Vec::new(),
            disks: Vec::new(),
            cgroup: None,
            arguments: vec!["qemu".into()],
        }
    }

    #[test]
    fn a_record_is_kept_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::below(root.path(), &"vm1".parse().unwrap());
        assert_eq!(place.load().unwrap(), None);
        let lock = place.make().unwrap();
        assert!(place.make().unwrap_err().to_string().contains("another command looks after"));
        let to = Destination { to: "10.0.0.2:7710".into(), session: "ab".into() };
        for stage in [Stage::Starting, Stage::Leaving(to.clone()), Stage::Gone(to)] {
            let written = machine(stage);
            place.save(&written).unwrap();
            assert_eq!(place.load().unwrap().unwrap(), written);
        }
        assert_eq!(list(root.path()).unwrap().len(), 1);
        let error = place.load_alive().unwrap_err().to_string();
        assert!(error.contains("the QEMU of machine `vm1` has ended"), "{error}");
        place.remove(&machine(Stage::Left)).unwrap();
        assert!(list(root.path()).unwrap().is_empty());
        drop(lock);
        place.make().unwrap();
    }

    #[test]
    fn a_damaged_record_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::below(root.path(), &"vm1".parse().unwrap());
        let _lock = place.make().unwrap();
        fs::write(place.path().join(RECORD), "{").unwrap();
        assert!(place.load().unwrap_err().to_string().contains("no record of a machine"));
        assert!(list(root.path()).unwrap().is_empty());
    }
}
