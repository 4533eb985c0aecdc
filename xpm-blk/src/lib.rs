//! xpm-blk and xpm-fs: show allocations of external memory as block devices, and as files.
//!
//! * [`program`]: which of the two daemons a process is.
//! * [`start`], [`config`] and [`lifecycle`]: from the command line to a running daemon and its end.
//! * [`xpm_safety`]: makes the process fit to serve swap.
//! * [`standby`]: the second process, which takes over when this one dies.
//! * [`daemon`] and [`control`]: the set of shown allocations, and its changes.
//! * [`frontend`]: the forms in which allocations are shown.
//!
//! The data path of a request: from `frontend/ublk/queue.rs` (or the NBD server of `xpm_transport`) to a
//! channel of `xpm_client_core`, and back through the same objects. The control plane is never on this path.

pub mod config;
pub mod control;
pub mod daemon;
pub mod error;
pub mod frontend;
pub mod lifecycle;
pub mod program;
pub mod standby;
pub mod start;

mod export;
mod identity;
mod kept;
mod links;
mod owed;
mod records;
mod show;
mod sysfs;
mod usage;
mod watch;
