//! The known appliances, their last reports, and the memory that was promised on them since.
//!
//! An appliance's report of its free memory is old when it arrives. A promise (memory that an allocation is going to
//! take or has just taken) is therefore deducted until there is a sample that was certainly taken later. Heartbeats
//! of one appliance follow each other, so a heartbeat was sampled after the previous one was answered; the answer to
//! a question of ours was sampled after the question was asked. Time here is the count of the service's events.
//!
//! Decisions read a [`Pool`], which is updated with each report.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use xpm_protocol::api::allocator::{Appliance, ApplianceState, Heartbeat};
use xpm_protocol::api::appliance::{Info, Status};
use xpm_protocol::policy::{ApplianceProfile, RAMP_UP_DEFAULT_SECS};
use xpm_protocol::text::short_line;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, LinkSpeed, Name, Percent, Span};

use crate::store::ApplianceRecord;
use crate::store::record::DrainRecord;
use crate::strategy::{Candidate, Pool};

/// Heartbeat intervals without a heartbeat after which an appliance counts as silent.
pub(crate) const INTERVALS_MAX: u32 = 3;

/// Limits on the warnings of one heartbeat: lines, and bytes of each line; and lines that are remembered.
const WARNINGS_MAX: usize = 16;
const WARNING_LEN_MAX: usize = 1000;
const WARNED_MAX: usize = 256;

/// The appliances. Moments are times since the service's start; event counts only grow.
#[derive(Debug)]
pub struct Inventory {
    interval: Duration,
    appliances: BTreeMap<ApplianceId, Entry>,
    pool: Pool,
}

#[derive(Debug)]
struct Entry {
    info: Info,
    status: Status,
    /// When it registered first, seconds since 1970.
    since: u64,
    /// Time of its last heartbeat, or of its last answer to the question whether it is there.
    heard: Option<Duration>,
    /// Time of its last heartbeat.
    came: Option<Duration>,
    /// Event of the last heartbeat.
    heard_event: u64,
    /// `status` was sampled after this event.
    sampled_after: u64,
    /// Event of the last answer to a question of ours.
    answered: u64,
    /// Event at which it changed in a way that `status` does not show.
    doubtful: Option<u64>,
    /// Whether the last event reported it as up.
    told_up: bool,
    promises: HashMap<AllocationId, Promise>,
    /// Speed of its link that is promised to allocations, in bits per second.
    link_promised: u64,
    /// Its warnings to the operator, as of its last heartbeat.
    warned: Vec<String>,
    /// Recent errors; each heartbeat halves the count.
    errors: u64,
    /// Set while it is being emptied.
    drain: Option<DrainRecord>,
    /// When it was given up, seconds since 1970.
    given_up: Option<u64>,
    profile: Option<ApplianceProfile>,
}

#[derive(Debug)]
struct Promise {
    bytes: u64,
    /// Event from which the appliance counts the memory itself.
    settled: Option<u64>,
}

/// Changes that a heartbeat brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// The appliance is new or describes itself differently: its record has to be stored.
    pub changed: bool,
    /// It was unknown or silent before.
    pub back: bool,
    /// Its new warnings to the operator; only a few at a time.
    pub warnings: Vec<String>,
    /// It was known, and its addresses have changed.
    pub moved: bool,
    /// It was restarted, or reports fewer grants than before.
    pub has_less: bool,
}

impl Inventory {
    /// An empty inventory. `interval` is the time between heartbeats.
    pub fn new(interval: Duration) -> Inventory {
        Inventory { interval, appliances: BTreeMap::new(), pool: Pool::default() }
    }

    /// Adds an appliance from its record; it is silent until it is heard.
    pub fn restore(&mut self, record: ApplianceRecord) {
        let ApplianceRecord { info, status, since, drain, given_up } = record;
        let id = info.id;
        self.appliances.insert(id, Entry { drain, given_up, ..Entry::new(info, status, since) });
        self.refill(id);
    }

