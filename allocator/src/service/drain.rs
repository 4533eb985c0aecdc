//! Empties an appliance: allocation after allocation, its regions move to other appliances.
//!
//! The drain is part of the appliance's record, so it goes on after a restart.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Appliance, Drain, DrainState};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Span};

use super::{Awaited, Outcome, ReplyTo, Service, Work};
use crate::store::Change;
use crate::store::record::DrainRecord;

/// Most allocations that move at the same time, for drains and rebalancing together.
pub(super) const MOVES_MAX: usize = 2;
/// Pause before the next move of an allocation whose move was refused. If no place was found, the first retry comes
/// after [`SOON`], because the appliances' reports of free memory are some moments old; each further pause is twice as
/// long, up to this one.
pub(super) const AGAIN: Duration = Duration::from_secs(30);
/// Pause before the first retry if no place was found.
const SOON: Duration = Duration::from_secs(1);
/// Lowest rate of copying that can be requested, in bytes per second.
pub(super) const RATE_MIN: u64 = 64 << 10;

/// State of a drain that is not in its record.
#[derive(Debug, Default)]
pub(super) struct Draining {
    /// When this process saw the drain first, and the bytes that were to move then.
    began: Option<(Duration, u64)>,
    stuck: Option<String>,
}

impl Service {
    pub(super) fn drain(&mut self, reply: ReplyTo, id: ApplianceId, drain: Drain) {
        if self.inventory.info(id).is_none() {
            return self.refuse(reply, ErrorKind::NotFound, format!("no appliance has the id {id}"));
        }
        if drain.rate.is_some_and(|rate| rate.0 < RATE_MIN) {
            return self.refuse(reply, ErrorKind::Invalid, "a rate is 64KiB a second or more".to_owned());
        }
        let since = self.inventory.draining(id).map_or(self.now.unix, |drain| drain.since);
        let record = DrainRecord { since, rate: drain.rate.map(|rate| rate.0), paused: drain.paused };
        let name = self.inventory.name(id);
        if let Ok(subject) = name.parse() {
            let how = if drain.paused { "held up" } else { "begun" };
            self.tell(EventKind::Drain, &subject, format!("emptying appliance {name} is {how}"));
        }
        self.inventory.set_draining(id, Some(record));
        self.drains.entry(id).or_default().stuck = None;
        self.store_appliance(id, reply, |service| {
            let shown = service.list_appliances().into_iter().find(|one| one.info.id == id);
            shown.map_or(Outcome::Done, |shown: Appliance| Outcome::Appliance(Box::new(shown)))
        });
    }

    pub(super) fn end_drain(&mut self, reply: ReplyTo, id: ApplianceId) {
        self.drains.remove(&id);
        self.inventory.set_draining(id, None);
        self.store_appliance(id, reply, |_| Outcome::Done);
    }

    fn store_appliance(&mut self, id: ApplianceId, reply: ReplyTo, outcome: impl Fn(&Service) -> Outcome) {
        let outcome = outcome(self);
        match self.inventory.record(id) {
            Some(record) => {
                self.store(vec![Change::Appliance(Box::new(record))], Awaited::Answer(reply, outcome));
            }
            None => self.refuse(reply, ErrorKind::NotFound, format!("no appliance has the id {id}")),
        }
    }

    /// Begins the moves that can begin now.
    pub(super) fn run_drains(&mut self) {
        for (id, record) in self.inventory.all_draining() {
            let left = self.bytes_on(id);
            let now = self.now.at;
            self.drains.entry(id).or_default().began.get_or_insert((now, left));
            if !record.paused {
                self.run_drain(id, record.rate);
            }
        }
    }

