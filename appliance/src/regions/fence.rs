//! Shutting clients out of a grant's memory.

use std::sync::{Arc, PoisonError};

use xpm_protocol::{Epoch, GrantId};

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

    /// A grant lets clients in from now on, in this epoch.
    fn opened(&self, lease: &Arc<Lease>, epoch: Epoch) {
        let _ = (lease, epoch);
    }

    /// The memory of the group is about to be given to a process of this host.
    fn sharing(&self, group: u128) {
        let _ = group;
    }
}

/// The memory of a lease whose clients were shut out, in order, and why not all of it could be moved
/// that had to be.
#[derive(Default)]
pub(super) struct Moved {
    pub(super) memories: Vec<Arc<Memory>>,
    /// Whether any of it was.
    pub(super) has_moved: bool,
    pub(super) error: Option<ArenaError>,
}

impl Shared {
    fn fences(&self) -> Vec<Arc<dyn Fence>> {
        self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the fences that a grant lets clients in.
    pub(super) fn opened(&self, id: GrantId) {
        let state = self.lock();
        let lease = state.leases.get(&id).filter(|lease| lease.is_alive()).cloned();
        let Some((lease, grant)) = lease.zip(state.ledger.grant(id)) else { return };
        // Under the lock: a change of the grant comes before all of this or after.
        self.fences().iter().for_each(|fence| fence.opened(&lease, grant.epoch));
    }

    /// Closes all connections of all grants, and returns when there are none. New ones must not come any
    /// more.
    pub(super) fn close_connections(&self) {
        let groups: Vec<GrantId> = self.lock().ledger.grants().map(|(id, _)| id).collect();
        for id in groups {
            self.fences().iter().for_each(|fence| {
                fence.close_group(id.as_u128());
            });
        }
    }

    pub(super) fn sharing(&self, id: GrantId) {
        self.fences().iter().for_each(|fence| fence.sharing(id.as_u128()));
    }

    pub(super) fn connections(&self, id: GrantId) -> u64 {
        self.fences().iter().map(|fence| fence.connections(id.as_u128()) as u64).sum()
    }

    /// Ends a lease and shuts its clients out. How many may still have its memory mapped.
    pub(super) fn shut_out(&self, lease: &Lease) -> usize {
        lease.revoke();
        self.fences().iter().map(|fence| fence.close_group(lease.grant().as_u128())).sum()
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
        // Of processes that came to an earlier life of this appliance, no connection tells.
        let moves = |memory: &Memory| memory.has_strays() || (remaining > 0 && memory.is_shared());
        let has_moved = lease.regions().iter().any(|memory| moves(memory));
        let mut moved = Moved { has_moved, ..Moved::default() };
        if has_moved {
            // Half of it is in one place then and half in the other.
            self.record_moving(&self.lock(), lease.grant());
        }
        for memory in lease.regions() {
            let place = match moves(memory) && moved.error.is_none() {
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
