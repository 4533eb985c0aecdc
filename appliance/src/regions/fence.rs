//! Shutting clients out of a grant's memory.

use std::sync::{Arc, PoisonError};

use xpm_protocol::GrantId;

use super::shared::Shared;
use crate::arena::{ArenaError, Memory};
use crate::lease::Lease;

/// Shuts the clients of a grant out.
pub trait Fence: Send + Sync {
    /// Closes the connections of the group; returns when they touch nothing any more, or with the
    /// number of clients of which that is not known.
    fn close_group(&self, group: u128) -> usize;

    /// Connections of the group.
    fn connections(&self, group: u128) -> usize;
}

/// The memory of a lease whose clients were shut out, in order, and why not all of it could be moved
/// that had to be.
#[derive(Default)]
pub(super) struct Moved {
    pub(super) memories: Vec<Arc<Memory>>,
    pub(super) error: Option<ArenaError>,
}

impl Shared {
    pub(super) fn connections(&self, id: GrantId) -> u64 {
        let fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fences.iter().map(|fence| fence.connections(id.as_u128()) as u64).sum()
    }

    /// Ends a lease and shuts its clients out. How many may still have its memory mapped.
    pub(super) fn shut_out(&self, lease: &Lease) -> usize {
        lease.revoke();
        let fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fences.iter().map(|fence| fence.close_group(lease.grant().as_u128())).sum()
    }

    /// Ends a lease, shuts its clients out, and if one did not let go, moves the memory to where it
    /// cannot reach it: a process cannot be made to unmap, and its late writes must not land.
    pub(super) fn move_away(&self, lease: &Lease) -> Moved {
        let remaining = self.shut_out(lease);
        if remaining > 0 {
            tracing::warn!(
                "grant {}: {remaining} processes of the old owner keep its memory mapped; moving it away from them",
                lease.grant()
            );
        }
        let mut moved = Moved::default();
        for memory in lease.regions() {
            let place = match remaining > 0 && memory.is_shared() && moved.error.is_none() {
                true => self.arena.relocate(memory).map(Arc::new),
                false => Ok(memory.clone()),
            };
            moved.memories.push(place.unwrap_or_else(|error| {
                moved.error = Some(error);
                memory.clone()
            }));
        }
        moved
    }
}
