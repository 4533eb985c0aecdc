//! Client library of xpm: external memory as volumes of blocks, and as slabs carved out of regions.
//!
//! * [`volume`]: an allocation in use. A [`Volume`] is shared, and gives one [`Channel`] for each queue.
//! * [`slab`]: pieces of regions, carved out with no message to anyone.

pub mod slab;
pub mod volume;

pub use volume::{Change, ChangeError, Channel, OpenError, Run, Volume, VolumeOptions, VolumeStatus};
