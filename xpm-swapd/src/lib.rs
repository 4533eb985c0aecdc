//! xpm-swapd: keeps the right amount of swap on external memory, without anyone watching.
//!
//! * [`config`] and [`lifecycle`]: from the command line to a running daemon and its end.
//! * [`policy`]: what is to be done, as a pure function of what there is.
//! * [`engine`] and [`control`]: the daemon that looks, decides and acts, and its control interface.
//! * [`os`]: the edge to the kernel: its tables, memory pressure, swap headers, swapon and swapoff.
//!
//! It makes allocations at the allocator, has xpm-blk show them, and turns swap on there. It is not on
//! the way of any page: swap goes on without it.

pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod lifecycle;
pub mod os;
pub mod policy;

mod fallback;
mod state;
