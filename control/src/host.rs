//! Who this host is.

use std::fs;
use std::io;

use xpm_protocol::HostId;

/// Id of the running kernel. Two processes that read the same one can share memory.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Name of this host, as `uname -n` prints it.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// The id of the running kernel: its boot id without dashes (random(4)). Fails where `/proc` is
/// not mounted.
pub fn host_id() -> io::Result<HostId> {
    let text = read(BOOT_ID)?;
    let digits: String = text.trim().chars().filter(|&c| c != '-').collect();
    digits.parse().map_err(|_| io::Error::other(format!("{BOOT_ID} holds no boot id: `{}`", text.trim())))
}

/// The name of this host. Fails where `/proc` is not mounted.
pub fn host_name() -> io::Result<String> {
    Ok(read(HOST_NAME)?.trim().to_owned())
}

fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot read {path}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_each_time() {
        assert_eq!(host_id().unwrap(), host_id().unwrap());
        assert_ne!(host_id().unwrap().as_u128(), 0);
        assert!(!host_name().unwrap().is_empty());
    }
}
