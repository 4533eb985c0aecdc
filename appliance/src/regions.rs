//! The table of regions and grants: the ledger, the memory behind it, and the clients that are shut
//! out before a grant changes. Only the control plane and new connections come here.

mod worker;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::appliance::{self as api, Commit, RegionState, Reserve};
use xpm_protocol::units::{ByteSize, is_region_len};
use xpm_protocol::{GrantId, GrantKey, RegionId};

use crate::arena::{Arena, ArenaError, Memory};
use crate::lease::Lease;
use crate::ledger::{Change, Ledger, NoPlan, Refusal, Stock, Totals};

/// Most regions that one order asks for.
const COUNT_MAX: u32 = 4096;
/// Longest time that a reservation lives.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// How long an order waits until what it asked for is faulted in; the rest follows while it is in
/// use already. Shorter than the 3 s after which the allocator asks another appliance.
const FAULT_LIMIT: Duration = Duration::from_secs(2);
/// How long an order waits for another one that changes the same thing.
const TURN_LIMIT: Duration = Duration::from_secs(30);
/// Threads that make, fault in and clear regions, at most: more of them only wait for memory.
const WORKERS_MAX: usize = 4;

/// Shuts the clients of a grant out.
pub trait Fence: Send + Sync {
    /// Closes the connections of the group; returns when they touch nothing any more, or with the
    /// number of clients of which that is not known.
    fn close_group(&self, group: u128) -> usize;

    /// Connections of the group.
    fn connections(&self, group: u128) -> usize;
}

/// Why an order is refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The books are against it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host has no memory for it.
    #[error("this appliance cannot make the memory ready")]
    Memory(#[from] ArenaError),
    /// Another order on the same thing takes too long.
    #[error("another order on the same grant or memory is still running: try again")]
    Busy,
}

impl TableError {
    /// As the control interface answers it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            TableError::Refused(Refusal::NoSpace { .. }) | TableError::Memory(_) => ErrorKind::NoSpace,
            TableError::Refused(Refusal::UnknownRegion(_)) => ErrorKind::NotFound,
            TableError::Refused(Refusal::InGrant { .. }) => ErrorKind::InUse,
            TableError::Refused(Refusal::Conflict(_)) => ErrorKind::Conflict,
            TableError::Refused(Refusal::Invalid(_)) => ErrorKind::Invalid,
            TableError::Busy => ErrorKind::Unavailable,
        }
    }
}

/// The table. Clones are the same one; its threads end some time after the last.
#[derive(Clone)]
pub struct Table {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something changed that someone may wait for, or there is something to do.
    changed: Condvar,
    arena: Arena,
    fences: Mutex<Vec<Arc<dyn Fence>>>,
    /// For the heartbeat.
    news: Notify,
    workers: usize,
}

struct State {
    ledger: Ledger<Arc<Memory>>,
    leases: HashMap<GrantId, Arc<Lease>>,
    /// Lent, but not wholly faulted in.
    to_fault: VecDeque<Arc<Memory>>,
    /// After a failure, no stocking until then.
    stock_again: Option<Instant>,
    /// After a region could not be cleared because someone still held it.
    clear_again: Option<Instant>,
}