    /// Takes a heartbeat. `unix` are seconds since 1970.
    pub fn hear(&mut self, now: Duration, unix: u64, event: u64, heartbeat: Heartbeat) -> Heard {
        let Heartbeat { info, status } = heartbeat;
        let id = info.id;
        let back = self.state(id, now) != Some(ApplianceState::Up);
        let known = self.appliances.contains_key(&id);
        let entry =
            self.appliances.entry(id).or_insert_with(|| Entry::new(info.clone(), Status::default(), unix));
        let changed = !known || entry.info != info || entry.status.capacity != status.capacity;
        let renamed = entry.info.name != info.name;
        let moved = entry.info.endpoints != info.endpoints;
        entry.errors = (entry.errors / 2)
            .saturating_add(status.counters.errors.saturating_sub(entry.status.counters.errors));
        let is_new = |line: &&String| !entry.warned.contains(line);
        let warnings = status.warnings.iter().filter(is_new).take(WARNINGS_MAX);
        let warnings: Vec<String> = warnings.map(|line| short_line(line, WARNING_LEN_MAX)).collect();
        entry.warned = status.warnings.iter().take(WARNED_MAX).cloned().collect();
        let has_less = known && (status.uptime < entry.status.uptime || status.grants < entry.status.grants);
        let status = match known && entry.heard_event < entry.answered {
            // The heartbeat may have been on its way while the appliance answered, and be older than that answer.
            true => with_memory_of(&status, &entry.status),
            false => {
                entry.sampled_after = if known { entry.heard_event } else { 0 };
                status
            }
        };
        (entry.info, entry.status) = (info, status);
        (entry.heard, entry.heard_event, entry.told_up) = (Some(now), event, entry.given_up.is_none());
        entry.came = Some(now);
        if renamed {
            entry.profile = None;
        }
        entry.drop_seen();
        match changed {
            true => self.refill(id),
            false => self.change(id, |_| {}),
        }
        Heard { changed, back, warnings, moved, has_less }
    }

    /// Takes the first answer of an appliance after a start. Returns whether it was not heard before.
    pub fn greet(&mut self, id: ApplianceId, now: Duration, asked: u64, event: u64, status: Status) -> bool {
        let was_up = self.state(id, now) == Some(ApplianceState::Up);
        if let Some(entry) = self.appliances.get_mut(&id) {
            (entry.heard, entry.told_up) = (Some(now), entry.given_up.is_none());
        }
        self.sample(id, asked, event, status);
        !was_up && self.state(id, now) == Some(ApplianceState::Up)
    }

    /// Takes the answer to a question. The question was asked at the event `asked`; the answer came at the event
    /// `now`.
    pub fn sample(&mut self, id: ApplianceId, asked: u64, now: u64, status: Status) {
        let Some(entry) = self.appliances.get_mut(&id).filter(|entry| entry.sampled_after <= asked) else {
            return;
        };
        entry.status = status;
        (entry.sampled_after, entry.answered) = (asked, now);
        entry.drop_seen();
        self.change(id, |_| {});
    }

    /// Removes an appliance.
    pub fn remove(&mut self, id: ApplianceId) {
        self.appliances.remove(&id);
        self.pool.remove(id);
    }

