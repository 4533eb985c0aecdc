//! The memory appliance: lends this machine's memory.
//!
//! * [`arena`]: the memory, where regions come from, and how they are cleared.
//! * [`ledger`] is the bookkeeping, [`regions`] adds memory and threads to it.
//! * [`keep`] makes both outlive the process.
//! * [`serve`] serves grants to clients by NBD, [`share`] as shared memory, [`rdma`] by RDMA.
//! * [`control`] takes orders over HTTP, [`register`] sends heartbeats to the allocator.
//! * [`config`] and [`daemon`] are the program.

pub mod arena;
pub mod config;
pub mod control;
pub mod copier;
pub mod daemon;
pub mod host;
pub mod keep;
mod lease;
pub mod ledger;
pub mod rdma;
pub mod regions;
pub mod register;
pub mod serve;
pub mod share;
pub mod state;
mod sweeper;
mod warnings;