impl Table {
    /// An empty table of `capacity` bytes, and the threads that keep its stock.
    ///
    /// # Errors
    /// When the kernel gives no random number or thread.
    pub fn start(arena: Arena, capacity: u64, stock: Stock) -> io::Result<Table> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
        let state = State {
            ledger: Ledger::new(capacity, stock, xpm_control::random::u128()?),
            leases: HashMap::new(),
            to_fault: VecDeque::new(),
            stock_again: None,
            clear_again: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            arena,
            fences: Mutex::new(Vec::new()),
            news: Notify::new(),
            workers,
        });
        for number in 0..workers {
            worker::spawn(number, Arc::downgrade(&shared))?;
        }
        Ok(Table { shared })
    }

    /// Adds a fence: it is closed before a grant changes.
    pub fn add_fence(&self, fence: Arc<dyn Fence>) {
        self.shared.fences.lock().unwrap_or_else(PoisonError::into_inner).push(fence);
    }

    /// What the memory lies on.
    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }

    /// Resolves when grants changed since the last time.
    pub async fn news(&self) {
        self.shared.news.notified().await;
    }

    /// Reserves regions, all zeros. What is not ready is made now, which blocks for up to some
    /// seconds.
    ///
    /// # Errors
    /// When the order contradicts itself, or there is not enough memory.
    pub fn reserve(&self, order: &Reserve) -> Result<Vec<api::Region>, TableError> {
        let len = order.region_len.0;
        check_order(order)?;
        let mut plan = self.plan(order)?;
        drop(std::mem::take(&mut plan.dropped));
        let made = match self.shared.make(plan.make, len) {
            Ok(made) => made,
            Err(error) => {
                self.shared.lock().ledger.abandon(plan);
                self.shared.changed.notify_all();
                return Err(error.into());
            }
        };
        let mut state = self.shared.lock();
        state.to_fault.extend(made.iter().cloned());
        let ids = state.ledger.reserved(plan, made, Instant::now() + order.ttl.0);
        let regions = ids.iter().filter_map(|id| state.region(*id)).collect();
        drop(state);
        self.shared.changed.notify_all();
        Ok(regions)
    }

    fn plan(&self, order: &Reserve) -> Result<crate::ledger::Plan<Arc<Memory>>, TableError> {
        let limit = Instant::now() + TURN_LIMIT;
        let mut state = self.shared.lock();
        loop {
            state.ledger.expire(Instant::now());
            match state.ledger.plan(order.allocation, order.count as usize, order.region_len.0) {
                Ok(plan) => return Ok(plan),
                Err(NoPlan::Refused(refusal)) => return Err(refusal.into()),
                Err(NoPlan::Wait) => state = self.shared.wait(state, limit)?,
            }
        }
    }

    /// All regions.
    pub fn regions(&self) -> Vec<api::Region> {
        let state = self.shared.lock();
        state.ledger.regions().filter_map(|(id, _)| state.region(id)).collect()
    }

    /// Deletes a region that is reserved; one that is not there counts as deleted.
    ///
    /// # Errors
    /// When it is in a grant.
    pub fn delete_region(&self, id: RegionId) -> Result<(), TableError> {
        self.shared.lock().ledger.delete_region(id)?;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Makes a grant of reserved regions, or raises the epoch of one, for which its clients are
    /// shut out first; blocks for that.
    ///
    /// # Errors
    /// When it contradicts itself or what is there.
    pub fn commit(&self, id: GrantId, commit: &Commit) -> Result<api::Grant, TableError> {
        let mut state = self.shared.turn(id)?;
        state.ledger.expire(Instant::now());
        match state.ledger.commit(id, commit)? {
            Change::Nothing => {}
            Change::Made => state.add_lease(id),
            Change::Renew => {
                let lease = state.leases.get(&id).cloned();
                drop(state);
                let moved = lease.map_or_else(Moved::default, |lease| self.shared.move_away(&lease));
                state = self.shared.lock();
                state.renew(id, commit, moved)?;
            }
        }
        drop(state);
        self.shared.tell();
        self.grant(id).ok_or(TableError::Busy)
    }

    /// All grants.
    pub fn grants(&self) -> Vec<api::Grant> {
        let ids: Vec<GrantId> = self.shared.lock().ledger.grants().map(|(id, _)| id).collect();
        ids.into_iter().filter_map(|id| self.grant(id)).collect()
    }

    fn grant(&self, id: GrantId) -> Option<api::Grant> {
        let connections = self.shared.connections(id);
        let state = self.shared.lock();
        let grant = state.ledger.grant(id)?;
        let regions: Vec<api::Region> =
            grant.regions.iter().filter_map(|region| state.region(*region)).collect();
        Some(api::Grant {
            id,
            allocation: grant.allocation,
            name: grant.name.clone(),
            epoch: grant.epoch,
            regions: grant.regions.clone(),
            len: ByteSize(regions.iter().map(|region| region.len.0).sum()),
            resident: ByteSize(regions.iter().map(|region| region.resident.0).sum()),
            connections,
        })
    }

    /// Deletes a grant: shuts its clients out, which it blocks for, and has its regions cleared.
    /// One that is not there counts as deleted.
    ///
    /// # Errors
    /// When another order on it takes too long.
    pub fn delete_grant(&self, id: GrantId) -> Result<(), TableError> {
        let mut state = self.shared.turn(id)?;
        state.ledger.set_closing(id, true);
        let lease = state.leases.remove(&id);
        drop(state);
        if let Some(lease) = lease {
            // Who still has it mapped sees zeros soon, and what was shared is never lent again.
            self.shared.shut_out(&lease);
        }
        self.shared.lock().ledger.delete_grant(id);
        self.shared.tell();
        Ok(())
    }

    /// The lease of the grant with this key, if it lets clients in.
    pub fn open(&self, key: &GrantKey) -> Option<Arc<Lease>> {
        let state = self.shared.lock();
        let id = state.ledger.find(key)?;
        state.leases.get(&id).filter(|lease| lease.is_alive()).cloned()
    }

    /// The same for a process that is given the memory itself; none where that cannot be.
    pub fn open_shared(&self, key: &GrantKey) -> Option<(GrantId, Vec<SharedRegion>)> {
        if !self.shared.arena.is_shareable() {
            return None;
        }
        let state = self.shared.lock();
        let id = state.ledger.find(key)?;
        let lease = state.leases.get(&id).filter(|lease| lease.is_alive())?;
        // Under the lock: once the grant is closing, it is known which of its regions are shared.
        Some((id, lease.regions().iter().map(|memory| (memory.share(), memory.len())).collect()))
    }

    /// Sums, for the status: totals, capacity, free memory, resident memory of granted regions, and
    /// the numbers of regions in grants and of grants.
    pub fn summary(&self) -> Summary {
        let state = self.shared.lock();
        let granted =
            state.ledger.regions().filter(|(_, region)| region.state.name() == RegionState::Granted);
        Summary {
            totals: state.ledger.totals(),
            capacity: state.ledger.capacity(),
            free: state.ledger.free(),
            resident: granted
                .clone()
                .filter_map(|(_, region)| Some(region.memory.as_ref()?.resident()))
                .sum(),
            regions: granted.count(),
            grants: state.ledger.grants().count(),
        }
    }
}

