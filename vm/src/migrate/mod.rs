//! Moves a machine to another host, without its RAM.
//!
//! The command `xpm vm receive` ([`destination`]) waits with a QEMU that has the same RAM file; `xpm vm migrate`
//! ([`source`]) drives the move. Their messages are in `wire.rs`. The machine is stopped before anything is handed
//! over, and on either side only a command lets it run: QEMU never runs it by itself, whatever happens to the other
//! side or to the commands.

pub mod destination;
pub mod settle;
pub mod source;
pub mod timeline;
pub(crate) mod tunnel;
mod wire;
