//! The ledger: the use of each region. Pure bookkeeping; the caller passes the time and the memory that it
//! made.
//!
//! Invariants, kept by each operation:
//! * the lengths of all regions, and of those being made, are in sum no more than the capacity. If an earlier life
//!   lent more, no region is added until the sum is within the capacity. Regions that leave to make room for others
//!   are gone before the others can be granted;
//! * a region in a grant is in one grant, or also in the grant that takes it over, and all regions of a grant
//!   exist;
//! * a deleted grant is never made again, because an order to make it may still be in transit;
//! * a region that was in a grant becomes usable again only by [`Ledger::cleared`], under a new id.

mod grants;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use xpm_protocol::api::appliance::RegionState;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{AllocationId, GrantId, RegionId};

pub use self::grants::{Change, Grant};

/// Why an order is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is not enough free memory.
    #[error("{} is asked for and {} is free here: ask for less, or delete what is not needed", ByteSize(*.asked), ByteSize(*.free))]
    NoSpace {
        /// The requested memory, in bytes.
        asked: u64,
        /// The free memory, in bytes.
        free: u64,
    },
    /// The region does not exist, or its reservation has expired.
    #[error("there is no region {0} here, or its reservation is over: reserve again")]
    UnknownRegion(RegionId),
    /// A region is in a grant.
    #[error("region {region} belongs to grant {grant}: delete the grant")]
    InGrant {
        /// The region.
        region: RegionId,
        /// The grant that it is in.
        grant: GrantId,
    },
    /// The order contradicts the present state.
    #[error("{0}")]
    Conflict(String),
    /// The order contradicts itself.
    #[error("{0}")]
    Invalid(String),
}

/// One region, with its memory `M`.
#[derive(Debug)]
pub struct Region<M> {
    /// Length in bytes.
    pub len: u64,
    /// Its memory; none while it is being cleared or dropped.
    pub memory: Option<M>,
    /// Its use.
    pub state: State,
}

/// The use of a region.
///
/// ```text
///            made ahead of need
///                   |
///                   v    reserve             commit
///       +-------> Ready ---------> Reserved ---------> Granted
///       |           |                 |                   |
///       | cleared   | no longer       | expired, or       | grant deleted, or moved away
///       | (kept)    | needed          | region deleted    | from memory that was shared
///       |           v                 v                   v
///       +-------- Clearing <----------+-------------------+
///                   |
///                   v cleared and not kept, or the memory was shared: dropped
/// ```
///
/// Only `Clearing` leads back to `Ready`, so a client never receives the content of another client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Faulted in and all zeros; belongs to no client.
    Ready,
    /// Belongs to an allocation until the reservation expires.
    Reserved {
        /// The allocation.
        allocation: AllocationId,
        /// The expiry of the reservation.
        until: Instant,
    },
    /// In a grant.
    Granted {
        /// The allocation.
        allocation: AllocationId,
        /// The grant.
        grant: GrantId,
    },
    /// To be cleared or dropped.
    Clearing,
}

impl State {
    /// The name of the state in the control interface.
    pub fn name(self) -> RegionState {
        match self {
            State::Ready => RegionState::Ready,
            State::Reserved { .. } => RegionState::Reserved,
            State::Granted { .. } => RegionState::Granted,
            State::Clearing => RegionState::Clearing,
        }
    }
}

/// Sums of region lengths by use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// In grants.
    pub granted: u64,
    /// Reserved, or being made for a reservation.
    pub reserved: u64,
    /// Deleted, and not cleared or dropped yet.
    pub clearing: u64,
    /// Ready.
    pub ready: u64,
    /// Being made for the stock.
    pub stocking: u64,
}

impl Totals {
    /// Memory that exists or is being made.
    pub fn used(self) -> u64 {
        self.granted + self.reserved + self.clearing + self.ready + self.stocking
    }
}

/// The stock: memory that is kept ready ahead of need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// Size of the regions, in bytes.
    pub region_len: u64,
    /// The size of the stock in bytes; a multiple of the region size.
    pub target: u64,
}

