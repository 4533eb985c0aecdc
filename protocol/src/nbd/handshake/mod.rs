//! The handshake ("fixed newstyle negotiation" of the specification), both sides, without I/O:
//! bytes go in, bytes and decisions come out.
//!
//! Names of exports may be secrets, so nothing here prints them by `Debug` or puts them into an
//! error.

pub mod client;
pub mod server;

mod message;
