//! The descriptors that the service manager keeps for the next life of this daemon, for when neither a
//! standby nor a successor takes over: those of mounts (sd_notify(3), `FDSTORE=1`).

use std::os::fd::{BorrowedFd, OwnedFd};

use xpm_control::handed;
use xpm_control::manager::Manager;
use xpm_protocol::Name;

use crate::records::{Follower, Record};

/// Prefix of the descriptors' names; the allocation's name follows.
const PREFIX: &str = "mount-";

/// The descriptors that it kept, by the name of the allocation. Further calls return none.
pub(crate) fn handed() -> impl Iterator<Item = (Name, OwnedFd)> {
    let left = handed::take().into_iter();
    left.filter_map(|(name, descriptor)| Some((name.strip_prefix(PREFIX)?.parse().ok()?, descriptor)))
}

/// Lets the service manager keep the descriptors.
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
        // The service manager may have none of this name.
        let _ = self.0.remove(&format!("{PREFIX}{name}"));
        true
    }
}
