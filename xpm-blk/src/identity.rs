//! Which life of this client a process is part of.
//!
//! A life begins when a process takes the lock of the state directory, and goes on in the processes that it hands the lock to. Its
//! number is on disk before it is used. So of two copies of a state directory each begins a life of the same number, and an
//! appliance that let one of them in refuses the other.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xpm_control::{host, random, state};
use xpm_protocol::{InstallationId, Life, MachineId};

use crate::error::{DeviceError, Step};

const FILE: &str = "identity.json";
const CLIENT_ID: &str = "client-id";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    machine: MachineId,
    installation: InstallationId,
    /// Number of the last life.
    life: u64,
}

/// Begins the next life with a state directory that this process has the lock of. Where the directory came from another
/// machine and shows nothing, it becomes a client of its own: an image of a machine was made, and this is one of its copies.
/// Blocks until all is on disk.
pub(crate) fn begin_life(directory: &Path, lock: &File) -> Result<Life, DeviceError> {
    let path = directory.join(FILE);
    let at = || format!("begin a new life with {}", path.display());
    let machine = host::machine_id();
    let known = read(&path)?;
    let is_copy = known.is_some_and(|known| known.machine != machine);
    let known = match known {
        Some(_) if is_copy && is_unused(directory).at(at())? => {
            tracing::warn!(
                "the state directory {} was copied from another machine, and shows nothing: this becomes a new client",
                directory.display()
            );
            remove(&directory.join(CLIENT_ID)).at(at())?;
            None
        }
        known => known,
    };
    if known.is_some() && is_copy {
        tracing::warn!(
            "the state directory {} was used on another machine: its devices are shown when the allocator says that they may be",
            directory.display()
        );
    }
    let installation = match known {
        Some(known) => known.installation,
        None => InstallationId::from_u128(random::u128().at(at())?.max(1)),
    };
    let number = known.map_or(1, |known| known.life.saturating_add(1));
    // The machine stays the one of the records until one of them was shown here.
    let kept = Identity { machine, installation, life: number };
    let text = serde_json::to_vec_pretty(&kept).map_err(io::Error::from).at(at())?;
    state::write(&path, &text).at(at())?;
    Ok(Life { machine, installation, seat: host::seat_of(lock).at(at())?, number })
}

fn read(path: &Path) -> Result<Option<Identity>, DeviceError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.at(format!("read {}", path.display()))),
    };
    let identity = serde_json::from_str(&text).map_err(io::Error::from);
    identity.map(Some).at(format!(
        "read {} (remove the file to begin anew: devices are shown then when the allocator says so)",
        path.display()
    ))
}

/// Whether it shows nothing and owes nothing.
fn is_unused(directory: &Path) -> io::Result<bool> {
    for inside in ["devices", "owed"] {
        match fs::read_dir(directory.join(inside)) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Ok(false);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(directory: &Path) -> Life {
        begin_life(directory, &File::create(directory.join("lock")).unwrap()).unwrap()
    }

    /// As if the directory had been used on another machine.
    fn move_away(directory: &Path) {
        let path = directory.join(FILE);
        let known = read(&path).unwrap().unwrap();
        let elsewhere = Identity { machine: MachineId::from_u128(7), ..known };
        fs::write(path, serde_json::to_vec(&elsewhere).unwrap()).unwrap();
    }

    #[test]
    fn lives_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (begin(directory.path()), begin(directory.path()));
        assert_eq!((first.number, second.number), (1, 2));
        assert_eq!(
            (first.machine, first.installation, first.seat),
            (second.machine, second.installation, second.seat)
        );
    }

    #[test]
    fn a_copy_of_an_image_is_a_client_of_its_own_and_one_with_devices_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let first = begin(directory.path());
        fs::write(directory.path().join(CLIENT_ID), "x").unwrap();
        fs::create_dir(directory.path().join("devices")).unwrap();
        move_away(directory.path());
        let second = begin(directory.path());
        assert_ne!(first.installation, second.installation);
        assert!(!directory.path().join(CLIENT_ID).exists());
        fs::write(directory.path().join(CLIENT_ID), "x").unwrap();
        fs::write(directory.path().join("devices/a.json"), "{}").unwrap();
        move_away(directory.path());
        assert_eq!(begin(directory.path()).installation, second.installation);
        assert!(directory.path().join(CLIENT_ID).exists());
    }

    #[test]
    fn what_cannot_be_read_is_not_begun_with() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "{").unwrap();
        let lock = File::create(directory.path().join("lock")).unwrap();
        assert!(begin_life(directory.path(), &lock).unwrap_err().to_string().contains("remove the file"));
    }
}
