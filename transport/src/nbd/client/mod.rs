//! The client's end of the NBD transport.
//!
//! [`connect()`] negotiates one connection to one grant's export, [`connect_to()`] to an export of any
//! server; both block, and end within a time limit. Their result either becomes an [`NbdLink`], or its stream
//! is passed to the kernel's nbd driver.

mod connect;
mod input;
mod link;
mod output;
mod parts;
mod plan;

pub use self::connect::{
    Connected, Target, connect, connect_as, connect_first, connect_to, describe, describe_first,
};
pub use self::link::NbdLink;
pub use crate::connect::ConnectError;
