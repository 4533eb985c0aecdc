//! Time that does not count against the end of an allocation.
//!
//! An end is a moment of the day, and the owner was promised the time up to it. Three spans do not count: while the
//! allocator is away, the difference when a clock is set, and while an announced end can reach neither the owner nor
//! an appliance of it. The moments in the record move by these spans. A move is durable before a later step is taken,
//! together with the note that the allocator runs. Hours of an account are moments of the day themselves; such an end
//! moves only once it was announced.

use std::time::Duration;

use xpm_protocol::api::allocator::EndReason;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ClientId, Name, Span};

use super::clock::News;
use super::lease::Told;
use super::{AfterStore, Awaited, Moment, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, Phase};

/// How often the note "the allocator runs" is stored while some allocation has an end.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// How long an owner counts as reachable after its last request; owners ask every 10 s.
const OWNER_HEARS: Duration = Duration::from_secs(60);
/// Shorter spans move no end, in seconds.
const WORTH: u64 = 2;

/// A move of an end that is not in the record yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shift {
    seconds: i64,
    why: &'static str,
}

impl Service {
    /// Returns the time of day to judge by. Logs a jump of the clock and adjusts to it.
    pub(super) fn read_clock(&mut self, moment: Moment) -> u64 {
        let (unix, news) = self.clock_of_day.read(moment);
        self.now = Moment { unix, ..moment };
        let Some(news) = news else { return unix };
        let by = |ahead: i64| {
            let how = if ahead < 0 { "behind" } else { "ahead of" };
            format!(
                "{} {how} the time by the monotonic clock",
                Span(Duration::from_secs(ahead.unsigned_abs()))
            )
        };
        let (kind, line) = match news {
            News::Jumped(ahead) => (
                EventKind::ClockJumped,
                format!(
                    "the clock of the allocator's machine is {}: nothing is judged by it yet; check its time service",
                    by(ahead)
                ),
            ),
            News::Back => {
                (EventKind::ClockBack, "the clock of the allocator's machine is right again".to_owned())
            }
            News::Taken(ahead) => (
                EventKind::ClockSet,
                format!(
                    "the clock of the allocator's machine stays {}: its time holds from now on; leases keep what is left of \
                     them",
                    by(ahead)
                ),
            ),
        };
        self.tell_of_itself(kind, line);
        if let News::Taken(ahead) = news {
            self.clock_was_set(ahead);
        }
        unix
    }

    /// The wall clock was set by `by` seconds: moves every stored moment that stands for a span.
    fn clock_was_set(&mut self, by: i64) {
        self.garbage_follows_clock(by);
        self.queue_follows_clock(by);
        self.event_waits_follow_clock(by);
        self.deaf.values_mut().for_each(|since| *since = since.saturating_add_signed(by));
        let ids: Vec<AllocationId> = self.allocations.keys().copied().collect();
        for id in ids {
            let entry = self.entry(id);
            entry.steps_from = entry.steps_from.saturating_add_signed(by);
            let told = entry.told;
            match moves_with_time(&entry.record, told > Told::Nothing) {
                true => self.forbear(id, by, "the clock was set"),
                false => self.set_timer(id),
            }
        }
    }

    /// Moves the end of an allocation. No step of its end is taken until the move is durable.
    pub(super) fn forbear(&mut self, id: AllocationId, seconds: i64, why: &'static str) {
        let before = self.entry(id).shift.map_or(0, |shift| shift.seconds);
        self.entry(id).shift = Some(Shift { seconds: before.saturating_add(seconds), why });
        self.shifted.insert(id);
        self.set_timer(id);
    }

    /// Stores pending moves of the allocations to which no work is done now.
    pub(super) fn settle_shifts(&mut self) {
        let unix = self.now.unix;
        let idle = |id: &&AllocationId| {
            self.allocations.get(id).is_none_or(|entry| matches!(entry.work, Work::Idle))
        };
        let ids: Vec<AllocationId> = self.shifted.iter().filter(idle).copied().collect();
        for id in ids {
            self.shifted.remove(&id);
            let Some(entry) = self.allocations.get_mut(&id) else { continue };
            let Some(shift) = entry.shift.take().filter(|_| entry.record.phase == Phase::Ready) else {
                continue;
            };
            entry.work = Work::Storing;
            let record = move_end(entry.record.clone(), shift.seconds);
            self.tell_moved(&record.name, shift);
            let mut batch = vec![Change::Allocation(Box::new(record.clone()))];
            // While another move is not durable, a restart has to find the earlier note.
            if self.shifted.is_empty() {
                batch.push(Change::Alive(unix));
            }
            self.store(batch, Awaited::Record(Box::new(record), AfterStore::Settled));
        }
    }

    fn tell_moved(&mut self, name: &Name, shift: Shift) {
        let span = Span(Duration::from_secs(shift.seconds.unsigned_abs()));
        let how = if shift.seconds < 0 { "earlier" } else { "later" };
        self.tell(EventKind::LeaseMoved, name, format!("`{name}` ends {span} {how}: {}", shift.why));
    }

