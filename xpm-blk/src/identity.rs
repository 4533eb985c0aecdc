//! The life of this client that a process is part of; see [`xpm_control::life`].

use std::fs::{self, File};
use std::io;
use std::path::Path;

use xpm_control::life::{self, Begun, Origin};
use xpm_protocol::Life;

use crate::error::{DeviceError, Step};

const CLIENT_ID: &str = "client-id";

/// Begins the next life with a state directory whose lock this process has. If the directory came from
/// another machine and shows no device, this becomes a new client: the directory is a copy from a machine's
/// image. Blocks until the result is on disk.
pub(crate) fn begin_life(directory: &Path, lock: &File) -> Result<Life, DeviceError> {
    let becomes_new = || {
        let is_unused = is_unused(directory)?;
        if is_unused {
            remove(&directory.join(CLIENT_ID))?;
        }
        Ok(is_unused)
    };
    let Begun { life, origin } = life::begin(directory, lock, becomes_new).at("begin a life")?;
    match origin {
        Origin::Here => {}
        Origin::Image => tracing::warn!(
            "the state directory {} was copied from another machine, and shows nothing: this becomes a new client",
            directory.display()
        ),
        Origin::Copied => tracing::warn!(
            "the state directory {} was used on another machine: its devices are shown when the allocator says that they may be",
            directory.display()
        ),
    }
    Ok(life)
}

/// Whether the directory has no shown device and no allocation to give back.
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

    /// Makes the directory look as if it had been used on another machine.
    fn move_away(directory: &Path) {
        let path = directory.join(life::FILE_NAME);
        let mut known: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        known["machine"] = "07".repeat(16).into();
        fs::write(path, known.to_string()).unwrap();
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
}
