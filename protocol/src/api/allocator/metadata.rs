//! How far an allocator's metadata are, so that metadata of yesterday are noticed.

use serde::{Deserialize, Serialize};

use crate::PoolId;

/// A state of the metadata of a pool. The allocator tells appliances and owners the newest one that is durable, they keep
/// the newest one that they heard of, and tell it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MetadataState {
    /// The pool that the metadata are of.
    pub pool: PoolId,
    /// Counts the changes that became durable.
    pub number: u64,
}

impl MetadataState {
    /// Whether metadata in this state lack changes that metadata in the other state have.
    pub fn is_behind(&self, other: &MetadataState) -> bool {
        self.pool == other.pool && self.number < other.number
    }
}

/// That an allocator's metadata are older than what appliances or owners heard of: a snapshot of its machine was reverted,
/// or an old copy was restored. What such an allocator says of an allocation proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behind {
    /// The newest number that somebody heard of.
    pub heard: u64,
    /// Who heard of it.
    pub who: String,
    /// In one line, with what to do.
    pub text: String,
}