    /// Stores the note "the allocator runs" from time to time, as long as some end depends on it.
    pub(super) fn note_alive(&mut self) {
        let due = self.alive_noted.is_none_or(|noted| self.now.at.saturating_sub(noted) >= ALIVE_EVERY);
        if due && self.shifted.is_empty() && !(self.timers.is_empty() && self.deaf.is_empty()) {
            self.alive_noted = Some(self.now.at);
            self.store(vec![Change::Alive(self.now.unix)], Awaited::Nothing);
        }
    }

    /// Takes the absence of the allocator off the ends in the records of an earlier process. `alive`: when the
    /// allocator ran last, if known. Returns, with each record, the moment from which its steps are due.
    pub(super) fn without_absence(
        &mut self,
        records: Vec<AllocationRecord>,
        alive: Option<u64>,
    ) -> Vec<(AllocationRecord, u64)> {
        let unix = self.now.unix;
        let away = alive.map_or(0, |alive| unix.saturating_sub(alive));
        let shift = Shift { seconds: away.cast_signed(), why: "the allocator was away" };
        let mut batch = Vec::new();
        let mut moved = Vec::with_capacity(records.len());
        for record in records {
            // An end that an earlier process announced is announced once more, and is not late.
            let announced = alive.is_some_and(|alive| record.lease_stage(alive) > Told::Nothing)
                || record.reclaim.is_some();
            let steps_from = if announced { unix } else { 0 };
            let moves = record.phase == Phase::Ready && away > WORTH && moves_with_time(&record, announced);
            let record = if moves { move_end(record, shift.seconds) } else { record };
            if moves {
                self.tell_moved(&record.name, shift);
                batch.push(Change::Allocation(Box::new(record.clone())));
            }
            moved.push((record, steps_from));
        }
        if !batch.is_empty() {
            batch.push(Change::Alive(unix));
            self.store(batch, Awaited::Nothing);
        }
        moved
    }

    /// Notes that this client, which owns an allocation or wants to, was heard.
    pub(super) fn hear_owner(&mut self, client: ClientId) {
        self.owners_heard.insert(client, self.now.at);
    }

    /// Whether an announced end can reach the owner: the allocation has no owner, its owner sent a request a moment
    /// ago, or heartbeats of one of its appliances arrive. An answer to this process's own question does not count:
    /// it does not show that the appliance can reach the allocator.
    pub(super) fn can_be_heard(&self, id: AllocationId) -> bool {
        let Some(entry) = self.allocations.get(&id) else { return true };
        let Some(owner) = &entry.record.owner else { return true };
        let now = self.now.at;
        let heard = self.owners_heard.get(&owner.client);
        let up = |one: &xpm_protocol::ApplianceId| self.inventory.reaches_us(*one, now);
        heard.is_some_and(|heard| now.saturating_sub(*heard) <= OWNER_HEARS)
            || entry.record.appliances().iter().any(up)
    }

    pub(super) fn is_deaf(&mut self, id: AllocationId) {
        let unix = self.now.unix;
        self.deaf.entry(id).or_insert(unix);
    }

    /// Finds announced ends that cannot reach their owners, and moves ends that can be heard of again.
    pub(super) fn note_who_is_deaf(&mut self) {
        let unix = self.now.unix;
        let announced = |entry: &super::Entry| {
            entry.record.phase == Phase::Ready
                && (entry.told > Told::Nothing || entry.record.reclaim.is_some())
        };
        let deaf = |id: &AllocationId| !self.can_be_heard(*id);
        let found: Vec<AllocationId> = self
            .allocations
            .iter()
            .filter(|(id, entry)| announced(entry) && deaf(id))
            .map(|(id, _)| *id)
            .collect();
        let over: Vec<(AllocationId, u64)> =
            self.deaf.iter().filter(|(id, _)| !deaf(id)).map(|(id, since)| (*id, *since)).collect();
        found.into_iter().for_each(|id| self.is_deaf(id));
        for (id, since) in over {
            self.deaf.remove(&id);
            let lost = unix.saturating_sub(since);
            let ready = self.allocations.get(&id).is_some_and(|entry| entry.record.phase == Phase::Ready);
            if ready && lost > WORTH {
                self.forbear(id, lost.cast_signed(), "neither its owner nor an appliance of it was heard");
            }
        }
    }
}

/// Whether the end of an allocation stands for a span that its owner was promised.
fn moves_with_time(record: &AllocationRecord, announced: bool) -> bool {
    let lease = record.terms.lease.is_some_and(|lease| announced || lease.reason != EndReason::Hours);
    lease || record.reclaim.is_some()
}

fn move_end(mut record: AllocationRecord, seconds: i64) -> AllocationRecord {
    let by = |moment: u64| moment.saturating_add_signed(seconds);
    if let Some(lease) = &mut record.terms.lease {
        (lease.ends, lease.total_ends) = (by(lease.ends), lease.total_ends.map(by));
    }
    if let Some(reclaim) = &mut record.reclaim {
        reclaim.frees = by(reclaim.frees);
    }
    record
}
