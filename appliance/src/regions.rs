//! The table of regions and grants: the ledger, the memory behind it, and the clients that are shut
//! out before a grant changes. Only the control plane and new connections come here.

mod fence;
mod shared;
mod state;
mod worker;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::appliance::{self as api, Commit, RegionState, Reserve};
use xpm_protocol::units::{ByteSize, is_region_len};
use xpm_protocol::{GrantId, GrantKey, RegionId};

pub use self::fence::Fence;
use self::fence::Moved;
use self::shared::{Shared, TURN_LIMIT};
use self::state::State;
use crate::arena::{Arena, ArenaError, Memory};
use crate::keep::{Keeper, Returned};
use crate::lease::Lease;
use crate::ledger::{Change, Ledger, NoPlan, Plan, Refusal, Stock, Totals};

/// Most regions that one order asks for.
const COUNT_MAX: u32 = 4096;
/// Longest time that a reservation lives.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// Threads that make, fault in and clear regions, at most: more of them only wait for memory.
const WORKERS_MAX: usize = 4;

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

impl Table {
    /// An empty table of `capacity` bytes, and the threads that keep its stock.
    ///
    /// # Errors
    /// When the kernel gives no random number or thread.
    pub fn start(arena: Arena, capacity: u64, stock: Stock) -> io::Result<Table> {
        Table::start_with(arena, capacity, stock, Keeper::none(), Returned::default())
    }

    /// The same with what an earlier life left, and what is recorded for the next one.
    ///
    /// # Errors
    /// When the kernel gives no random number or thread.
    pub fn start_with(
        arena: Arena,
        capacity: u64,
        stock: Stock,
        keeper: Keeper,
        returned: Returned,
    ) -> io::Result<Table> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
        let mut state = State {
            ledger: Ledger::new(capacity, stock, xpm_control::random::u128()?),
            leases: HashMap::new(),
            orders_waiting: 0,
            leaving: VecDeque::new(),
            to_fault: VecDeque::new(),
            stock_again: None,
            clear_again: None,
        };
        state.take_back(returned);
        keeper.begin();
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            arena,
            fences: Mutex::new(Vec::new()),
            news: Notify::new(),
            workers,
            keeper,
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

    /// Tells the fences of the grants that were taken back. After they were added, before clients come.
    pub fn open_returned(&self) {
        let ids: Vec<GrantId> = self.shared.lock().ledger.grants().map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.shared.opened(id));
    }

    /// Ends well: what is lent stays for the next life, where it can. Clients must not be let in any more;
    /// those that are there are shut out where that is needed. Blocks.
    pub fn end(&self) {
        self.shared.keeper.end();
        if self.shared.arena.file().is_none() {
            return;
        }
        self.shared.close_connections();
        match self.shared.keeper.close() {
            Ok(true) => {}
            Ok(false) => tracing::warn!("what is lent outlives this process, but no restart of this machine"),
            Err(error) => tracing::error!("what is lent outlives no restart of this machine: {error}"),
        }
    }

    /// Whether what is lent outlives this process, if it is started again.
    pub fn is_kept(&self) -> bool {
        self.shared.keeper.keeps()
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
        let (plan, leaving) = self.plan(order)?;
        let made = match self.shared.make(plan.make, len, leaving) {
            Ok(made) => made,
            Err(error) => {
                self.shared.lock().ledger.abandon(plan);
                self.shared.changed.notify_all();
                return Err(error.into());
            }
        };
        let mut state = self.shared.lock();
        state.to_fault.extend(made.iter().map(Arc::downgrade));
        let ids = state.ledger.reserved(plan, made, Instant::now() + order.ttl.0);
        let regions = ids.iter().filter_map(|id| state.region(*id)).collect();
        drop(state);
        self.shared.changed.notify_all();
        Ok(regions)
    }

    /// How the order is met, and how many bytes are on their way out.
    fn plan(&self, order: &Reserve) -> Result<(Plan<Arc<Memory>>, u64), TableError> {
        let limit = Instant::now() + TURN_LIMIT;
        let mut state = self.shared.lock();
        loop {
            state.ledger.expire(Instant::now());
            match state.ledger.plan(order.allocation, order.count as usize, order.region_len.0) {
                Ok(mut plan) => {
                    state.leaving.extend(plan.leaving.drain(..));
                    self.shared.changed.notify_all();
                    return Ok((plan, state.ledger.leaving()));
                }
                Err(NoPlan::Refused(refusal)) => return Err(refusal.into()),
                Err(NoPlan::Wait) => {
                    if Instant::now() >= limit {
                        return Err(TableError::Busy);
                    }
                    state.orders_waiting += 1;
                    state = self.shared.sleep(state, TURN_LIMIT);
                    state.orders_waiting -= 1;
                }
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
        let change = state.ledger.commit(id, commit)?;
        match change {
            Change::Nothing if commit.descriptor.is_none() => {}
            Change::Nothing => self.shared.record(&state, id),
            Change::Made => {
                state.add_lease(id);
                self.shared.record(&state, id);
            }
            Change::Renew => {
                let lease = state.leases.get(&id).cloned();
                drop(state);
                let moved = lease.map_or_else(Moved::default, |lease| self.shared.move_away(&lease));
                state = self.shared.lock();
                let has_moved = moved.has_moved;
                let renewed = state.renew(id, commit, moved);
                match has_moved {
                    true => self.shared.record_sharing(&state, id),
                    false => self.shared.record(&state, id),
                }
                // Also when it failed: others may take their turn.
                self.shared.changed.notify_all();
                renewed?;
            }
        }
        drop(state);
        if !matches!(change, Change::Nothing) {
            self.shared.opened(id);
        }
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
            descriptor: grant.descriptor.clone(),
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
        let mut state = self.shared.lock();
        // Before its memory is used for anything else.
        self.shared.keeper.delete(id);
        state.ledger.delete_grant(id);
        drop(state);
        self.shared.tell();
        Ok(())
    }

    /// The lease of a grant, if it lets clients in.
    pub fn lease(&self, id: GrantId) -> Option<Arc<Lease>> {
        let state = self.shared.lock();
        state.leases.get(&id).filter(|lease| lease.is_alive()).cloned()
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
        // A process that has it mapped can exchange its pages, which a device would not see.
        self.shared.sharing(id);
        // Under the lock: once the grant is closing, it is known which of its regions are shared.
        let is_new = lease.regions().iter().any(|memory| !memory.is_shared());
        let regions = lease.regions().iter().map(|memory| (memory.share(), memory.len())).collect();
        if is_new {
            // Also in the next life.
            self.shared.record_sharing(&state, id);
        }
        Some((id, regions))
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

#[cfg(test)]
mod tests;
