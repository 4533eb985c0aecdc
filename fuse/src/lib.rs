//! The bare FUSE protocol, as far as a file system needs it whose server may die and be replaced.
//!
//! A library that runs a session for its user (`fuser`, `libfuse`) waits for INIT, and so cannot continue on a
//! descriptor on which a dead process served before. This crate has no loop and no thread: the user reads a request
//! ([`Device::receive`]), decodes it ([`wire::Request::parse`]), and writes the reply ([`wire::reply`],
//! [`Device::send`]) whenever it has one, from any thread.
//!
//! ```text
//! mount() --> Device --receive--> bytes --Request::parse--> Init --negotiate--> Negotiated --reply--> serving
//!                ^                                                                                       |
//!                |  a successor has the same descriptor: Device::from_fd, then notify::resend()          |
//!                +---------------------------------------------------------------------------------------+
//! ```
//!
//! # One descriptor, and no io_uring
//!
//! A connection has exactly one descriptor of `/dev/fuse`, and every process that may have to continue holds it.
//! Two ways of the kernel's to serve faster are left out, because both lose writes when the server is killed:
//!
//! - A descriptor *cloned* by `FUSE_DEV_IOC_CLONE` has a list of its own of the requests that were read from it. When
//!   the last holder of the clone closes it, the kernel ends these requests with ECONNABORTED, although the connection
//!   lives on. A program that wrote through a mapping never sees that error: its page is clean and wrong.
//! - FUSE over io_uring (Linux 6.14) ends the requests of its ring in the same way when the ring's process dies.
//!
//! With one descriptor the requests stay in the kernel's list, and [`wire::notify::resend`] has them delivered again.

mod bdi;
mod cachestat;
mod connection;
mod device;
mod mount;
mod negotiate;
pub mod wire;

pub use bdi::{Bdi, BdiSettings};
pub use cachestat::{CacheStat, cachestat};
pub use connection::Connection;
pub use device::{Device, Gone, Received, Sent};
pub use mount::{Mount, MountError, RootKind, mount, unmount, unmount_lazily};
pub use negotiate::{Negotiated, Refused, Wanted};

#[doc(no_inline)]
pub use rustix::io::Errno;
