//! Moves regions from full appliances to empty ones.
//!
//! The plan is made once, from the memory in use on each appliance, and carried out one move after the other. A move
//! that has become impossible is skipped. The plan is in memory only.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{PlannedMove, Rebalance, RebalancePlan};
use xpm_protocol::{AllocationId, ApplianceId, ByteSize};

use super::drain::{MOVES_MAX, RATE_MIN, eta};
use super::{Outcome, ReplyTo, Service, Work};

/// Most moves of one plan.
const PLAN_MAX: usize = 10_000;

/// The plan under way.
#[derive(Debug, Default)]
pub(super) struct Balancing {
    moves: VecDeque<Move>,
    moved: u64,
    /// When it began, and the bytes that were to move then.
    began: Option<(Duration, u64)>,
    paused: bool,
    rate: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Move {
    allocation: AllocationId,
    from: ApplianceId,
    to: ApplianceId,
    regions: usize,
    bytes: u64,
}

/// Memory of an appliance, as the plan counts it.
#[derive(Debug, Clone, Copy)]
struct Load {
    used: u64,
    capacity: u64,
}

impl Load {
    /// Share of the memory that is in use, in millionths.
    fn share(self) -> u64 {
        (u128::from(self.used) * 1_000_000 / u128::from(self.capacity.max(1))) as u64
    }
}

impl Service {
    pub(super) fn rebalance(&mut self, reply: ReplyTo, rebalance: Rebalance) {
        if rebalance.rate.is_some_and(|rate| rate.0 < RATE_MIN) {
            return self.refuse(reply, ErrorKind::Invalid, "a rate is 64KiB a second or more".to_owned());
        }
        if !self.balancing.moves.is_empty() && !rebalance.dry_run {
            let line = "a rebalancing is under way: wait for its end, or end it with `xpm rebalance --abort`";
            return self.refuse(reply, ErrorKind::Conflict, line.to_owned());
        }
        let moves = self.plan_rebalance();
        let bytes = moves.iter().map(|one| one.bytes).sum();
        let began = Some((self.now.at, bytes));
        let rate = rebalance.rate.map(|rate| rate.0);
        let new = Balancing { moves, moved: 0, began, paused: false, rate };
        let shown = self.shown(&new);
        if !rebalance.dry_run {
            self.balancing = new;
        }
        self.reply(reply, Ok(Outcome::Rebalance(shown)));
    }

    pub(super) fn rebalancing(&self) -> RebalancePlan {
        self.shown(&self.balancing)
    }

    pub(super) fn pause_rebalance(&mut self, paused: bool) -> RebalancePlan {
        self.balancing.paused = paused;
        self.rebalancing()
    }

    pub(super) fn end_rebalance(&mut self, reply: ReplyTo) {
        self.balancing.moves.clear();
        self.reply(reply, Ok(Outcome::Done));
    }

    fn shown(&self, balancing: &Balancing) -> RebalancePlan {
        let name = |id: ApplianceId| self.inventory.info(id).map(|info| info.name.clone());
        let shown = |one: &Move| {
            Some(PlannedMove {
                allocation: self.allocations.get(&one.allocation)?.record.name.clone(),
                from: name(one.from)?,
                to: name(one.to)?,
                bytes: ByteSize(one.bytes),
            })
        };
        let left: u64 = balancing.moves.iter().map(|one| one.bytes).sum();
        RebalancePlan {
            moves: balancing.moves.iter().filter_map(shown).collect(),
            moved: ByteSize(balancing.moved),
            paused: balancing.paused,
            eta: balancing.began.and_then(|(at, first)| eta(self.now.at.saturating_sub(at), first, left)),
        }
    }

