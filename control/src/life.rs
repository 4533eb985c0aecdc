//! Begins the life of a client or an appliance.
//!
//! A life begins when a process takes the lock of the state directory, and continues in processes to which it hands
//! the lock. Its number is on disk before it is used. So each of two copies of a state directory begins a life of the
//! same number, and a daemon that has accepted one of them refuses the other.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xpm_protocol::{InstallationId, Life, MachineId};

use crate::{host, random, state};

/// Name of the file in a state directory.
pub const FILE_NAME: &str = "identity.json";

/// A new life, and where its state directory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The life.
    pub life: Life,
    /// How the state directory came to this machine.
    pub origin: Origin,
}

/// How a state directory came to this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was made here, or used here last.
    Here,
    /// It was used on another machine last, and is not empty: the installation id stays the same.
    Copied,
    /// It was used on another machine last, and is empty: it gets a new installation id.
    Image,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    machine: MachineId,
    installation: InstallationId,
    /// Number of the last life.
    life: u64,
}

/// Begins the next life with a state directory whose lock this process has. If the directory came from another
/// machine, `becomes_new` is asked whether it is empty, so that a new installation begins. Blocks until all is on
/// disk.
///
/// # Errors
/// When the identity in the directory cannot be read or written; the error names the file.
pub fn begin(
    directory: &Path,
    lock: &File,
    becomes_new: impl FnOnce() -> io::Result<bool>,
) -> io::Result<Begun> {
    let path = directory.join(FILE_NAME);
    let at = |error: io::Error| named(&error, &format!("begin a new life with {}", path.display()));
    let machine = host::machine_id();
    let known = read(&path)?;
    let origin = match known {
        Some(known) if known.machine != machine && becomes_new().map_err(at)? => Origin::Image,
        Some(known) if known.machine != machine => Origin::Copied,
        _ => Origin::Here,
    };
    let known = known.filter(|_| origin != Origin::Image);
    let installation = match known {
        Some(known) => known.installation,
        None => InstallationId::from_u128(random::u128().map_err(at)?.max(1)),
    };
    let number = known.map_or(1, |known| known.life.saturating_add(1));
    let kept = Identity { machine, installation, life: number };
    let text = serde_json::to_vec_pretty(&kept).map_err(io::Error::from).map_err(at)?;
    state::write(&path, &text).map_err(at)?;
    let seat = host::seat_of(lock).map_err(at)?;
    Ok(Begun { life: Life { machine, installation, seat, number }, origin })
}

fn read(path: &Path) -> io::Result<Option<Identity>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(&error, &format!("read {}", path.display()))),
    };
    let identity = serde_json::from_str(&text).map_err(io::Error::from);
    let step =
        format!("read {} (remove the file: the next start is life 1 of a new installation)", path.display());
    identity.map(Some).map_err(|error| named(&error, &step))
}

/// The same error with the failed step.
fn named(error: &io::Error, step: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{step}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin_with(directory: &Path, becomes_new: bool) -> io::Result<Begun> {
        begin(directory, &File::create(directory.join("lock")).unwrap(), || Ok(becomes_new))
    }

    /// Makes the directory look as if it had been used on another machine.
    fn move_away(directory: &Path) {
        let path = directory.join(FILE_NAME);
        let known = read(&path).unwrap().unwrap();
        let elsewhere = Identity { machine: MachineId::from_u128(7), ..known };
        fs::write(path, serde_json::to_vec(&elsewhere).unwrap()).unwrap();
    }

    #[test]
    fn lives_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = [(); 2].map(|()| begin_with(directory.path(), true).unwrap());
        assert_eq!((first.life.number, second.life.number), (1, 2));
        assert_eq!(first.life, Life { number: 1, ..second.life });
        assert_eq!((first.origin, second.origin), (Origin::Here, Origin::Here));
    }

    #[test]
    fn a_directory_of_another_machine_keeps_its_installation_unless_empty() {
        let directory = tempfile::tempdir().unwrap();
        let first = begin_with(directory.path(), false).unwrap();
        move_away(directory.path());
        let copy = begin_with(directory.path(), false).unwrap();
        assert_eq!(copy.origin, Origin::Copied);
        assert_eq!((copy.life.installation, copy.life.number), (first.life.installation, 2));
        move_away(directory.path());
        let image = begin_with(directory.path(), true).unwrap();
        assert_eq!((image.origin, image.life.number), (Origin::Image, 1));
        assert_ne!(image.life.installation, first.life.installation);
    }

    #[test]
    fn an_unreadable_identity_begins_no_life() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE_NAME), "{").unwrap();
        let line = begin_with(directory.path(), false).unwrap_err().to_string();
        assert!(line.contains("identity.json") && line.contains("remove the file"), "{line}");
    }
}
