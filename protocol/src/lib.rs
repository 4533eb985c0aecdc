//! The messages between the parts of xpm as types: ids, units, the control plane's messages and the NBD wire codec.
//!
//! This crate does no I/O, reads no clock and makes no random numbers. A decoded message is a valid value and need
//! not be checked again.

#![forbid(unsafe_code)]

pub mod api;
pub mod blocks;
pub mod gate;
pub mod id;
pub mod key;
pub mod layout;
pub mod life;
pub mod nbd;
pub mod policy;
mod schema;
pub mod speed;
pub mod text;
pub mod units;

pub use blocks::{BlockSize, BlockWish};
pub use id::{
    AllocationId, ApplianceId, ClientId, Epoch, GrantId, HandoverId, HostId, InstallationId, MachineId, Name,
    PoolId, RegionId, RequestId, SeatId,
};
pub use key::GrantKey;
pub use layout::Layout;
pub use life::{Life, Succession, Visitor};
pub use speed::{LinkSpeed, Percent};
pub use units::{ByteSize, Span};