    /// Gives each appliance the profile for its name.
    pub fn profile<'a>(&mut self, profile: impl Fn(&Name) -> Option<&'a ApplianceProfile>) {
        let ids: Vec<ApplianceId> = self.appliances.keys().copied().collect();
        for id in ids {
            self.profile_one(id, &profile);
        }
    }

    /// Gives one appliance the profile for its name.
    pub fn profile_one<'a>(
        &mut self,
        id: ApplianceId,
        profile: impl Fn(&Name) -> Option<&'a ApplianceProfile>,
    ) {
        if let Some(entry) = self.appliances.get_mut(&id) {
            entry.profile = profile(&entry.info.name).cloned();
            self.refill(id);
        }
    }

    /// Promises memory of an appliance to an allocation.
    pub fn promise(&mut self, allocation: AllocationId, id: ApplianceId, bytes: u64) {
        self.change(id, |entry| {
            let promise = entry.promises.entry(allocation).or_insert(Promise { bytes: 0, settled: None });
            promise.bytes = promise.bytes.saturating_add(bytes);
            promise.settled = None;
        });
    }

    /// From this event on the appliance counts the promised memory itself: as taken, or, if the memory was given
    /// back, in its new state.
    pub fn settle(&mut self, allocation: AllocationId, id: ApplianceId, event: u64) {
        self.change(id, |entry| {
            entry.doubtful = Some(event);
            if let Some(promise) = entry.promises.get_mut(&allocation) {
                promise.settled = Some(event);
            }
        });
    }

    /// Cancels a promise: the memory was never taken.
    pub fn forget(&mut self, allocation: AllocationId, id: ApplianceId) {
        self.change(id, |entry| {
            entry.promises.remove(&allocation);
        });
    }

    /// Promises speed of an appliance's link, in bits per second, or takes the promise back.
    pub fn promise_link(&mut self, id: ApplianceId, more: LinkSpeed, back: bool) {
        self.change(id, |entry| {
            entry.link_promised = match back {
                true => entry.link_promised.saturating_sub(more.0),
                false => entry.link_promised.saturating_add(more.0),
            };
        });
    }

    /// Counts an error of the appliance.
    pub fn blame(&mut self, id: ApplianceId) {
        self.change(id, |entry| entry.errors = entry.errors.saturating_add(1));
    }

    /// Changes the present state of an appliance, not its lasting properties, and updates the pool.
    fn change(&mut self, id: ApplianceId, change: impl FnOnce(&mut Entry)) {
        let patience = self.interval * INTERVALS_MAX;
        if let Some(entry) = self.appliances.get_mut(&id) {
            change(entry);
            let entry = &*entry;
            self.pool.update(id, |one| entry.tell(one, patience));
        }
    }

    fn refill(&mut self, id: ApplianceId) {
        if let Some(entry) = self.appliances.get(&id) {
            self.pool.put(entry.candidate(self.interval * INTERVALS_MAX));
        }
    }

    /// Whether the appliance is up or silent; none if it is unknown.
    pub fn state(&self, id: ApplianceId, now: Duration) -> Option<ApplianceState> {
        self.appliances.get(&id).map(|entry| self.state_of(entry, now))
    }

    fn state_of(&self, entry: &Entry, now: Duration) -> ApplianceState {
        match entry.heard {
            Some(heard)
                if now.saturating_sub(heard) <= self.interval * INTERVALS_MAX && entry.given_up.is_none() =>
            {
                ApplianceState::Up
            }
            _ => ApplianceState::Silent,
        }
    }

    /// Whether it is up and has sent a heartbeat lately. Its answers to our questions do not show that it can reach
    /// the allocator.
    pub fn reaches_us(&self, id: ApplianceId, now: Duration) -> bool {
        let Some(entry) = self.appliances.get(&id) else { return false };
        let lately = |at: Duration| now.saturating_sub(at) <= self.interval * INTERVALS_MAX;
        entry.came.is_some_and(lately) && self.state_of(entry, now) == ApplianceState::Up
    }

    /// Whether it was heard lately and is not given up. If this process started only lately, an appliance that was
    /// not heard yet counts, too.
    pub fn may_be_up(&self, id: ApplianceId, now: Duration) -> bool {
        let is_lately = |entry: &Entry| {
            entry.given_up.is_none()
                && now.saturating_sub(entry.heard.unwrap_or_default()) <= self.interval * INTERVALS_MAX
        };
        self.appliances.get(&id).is_some_and(is_lately)
    }

    /// Another appliance of this name that may be up.
    pub fn namesake(&self, id: ApplianceId, name: &Name, now: Duration) -> Option<&Info> {
        let others =
            self.appliances.iter().filter(|(other, entry)| **other != id && entry.info.name == *name);
        others.map(|(_, entry)| &entry.info).find(|info| self.may_be_up(info.id, now))
    }

    /// The appliance's description of itself.
    pub fn info(&self, id: ApplianceId) -> Option<&Info> {
        self.appliances.get(&id).map(|entry| &entry.info)
    }

    /// Its record.
    pub fn record(&self, id: ApplianceId) -> Option<ApplianceRecord> {
        self.appliances.get(&id).map(|entry| ApplianceRecord {
            info: entry.info.clone(),
            status: entry.status.clone(),
            since: entry.since,
            drain: entry.drain,
            given_up: entry.given_up,
        })
    }

    /// The records of all appliances.
    pub fn records(&self) -> Vec<ApplianceRecord> {
        self.appliances.keys().filter_map(|id| self.record(*id)).collect()
    }

    /// Its drain, if it is being emptied.
    pub fn draining(&self, id: ApplianceId) -> Option<DrainRecord> {
        self.appliances.get(&id).and_then(|entry| entry.drain)
    }

    /// Begins or ends the emptying of an appliance; it gets nothing new meanwhile.
    pub fn set_draining(&mut self, id: ApplianceId, drain: Option<DrainRecord>) {
        if let Some(entry) = self.appliances.get_mut(&id) {
            entry.drain = drain;
            self.refill(id);
        }
    }

    /// Since when it is given up, seconds since 1970. It gets no allocation until it has cleared its old memory.
    pub fn given_up(&self, id: ApplianceId) -> Option<u64> {
        self.appliances.get(&id).and_then(|entry| entry.given_up)
    }

    /// Marks an appliance as given up, or removes the mark.
    pub fn set_given_up(&mut self, id: ApplianceId, since: Option<u64>) {
        if let Some(entry) = self.appliances.get_mut(&id) {
            entry.given_up = since;
            entry.told_up = since.is_none();
            self.refill(id);
        }
    }

    /// The appliances that are given up.
    pub fn all_given_up(&self) -> Vec<ApplianceId> {
        let given_up = self.appliances.iter().filter(|(_, entry)| entry.given_up.is_some());
        given_up.map(|(id, _)| *id).collect()
    }

    /// The appliances that are being emptied.
    pub fn all_draining(&self) -> Vec<(ApplianceId, DrainRecord)> {
        self.appliances.iter().filter_map(|(id, entry)| Some((*id, entry.drain?))).collect()
    }

    /// Its name, or its id if it is unknown.
    pub fn name(&self, id: ApplianceId) -> String {
        self.info(id).map_or_else(|| id.to_string(), |info| info.name.to_string())
    }

    /// The appliances that have fallen silent since the last call.
    pub fn fallen_silent(&mut self, now: Duration) -> Vec<ApplianceId> {
        let limit = self.interval * INTERVALS_MAX;
        let silent = |entry: &Entry| entry.heard.is_none_or(|heard| now.saturating_sub(heard) > limit);
        let told = self.appliances.iter_mut().filter(|(_, entry)| entry.told_up && silent(entry));
        told.map(|(id, entry)| {
            entry.told_up = false;
            *id
        })
        .collect()
    }

    /// The appliances that are up and may have more free memory than they reported: memory was given back there, or
    /// is being cleared, or a promise may be counted twice.
    pub fn doubtful(&self, now: Duration) -> Vec<ApplianceId> {
        let doubtful = |entry: &Entry| {
            entry.doubtful.is_some() || !entry.promises.is_empty() || clearing(&entry.status) > 0
        };
        let found = self
            .appliances
            .iter()
            .filter(|(_, entry)| doubtful(entry) && self.state_of(entry, now) == ApplianceState::Up);
        found.map(|(id, _)| *id).collect()
    }

    /// Share of memory that is in use, over all appliances that are up.
    pub fn used(&self, now: Duration) -> Percent {
        let up = self.pool.iter().filter(|one| one.up_until >= now);
        let (capacity, free) = up.fold((0_u128, 0_u128), |(capacity, free), one| {
            (capacity + u128::from(one.capacity), free + u128::from(one.free.min(one.capacity)))
        });
        let percent = ((capacity - free) * 100).checked_div(capacity).unwrap_or(0);
        Percent::new(percent as u8).unwrap_or_default()
    }

    /// The appliances in the form that decisions read.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The appliances as the API shows them. `regions`: how many regions the records have on each appliance.
    pub fn list(&self, now: Duration, regions: &HashMap<ApplianceId, u64>) -> Vec<Appliance> {
        let shown = |(id, entry): (&ApplianceId, &Entry)| Appliance {
            info: entry.info.clone(),
            status: Status { free: ByteSize(entry.unpromised()), ..entry.status.clone() },
            state: self.state_of(entry, now),
            silent: entry.heard.map(|heard| Span(whole_millis(now.saturating_sub(heard)))),
            regions: regions.get(id).copied().unwrap_or(0),
            drain: None,
            given_up: entry.given_up,
        };
        self.appliances.iter().map(shown).collect()
    }
}

