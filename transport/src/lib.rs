//! The data plane of xpm, both ends: nbd over TCP and unix sockets, shm, and rdma.
//!
//! * [`link`]: the client's interface of every transport: post, submit, poll, wait.
//! * [`store`]: the interface behind which a server of NBD connections finds the bytes that it serves.
//! * [`nbd`], [`shm`] and [`rdma`]: the transports.
//!
//! Control work (handshakes, passing of memory) is done off the data path; the work on the data path runs in
//! one thread for each queue, without locks, allocations or log calls.

mod accept;
pub mod chain;
pub mod connect;
mod handshakes;
pub mod io;
pub mod link;
pub mod names;
pub mod nbd;
pub mod rdma;
pub mod shm;
pub mod slots;
pub mod sound;
pub mod spin;
pub mod store;
mod trusted;

pub use io::{Completion, IoBuf, IoError, Kind, Operation};
pub use link::{Link, LinkDown};
pub use store::Store;
