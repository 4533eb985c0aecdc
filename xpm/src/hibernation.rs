//! Hibernation with swap on a device of xpm-blk.
//!
//! The kernel freezes all processes, and then makes room by swapping out (`hibernate_preallocate_memory` in
//! kernel/power/snapshot.c). A ublk device is served by one of those processes, and a device of the kernel's nbd driver by one
//! of them or by the network, which is suspended as well: the kernel waits for ever.

use std::fs;
use std::path::Path;

use anyhow::bail;
use xpm_control::proc::{self, Swap};

/// Drop-ins of the package, by which the service manager asks before it hibernates.
const GUARDS: [&str; 2] = [
    "/usr/lib/systemd/system/systemd-hibernate.service.d/xpm.conf",
    "/etc/systemd/system/systemd-hibernate.service.d/xpm.conf",
];

/// Whether swap is on a device that does not outlast the freezing of processes.
pub(crate) fn is_endangered(swap: &Swap) -> bool {
    swap.path.starts_with("/dev/ublkb")
        || swap.path.starts_with("/dev/nbd")
        || swap.path.starts_with("/dev/xpm/")
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
