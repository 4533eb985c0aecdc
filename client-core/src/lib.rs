//! Client library of xpm: external memory as volumes of blocks, and as slabs carved out of regions.
//!
//! * [`Attachment`]: becoming the owner of an allocation.
//! * [`owner`]: what owners and the allocator say to each other.
//! * [`volume`]: an allocation in use. A [`Volume`] is shared, and gives one [`Channel`] for each queue.
//! * [`mapping`]: an allocation at addresses, with local memory as its cache.
//! * [`slab`]: pieces of regions, carved out with no message to anyone.

mod attach;
pub mod mapping;
pub mod owner;
mod signals;
pub mod slab;
pub mod volume;

// What options and answers of this library are made of.
pub use xpm_control::token::{Token, TokenError};
pub use xpm_control::urls::{ParseUrlsError, Urls};
pub use xpm_protocol::api::allocator::Map;
pub use xpm_protocol::api::blk::{Hold, TransportKind};
pub use xpm_protocol::{ClientId, Name};

pub use attach::{AttachError, AttachOptions, Attachment};
pub use volume::{Change, ChangeError, Channel, OpenError, Run, Volume, VolumeOptions, VolumeStatus};
