//! Which region is used for what: pure bookkeeping, told the time and told what was made.
//!
//! Invariants, kept by each operation:
//! * the lengths of all regions, and of those being made, are together no more than the capacity, unless
//!   an earlier life lent more: then nothing is added until they are; and what leaves to make room for others does so before they can be granted;
//! * a region in a grant is in one, or also in the one that takes it over, and a grant's regions are
//!   all there;
//! * a grant that was deleted is not made again: an order to make it may have been on its way;
//! * a region that was in a grant comes back only by [`Ledger::cleared`], under a new id.

mod grants;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use xpm_protocol::api::appliance::RegionState;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{AllocationId, GrantId, RegionId};

pub use self::grants::{Change, Grant};

/// Why something is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is not enough free memory.
    #[error("{} is asked for and {} is free here: ask for less, or delete what is not needed", ByteSize(*.asked), ByteSize(*.free))]
    NoSpace {
        /// What is asked for, in bytes.
        asked: u64,
        /// What is free, in bytes.
        free: u64,
    },
    /// A region is not there, or its reservation is over.
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
    /// It contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// It contradicts itself.
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
    /// What it is used for.
    pub state: State,
}

/// What a region is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Faulted in and all zeros; belongs to nobody.
    Ready,
    /// Belongs to an allocation until a time.
    Reserved {
        /// The allocation.
        allocation: AllocationId,
        /// When the reservation is over.
        until: Instant,
    },
    /// In a grant.
    Granted {
        /// The allocation.
        allocation: AllocationId,
        /// The grant.
        grant: GrantId,
    },
    /// To be cleared, or to be dropped.
    Clearing,
}

impl State {
    /// As the control interface calls it.
    pub fn name(self) -> RegionState {
        match self {
            State::Ready => RegionState::Ready,
            State::Reserved { .. } => RegionState::Reserved,
            State::Granted { .. } => RegionState::Granted,
            State::Clearing => RegionState::Clearing,
        }
    }
}

/// Sums, in bytes.
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
    /// What exists or is being made.
    pub fn used(self) -> u64 {
        self.granted + self.reserved + self.clearing + self.ready + self.stocking
    }
}

/// What is kept ready ahead of need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// Size of the regions, in bytes.
    pub region_len: u64,
    /// How much, in bytes; whole regions.
    pub target: u64,
}

/// How a reservation is to be met.
#[derive(Debug)]
pub struct Plan<M> {
    allocation: AllocationId,
    region_len: u64,
    /// Ready regions, taken already.
    ready: Vec<RegionId>,
    /// How many have to be made.
    pub make: usize,
    /// Ready regions of other sizes that make room, with their lengths. To be dropped; each one that
    /// is, is told by [`Ledger::left`].
    pub leaving: Vec<(M, u64)>,
}

/// A reservation cannot be planned now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlan {
    /// Free memory is just being made into the stock: look again when that is done.
    Wait,
    /// It is refused.
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
    /// Dropped to make room for others, and not gone yet, in bytes.
    leaving: u64,
    ids: Ids,
    /// The region that was given out last to be cleared.
    last_clearing: RegionId,
}

/// Region ids: each differs from all others of this life, and, as it starts at a random number,
/// from those of other lives.
#[derive(Debug)]
struct Ids {
    start: u128,
    count: u128,
}

impl Ids {
    fn next(&mut self) -> RegionId {
        /// Odd, so that multiples of it repeat only after 2^128, and look different to people.
        const STRIDE: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
        self.count += 1;
        RegionId::from_u128(self.start.wrapping_add(self.count.wrapping_mul(STRIDE)))
    }
}

impl<M: Clone> Ledger<M> {
    /// An empty ledger of `capacity` bytes; `random` is where region ids start.
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

    /// What it lends in all, in bytes: what it may, or what it lent already when it was told to lend less.
    pub fn capacity(&self) -> u64 {
        let Totals { granted, reserved, clearing, .. } = self.totals;
        self.capacity.max(granted + reserved + clearing)
    }

    /// What is kept ready.
    pub fn stock(&self) -> Stock {
        self.stock
    }

    /// Sums now.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// What may still be asked for, in bytes.
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

