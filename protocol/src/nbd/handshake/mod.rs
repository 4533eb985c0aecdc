//! The handshake ("fixed newstyle negotiation" of the specification), both sides, without I/O: bytes go in, bytes and
//! decisions come out.
//!
//! Names of exports may be secrets, so no `Debug` output and no error contains them.

pub mod client;
pub mod server;

mod message;
