//! The state that a table's clones and threads share, and the turns of orders on it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_protocol::{GrantId, RegionId};

use super::TableError;
use super::fence::Fence;
use super::state::State;
use crate::arena::{Arena, ArenaError, Memory};
use crate::keep::{Condition, Keeper, SavedGrant, SavedRegion};
use crate::warnings::Warnings;

/// How long an order waits until its memory is faulted in; the rest is faulted in while the memory is in use
/// already. On a busy host faulting in takes a second for each few hundred MiB, and the sender of an order
/// gives up after some seconds.
const FAULT_LIMIT: Duration = Duration::from_millis(300);
/// How long an order waits for another one that changes the same grant.
pub(super) const TURN_LIMIT: Duration = Duration::from_secs(30);

pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Notified when a state changes that a thread may wait for, or when there is work.
    pub(super) changed: Condvar,
    pub(super) arena: Arena,
    pub(super) fences: Mutex<Vec<Arc<dyn Fence>>>,
    /// Notified for the heartbeat.
    pub(super) news: Notify,
    pub(super) workers: usize,
    pub(super) keeper: Keeper,
    pub(super) warnings: Warnings,
}

impl Shared {
    /// Every critical section leaves the state valid, so a poisoned lock is safe to use.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, until `limit`.
    pub(super) fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Instant,
    ) -> Result<MutexGuard<'a, State>, TableError> {
        let left = limit.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TableError::Busy);
        }
        Ok(self.sleep(state, left))
    }

    /// Waits for a change, for at most `limit`.
    pub(super) fn sleep<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until no other order changes the grant and all memory that may be in use is within the capacity;
    /// returns the locked state.
    pub(super) fn turn(&self, id: GrantId) -> Result<MutexGuard<'_, State>, TableError> {
        let limit = Instant::now() + TURN_LIMIT;
        let mut state = self.lock();
        while state.ledger.leaving() > 0 || state.ledger.grant(id).is_some_and(|grant| grant.closing) {
            state = self.wait(state, limit)?;
        }
        Ok(state)
    }

    /// Waits until the memory that makes room for others is gone, up to a time limit.
    pub(super) fn wait_left(&self) {
        let limit = Instant::now() + TURN_LIMIT;
        let mut state = self.lock();
        while state.ledger.leaving() > 0 {
            match self.wait(state, limit) {
                Ok(again) => state = again,
                Err(_) => return,
            }
        }
    }

    /// Records the present state of a grant for the next life. To be called before a client learns of it.
    pub(super) fn record(&self, state: &State, id: GrantId) {
        let is_open = state.leases.get(&id).is_some_and(|lease| lease.is_alive());
        self.record_as(state, id, if is_open { Condition::Open } else { Condition::Closed });
    }

    fn record_as(&self, state: &State, id: GrantId, condition: Condition) {
        if !self.keeper.keeps() {
            return;
        }
        let condition = if is_torn(state, id) { Condition::Moving } else { condition };
        match saved(state, id, condition, &self.keeper) {
            Some(grant) => self.keeper.put(grant),
            // A part of the memory is in no store, or the grant does not exist.
            None => self.keeper.delete(id),
        }
    }

    /// Records all grants that have a region of this one: a property of a region's memory changed.
    pub(super) fn record_sharing(&self, state: &State, id: GrantId) {
        sharing(state, id).into_iter().for_each(|id| self.record(state, id));
    }

    /// Records that the content of a grant's regions is about to move.
    pub(super) fn record_moving(&self, state: &State, id: GrantId) {
        sharing(state, id).into_iter().for_each(|id| self.record_as(state, id, Condition::Moving));
    }

    /// Notifies the threads that wait for a change of grants.
    pub(super) fn tell(&self) {
        self.changed.notify_all();
        self.news.notify_one();
    }

    /// Makes regions, and faults them in for as long as an order may take; does not fault in while `leaving`
    /// bytes of other regions are leaving to make room.
    pub(super) fn make(&self, count: usize, len: u64, leaving: u64) -> Result<Vec<Arc<Memory>>, ArenaError> {
        let until = Instant::now() + FAULT_LIMIT;
        let made = (0..count).map(|_| self.arena.make(len, leaving).map(Arc::new));
        let made = made.collect::<Result<Vec<_>, _>>()?;
        if made.is_empty() || leaving > 0 {
            return Ok(made);
        }
        let share = made.len().div_ceil(self.workers);
        std::thread::scope(|scope| {
            let threads: Vec<_> = made
                .chunks(share)
                .map(|part| {
                    scope.spawn(move || {
                        part.iter()
                            .try_for_each(|memory| self.arena.fault_in(memory, Some(until)).map(|_| ()))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        Ok(made)
    }
}

/// The grants that have a region of this one.
fn sharing(state: &State, id: GrantId) -> Vec<GrantId> {
    state.ledger.grant(id).map(|grant| state.ledger.sharing(&grant.regions)).unwrap_or_default()
}

/// Whether the content of a grant is incomplete for good.
fn is_torn(state: &State, id: GrantId) -> bool {
    let regions = state.ledger.grant(id).map(|grant| grant.regions.as_slice()).unwrap_or_default();
    let memories = regions.iter().filter_map(|region| state.ledger.region(*region)?.memory.as_ref());
    memories.into_iter().any(|memory| memory.is_torn())
}

/// None when some of the grant's memory is not stored.
fn saved(state: &State, id: GrantId, condition: Condition, keeper: &Keeper) -> Option<SavedGrant> {
    let grant = state.ledger.grant(id)?;
    let one = |id: &RegionId| {
        let region = state.ledger.region(*id)?;
        let memory = region.memory.as_ref()?;
        let place = memory.keep(keeper.vault())?;
        Some(SavedRegion { id: *id, len: region.len, place, shared: memory.is_shared() })
    };
    Some(SavedGrant {
        id,
        allocation: grant.allocation,
        name: grant.name.clone(),
        epoch: grant.epoch,
        key: grant.key.clone(),
        regions: grant.regions.iter().map(one).collect::<Option<_>>()?,
        descriptor: grant.descriptor.clone(),
        condition,
        holder: state.holders.get(&id).cloned().map(Box::new),
    })
}