impl Entry {
    fn new(info: Info, status: Status, since: u64) -> Entry {
        Entry {
            info,
            status,
            since,
            heard: None,
            came: None,
            heard_event: 0,
            sampled_after: 0,
            answered: 0,
            doubtful: None,
            told_up: false,
            promises: HashMap::new(),
            link_promised: 0,
            warned: Vec::new(),
            errors: 0,
            drain: None,
            given_up: None,
            profile: None,
        }
    }

    fn drop_seen(&mut self) {
        let sampled_after = self.sampled_after;
        self.promises.retain(|_, promise| promise.settled.is_none_or(|settled| settled > sampled_after));
        self.doubtful = self.doubtful.filter(|&event| event > sampled_after);
    }

    /// Memory that may be used at all, in bytes.
    fn usable(&self) -> u64 {
        let capacity = self.status.capacity.0;
        let Some(profile) = &self.profile else { return capacity };
        let capacity = profile.capacity.map_or(capacity, |most| most.0.min(capacity));
        capacity.saturating_sub(profile.head_room.map_or(0, |room| room.of(capacity)))
    }

    /// Memory that may still be requested: free memory by its report, less head-room, less promises.
    fn free(&self) -> u64 {
        let kept = self.status.capacity.0.saturating_sub(self.usable());
        self.unpromised().saturating_sub(kept)
    }

