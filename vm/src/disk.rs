//! A machine's disks that are external memory: each is an allocation that xpm-blk of the machine's host shows at a
//! socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use xpm_protocol::Name;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The allocation.
    pub name: Name,
    /// The socket where QEMU reaches it by NBD.
    pub socket: PathBuf,
}