/// The memory of a lease whose clients were shut out, in order, and why not all of it could be moved
/// that had to be.
#[derive(Default)]
struct Moved {
    memories: Vec<Arc<Memory>>,
    error: Option<ArenaError>,
}

/// A region's descriptor and length in bytes.
pub type SharedRegion = (Arc<std::os::fd::OwnedFd>, u64);

/// What a table holds; bytes where nothing else is said.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// By use.
    pub totals: Totals,
    /// What is lent in all.
    pub capacity: u64,
    /// What may still be asked for.
    pub free: u64,
    /// What granted regions really hold.
    pub resident: u64,
    /// Regions in grants, as a number.
    pub regions: usize,
    /// Grants, as a number.
    pub grants: usize,
}

fn check_order(order: &Reserve) -> Result<(), Refusal> {
    let invalid = |line: &str| Err(Refusal::Invalid(line.to_owned()));
    if !is_region_len(order.region_len.0) {
        return invalid("a region's size is a power of two from 16MiB to 64GiB");
    }
    if order.count == 0 || order.count > COUNT_MAX {
        return invalid("ask for 1 to 4096 regions at once");
    }
    if order.ttl.0.is_zero() || order.ttl.0 > TTL_MAX {
        return invalid("a reservation lives for more than nothing and at most 1h");
    }
    Ok(())
}