    /// Free memory by its report, less promises.
    fn unpromised(&self) -> u64 {
        let promised = self.promises.values().map(|promise| promise.bytes).fold(0, u64::saturating_add);
        self.status.free.0.saturating_sub(promised)
    }

    fn health(&self) -> u16 {
        (1000 / self.errors.saturating_add(1)) as u16
    }

    fn link_speed(&self) -> Option<LinkSpeed> {
        self.profile.as_ref().and_then(|profile| profile.link_speed).or(self.info.link_speed)
    }

    /// Idle share of its link, in thousandths; 1000 if unknown.
    fn idle(&self) -> u16 {
        match (self.status.traffic, self.link_speed()) {
            (Some(traffic), Some(speed)) if speed.0 > 0 => {
                1000 - (u128::from(traffic.0) * 1000 / u128::from(speed.0)).min(1000) as u16
            }
            _ => 1000,
        }
    }

    /// Updates the fields that change from one heartbeat to the next.
    fn tell(&self, one: &mut Candidate, patience: Duration) {
        one.up_until = self.up_until(patience);
        one.free = self.free();
        one.clearing = clearing(&self.status);
        one.link_promised = LinkSpeed(self.link_promised);
        one.idle = self.idle();
        one.health = self.health();
    }

    /// Until when it counts as up. Only "never heard" is zero.
    fn up_until(&self, patience: Duration) -> Duration {
        self.heard
            .filter(|_| self.given_up.is_none())
            .map_or(Duration::ZERO, |heard| (heard + patience).max(Duration::from_millis(1)))
    }

    fn candidate(&self, patience: Duration) -> Candidate {
        let profile = self.profile.as_ref();
        let mut labels = self.info.labels.clone();
        labels.extend(profile.iter().flat_map(|profile| profile.labels.clone()));
        let ramp_up = profile.and_then(|profile| profile.ramp_up);
        Candidate {
            id: self.info.id,
            name: self.info.name.clone(),
            up_until: self.up_until(patience),
            free: self.free(),
            capacity: self.usable(),
            clearing: clearing(&self.status),
            drain: self.drain.is_some() || profile.is_some_and(|profile| profile.drain),
            labels,
            medium: self.info.medium,
            rdma: !self.info.endpoints.rdma.is_empty(),
            link_speed: self.link_speed(),
            link_promised: LinkSpeed(self.link_promised),
            idle: self.idle(),
            health: self.health(),
            since: self.since,
            ramp_up: ramp_up.map_or(RAMP_UP_DEFAULT_SECS, |span| span.0.as_secs()),
        }
    }
}

