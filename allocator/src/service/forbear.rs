//! Time that does not count against the end of an allocation.
//!
//! An end is a moment of the day, and its owner was promised the time up to it. That time does not pass while the
//! allocator is away, nor when a clock is set, nor while an announced end can be heard by nobody. So the moments of the
//! record move: the move is durable before a later step is taken, together with the note that the allocator is there.
//! Hours of an account are moments of the day themselves. They move only once their end was announced.

use std::time::Duration;

use xpm_protocol::api::allocator::EndReason;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ClientId, Name, Span};

use super::clock::News;
use super::lease::Told;
use super::{AfterStore, Awaited, Moment, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, Phase};

/// How often it is noted that the allocator is there, while some allocation has an end.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// How long after an owner was heard it counts as somebody who hears; owners ask every 10 s.
const OWNER_HEARS: Duration = Duration::from_secs(60);
/// What is not worth a move, in seconds.
const WORTH: u64 = 2;

/// A move that is not in the record yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shift {
    seconds: i64,
    why: &'static str,
}

impl Service {
    /// The time of day to judge by. What happened to the clock is told and dealt with.
    pub(super) fn read_clock(&mut self, moment: Moment) -> u64 {
        let (unix, news) = self.clock_of_day.read(moment);
        self.now = Moment { unix, ..moment };
        let Some(news) = news else { return unix };
        let by = |ahead: i64| {
            let how = if ahead < 0 { "behind" } else { "ahead of" };
            format!(
                "{} {how} what the clock that measures spans says",
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

    /// Every moment of the day that stands for a span moves with the clock.
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

    /// Moves the end of an allocation. No step of it is taken until that is durable.
    pub(super) fn forbear(&mut self, id: AllocationId, seconds: i64, why: &'static str) {
        let before = self.entry(id).shift.map_or(0, |shift| shift.seconds);
        self.entry(id).shift = Some(Shift { seconds: before.saturating_add(seconds), why });
        self.shifted.insert(id);
        self.set_timer(id);
    }

    /// Makes durable what was moved, of allocations to which nothing is done now.
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
            // While another move is not durable, the next life has to find the moment before it.
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

    /// Notes now and then that the allocator is there, as long as that matters to somebody.
    pub(super) fn note_alive(&mut self) {
        let due = self.alive_noted.is_none_or(|noted| self.now.at.saturating_sub(noted) >= ALIVE_EVERY);
        if due && self.shifted.is_empty() && !(self.timers.is_empty() && self.deaf.is_empty()) {
            self.alive_noted = Some(self.now.at);
            self.store(vec![Change::Alive(self.now.unix)], Awaited::Nothing);
        }
    }

    /// Takes the time off, in records of an earlier life, in which the allocator was away: `alive` is when it was there
    /// last, where that is known. Returns from when on the steps of each are due.
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
            // What was announced in an earlier life is told once more, and is not late.
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

    /// Somebody asks for this client.
    pub(super) fn hear_owner(&mut self, client: ClientId) {
        self.owners_heard.insert(client, self.now.at);
    }

    /// Whether what is said about the end of an allocation can reach those whom it hits: nobody uses it, its owner asked
    /// a moment ago, or heartbeats of an appliance of it come. An answer to this process's own question does not count: it shows
    /// no way to the allocator.
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

    /// Finds announced ends that nobody can hear of, and moves those that can be heard of again.
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
