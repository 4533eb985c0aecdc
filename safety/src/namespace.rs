//! A mount namespace of its own, so that this process does not keep a file system on its own device mounted:
//! otherwise its exit would wait for itself.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use xpm_protocol::api::blk::SafetyItem;

/// The namespace that the process was started in.
static STARTED_IN: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Leaves the common mount namespace. Unmounts there still propagate into this namespace, so that nothing stays
/// mounted here that was unmounted there; mounts made here do not propagate back.
pub(super) fn leave() {
    STARTED_IN.get_or_init(current);
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    let left = separate().and_then(|()| mount_change("/", flags));
    if let Err(error) = left {
        tracing::warn!("own mount namespace: {error}");
    }
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