impl State {
    fn region(&self, id: RegionId) -> Option<api::Region> {
        use crate::ledger::State::{Clearing, Granted, Ready, Reserved};
        let region = self.ledger.region(id)?;
        let (allocation, grant) = match region.state {
            Ready | Clearing => (None, None),
            Reserved { allocation, .. } => (Some(allocation), None),
            Granted { allocation, grant } => (Some(allocation), Some(grant)),
        };
        Some(api::Region {
            id,
            len: ByteSize(region.len),
            state: region.state.name(),
            allocation,
            grant,
            // A region without memory at hand is being cleared right now.
            resident: ByteSize(region.memory.as_ref().map_or(region.len, |memory| memory.resident())),
        })
    }

    /// Ends a change of epoch. Where memory could not be moved away from a process that has it
    /// mapped, the grant stays closed to everyone until the order is repeated with success.
    fn renew(&mut self, id: GrantId, commit: &Commit, moved: Moved) -> Result<(), ArenaError> {
        let regions = self.ledger.grant(id).map(|grant| grant.regions.clone()).unwrap_or_default();
        for (region, memory) in regions.into_iter().zip(moved.memories) {
            self.to_fault.push_back(memory.clone());
            self.ledger.replace_memory(region, memory);
        }
        self.add_lease(id);
        match moved.error {
            None => {
                self.ledger.renew(id, commit);
                Ok(())
            }
            Some(error) => {
                self.leases.values().filter(|lease| lease.grant() == id).for_each(|lease| lease.revoke());
                self.ledger.set_closing(id, false);
                Err(error)
            }
        }
    }

    fn add_lease(&mut self, id: GrantId) {
        let Some(grant) = self.ledger.grant(id) else { return };
        let memories: Vec<Arc<Memory>> =
            grant.regions.iter().filter_map(|region| self.ledger.region(*region)?.memory.clone()).collect();
        self.leases.insert(id, Arc::new(Lease::new(id, memories)));
    }
}

impl Shared {
    /// The state is whole whenever the lock is free, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something changes, and not beyond `limit`.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Instant,
    ) -> Result<MutexGuard<'a, State>, TableError> {
        let left = limit.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TableError::Busy);
        }
        Ok(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    /// The state, when no other order is changing the grant.
    fn turn(&self, id: GrantId) -> Result<MutexGuard<'_, State>, TableError> {
        let limit = Instant::now() + TURN_LIMIT;
        let mut state = self.lock();
        while state.ledger.grant(id).is_some_and(|grant| grant.closing) {
            state = self.wait(state, limit)?;
        }
        Ok(state)
    }

    /// Grants changed: wakes who waits for that.
    fn tell(&self) {
        self.changed.notify_all();
        self.news.notify_one();
    }

    fn connections(&self, id: GrantId) -> u64 {
        let fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fences.iter().map(|fence| fence.connections(id.as_u128()) as u64).sum()
    }

    /// Ends a lease and shuts its clients out. How many may still have its memory mapped.
    fn shut_out(&self, lease: &Lease) -> usize {
        lease.revoke();
        let fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fences.iter().map(|fence| fence.close_group(lease.grant().as_u128())).sum()
    }

    /// Ends a lease, shuts its clients out, and if one did not let go, moves the memory to where it
    /// cannot reach it: a process cannot be made to unmap, and its late writes must not land.
    fn move_away(&self, lease: &Lease) -> Moved {
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

    /// Makes regions and faults them in for as long as an order may take.
    fn make(&self, count: usize, len: u64) -> Result<Vec<Arc<Memory>>, ArenaError> {
        let until = Instant::now() + FAULT_LIMIT;
        let made = (0..count).map(|_| self.arena.make(len).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        if made.is_empty() {
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

#[cfg(test)]
mod tests;