    /// Plans a reservation: takes ready regions of the length, and counts those to be made.
    ///
    /// # Errors
    /// When too little memory is free, or none can be told yet.
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
            // Without an end until the whole reservation is there.
            self.set_state(*id, State::Reserved { allocation, until: far_future() });
        }
        self.totals.reserved += make as u64 * region_len;
        Ok(Plan { allocation, region_len, ready, make, leaving })
    }

    /// Takes ready regions of other lengths out until `needed` bytes of the capacity are unused.
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

    /// Takes all ready regions out, to be dropped as those of [`Plan::leaving`].
    pub fn take_ready(&mut self) -> Vec<(M, u64)> {
        let ready = self.regions().filter(|(_, region)| region.state == State::Ready);
        let ids: Vec<RegionId> = ready.map(|(id, _)| id).collect();
        let removed = ids.into_iter().filter_map(|id| self.remove(id));
        let leaving: Vec<(M, u64)> =
            removed.filter_map(|region| Some((region.memory?, region.len))).collect();
        self.leaving += leaving.iter().map(|(_, len)| len).sum::<u64>();
        leaving
    }

    /// What leaves to make room, in bytes. While it is not 0, nothing is granted, and what was made
    /// in its place is not faulted in.
    pub fn leaving(&self) -> u64 {
        self.leaving
    }

    /// Memory of this length that made room is gone.
    pub fn left(&mut self, len: u64) {
        self.leaving -= len;
    }

    /// Ends a reservation well: what had to be made is there. The regions, in order.
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

    /// Ends a reservation badly: what had to be made could not be, and what was made is gone.
    pub fn abandon(&mut self, plan: Plan<M>) {
        self.totals.reserved -= plan.make as u64 * plan.region_len;
        plan.ready.into_iter().for_each(|id| self.undo(id));
    }

    /// Undoes reservations that are over. Whether there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let over = |region: &Region<M>| matches!(region.state, State::Reserved { until, .. } if until <= now);
        let ids: Vec<RegionId> =
            self.regions().filter(|(_, region)| over(region)).map(|(id, _)| id).collect();
        ids.iter().for_each(|id| self.undo(*id));
        !ids.is_empty()
    }

    /// When the next reservation is over.
    pub fn next_expiry(&self) -> Option<Instant> {
        let untils = self.regions.values().filter_map(|region| match region.state {
            State::Reserved { until, .. } => Some(until),
            _ => None,
        });
        untils.min()
    }

    /// A reserved region is nobody's again. It was in no grant, so it is still all zeros; but under
    /// its old id, whoever let the reservation end could still commit it.
    fn undo(&mut self, id: RegionId) {
        if let Some(region) = self.remove(id) {
            let id = self.ids.next();
            self.insert(id, Region { state: State::Ready, ..region });
        }
    }

    /// Deletes a reservation's region. One that is not there counts as deleted.
    ///
    /// # Errors
    /// When it is in a grant.
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

    /// A region to be cleared, with its memory, which is the caller's until it says
    /// [`Ledger::cleared`], [`Ledger::dropped`] or [`Ledger::not_yet`]. They take turns, so that one
    /// that cannot be cleared yet holds no other up.
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

    /// A region that is ready and not wanted so, as [`Ledger::take_clearing`] gives one.
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

    /// The region is cleared and faulted in again: it is ready.
    pub fn cleared(&mut self, id: RegionId, memory: M) {
        if let Some(region) = self.remove(id) {
            let id = self.ids.next();
            self.insert(id, Region { len: region.len, memory: Some(memory), state: State::Ready });
        }
    }

    /// So many bytes can be lent no more.
    pub fn lose_capacity(&mut self, len: u64) {
        self.capacity = self.capacity.saturating_sub(len);
    }

    /// The region's memory is gone.
    pub fn dropped(&mut self, id: RegionId) {
        self.remove(id);
    }

    /// The region cannot be cleared yet.
    pub fn not_yet(&mut self, id: RegionId, memory: M) {
        if let Some(region) = self.regions.get_mut(&id) {
            region.memory = Some(memory);
        }
    }

    /// Whether a region is to be made for the stock; if so, its length, which now counts as used
    /// until [`Ledger::stocked`].
    pub fn start_stocking(&mut self) -> Option<u64> {
        let len = self.stock.region_len;
        if !self.wants(len) || self.totals.used() + len > self.capacity {
            return None;
        }
        self.totals.stocking += len;
        Some(len)
    }

    /// A region for the stock was made, or could not be.
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

/// Later than any reservation ends.
fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}

#[cfg(test)]
mod tests;