    /// Plans moves from the fullest appliance to the emptiest one, one region at a time, as long as a move brings the
    /// two closer together.
    fn plan_rebalance(&self) -> VecDeque<Move> {
        let up = |one: &&crate::strategy::Candidate| one.up_until >= self.now.at && !one.drain;
        // From the records, which are newer than the last reports of the appliances.
        let mut used: BTreeMap<ApplianceId, u64> = BTreeMap::new();
        for record in self.allocations.values().map(|entry| &entry.record) {
            for grant in record.memory_grants() {
                *used.entry(grant.appliance).or_default() += record.bytes_of(grant);
            }
        }
        let load = |one: &crate::strategy::Candidate| Load {
            used: used.get(&one.id).copied().unwrap_or(0),
            capacity: one.capacity,
        };
        let mut loads: BTreeMap<ApplianceId, Load> =
            self.inventory.pool().iter().filter(up).map(|one| (one.id, load(one))).collect();
        let mut regions = self.movable(&loads);
        let mut planned: Vec<Move> = Vec::new();
        while planned.len() < PLAN_MAX {
            let Some((from, to)) = ends(&loads, &regions) else { break };
            let Some((allocation, left, len)) = regions.get_mut(&from).and_then(|all| all.last_mut()) else {
                break;
            };
            let (after_from, after_to) = (loads[&from].less(*len), loads[&to].more(*len));
            if after_to.share() > after_from.share() || loads[&to].used + *len > loads[&to].capacity {
                break;
            }
            (*loads.get_mut(&from).expect("it is there"), *loads.get_mut(&to).expect("it is there")) =
                (after_from, after_to);
            let (allocation, len) = (*allocation, *len);
            *left -= 1;
            if *left == 0 {
                regions.get_mut(&from).map(Vec::pop);
            }
            let same = |one: &&mut Move| one.allocation == allocation && one.from == from && one.to == to;
            match planned.iter_mut().find(same) {
                Some(one) => (one.regions, one.bytes) = (one.regions + 1, one.bytes + len),
                None => planned.push(Move { allocation, from, to, regions: 1, bytes: len }),
            }
        }
        planned.into()
    }

    /// Regions that may move, by appliance: allocation, number of regions, length of each.
    fn movable(
        &self,
        loads: &BTreeMap<ApplianceId, Load>,
    ) -> BTreeMap<ApplianceId, Vec<(AllocationId, usize, u64)>> {
        let mut movable: BTreeMap<ApplianceId, Vec<(AllocationId, usize, u64)>> = BTreeMap::new();
        for (id, entry) in &self.allocations {
            let record = &entry.record;
            if !record.holds_name() || record.change.is_some() || !matches!(entry.work, Work::Idle) {
                continue;
            }
            for appliance in record.appliances().into_iter().filter(|one| loads.contains_key(one)) {
                let regions = record.regions_on(appliance).len();
                movable.entry(appliance).or_default().push((*id, regions, record.region_len));
            }
        }
        movable
    }

    /// Begins the moves that can begin now.
    pub(super) fn run_rebalance(&mut self) {
        while !self.balancing.paused && self.moves_under_way() < MOVES_MAX {
            let Some(one) = self.balancing.moves.pop_front() else { return };
            let Some(entry) = self.allocations.get(&one.allocation) else { continue };
            if entry.record.change.is_some() || !matches!(entry.work, Work::Idle) {
                self.balancing.moves.push_back(one);
                return;
            }
            let mut regions = entry.record.regions_on(one.from);
            let name = entry.record.name.clone();
            // From the end of the allocation, which is likely to be used least.
            regions.drain(..regions.len().saturating_sub(one.regions));
            let rate = self.balancing.rate;
            match self.begin_move(one.allocation, &regions, (one.from, Some(one.to)), rate) {
                Ok(()) => self.balancing.moved += one.bytes,
                Err(error) => tracing::warn!("`{name}` is not rebalanced: {}", error.1),
            }
        }
    }
}

impl Load {
    fn less(self, len: u64) -> Load {
        Load { used: self.used.saturating_sub(len), ..self }
    }

    fn more(self, len: u64) -> Load {
        Load { used: self.used.saturating_add(len), ..self }
    }
}

/// The fullest appliance of those with movable regions, and the emptiest appliance.
fn ends(
    loads: &BTreeMap<ApplianceId, Load>,
    regions: &BTreeMap<ApplianceId, Vec<(AllocationId, usize, u64)>>,
) -> Option<(ApplianceId, ApplianceId)> {
    let has_regions = |id: &ApplianceId| regions.get(id).is_some_and(|all| !all.is_empty());
    let from = loads.iter().filter(|(id, _)| has_regions(id)).max_by_key(|(_, load)| load.share())?.0;
    let to = loads.iter().min_by_key(|(_, load)| load.share())?.0;
    (from != to).then_some((*from, *to))
}
