//! Hibernation with swap on a device of xpm-blk.
//!
//! The kernel freezes all processes, and then makes room by swapping out (`hibernate_preallocate_memory` in
//! kernel/power/snapshot.c). A ublk device is served by one of those processes, and a device of the kernel's nbd
//! driver by one of them or by the network, which is suspended as well: the kernel waits for ever.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::bail;
use xpm_control::proc::{self, Swap};

/// Drop-ins of the package, by which the service manager asks before it hibernates.
const GUARDS: [&str; 2] = [
    "/usr/lib/systemd/system/systemd-hibernate.service.d/xpm.conf",
    "/etc/systemd/system/systemd-hibernate.service.d/xpm.conf",
];

/// Devices of the kernel on which a device is built (dm-crypt on LVM on a RAID), at most.
const LAYERS_MAX: usize = 8;

/// Whether swap is on a device that does not outlast the freezing of processes, or on a file or a device above such a
/// one.
pub(crate) fn is_endangered(swap: &Swap) -> bool {
    is_of_xpm(&swap.path)
        || swap.path.starts_with("/dev/xpm/")
        || below(&swap.path).is_some_and(|one| is_on_xpm(&one, LAYERS_MAX))
}

/// Whether a device's name, with or without its directory, is that of a ublk or nbd device or of a partition of one.
fn is_of_xpm(device: &str) -> bool {
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    ["ublkb", "nbd"].iter().any(|driver| {
        name.strip_prefix(driver).is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    })
}

/// The directory in sysfs of a block device, or of the one that a file lies on.
fn below(path: &str) -> Option<PathBuf> {
    let found = fs::metadata(path).ok()?;
    let number = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

/// Whether a device, by its directory in sysfs, or one that it is built on, is one of xpm's.
fn is_on_xpm(device: &Path, layers_max: usize) -> bool {
    if device.file_name().is_some_and(|name| is_of_xpm(&name.to_string_lossy())) {
        return true;
    }
    let slaves = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    layers_max > 0
        && slaves
            .filter_map(|slave| fs::canonicalize(slave.path()).ok())
            .any(|one| is_on_xpm(&one, layers_max - 1))
}

/// `xpm blk check-hibernation`.
pub(crate) fn check() -> anyhow::Result<()> {
    let swaps = proc::swaps()?;
    match swaps.iter().find(|swap| is_endangered(swap)) {
        None => Ok(()),
        Some(swap) => bail!(
            "swap is on {}, which is served by a process that hibernation freezes first: this machine would stop for good. Run \
             `swapoff {}` before it hibernates, or suspend it to memory instead",
            swap.path,
            swap.path
        ),
    }
}

/// Whether this kernel can hibernate: not where it was booted with `nohibernate`, or is locked down.
pub(crate) fn is_possible() -> bool {
    let state = fs::read_to_string("/sys/power/state").unwrap_or_default();
    let disk = fs::read_to_string("/sys/power/disk").unwrap_or_default();
    state.split_whitespace().any(|word| word == "disk") && !disk.contains("[disabled]")
}

/// Whether the service manager asks before it hibernates.
pub(crate) fn is_guarded() -> bool {
    GUARDS.iter().any(|guard| Path::new(guard).exists())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_device_that_is_built_on_one_of_xpm_is_found_through_all_layers() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = |name: &str, below: &[&str]| {
            let slaves = sysfs.path().join(name).join("slaves");
            fs::create_dir_all(&slaves).unwrap();
            for one in below {
                symlink(sysfs.path().join(one), slaves.join(one)).unwrap();
            }
            sysfs.path().join(name)
        };
        let (disk, _) = (device("sda", &[]), device("ublkb0", &[]));
        device("md0", &["sda", "ublkb0"]);
        let (local, encrypted) = (device("dm-0", &["sda"]), device("dm-1", &["md0"]));
        assert!(is_on_xpm(&encrypted, LAYERS_MAX));
        assert!(!is_on_xpm(&local, LAYERS_MAX) && !is_on_xpm(&disk, LAYERS_MAX));
        // A loop of links must not make it run for ever.
        let endless = device("dm-2", &["dm-2"]);
        assert!(!is_on_xpm(&endless, LAYERS_MAX));
    }

    #[test]
    fn names_of_other_drivers_are_no_devices_of_xpm() {
        for name in ["/dev/ublkb0", "/dev/nbd12p1", "nbd0"] {
            assert!(is_of_xpm(name), "{name}");
        }
        for name in ["/dev/sda2", "/dev/nbdkit", "/swap/ublkb0", "/dev/zram0"] {
            assert!(!is_of_xpm(name), "{name}");
        }
    }
}
