//! The core of every client of xpm: becoming the owner of an allocation, and using it as a volume of blocks.
//!
//! * [`Attachment`]: becoming the owner of an allocation.
//! * [`owner`]: what owners and the allocator say to each other.
//! * [`volume`]: an allocation in use. A [`Volume`] is shared, and gives one [`Channel`] for each queue.
//!
//! Programs that map an allocation use the crate `xpm_mapping`, which re-exports what they need of this one.

pub mod attach;
pub mod owner;
pub mod signals;
pub mod volume;

// The types of this library's options and answers.
pub use xpm_control::token::{Token, TokenError};
pub use xpm_control::urls::{ParseUrlsError, Urls};
pub use xpm_protocol::api::allocator::Map;
pub use xpm_protocol::api::blk::{Hold, TransportKind};
pub use xpm_protocol::{ClientId, Name};

pub use attach::{AttachError, AttachOptions, Attachment};
pub use volume::{Change, ChangeError, Channel, OpenError, Run, Volume, VolumeOptions, VolumeStatus};
