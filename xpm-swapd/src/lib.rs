//! xpm-swapd: keeps the right amount of swap on external memory, without supervision.
//!
//! * [`config`] and [`lifecycle`]: from the command line to a running daemon and its end.
//! * [`policy`]: decides the next action, as a pure function of the present state.
//! * [`engine`] and [`control`]: the daemon that checks, decides and acts, and its control interface.
//! * [`os`]: the edge to the kernel: its tables, memory pressure, swap headers, swapon and swapoff.
//!
//! The daemon creates allocations at the allocator, lets xpm-blk show them, and turns swap on there. It is
//! not on the path of any page: swap works without it.

pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod lifecycle;
pub mod os;
pub mod policy;

mod fallback;
mod state;
