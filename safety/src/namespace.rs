//! A mount namespace of its own, so that this process does not keep a file system on its own device mounted:
//! otherwise its exit would wait for itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use xpm_control::proc::unescape;
use xpm_protocol::api::blk::SafetyItem;

/// The namespace that the process was started in.
static STARTED_IN: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Leaves the common mount namespace. Unmounts there still propagate into this namespace, so that nothing stays
/// mounted here that was unmounted there; mounts made here do not propagate back.
///
/// From a private mount of the common namespace nothing propagates (mount_namespaces(7); the usual kind in a
/// container, and wherever no systemd made `/` shared). So this process removes its copies of such mounts at once,
/// where they are file systems of external memory.
pub(super) fn leave() {
    STARTED_IN.get_or_init(current);
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    let left = separate().and_then(|()| mount_change("/", flags));
    match left {
        Ok(()) => remove_copies(),
        Err(error) => tracing::warn!("own mount namespace: {error}"),
    }
}

fn remove_copies() {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    for place in copies(&table, &program) {
        if let Err(error) = unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            tracing::warn!(
                "{} stays mounted in the mount namespace of this process: {error}",
                place.display()
            );
        }
    }
}

/// File systems of external memory in a table in the form of proc_pid_mountinfo(5) to which no unmount propagates; the
/// last one first, because it may lie on one before. A file system with the running program is not external memory.
fn copies(table: &str, program: &Path) -> Vec<PathBuf> {
    let place = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let (kind, source) = (file_system.next()?, file_system.next()?);
        let is_external = kind.starts_with("fuse") && source.starts_with("xpm:")
            || ["/dev/ublkb", "/dev/nbd"].iter().any(|device| source.starts_with(device));
        let mut fields = mount.split(' ').skip(4);
        let place = PathBuf::from(unescape(fields.next()?));
        let propagates = fields.any(|field| field.starts_with("master:"));
        (is_external && !propagates && !program.starts_with(&place)).then_some(place)
    };
    table.lines().rev().filter_map(place).collect()
}

#[allow(unsafe_code)]
fn separate() -> rustix::io::Result<()> {
    // SAFETY: unshares only the mount namespace; file descriptors stay shared. The process has a single thread, so no
    // thread is left behind in the old namespace.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

pub(super) fn own() -> SafetyItem {
    let before = STARTED_IN.get().cloned().flatten();
    let found = current().ok_or_else(|| "/proc/self/ns/mnt cannot be read".to_owned()).map(|now| {
        let ok = before.is_some_and(|before| before != now);
        (ok, format!("{}{}", now.display(), if ok { "" } else { ", shared with others" }))
    });
    super::item("mount-namespace", found, "run as root, or give CAP_SYS_ADMIN")
}

fn current() -> Option<PathBuf> {
    fs::read_link("/proc/self/ns/mnt").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 259:1 / / rw - ext4 /dev/vda1 rw\n\
                         23 22 0:45 / /mnt/a\\040b rw - fuse xpm:a rw\n\
                         24 22 0:46 / /mnt/c rw master:7 - fuse xpm:c rw\n\
                         25 22 0:47 / /mnt/d rw - fuse sshfs#d rw\n\
                         26 22 259:3 / /srv rw - xfs /dev/ublkb0 rw\n\
                         27 26 43:0 / /srv/deep rw - ext4 /dev/nbd3 rw\n\
                         rubbish\n\n - \n";

    #[test]
    fn copies_of_external_memory_are_removed_and_nothing_else() {
        let found = |program| copies(TABLE, Path::new(program));
        let all = ["/srv/deep", "/srv", "/mnt/a b"].map(PathBuf::from);
        assert_eq!(found("/usr/sbin/xpm-blk"), all);
        assert_eq!(found("/srv/xpm-blk"), [all[0].clone(), all[2].clone()]);
    }
}
