//! The users of a mount.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use xpm_fuse::Connection;

use crate::usage::{DeviceNumber, mounts};

/// The users of the mount at a path, each as `opened by qemu (process 7)`; in this process's mount namespace a mapping
/// whose descriptor is closed has no name. Programs in other mount namespaces that copied the mount count as well.
/// Sends no request to the server of the mount.
pub(super) fn of(path: &Path, connection: Connection) -> Vec<String> {
    let mut users = here(path);
    users.extend(elsewhere(connection));
    users
}

/// Programs in this process's mount namespace that have a file of the mount open or mapped.
fn here(path: &Path) -> Vec<String> {
    if !is_busy(path) {
        return Vec::new();
    }
    let Ok(number) = mount_number(path) else { return Vec::new() };
    let mut users: Vec<String> =
        processes().filter(|&process| has_open(process, |mount| mount == number)).map(name).collect();
    if users.is_empty() {
        users.push("mapped by a program".to_owned());
    }
    users
}

/// Processes of other mount namespaces that have a copy of the mount, whether or not they use its files. While one of
/// them lives, the kernel keeps the connection after this namespace's mount was removed (mount_namespaces(7)).
pub(super) fn holders(connection: Connection) -> Vec<String> {
    copies(connection).map(|(process, _)| named(process)).collect()
}

/// Programs in other mount namespaces that have a file of the mount open or mapped.
fn elsewhere(connection: Connection) -> Vec<String> {
    let uses = |(process, mounts): &(u32, Vec<String>)| {
        has_open(*process, |mount| mounts.iter().any(|copy| copy == mount))
            || has_mapped(*process, connection)
    };
    copies(connection).filter(uses).map(|(process, _)| name(process)).collect()
}

/// Processes of other mount namespaces with a copy of the mount, each with the numbers of its copies.
fn copies(connection: Connection) -> impl Iterator<Item = (u32, Vec<String>)> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let own = namespace("self");
    processes().filter_map(move |process| {
        if namespace(&process.to_string()) == own {
            return None;
        }
        let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).ok()?;
        let mounts = mounts_of(&table, connection);
        (!mounts.is_empty()).then_some((process, mounts))
    })
}

/// The numbers of a connection's mounts in a table in the form of proc_pid_mountinfo(5).
fn mounts_of(table: &str, connection: Connection) -> Vec<String> {
    let (major, minor) = connection.device();
    let device = DeviceNumber { major, minor };
    let of_connection = mounts::all(table).filter(|mount| mount.device == device);
    of_connection.map(|mount| mount.number.to_owned()).collect()
}

/// Whether a process maps a file of the connection (proc_pid_maps(5): the device in hexadecimal digits).
fn has_mapped(process: u32, connection: Connection) -> bool {
    let (major, minor) = connection.device();
    let device = format!("{major:02x}:{minor:02x}");
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    maps.lines().any(|line| line.split(' ').nth(3) == Some(&device))
}

/// Whether a file of the mount is open or mapped.
///
/// umount2(2) with MNT_EXPIRE unmounts at its second call in a row only, and refuses a mount that is in use at the
/// first. An access to the path before and after the call makes every call a first one.
fn is_busy(path: &Path) -> bool {
    let look = || drop(look_at(path));
    look();
    let busy = unmount(path, UnmountFlags::EXPIRE | UnmountFlags::NOFOLLOW) == Err(Errno::BUSY);
    look();
    busy
}

/// Opens a descriptor that only names the file (`O_PATH`).
fn look_at(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)
}

/// The number of the mount, from proc_pid_fdinfo(5).
fn mount_number(path: &Path) -> io::Result<String> {
    let file = look_at(path)?;
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    mount_of(&facts).map(str::to_owned).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn mount_of(facts: &str) -> Option<&str> {
    facts.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim)
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&process| process != std::process::id())
}

fn has_open(process: u32, is_ours: impl Fn(&str) -> bool) -> bool {
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    let facts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    facts.into_iter().any(|facts| mount_of(&facts).is_some_and(&is_ours))
}

fn name(process: u32) -> String {
    format!("opened by {}", named(process))
}

fn named(process: u32) -> String {
    let command = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    format!("{} (process {process})", command.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_found_by_their_device() {
        let table = "24 1 254:0 / / rw - ext4 /dev/vda rw\n70 24 0:45 / /mnt/a rw - fuse xpm:a rw\n71 24 0:4 / /mnt/b rw - fuse xpm:b rw\n\nx\n";
        assert_eq!(mounts_of(table, Connection::from_device(0, 45)), ["70"]);
        assert_eq!(mounts_of(table, Connection::from_device(0, 5)), Vec::<String>::new());
    }
}