/// `status` with the memory figures of `other`.
fn with_memory_of(status: &Status, other: &Status) -> Status {
    let Status { granted, reserved, free, ready, regions, grants, .. } = *other;
    Status { granted, reserved, free, ready, regions, grants, ..status.clone() }
}

/// Memory that is neither used nor free: it is being cleared.
fn clearing(status: &Status) -> u64 {
    let used = [status.granted, status.reserved, status.free];
    used.iter().fold(status.capacity.0, |rest, part| rest.saturating_sub(part.0))
}

/// The span without fractions of a millisecond, which no reader needs.
pub(crate) fn whole_millis(span: Duration) -> Duration {
    Duration::from_millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::appliance;

    const TICK: Duration = Duration::from_secs(5);

    fn heartbeat(free: u64) -> Heartbeat {
        let ApplianceRecord { info, mut status, .. } = appliance(1);
        status.free = ByteSize(free);
        Heartbeat { info, status }
    }

    fn free(inventory: &Inventory) -> u64 {
        inventory.pool().iter().next().unwrap().free
    }

    /// An appliance with 100 bytes, of which 60 are promised to an allocation.
    fn promised() -> (Inventory, AllocationId, ApplianceId) {
        let mut inventory = Inventory::new(TICK);
        let (allocation, id) = (AllocationId::from_u128(1), appliance(1).info.id);
        inventory.hear(Duration::ZERO, 0, 1, heartbeat(100));
        inventory.promise(allocation, id, 60);
        (inventory, allocation, id)
    }

    #[test]
    fn an_appliance_is_silent_after_three_intervals() {
        let mut inventory = Inventory::new(TICK);
        inventory.restore(appliance(1));
        let id = appliance(1).info.id;
        assert_eq!(inventory.state(id, Duration::ZERO), Some(ApplianceState::Silent));
        let heard = inventory.hear(
            Duration::ZERO,
            0,
            1,
            Heartbeat { info: appliance(1).info, status: appliance(1).status },
        );
        let expected =
            Heard { changed: false, back: true, warnings: Vec::new(), moved: false, has_less: false };
        assert_eq!(heard, expected);
        assert_eq!(inventory.state(id, TICK * 3), Some(ApplianceState::Up));
        assert_eq!(inventory.state(id, TICK * 3 + Duration::from_millis(1)), Some(ApplianceState::Silent));
        assert!(inventory.fallen_silent(TICK * 3).is_empty());
        assert!(inventory.doubtful(TICK * 4).is_empty());
        assert_eq!(inventory.fallen_silent(TICK * 4), [id]);
        assert!(inventory.fallen_silent(TICK * 5).is_empty(), "it is said once");
    }

    #[test]
    fn a_promise_counts_until_a_later_sample() {
        let (mut inventory, allocation, id) = promised();
        assert_eq!(free(&inventory), 40);
        inventory.hear(TICK, 0, 2, heartbeat(100));
        inventory.settle(allocation, id, 3);
        inventory.hear(TICK * 2, 0, 4, heartbeat(100));
        assert_eq!(free(&inventory), 40, "it may have been sampled before");
        inventory.hear(TICK * 3, 0, 5, heartbeat(40));
        assert_eq!(free(&inventory), 40, "it was sampled after the last one was answered");
    }

    #[test]
    fn an_answer_to_a_question_is_a_later_sample() {
        let (mut inventory, allocation, id) = promised();
        inventory.settle(allocation, id, 2);
        inventory.sample(id, 3, 4, heartbeat(40).status);
        assert_eq!(free(&inventory), 40);
        inventory.sample(id, 2, 5, heartbeat(100).status);
        assert_eq!(free(&inventory), 40, "an older answer changes nothing");
    }

    #[test]
    fn memory_figures_of_a_heartbeat_older_than_an_answer_are_ignored() {
        let (mut inventory, allocation, id) = promised();
        inventory.settle(allocation, id, 2);
        inventory.sample(id, 3, 4, heartbeat(40).status);
        inventory.hear(TICK, 0, 5, heartbeat(100));
        assert_eq!(free(&inventory), 40, "it may have been sent before the memory was taken");
        inventory.hear(TICK * 2, 0, 6, heartbeat(30));
        assert_eq!(free(&inventory), 30);
    }
}
