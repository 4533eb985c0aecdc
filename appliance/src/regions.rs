//! The table of regions and grants: the ledger, the memory behind it, and the fences that shut clients out
//! before a grant changes. Used by the control plane and by new connections only.

mod fence;
mod holders;
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
use xpm_protocol::units::{ByteSize, PAGE_LEN, is_region_len};
use xpm_protocol::{GrantId, GrantKey, RegionId};

pub use self::fence::Fence;
use self::fence::Moved;
use self::shared::{Shared, TURN_LIMIT};
use self::state::State;
use crate::arena::{Arena, ArenaError, Memory};
use crate::keep::{Keeper, Returned};
use crate::lease::Lease;
use crate::ledger::{Change, Ledger, NoPlan, Plan, Refusal, Stock, Totals};
use crate::warnings::{Topic, Warnings};

/// Most regions of one order.
const COUNT_MAX: u32 = 4096;
/// Memory that this process itself may need next, in bytes.
const LIMIT_LEAST: u64 = 1 << 20;
/// The part of a cgroup's limit that is never lent, in bytes.
const LIMIT_MARGIN: u64 = 64 << 20;
/// Longest lifetime of a reservation.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// Most threads that make, fault in and clear regions: more threads would only wait for memory.
const WORKERS_MAX: usize = 4;

/// Why an order is refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The ledger refuses the order.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host has no memory for the order.
    #[error("this appliance cannot make the memory ready")]
    Memory(#[from] ArenaError),
    /// A process that has the memory of a grant mapped may keep it mapped, and the memory cannot be moved
    /// away from it.
    #[error(
        "a process on this host was given the memory of the grant and may have it mapped, and the memory cannot be moved \
         away from it; free memory on this host and try again, or take the allocation with --force --lose: then its new \
         owner gets zeros in place of that memory"
    )]
    Unmovable(#[source] ArenaError),
    /// As [`TableError::Unmovable`], found when a part of the memory was moved already.
    #[error(
        "a process on this host was given the memory of the grant and may have it mapped, and not all of the memory could \
         be moved away from it: nobody can use the grant until this is repeated; free memory on this host first, or use \
         --force --lose: then its new owner gets zeros in place of what could not be moved"
    )]
    HalfMoved(#[source] ArenaError),
    /// Another order on the same grant or memory takes too long.
    #[error("another order on the same grant or memory is still running: try again")]
    Busy,
}

impl TableError {
    /// The kind of error that the control interface returns.
    pub fn kind(&self) -> ErrorKind {
        match self {
            TableError::Refused(Refusal::NoSpace { .. })
            | TableError::Memory(_)
            | TableError::Unmovable(_) => ErrorKind::NoSpace,
            TableError::Refused(Refusal::UnknownRegion(_)) => ErrorKind::NotFound,
            TableError::Refused(Refusal::InGrant { .. }) => ErrorKind::InUse,
            TableError::Refused(Refusal::Conflict(_)) => ErrorKind::Conflict,
            TableError::Refused(Refusal::Invalid(_)) => ErrorKind::Invalid,
            TableError::HalfMoved(_) | TableError::Busy => ErrorKind::Unavailable,
        }
    }
}

/// The table. Clones share the same table; its threads end some time after the last clone is dropped.
#[derive(Clone)]
pub struct Table {
    shared: Arc<Shared>,
}

impl Table {
    /// An empty table of `capacity` bytes, and the threads that keep its stock.
    ///
    /// # Errors
    /// When the kernel provides no random number or thread.
    pub fn start(arena: Arena, capacity: u64, stock: Stock) -> io::Result<Table> {
        Table::start_with(arena, capacity, stock, Keeper::none(), Returned::default())
    }