/// How a reservation is to be satisfied.
#[derive(Debug)]
pub struct Plan<M> {
    allocation: AllocationId,
    region_len: u64,
    /// Ready regions that the plan has taken.
    ready: Vec<RegionId>,
    /// Number of regions that have to be made.
    pub make: usize,
    /// Ready regions of other sizes that make room, with their lengths. The caller drops them, and reports
    /// each dropped one by [`Ledger::left`].
    pub leaving: Vec<(M, u64)>,
}

/// Why a reservation cannot be planned now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlan {
    /// Free memory is being made into stock: try again when that is done.
    Wait,
    /// The reservation is refused.
    Refused(Refusal),
}

/// All regions and grants of an appliance.
#[derive(Debug)]
pub struct Ledger<M> {
    capacity: u64,
    stock: Stock,
    regions: BTreeMap<RegionId, Region<M>>,
    grants: BTreeMap<GrantId, Grant>,
    gone: grants::Gone,
    totals: Totals,
    /// Memory that was dropped to make room for others and is not gone yet, in bytes.
    leaving: u64,
    ids: Ids,
    /// The region that was returned last by [`Ledger::take_clearing`].
    last_clearing: RegionId,
}

/// Generates region ids: each differs from all others of this life, and, as the ids start at a random number,
/// from those of other lives.
#[derive(Debug)]
struct Ids {
    start: u128,
    count: u128,
}

impl Ids {
    fn next(&mut self) -> RegionId {
        /// Odd, so that its multiples repeat only after 2^128; and large, so that ids look different.
        const STRIDE: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
        self.count += 1;
        RegionId::from_u128(self.start.wrapping_add(self.count.wrapping_mul(STRIDE)))
    }
}

impl<M: Clone> Ledger<M> {
    /// An empty ledger of `capacity` bytes; region ids start at `random`.
    pub fn new(capacity: u64, stock: Stock, random: u128) -> Ledger<M> {
        Ledger {
            capacity,
            stock,
            regions: BTreeMap::new(),
            grants: BTreeMap::new(),
            gone: grants::Gone::default(),
            totals: Totals::default(),
            leaving: 0,
            ids: Ids { start: random, count: 0 },
            last_clearing: RegionId::from_u128(0),
        }
    }

    /// Memory that the appliance lends in all, in bytes: its capacity, or the memory lent already if that is
    /// more after the capacity was lowered.
    pub fn capacity(&self) -> u64 {
        let Totals { granted, reserved, clearing, .. } = self.totals;
        self.capacity.max(granted + reserved + clearing)
    }

    /// The stock's parameters.
    pub fn stock(&self) -> Stock {
        self.stock
    }

    /// The present sums.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Memory that can still be reserved, in bytes.
    pub fn free(&self) -> u64 {
        let Totals { granted, reserved, clearing, .. } = self.totals;
        self.capacity.saturating_sub(granted + reserved + clearing)
    }

