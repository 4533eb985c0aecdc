//! The users of a mount.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

/// The users of the mount at a path, each as `opened by qemu (process 7)`; a mapping whose descriptor is closed has no
/// name. Sends no request to the server of the mount.
pub(super) fn of(path: &Path) -> Vec<String> {
    if !is_busy(path) {
        return Vec::new();
    }
    let Ok(number) = mount_number(path) else { return Vec::new() };
    let mut users: Vec<String> = processes().filter(|process| has_open(process, &number)).map(name).collect();
    if users.is_empty() {
        users.push("mapped by a program".to_owned());
    }
    users
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

fn has_open(process: &u32, mount: &str) -> bool {
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    let facts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    facts.into_iter().any(|facts| mount_of(&facts) == Some(mount))
}

fn name(process: u32) -> String {
    let command = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    format!("opened by {} (process {process})", command.trim())
}
