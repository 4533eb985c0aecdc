//! One process serves, and another one stands by.
//!
//! When the process that serves swap dies, the machine may have no memory to start another one: what that needs is
//! swapped out to the device that has no server. So the serving process keeps a *standby*: a second process of the same
//! program, with its memory locked, its threads started, and all records told. It waits for the death of the first one, and
//! goes on with its devices without reading a file. [`keeper`] is the serving side, [`waiting`] the other one, [`link`] what
//! they say.
//!
//! A newer process that finds the state directory in use asks the one that serves to be its *successor*: the same, but it
//! takes over as soon as it is ready. That is how the program is upgraded.
//!
//! Who may serve: the holder of the lock of the state directory, once whoever gave it the lock is dead. That death is
//! seen by a pidfd, and includes the death of all threads; what the kernel still has to clean up then (an open ublk
//! device) is waited for at the place. A process gives the lock to one other process at most, and to another one only
//! when that one is dead, so that never two go on.

pub(crate) mod keeper;
pub(crate) mod waiting;

mod ballast;
mod link;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The argument by which a process knows that it is a standby; its standard input is the link then.
pub const ARGUMENT: &str = "--stand-by";

/// How often those who serve and those who stand by say that they live.
const TICK: Duration = Duration::from_secs(1);

/// Where a process that wants to take over finds the one that serves.
fn socket_path(state: &Path) -> PathBuf {
    state.join("handover.sock")
}
