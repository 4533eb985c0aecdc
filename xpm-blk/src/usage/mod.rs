//! Who uses a block device now: swap, file systems, other devices, programs.

mod mounts;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{major, minor};
use xpm_control::proc;

use crate::sysfs;

/// Number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Who uses the disk or one of its partitions, each as `swap`, `mounted at /mnt`, `held by dm-0`.
/// Does no I/O on the disk, and so never blocks on it.
pub(crate) fn users(disk: &str) -> Vec<String> {
    let parts = parts(disk);
    let numbers = numbers_of(&parts);
    let mut users = Vec::new();
    let swaps = proc::swaps().unwrap_or_default();
    if swaps.iter().any(|swap| is_one_of(Path::new(&swap.path), &parts, &numbers)) {
        users.push("swap".to_owned());
    }
    let mounts = mounts::of(&mount_table(), &numbers);
    users.extend(mounts.into_iter().map(|place| format!("mounted at {place}")));
    users.extend(parts.iter().flat_map(|part| holders(part)).map(|holder| format!("held by {holder}")));
    users
}

/// What is to be said of a disk that lost its server and that no record wants; none when nobody uses it, and it is not `held`,
/// which is asked when no user is known by name.
pub(crate) fn left_in_use(disk: &str, held: fn(&str) -> bool) -> Option<String> {
    let users = users(disk);
    if users.is_empty() && !held(disk) {
        return None;
    }
    let users = if users.is_empty() { "opened by a program".to_owned() } else { users.join(", ") };
    Some(format!(
        "/dev/{disk} was left by an earlier xpm-blk, and no record says what it showed: its I/O waits for ever; it is in use \
         ({users}). Put the record back into the state directory and start xpm-blk again, or give the device up"
    ))
}

/// Whether somebody has the disk open for himself alone, as mounts of any mount namespace, swap
/// and other devices do. Opens the disk, and so can wait for its I/O.
pub(crate) fn is_claimed(disk: &str) -> bool {
    let opened =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(Path::new("/dev").join(disk));
    matches!(opened, Err(error) if error.kind() == io::ErrorKind::ResourceBusy)
}

/// Whether any process has the disk or a part of it open, or sees it mounted. Does no I/O on the disk, as [`is_claimed`] may.
pub(crate) fn is_open(disk: &str) -> bool {
    let numbers = numbers_of(&parts(disk));
    let is_one = |path: &Path| block_number(path).is_some_and(|number| numbers.contains(&number));
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(Path::new("/proc")).any(|process| {
        let table = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        !mounts::of(&table, &numbers).is_empty()
            || mounts::sources(&table).any(|source| is_one(Path::new(&source)))
            || entries(&process.join("fd")).any(|descriptor| is_one(&descriptor))
    })
}

/// The directories of a disk and its partitions under `/sys/block`.
fn parts(disk: &str) -> Vec<String> {
    let mut parts = vec![disk.to_owned()];
    if let Ok(entries) = fs::read_dir(sysfs::path(disk, "")) {
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        parts.extend(names.filter(|name| name.starts_with(disk)).map(|name| format!("{disk}/{name}")));
    }
    parts
}

fn numbers_of(parts: &[String]) -> Vec<DeviceNumber> {
    parts.iter().filter_map(|part| parse_number(&sysfs::text(part, "dev")?)).collect()
}

fn holders(part: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(sysfs::path(part, "holders")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Whether a path of the swap table means one of the parts of a disk: by its device number, or, as
/// the path may be one of another mount namespace or root, by the kernel's name at its end.
fn is_one_of(path: &Path, parts: &[String], numbers: &[DeviceNumber]) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let named = parts.iter().any(|part| part.rsplit('/').next() == name);
    named || block_number(path).is_some_and(|number| numbers.contains(&number))
}

fn block_number(path: &Path) -> Option<DeviceNumber> {
    let found = fs::metadata(path).ok()?;
    found
        .file_type()
        .is_block_device()
        .then(|| DeviceNumber { major: major(found.rdev()), minor: minor(found.rdev()) })
}

/// The mounts of the host, not those of this process: it has a mount namespace of its own.
fn mount_table() -> String {
    fs::read_to_string("/proc/1/mountinfo")
        .or_else(|_| fs::read_to_string("/proc/self/mountinfo"))
        .unwrap_or_default()
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(parse_number("259:3"), Some(DeviceNumber { major: 259, minor: 3 }));
        for text in ["", "259", ":", "a:b", "1:-1"] {
            assert_eq!(parse_number(text), None);
        }
    }

    #[test]
    fn swap_on_a_disk_is_known_by_name_where_the_path_leads_nowhere() {
        let parts = ["ublkb0".to_owned(), "ublkb0/ublkb0p1".to_owned()];
        for path in ["/dev/ublkb0", "/elsewhere/dev/ublkb0", "/dev/ublkb0p1"] {
            assert!(is_one_of(Path::new(path), &parts, &[]), "{path}");
        }
        for path in ["/dev/ublkb01", "/dev/ublkb0/x", "/"] {
            assert!(!is_one_of(Path::new(path), &parts, &[]), "{path}");
        }
    }

    #[test]
    fn a_disk_that_is_not_there_has_no_users() {
        assert!(users("no-such-disk").is_empty());
        assert!(!is_claimed("no-such-disk"));
    }
}