    /// As [`Table::start`], with the state that an earlier life left, and a keeper that records changes for
    /// the next life.
    ///
    /// # Errors
    /// When the kernel provides no random number or thread.
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
            holders: HashMap::new(),
            absent: HashMap::new(),
            orders_waiting: 0,
            leaving: VecDeque::new(),
            to_fault: VecDeque::new(),
            stock_again: None,
            clear_again: None,
        };
        let warnings = Warnings::default();
        for line in &returned.warnings {
            warnings.add(line.clone());
        }
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
            warnings,
        });
        for number in 0..workers {
            worker::spawn(number, Arc::downgrade(&shared))?;
        }
        Ok(Table { shared })
    }

    /// Adds a fence, which shuts clients out before a grant changes.
    pub fn add_fence(&self, fence: Arc<dyn Fence>) {
        self.shared.fences.lock().unwrap_or_else(PoisonError::into_inner).push(fence);
    }

    /// Notifies the fences of the grants that were taken back. To be called after the fences were added,
    /// before clients connect.
    pub fn open_returned(&self) {
        let ids: Vec<GrantId> = self.shared.lock().ledger.grants().map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.shared.opened(id));
    }

    /// Ends the table for a restart: lent memory stays for the next life where possible. The caller no longer
    /// admits clients; present ones are shut out where that is needed. Blocks.
    pub fn end(&self) {
        self.shared.keeper.end();
        if self.shared.arena.file().is_none() {
            return;
        }
        self.shared.close_connections();
        match self.shared.keeper.close() {
            Ok(true) => {}
            Ok(false) => tracing::warn!("lent memory outlives this process, but no restart of this machine"),
            Err(error) => tracing::error!("lent memory does not outlive a restart of this machine: {error}"),
        }
    }

    /// Whether lent memory outlives this process if the process is started again.
    pub fn is_kept(&self) -> bool {
        self.shared.keeper.keeps()
    }

    /// The source of the memory.
    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }

    /// Resolves when grants have changed since the last call.
    pub async fn news(&self) {
        self.shared.news.notified().await;
    }

    /// Reserves regions, all zeros. Regions that are not ready are made now, which blocks for up to some
    /// seconds.
    ///
    /// # Errors
    /// When the order contradicts itself, or there is not enough memory.
    pub fn reserve(&self, order: &Reserve) -> Result<Vec<api::Region>, TableError> {
        let len = order.region_len.0;
        check_order(order)?;
        // Not even ready regions are granted when the next page could get this process killed.
        self.shared.arena.check_limits(LIMIT_LEAST)?;
        let (plan, leaving) = self.plan(order)?;
        let made = match self.make(&plan, len, leaving) {
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

    /// Makes the regions that the order lacks. With a backing file, leaving regions of other sizes free their
    /// places first; if the free space is too fragmented even then, all ready regions leave.
    fn make(&self, plan: &Plan<Arc<Memory>>, len: u64, leaving: u64) -> Result<Vec<Arc<Memory>>, ArenaError> {
        if self.shared.arena.file().is_none() || plan.make == 0 {
            return self.shared.make(plan.make, len, leaving);
        }
        self.shared.wait_left();
        match self.shared.make(plan.make, len, 0) {
            Err(ArenaError::Fragmented(_)) => {
                let mut state = self.shared.lock();
                let ready = state.ledger.take_ready();
                state.leaving.extend(ready);
                drop(state);
                self.shared.changed.notify_all();
                self.shared.wait_left();
                self.shared.make(plan.make, len, 0)
            }
            made => made,
        }
    }

    /// Plans the order. Also returns the number of bytes that are leaving.
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

    /// Lines for the operator; see [`api::Status::warnings`].
    pub fn warnings(&self) -> Vec<String> {
        self.shared.warnings.lines()
    }

    /// Reports that some of these bytes of a grant could not be accessed, in the log and to the allocator.
    pub fn found_bad(&self, lease: &Lease, offset: u64, len: u64) {
        let pages = lease.find_bad(offset, len);
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return };
        let grant = self
            .shared
            .lock()
            .ledger
            .grant(lease.grant())
            .map(|grant| (grant.name.clone(), grant.allocation));
        let Some((name, allocation)) = grant else { return };
        let line = format!(
            "memory of `{name}` (allocation {allocation}) is bad: {} pages from byte {first} to byte {} of grant {} are gone, and \
             reads of them are I/O errors; all else goes on",
            pages.len(),
            last + PAGE_LEN - 1,
            lease.grant()
        );
        tracing::error!("{line}");
        self.shared.warnings.add(line);
        self.shared.news.notify_one();
    }

    /// Checks whether the limits of the cgroups still allow the lent memory, and logs changes. Returns how
    /// much of the free memory can be lent now, in bytes.
    pub fn look_at_limits(&self) -> u64 {
        let Summary { totals, capacity, free, resident, .. } = self.summary();
        let missing = capacity.saturating_sub(resident + totals.ready + totals.reserved);
        match self.shared.arena.check_limits(missing) {
            Ok(()) => {
                if self.shared.warnings.clear(Topic::Limit) {
                    tracing::info!("the limits of this process's memory allow --memory again");
                    self.shared.news.notify_one();
                }
                free
            }
            Err(error) => {
                let line = format!("not all of --memory {} can be lent: {error}", ByteSize(capacity));
                if self.shared.warnings.set(Topic::Limit, line.clone()) {
                    tracing::error!("{line}");
                    self.shared.news.notify_one();
                }
                let left = if let ArenaError::Limit { available, .. } = error { available } else { 0 };
                free.min(totals.ready + left.saturating_sub(LIMIT_MARGIN))
            }
        }
    }

    /// All regions.
    pub fn regions(&self) -> Vec<api::Region> {
        let state = self.shared.lock();
        state.ledger.regions().filter_map(|(id, _)| state.region(id)).collect()
    }

    /// Deletes a reserved region. A region that does not exist counts as deleted.
    ///
    /// # Errors
    /// When the region is in a grant.
    pub fn delete_region(&self, id: RegionId) -> Result<(), TableError> {
        self.shared.lock().ledger.delete_region(id)?;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Makes a grant of reserved regions, or raises the epoch of a grant, for which its clients are shut out
    /// first. Blocks for that, and for about a second per GiB of memory that was shared.
    ///
    /// # Errors
    /// When the commit contradicts itself or the present state, or shared memory cannot be moved.
    pub fn commit(&self, id: GrantId, commit: &Commit) -> Result<api::Grant, TableError> {
        self.commit_with(id, commit, false)
    }

    /// As [`Table::commit`]; with `lose`, shared memory that cannot be moved is replaced by zeros.
    ///
    /// # Errors
    /// As [`Table::commit`].
    pub fn commit_with(&self, id: GrantId, commit: &Commit, lose: bool) -> Result<api::Grant, TableError> {
        let mut state = self.shared.turn(id)?;
        state.ledger.expire(Instant::now());
        let change = state.ledger.commit(id, commit)?;
        let mut lost = 0;
        match change {
            Change::Nothing if commit.descriptor.is_none() => {}
            Change::Nothing => self.shared.record(&state, id),
            Change::Made => {
                state.add_lease(id);
                self.shared.record(&state, id);
            }
            Change::Renew => {
                let lease = state.leases.get(&id).cloned();
                let others = state.outdated_with(id, commit.epoch);
                if !lose && let Some(Err(error)) = lease.as_ref().map(|lease| self.shared.can_move(lease)) {
                    // No client was shut out yet, and none has seen the closing state, so the present owner
                    // continues.
                    state.ledger.set_closing(id, false);
                    return Err(TableError::Unmovable(error));
                }
                drop(state);
                for lease in &others {
                    self.shared.shut_out(lease);
                }
                let moved = lease.map_or_else(Moved::default, |lease| self.shared.move_away(&lease, lose));
                state = self.shared.lock();
                let has_moved = moved.has_moved || !others.is_empty();
                lost = moved.lost;
                let renewed = state.renew(id, commit, moved);
                match has_moved {
                    true => self.shared.record_sharing(&state, id),
                    false => self.shared.record(&state, id),
                }
                // Also after a failure: other orders may take their turn.
                self.shared.changed.notify_all();
                renewed.map_err(TableError::HalfMoved)?;
            }
        }
        drop(state);
        if !matches!(change, Change::Nothing) {
            self.shared.opened(id);
        }
        self.shared.tell();
        if lost > 0 {
            tracing::warn!(
                "grant {id} of `{}` has zeros in place of {} that a process of its old owner may have mapped and that could \
                 not be moved",
                commit.name,
                ByteSize(lost)
            );
        }
        let lost = (lost > 0).then_some(ByteSize(lost));
        self.grant(id).map(|grant| api::Grant { lost, ..grant }).ok_or(TableError::Busy)
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
            lost: None,
        })
    }

    /// Deletes a grant: shuts its clients out, which blocks, and lets its regions be cleared. A grant that
    /// does not exist counts as deleted.
    ///
    /// # Errors
    /// When another order on the grant takes too long.
    pub fn delete_grant(&self, id: GrantId) -> Result<(), TableError> {
        let mut state = self.shared.turn(id)?;
        state.ledger.set_closing(id, true);
        let lease = state.leases.remove(&id);
        drop(state);
        if let Some(lease) = lease {
            // A process that still has the memory mapped will see zeros soon, and shared memory is never lent
            // again.
            self.shared.shut_out(&lease);
        }
        let mut state = self.shared.lock();
        // Recorded before the memory is used for another purpose.
        self.shared.keeper.delete(id);
        state.ledger.delete_grant(id);
        state.holders.remove(&id);
        state.absent.remove(&id);
        drop(state);
        self.shared.tell();
        Ok(())
    }

    /// The lease of a grant, if the grant admits clients.
    pub fn lease(&self, id: GrantId) -> Option<Arc<Lease>> {
        let state = self.shared.lock();
        state.leases.get(&id).filter(|lease| lease.is_alive()).cloned()
    }

    /// The lease of the grant with this key, if the grant admits clients.
    pub fn open(&self, key: &GrantKey) -> Option<Arc<Lease>> {
        let state = self.shared.lock();
        let id = state.ledger.find(key)?;
        state.leases.get(&id).filter(|lease| lease.is_alive()).cloned()
    }

    /// As [`Table::open`], for a process that receives the memory itself; none where that is not possible.
    pub fn open_shared(&self, key: &GrantKey) -> Option<(GrantId, Vec<SharedRegion>)> {
        if !self.shared.arena.is_shareable() {
            return None;
        }
        let state = self.shared.lock();
        let id = state.ledger.find(key)?;
        let lease = state.leases.get(&id).filter(|lease| lease.is_alive())?;
        // RDMA access ends first: a process that has the memory mapped can free its pages, and a device would continue
        // to use the old ones.
        self.shared.sharing(id);
        // Under the lock: when the grant begins to close, it is known which of its regions are shared.
        let is_new = lease.regions().iter().any(|memory| !memory.is_shared());
        let regions = lease.regions().iter().map(|memory| (memory.share(), memory.len())).collect();
        if is_new {
            // So that the next life knows it, too.
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

/// Sums of a table, in bytes unless the field says otherwise.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// By use.
    pub totals: Totals,
    /// Memory that the appliance lends in all.
    pub capacity: u64,
    /// Memory that can still be reserved.
    pub free: u64,
    /// Resident memory of granted regions.
    pub resident: u64,
    /// Number of regions in grants.
    pub regions: usize,
    /// Number of grants.
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