    fn run_drain(&mut self, id: ApplianceId, rate: Option<u64>) {
        let on_it: Vec<AllocationId> = self
            .allocations
            .iter()
            .filter(|(_, entry)| self.may_move(entry, id))
            .map(|(id, _)| *id)
            .collect();
        for allocation in on_it {
            if self.moves_under_way() >= MOVES_MAX {
                return;
            }
            let record = &self.entry(allocation).record;
            let (name, regions) = (record.name.clone(), record.regions_on(id));
            let begun = self.begin_move(allocation, &regions, (id, None), rate);
            let now = self.now.at;
            let side = &mut self.entry(allocation).side;
            let stuck = match begun {
                Ok(()) => {
                    side.unplaced = 0;
                    None
                }
                Err(error) => {
                    side.rests_until = Some(now + (SOON * (1 << side.unplaced.min(8))).min(AGAIN));
                    side.unplaced += 1;
                    Some(format!("`{name}` cannot move: {}", error.1))
                }
            };
            self.set_stuck(id, stuck);
        }
    }

    /// Sets or clears the reason why a drain stands still. A new reason is logged.
    fn set_stuck(&mut self, id: ApplianceId, stuck: Option<String>) {
        let name = self.inventory.name(id);
        let before = &mut self.drains.entry(id).or_default().stuck;
        match &stuck {
            Some(why) if *before != stuck => {
                tracing::info!("emptying appliance {name} does not go on: {why}");
            }
            _ => {}
        }
        *before = stuck;
    }

    /// Whether the allocation may move off the appliance: it has regions there, no work is done to it, and its pause
    /// after a refused change is over.
    fn may_move(&self, entry: &super::Entry, appliance: ApplianceId) -> bool {
        let record = &entry.record;
        let rested = entry.side.rests_until.is_none_or(|until| until <= self.now.at);
        record.holds_name()
            && matches!(entry.work, Work::Idle)
            && record.change.is_none()
            && record.next.is_none()
            && entry.hand_over.is_none()
            && record.standby.is_none()
            && record.handover.is_none()
            && rested
            && record.given_up.is_empty()
            && record.grants.iter().any(|grant| grant.appliance == appliance)
    }

    /// Number of changes under way that copy regions.
    pub(super) fn moves_under_way(&self) -> usize {
        let moves = |entry: &&super::Entry| {
            entry.record.change.as_ref().is_some_and(|change| !change.moved.is_empty())
        };
        self.allocations.values().filter(moves).count()
    }

    /// Bytes of allocations on an appliance that are still to move.
    fn bytes_on(&self, id: ApplianceId) -> u64 {
        let of = |entry: &super::Entry| {
            let record = &entry.record;
            let on = record.grants.iter().filter(|grant| grant.appliance == id);
            let bytes = on.map(|grant| record.bytes_of(grant)).sum::<u64>();
            bytes.saturating_sub(if record.change.is_some() { entry.side.copied } else { 0 })
        };
        self.allocations.values().filter(|entry| entry.record.holds_name()).map(of).sum()
    }

    pub(super) fn drain_state(&self, id: ApplianceId) -> Option<DrainState> {
        let record = self.inventory.draining(id)?;
        let left = self.bytes_on(id);
        let draining = self.drains.get(&id);
        let refused = || {
            let on = |entry: &&super::Entry| entry.record.grants.iter().any(|grant| grant.appliance == id);
            self.allocations.values().filter(on).find_map(|entry| entry.side.refused.clone())
        };
        let began = draining.and_then(|draining| draining.began);
        // Nothing can be copied from an appliance that does not answer.
        let advice = self.advice_for_silent_one(id);
        let silent = (!advice.is_empty()).then(|| format!("it does not answer{advice}"));
        Some(DrainState {
            since: record.since,
            rate: record.rate.map(ByteSize),
            paused: record.paused,
            left: ByteSize(left),
            eta: began.and_then(|(at, first)| eta(self.now.at.saturating_sub(at), first, left)),
            stuck: silent
                .or_else(|| draining.and_then(|draining| draining.stuck.clone()).or_else(refused))
                .filter(|_| left > 0),
        })
    }
}

/// Time that the rest takes at the mean speed so far.
pub(super) fn eta(spent: Duration, first: u64, left: u64) -> Option<Span> {
    let done = first.checked_sub(left).filter(|done| *done > 0)?;
    let seconds = spent.as_secs_f64() * left as f64 / done as f64;
    (seconds < 1e9).then(|| Span(Duration::from_secs(seconds.ceil() as u64)))
}