    /// All regions.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, &Region<M>)> + Clone {
        self.regions.iter().map(|(id, region)| (*id, region))
    }

    /// A region.
    pub fn region(&self, id: RegionId) -> Option<&Region<M>> {
        self.regions.get(&id)
    }

    /// Plans a reservation: takes ready regions of the length, and counts the regions that have to be made.
    ///
    /// # Errors
    /// When too little memory is free, or when that cannot be determined yet.
    pub fn plan(
        &mut self,
        allocation: AllocationId,
        count: usize,
        region_len: u64,
    ) -> Result<Plan<M>, NoPlan> {
        let free = self.free();
        let refused = |asked| NoPlan::Refused(Refusal::NoSpace { asked, free });
        let asked = (count as u64).checked_mul(region_len).ok_or_else(|| refused(u64::MAX))?;
        if asked > free {
            return Err(refused(asked));
        }
        let fits = |region: &Region<M>| region.state == State::Ready && region.len == region_len;
        let ready: Vec<RegionId> =
            self.regions().filter(|(_, region)| fits(region)).map(|(id, _)| id).take(count).collect();
        let make = count - ready.len();
        let leaving = self.make_room(make as u64 * region_len, region_len)?;
        for id in &ready {
            // Without an expiry until the whole reservation is complete.
            self.set_state(*id, State::Reserved { allocation, until: far_future() });
        }
        self.totals.reserved += make as u64 * region_len;
        Ok(Plan { allocation, region_len, ready, make, leaving })
    }

    /// Removes ready regions of other lengths until `needed` bytes of the capacity are unused.
    fn make_room(&mut self, needed: u64, region_len: u64) -> Result<Vec<(M, u64)>, NoPlan> {
        let unused = self.capacity.saturating_sub(self.totals.used());
        let (mut room, mut victims) = (unused, Vec::new());
        for (id, region) in &self.regions {
            if room >= needed {
                break;
            }
            if region.state == State::Ready && region.len != region_len {
                room += region.len;
                victims.push(*id);
            }
        }
        if room < needed {
            return Err(NoPlan::Wait);
        }
        let removed = victims.into_iter().filter_map(|id| self.remove(id));
        let leaving: Vec<(M, u64)> =
            removed.filter_map(|region| Some((region.memory?, region.len))).collect();
        self.leaving += leaving.iter().map(|(_, len)| len).sum::<u64>();
        Ok(leaving)
    }

    /// Removes all ready regions; the caller drops them like those of [`Plan::leaving`].
    pub fn take_ready(&mut self) -> Vec<(M, u64)> {
        let ready = self.regions().filter(|(_, region)| region.state == State::Ready);
        let ids: Vec<RegionId> = ready.map(|(id, _)| id).collect();
        let removed = ids.into_iter().filter_map(|id| self.remove(id));
        let leaving: Vec<(M, u64)> =
            removed.filter_map(|region| Some((region.memory?, region.len))).collect();
        self.leaving += leaving.iter().map(|(_, len)| len).sum::<u64>();
        leaving
    }

    /// Memory that leaves to make room, in bytes. While this is not 0, no region is granted, and memory made
    /// in its place is not faulted in.
    pub fn leaving(&self) -> u64 {
        self.leaving
    }

    /// Reports that memory of this length which made room is gone.
    pub fn left(&mut self, len: u64) {
        self.leaving -= len;
    }

    /// Completes a reservation: the planned regions are made. Returns the ids of the regions, in order.
    pub fn reserved(&mut self, plan: Plan<M>, made: Vec<M>, until: Instant) -> Vec<RegionId> {
        debug_assert_eq!(made.len(), plan.make, "as many as planned");
        let state = State::Reserved { allocation: plan.allocation, until };
        let mut ids = plan.ready;
        ids.iter().for_each(|id| self.set_state(*id, state));
        self.totals.reserved -= plan.make as u64 * plan.region_len;
        for memory in made {
            let id = self.ids.next();
            self.insert(id, Region { len: plan.region_len, memory: Some(memory), state });
            ids.push(id);
        }
        ids
    }

    /// Cancels a reservation whose regions could not all be made; those that were made are gone.
    pub fn abandon(&mut self, plan: Plan<M>) {
        self.totals.reserved -= plan.make as u64 * plan.region_len;
        plan.ready.into_iter().for_each(|id| self.undo(id));
    }

    /// Undoes expired reservations. Returns whether there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let over = |region: &Region<M>| matches!(region.state, State::Reserved { until, .. } if until <= now);
        let ids: Vec<RegionId> =
            self.regions().filter(|(_, region)| over(region)).map(|(id, _)| id).collect();
        ids.iter().for_each(|id| self.undo(*id));
        !ids.is_empty()
    }

    /// The expiry of the next reservation.
    pub fn next_expiry(&self) -> Option<Instant> {
        let untils = self.regions.values().filter_map(|region| match region.state {
            State::Reserved { until, .. } => Some(until),
            _ => None,
        });
        untils.min()
    }

    /// Makes a reserved region ready again. It was in no grant, so it is still all zeros. It gets a new id,
    /// because the client that let the reservation expire could still commit the old one.
    fn undo(&mut self, id: RegionId) {
        if let Some(region) = self.remove(id) {
            let id = self.ids.next();
            self.insert(id, Region { state: State::Ready, ..region });
        }
    }

    /// Deletes a reserved region. A region that does not exist counts as deleted.
    ///
    /// # Errors
    /// When the region is in a grant.
    pub fn delete_region(&mut self, id: RegionId) -> Result<(), Refusal> {
        match self.regions.get(&id).map(|region| region.state) {
            Some(State::Granted { grant, .. }) => Err(Refusal::InGrant { region: id, grant }),
            Some(State::Reserved { .. }) => {
                self.undo(id);
                Ok(())
            }
            Some(State::Ready | State::Clearing) | None => Ok(()),
        }
    }

    /// Returns a region that has to be cleared, with its memory, which belongs to the caller until it calls
    /// [`Ledger::cleared`], [`Ledger::dropped`] or [`Ledger::not_yet`]. The regions take turns, so that a
    /// region that cannot be cleared yet does not delay the others.
    pub fn take_clearing(&mut self) -> Option<(RegionId, M)> {
        let waiting = |(_, region): &(&RegionId, &Region<M>)| {
            region.state == State::Clearing && region.memory.is_some()
        };
        let after = (Bound::Excluded(self.last_clearing), Bound::Unbounded);
        let next = self.regions.range(after).find(waiting).or_else(|| self.regions.iter().find(waiting));
        let id = *next?.0;
        self.last_clearing = id;
        let memory = self.regions.get_mut(&id)?.memory.take()?;
        Some((id, memory))
    }

    /// Returns a ready region that the stock does not need, in the way of [`Ledger::take_clearing`].
    pub fn take_surplus(&mut self) -> Option<(RegionId, M)> {
        let Stock { region_len, target } = self.stock;
        let too_much = self.totals.ready > target;
        let unwanted =
            |region: &Region<M>| region.state == State::Ready && (region.len != region_len || too_much);
        let (id, _) = self.regions().find(|(_, region)| unwanted(region))?;
        self.set_state(id, State::Clearing);
        let memory = self.regions.get_mut(&id)?.memory.take()?;
        Some((id, memory))
    }

    /// Whether the stock lacks a region of this length.
    pub fn wants(&self, len: u64) -> bool {
        let Totals { ready, stocking, .. } = self.totals;
        len == self.stock.region_len && ready + stocking + len <= self.stock.target
    }

    /// Reports that the region is cleared and faulted in again: it is ready.
    pub fn cleared(&mut self, id: RegionId, memory: M) {
        if let Some(region) = self.remove(id) {
            let id = self.ids.next();
            self.insert(id, Region { len: region.len, memory: Some(memory), state: State::Ready });
        }
    }

    /// Lowers the capacity by memory that can never be lent again.
    pub fn lose_capacity(&mut self, len: u64) {
        self.capacity = self.capacity.saturating_sub(len);
    }

    /// Reports that the region's memory is gone.
    pub fn dropped(&mut self, id: RegionId) {
        self.remove(id);
    }

    /// Reports that the region cannot be cleared yet.
    pub fn not_yet(&mut self, id: RegionId, memory: M) {
        if let Some(region) = self.regions.get_mut(&id) {
            region.memory = Some(memory);
        }
    }

    /// Starts making a region for the stock, if one is needed. Returns its length, which counts as used until
    /// [`Ledger::stocked`].
    pub fn start_stocking(&mut self) -> Option<u64> {
        let len = self.stock.region_len;
        if !self.wants(len) || self.totals.used() + len > self.capacity {
            return None;
        }
        self.totals.stocking += len;
        Some(len)
    }

    /// Reports that a region for the stock was made, or could not be made.
    pub fn stocked(&mut self, memory: Option<M>) {
        let len = self.stock.region_len;
        self.totals.stocking -= len;
        if let Some(memory) = memory {
            let id = self.ids.next();
            self.insert(id, Region { len, memory: Some(memory), state: State::Ready });
        }
    }

    fn insert(&mut self, id: RegionId, region: Region<M>) {
        *self.total(region.state) += region.len;
        self.regions.insert(id, region);
    }

    fn remove(&mut self, id: RegionId) -> Option<Region<M>> {
        let region = self.regions.remove(&id)?;
        *self.total(region.state) -= region.len;
        Some(region)
    }

    fn set_state(&mut self, id: RegionId, state: State) {
        if let Some(region) = self.remove(id) {
            self.insert(id, Region { state, ..region });
        }
    }

    fn total(&mut self, state: State) -> &mut u64 {
        match state {
            State::Ready => &mut self.totals.ready,
            State::Reserved { .. } => &mut self.totals.reserved,
            State::Granted { .. } => &mut self.totals.granted,
            State::Clearing => &mut self.totals.clearing,
        }
    }
}

/// A time after the end of every reservation.
fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}

#[cfg(test)]
mod tests;
