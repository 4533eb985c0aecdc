//! The appliances that are known, what they said last, and what was promised on them since.
//!
//! What an appliance says about its free memory is old when it arrives. A promise (memory that an
//! allocation is going to take or has just taken) is therefore deducted until a sample is at hand
//! that was certainly taken later. Heartbeats of one appliance follow each other, so a heartbeat
//! was sampled after the one before it was answered; an answer to our own question was sampled
//! after the question was asked. Time here is the count of the service's events.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use xpm_protocol::api::allocator::{Appliance, ApplianceState, Heartbeat};
use xpm_protocol::api::appliance::{Info, Status};
use xpm_protocol::{AllocationId, ApplianceId, Span};

use crate::store::ApplianceRecord;
use crate::strategy::Candidate;

/// Heartbeat intervals without a heartbeat after which an appliance counts as silent.
const INTERVALS_MAX: u32 = 3;

/// The appliances. Moments are times since the service's start; event counts only grow.
#[derive(Debug)]
pub struct Inventory {
    interval: Duration,
    appliances: BTreeMap<ApplianceId, Entry>,
    promises: HashMap<(AllocationId, ApplianceId), Promise>,
}

#[derive(Debug)]
struct Entry {
    info: Info,
    status: Status,
    heard: Option<Duration>,
    /// Event of the last heartbeat.
    heard_event: u64,
    /// `status` was sampled after this event.
    sampled_after: u64,
    /// Whether the log says that it is up.
    told_up: bool,
}

#[derive(Debug)]
struct Promise {
    bytes: u64,
    /// Event at which the appliance was known to count the memory itself.
    settled: Option<u64>,
}

/// What a heartbeat changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// The appliance is new or describes itself differently: it is to be remembered.
    pub changed: bool,
    /// It was not heard before, or silent.
    pub back: bool,
}

impl Inventory {
    /// No appliances. `interval` is the time between heartbeats.
    pub fn new(interval: Duration) -> Inventory {
        Inventory { interval, appliances: BTreeMap::new(), promises: HashMap::new() }
    }

    /// Adds an appliance as it is remembered; it is silent until it is heard.
    pub fn restore(&mut self, record: ApplianceRecord) {
        let ApplianceRecord { info, status } = record;
        let entry = Entry { info, status, heard: None, heard_event: 0, sampled_after: 0, told_up: false };
        self.appliances.insert(entry.info.id, entry);
    }

    /// Takes a heartbeat.
    pub fn hear(&mut self, now: Duration, event: u64, heartbeat: Heartbeat) -> Heard {
        let Heartbeat { info, status } = heartbeat;
        let id = info.id;
        let before = self.appliances.get(&id);
        let changed =
            before.is_none_or(|entry| entry.info != info || entry.status.capacity != status.capacity);
        let back = self.state(id, now) != Some(ApplianceState::Up);
        let sampled_after = before.map_or(0, |entry| entry.heard_event);
        let (heard, heard_event) = (Some(now), event);
        let entry = Entry { info, status, heard, heard_event, sampled_after, told_up: true };
        self.appliances.insert(id, entry);
        self.drop_seen(id);
        Heard { changed, back }
    }

    /// Takes the answer to a question that was asked at the event `asked`.
    pub fn sample(&mut self, id: ApplianceId, asked: u64, status: Status) {
        let Some(entry) = self.appliances.get_mut(&id).filter(|entry| entry.sampled_after <= asked) else {
            return;
        };
        entry.status = status;
        entry.sampled_after = asked;
        self.drop_seen(id);
    }

    /// Removes an appliance.
    pub fn remove(&mut self, id: ApplianceId) {
        self.appliances.remove(&id);
        self.promises.retain(|(_, appliance), _| *appliance != id);
    }

    /// Promises memory of an appliance to an allocation.
    pub fn promise(&mut self, allocation: AllocationId, id: ApplianceId, bytes: u64) {
        self.promises.insert((allocation, id), Promise { bytes, settled: None });
    }

    /// From this event on the appliance counts the promised memory itself, as taken or, where it
    /// was given back, as what it is then.
    pub fn settle(&mut self, allocation: AllocationId, id: ApplianceId, event: u64) {
        if let Some(promise) = self.promises.get_mut(&(allocation, id)) {
            promise.settled = Some(event);
        }
    }

    /// The promise is off: the memory was never taken.
    pub fn forget(&mut self, allocation: AllocationId, id: ApplianceId) {
        self.promises.remove(&(allocation, id));
    }

    fn drop_seen(&mut self, id: ApplianceId) {
        let sampled_after = self.appliances.get(&id).map_or(0, |entry| entry.sampled_after);
        self.promises.retain(|(_, appliance), promise| {
            *appliance != id || promise.settled.is_none_or(|settled| settled > sampled_after)
        });
    }

    /// Whether the appliance is heard; none when it is unknown.
    pub fn state(&self, id: ApplianceId, now: Duration) -> Option<ApplianceState> {
        self.appliances.get(&id).map(|entry| self.state_of(entry, now))
    }

    fn state_of(&self, entry: &Entry, now: Duration) -> ApplianceState {
        match entry.heard {
            Some(heard) if now.saturating_sub(heard) <= self.interval * INTERVALS_MAX => ApplianceState::Up,
            _ => ApplianceState::Silent,
        }
    }

    /// Who the appliance is.
    pub fn info(&self, id: ApplianceId) -> Option<&Info> {
        self.appliances.get(&id).map(|entry| &entry.info)
    }

