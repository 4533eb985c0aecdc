//! The memory appliance: lends this machine's memory.
//!
//! * [`arena`] is the memory: where regions come from, and how they are cleared.
//! * [`ledger`] keeps the books, [`regions`] puts memory and threads behind them.
//! * [`keep`] has both outlive the process.
//! * [`serve`] gives grants to clients by NBD, [`share`] as shared memory, [`rdma`] by RDMA.
//! * [`control`] takes orders over HTTP, [`register`] tells the allocator.
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
