//! What the parts of xpm say to each other, as types: ids, units, the control plane's messages
//! and the NBD wire codec.
//!
//! Nothing here does I/O, reads a clock or makes randomness; whoever decodes a message with this
//! crate holds a valid value afterwards and need not check it again.

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