    /// Its name, or its id where it is unknown.
    pub fn name(&self, id: ApplianceId) -> String {
        self.info(id).map_or_else(|| id.to_string(), |info| info.name.to_string())
    }

    /// The appliances that have fallen silent since this was asked last.
    pub fn fallen_silent(&mut self, now: Duration) -> Vec<ApplianceId> {
        let up = self.up(now);
        let told =
            self.appliances.iter_mut().filter(|(id, entry)| entry.told_up && up.binary_search(id).is_err());
        told.map(|(id, entry)| {
            entry.told_up = false;
            *id
        })
        .collect()
    }

    /// The appliances that are up.
    pub fn up(&self, now: Duration) -> Vec<ApplianceId> {
        let up = self.appliances.iter().filter(|(_, entry)| self.state_of(entry, now) == ApplianceState::Up);
        up.map(|(id, _)| *id).collect()
    }

    /// The appliances as a decision sees them; those in `failed` did not serve this request.
    pub fn snapshot(&self, now: Duration, failed: &[ApplianceId]) -> Vec<Candidate> {
        let mut promised: HashMap<ApplianceId, u64> = HashMap::new();
        for ((_, id), promise) in &self.promises {
            *promised.entry(*id).or_default() += promise.bytes;
        }
        let candidate = |(id, entry): (&ApplianceId, &Entry)| Candidate {
            id: *id,
            name: entry.info.name.clone(),
            up: self.state_of(entry, now) == ApplianceState::Up,
            failed: failed.contains(id),
            free: entry.status.free.0.saturating_sub(promised.get(id).copied().unwrap_or(0)),
            clearing: clearing(&entry.status),
        };
        self.appliances.iter().map(candidate).collect()
    }

    /// The appliances as they are shown; `regions` counts those of the record.
    pub fn list(&self, now: Duration, regions: &HashMap<ApplianceId, u64>) -> Vec<Appliance> {
        let shown = |(id, entry): (&ApplianceId, &Entry)| Appliance {
            info: entry.info.clone(),
            status: entry.status.clone(),
            state: self.state_of(entry, now),
            silent: entry.heard.map(|heard| Span(whole_millis(now.saturating_sub(heard)))),
            regions: regions.get(id).copied().unwrap_or(0),
        };
        self.appliances.iter().map(shown).collect()
    }
}

/// What is neither used nor free.
fn clearing(status: &Status) -> u64 {
    let used = [status.granted, status.reserved, status.free];
    used.iter().fold(status.capacity.0, |rest, part| rest.saturating_sub(part.0))
}

/// Cuts what nobody wants to read.
pub(crate) fn whole_millis(span: Duration) -> Duration {
    Duration::from_millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use xpm_protocol::ByteSize;

    use super::*;
    use crate::testing::appliance;

    const TICK: Duration = Duration::from_secs(5);

    fn heartbeat(free: u64) -> Heartbeat {
        let ApplianceRecord { info, mut status } = appliance(1);
        status.free = ByteSize(free);
        Heartbeat { info, status }
    }

    fn free(inventory: &Inventory, now: Duration) -> u64 {
        inventory.snapshot(now, &[])[0].free
    }

    #[test]
    fn silent_after_three_intervals() {
        let mut inventory = Inventory::new(TICK);
        inventory.restore(appliance(1));
        let id = appliance(1).info.id;
        assert_eq!(inventory.state(id, Duration::ZERO), Some(ApplianceState::Silent));
        let heard = inventory.hear(
            Duration::ZERO,
            1,
            Heartbeat { info: appliance(1).info, status: appliance(1).status },
        );
        assert_eq!(heard, Heard { changed: false, back: true });
        assert_eq!(inventory.state(id, TICK * 3), Some(ApplianceState::Up));
        assert_eq!(inventory.state(id, TICK * 3 + Duration::from_millis(1)), Some(ApplianceState::Silent));
        assert!(inventory.fallen_silent(TICK * 3).is_empty());
        assert!(inventory.up(TICK * 4).is_empty());
        assert_eq!(inventory.fallen_silent(TICK * 4), [id]);
        assert!(inventory.fallen_silent(TICK * 5).is_empty(), "it is said once");
    }

    #[test]
    fn a_promise_counts_until_a_later_sample() {
        let mut inventory = Inventory::new(TICK);
        let (allocation, id) = (AllocationId::from_u128(1), appliance(1).info.id);
        inventory.hear(Duration::ZERO, 1, heartbeat(100));
        inventory.promise(allocation, id, 60);
        assert_eq!(free(&inventory, Duration::ZERO), 40);
        inventory.hear(TICK, 2, heartbeat(100));
        inventory.settle(allocation, id, 3);
        inventory.hear(TICK * 2, 4, heartbeat(100));
        assert_eq!(free(&inventory, TICK * 2), 40, "it may have been sampled before");
        inventory.hear(TICK * 3, 5, heartbeat(40));
        assert_eq!(free(&inventory, TICK * 3), 40, "it was sampled after the last one was answered");
    }

    #[test]
    fn an_answer_to_a_question_is_a_later_sample() {
        let mut inventory = Inventory::new(TICK);
        let (allocation, id) = (AllocationId::from_u128(1), appliance(1).info.id);
        inventory.hear(Duration::ZERO, 1, heartbeat(100));
        inventory.promise(allocation, id, 60);
        inventory.settle(allocation, id, 2);
        inventory.sample(id, 3, heartbeat(40).status);
        assert_eq!(free(&inventory, Duration::ZERO), 40);
        inventory.sample(id, 2, heartbeat(100).status);
        assert_eq!(free(&inventory, Duration::ZERO), 40, "an older answer changes nothing");
    }
}
