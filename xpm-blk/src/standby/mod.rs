//! One process serves, and another one stands by.
//!
//! When the process that serves swap dies, the machine may have no memory to start another one: the pages
//! that this needs are swapped out to the device that has no server. So the serving process keeps a
//! *standby*: a second process of the same program, with its memory locked, its threads started, and all
//! records received. It waits for the death of the first process, and takes over its devices without reading
//! a file. `keeper.rs` is the serving side, `waiting.rs` the other one, `link.rs` has their messages.
//!
//! A newer process that finds the state directory in use asks the serving process to be its *successor*: it
//! stands by in the same way, but takes over as soon as it is ready. This is how the program is upgraded.
//!
//! ```text
//!              starts a child                  memory is locked, records are here
//!   main ---------------------> standby filling ----------------------------------> standby ready
//!    |                                                                                   |
//!    |  dies, hangs (the standby kills it), or hands over because it is told to end      |
//!    |                                                                                   v
//!    +-------------------------------------------------------------------> it becomes main, and
//!    |                                                                     starts a standby of its own
//!    |
//!    |  a newer process announces itself: the standby ends, the newer process fills its memory
//!    +---------------> successor filling ---> successor ready ---> main gives it the lock and ends;
//!                                                                  the successor becomes main
//! ```
//!
//! The process that may serve is the holder of the lock of the state directory, once the process that gave it
//! the lock is dead. That death is detected by a pidfd, and includes the death of all threads; the kernel's
//! remaining clean-up (an open ublk device) is waited for where it matters. A process gives the lock to at
//! most one other process, and to another one only when that one is dead, so that two processes never take
//! over.

pub(crate) mod keeper;
pub(crate) mod waiting;

mod ballast;
mod link;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The argument that makes a process a standby; then its standard input is the link.
pub const ARGUMENT: &str = "--stand-by";

/// Interval of the messages by which both sides show that they are alive.
const TICK: Duration = Duration::from_secs(1);

/// The socket at which a process that wants to take over reaches the serving one.
fn socket_path(state: &Path) -> PathBuf {
    state.join("handover.sock")
}
