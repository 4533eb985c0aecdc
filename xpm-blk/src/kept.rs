//! Descriptors that the service manager keeps for the next life of this daemon, where neither a standby nor a
//! successor goes on: those of mounts (sd_notify(3), `FDSTORE=1`).

use std::os::fd::{BorrowedFd, OwnedFd};

use xpm_control::handed;
use xpm_control::manager::Manager;
use xpm_protocol::Name;

use crate::records::{Follower, Record};

/// What stands before the name of an allocation in the name of its descriptor.
const PREFIX: &str = "mount-";

/// The descriptors that it kept, by the name of the allocation. Nothing at further calls.
pub(crate) fn handed() -> impl Iterator<Item = (Name, OwnedFd)> {
    let left = handed::take().into_iter();
    left.filter_map(|(name, descriptor)| Some((name.strip_prefix(PREFIX)?.parse().ok()?, descriptor)))
}

/// Has it keep them.
pub(crate) struct Depositor(pub(crate) Manager);

impl Follower for Depositor {
    fn kept(&mut self, _record: &Record) -> bool {
        true
    }

    fn descriptor(&mut self, name: &Name, descriptor: BorrowedFd<'_>) -> bool {
        if let Err(error) = self.0.store(&format!("{PREFIX}{name}"), descriptor) {
            tracing::warn!("allocation {name}: the service manager does not keep its mount: {error}");
        }
        true
    }

    fn removed(&mut self, name: &Name) -> bool {
        // It may have none of this name.
        let _ = self.0.remove(&format!("{PREFIX}{name}"));
        true
    }
}
