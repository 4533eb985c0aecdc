//! The state of an allocator's metadata, by which outdated metadata are noticed.

use serde::{Deserialize, Serialize};

use crate::PoolId;

/// A state of the metadata of a pool. The allocator sends its newest durable state to appliances and owners. They
/// keep the newest state that they have heard of, and report it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MetadataState {
    /// The pool that the metadata are of.
    pub pool: PoolId,
    /// Number of batches of changes that became durable.
    pub number: u64,
}

impl MetadataState {
    /// Whether metadata in this state lack changes that metadata in the other state have.
    pub fn is_behind(&self, other: &MetadataState) -> bool {
        self.pool == other.pool && self.number < other.number
    }
}

/// Reported when an allocator's metadata are older than a state that appliances or owners have heard of: a snapshot
/// of its machine was reverted, or an old copy was restored. Its answers about an allocation prove nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behind {
    /// The newest number that was reported.
    pub heard: u64,
    /// The appliance or owner that reported it.
    pub who: String,
    /// Explanation with the remedy, in one line.
    pub text: String,
}
