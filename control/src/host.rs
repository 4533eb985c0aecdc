//! Identity of this host: kernel, machine, name, and the lives of its programs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use xpm_protocol::{HostId, InstallationId, Life, MachineId, SeatId};
use xxhash_rust::xxh3::Xxh3;

/// Id of the running kernel. Two processes that read the same id can share memory.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Id of the installed system; see machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";
/// Name of this host, as `uname -n` prints it.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// The id of the running kernel: its boot id without dashes (random(4)). Fails if `/proc` is not mounted.
pub fn host_id() -> io::Result<HostId> {
    let text = read(BOOT_ID)?;
    let digits: String = text.trim().chars().filter(|&c| c != '-').collect();
    digits.parse().map_err(|_| io::Error::other(format!("{BOOT_ID} holds no boot id: `{}`", text.trim())))
}

/// The name of this host. Fails if `/proc` is not mounted.
pub fn host_name() -> io::Result<String> {
    Ok(read(HOST_NAME)?.trim().to_owned())
}

/// The id of this machine, from `/etc/machine-id`. All machines without that file (usually containers) have the same
/// id.
pub fn machine_id() -> MachineId {
    // An unreadable file counts as missing.
    let text = fs::read_to_string(MACHINE_ID).unwrap_or_default();
    MachineId::from_u128(digest(&[b"xpm machine", text.trim().as_bytes()]))
}

/// The seat of a directory on the running kernel, from the locked file in it. Blocks on the file system.
///
/// # Errors
/// When the file's metadata cannot be read, or `/proc` is not mounted.
pub fn seat_of(lock: &File) -> io::Result<SeatId> {
    let file = lock.metadata()?;
    let (device, inode) = (file.dev().to_ne_bytes(), file.ino().to_ne_bytes());
    let host = host_id()?.as_u128().to_ne_bytes();
    Ok(SeatId::from_u128(digest(&[b"xpm seat", &host, &device, &inode])))
}

/// The life of a program without a state directory: all such programs on one kernel share it.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn life_of_kernel() -> io::Result<Life> {
    let host = host_id()?.as_u128().to_ne_bytes();
    Ok(Life {
        machine: machine_id(),
        installation: InstallationId::from_u128(0),
        seat: SeatId::from_u128(digest(&[b"xpm seat", &host])),
        number: 0,
    })
}

fn digest(parts: &[&[u8]]) -> u128 {
    let mut hash = Xxh3::new();
    for part in parts {
        // Each part is hashed with its length, so that different lists of parts differ.
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.digest128()
}

fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot read {path}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_the_same_each_time() {
        assert_eq!(host_id().unwrap(), host_id().unwrap());
        assert_ne!(host_id().unwrap().as_u128(), 0);
        assert!(!host_name().unwrap().is_empty());
        assert_eq!(machine_id(), machine_id());
    }

    #[test]
    fn a_copy_has_another_seat() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| File::create(directory.path().join(name)).unwrap());
        assert_eq!(seat_of(&one).unwrap(), seat_of(&one.try_clone().unwrap()).unwrap());
        assert_ne!(seat_of(&one).unwrap(), seat_of(&other).unwrap());
    }
}
