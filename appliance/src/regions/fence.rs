//! Shutting clients out of a grant's memory.

use std::sync::{Arc, PoisonError};

use xpm_protocol::{Epoch, GrantId, Life, Visitor};

use super::shared::Shared;
use crate::arena::{ArenaError, Memory};
use crate::lease::Lease;

/// A server that can shut the clients of a grant out.
pub trait Fence: Send + Sync {
    /// Closes the connections of the group, and waits until their accesses have ended. Returns the number of clients
    /// for which that is not known, and which may still access the memory.
    fn close_group(&self, group: u128) -> usize;

    /// Number of the group's connections.
    fn connections(&self, group: u128) -> usize;

    /// A grant admits clients from now on, in this epoch.
    fn opened(&self, lease: &Arc<Lease>, epoch: Epoch) {
        let _ = (lease, epoch);
    }

    /// Clients of the group that are other lives than `life`, on other seats, and whose hosts answer. May
    /// block for three seconds.
    fn living(&self, group: u128, life: &Life) -> Vec<Visitor> {
        let _ = (group, life);
        Vec::new()
    }

    /// Closes the connections of all lives other than `life`.
    fn close_others(&self, group: u128, life: &Life) {
        let _ = (group, life);
    }

    /// The memory of the group is about to be passed to a process of this host.
    fn sharing(&self, group: u128) {
        let _ = group;
    }
}

/// The memory of a lease whose clients were shut out, in order, and the reason if some of it could not be
/// moved though it had to be.
#[derive(Default)]
pub(super) struct Moved {
    pub(super) memories: Vec<Arc<Memory>>,
    /// Whether any of it was moved.
    pub(super) has_moved: bool,
    /// Memory that was replaced by zeros, in bytes.
    pub(super) lost: u64,
    pub(super) error: Option<ArenaError>,
}

/// The new memory of one region.
struct Place {
    memory: Arc<Memory>,
    lost: u64,
    error: Option<ArenaError>,
}

impl Shared {
    pub(super) fn fences(&self) -> Vec<Arc<dyn Fence>> {
        self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notifies the fences that a grant admits clients.
    pub(super) fn opened(&self, id: GrantId) {
        let state = self.lock();
        let lease = state.leases.get(&id).filter(|lease| lease.is_alive()).cloned();
        let Some((lease, grant)) = lease.zip(state.ledger.grant(id)) else { return };
        // Under the lock: a change of the grant happens entirely before or after this.
        self.fences().iter().for_each(|fence| fence.opened(&lease, grant.epoch));
    }

    /// Closes all connections of all grants, and returns when there are none. The caller has stopped
    /// admitting new ones.
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

    /// Revokes a lease and shuts its clients out. Returns the number of clients that may still have its
    /// memory mapped.
    pub(super) fn shut_out(&self, lease: &Lease) -> usize {
        lease.revoke();
        self.fences().iter().map(|fence| fence.close_group(lease.grant().as_u128())).sum()
    }

    /// Whether the memory of a lease could be moved away from processes that may have it mapped.
    pub(super) fn can_move(&self, lease: &Lease) -> Result<(), ArenaError> {
        match lease.regions().iter().find(|memory| memory.is_shared()) {
            Some(memory) => self.arena.can_move(memory.len()),
            None => Ok(()),
        }
    }

    /// Revokes a lease, shuts its clients out, and moves memory that was ever shared to a place that the
    /// sharing process cannot access: that process cannot be made to unmap, its closed connection proves
    /// nothing, and its late writes must not land. With `lose`, memory that cannot be moved is replaced by
    /// zeros.
    pub(super) fn move_away(&self, lease: &Lease, lose: bool) -> Moved {
        self.shut_out(lease);
        let regions = lease.regions();
        let has_moved = regions.iter().any(|memory| memory.is_shared());
        if !has_moved {
            return Moved { memories: regions.to_vec(), ..Moved::default() };
        }
        // During the move, a part of the content is in each place.
        self.record_moving(&self.lock(), lease.grant());
        let threads = self.workers.min(self.arena.moves_max()).max(1);
        let places: Vec<Place> = std::thread::scope(|scope| {
            let part = |part: &[Arc<Memory>]| part.iter().map(|memory| self.place(memory, lose)).collect();
            let threads: Vec<_> = regions
                .chunks(regions.len().div_ceil(threads))
                .map(|chunk| scope.spawn(move || -> Vec<Place> { part(chunk) }))
                .collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(places) => places,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.flatten().collect()
        });
        let mut moved = Moved { has_moved, ..Moved::default() };
        for place in places {
            moved.memories.push(place.memory);
            moved.lost += place.lost;
            moved.error = moved.error.or(place.error);
        }
        moved
    }

    /// Determines the new memory of a region.
    fn place(&self, memory: &Arc<Memory>, lose: bool) -> Place {
        if !memory.is_shared() {
            return Place { memory: memory.clone(), lost: 0, error: None };
        }
        let stays = |error| Place { memory: memory.clone(), lost: 0, error: Some(error) };
        match self.arena.relocate(memory) {
            Ok(new) => Place { memory: Arc::new(new), lost: 0, error: None },
            Err(_) if lose => match self.arena.replace(memory) {
                Ok(new) => Place { memory: Arc::new(new), lost: memory.len(), error: None },
                Err(error) => stays(error),
            },
            Err(error) => stays(error),
        }
    }
}
