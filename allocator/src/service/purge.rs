//! Gives memory back: the end of a deletion, and the undoing of unfinished allocations.
//!
//! `Deleting` or `Undoing` is durable before the first call, and the record goes only when every appliance has
//! confirmed. An appliance that does not answer is called again, first after a second, then after longer pauses, and
//! at once when it is heard again. The requester waits for the first round of calls only. An appliance that the
//! operator made the allocator forget is not called: its memory is gone.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId};

use super::wish::Wish;
use super::{AfterStore, Answer, Awaited, Call, CallError, Outcome, ReplyTo, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, Phase};

/// Pause before the second call to an appliance that did not answer; it doubles with each failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Action after the first round of calls.
#[derive(Debug)]
pub(super) enum Then {
    /// No request waits.
    Nothing,
    /// Send this answer.
    Answer(ReplyTo, Result<Outcome, ApiError>),
    /// Try the creation again.
    TryAgain(Box<Wish>),
}

/// Progress of giving one allocation back.
#[derive(Debug)]
pub(super) struct Purge {
    then: Then,
    /// By grant.
    grants: Vec<State>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Open { failures: u32 },
    Done,
    Again { at: Duration, failures: u32 },
}

/// Whether the allocation is deleted from its user's point of view.
pub(super) fn is_deleting(record: &AllocationRecord) -> bool {
    record.phase == Phase::Deleting
}

impl Service {
    pub(super) fn delete(&mut self, reply: ReplyTo, id: AllocationId, force: bool) {
        let record = &self.allocations[&id].record;
        if let Some(owner) = record.owner.as_ref().filter(|_| !force) {
            let advice = self.advice_for_silent(record);
            let line = format!(
                "`{}` is in use by {} as {} (client {}): detach it there first, or delete it with force, which destroys what is \
                 in it{advice}",
                record.name, owner.host_name, owner.purpose, owner.client
            );
            return self.refuse(reply, ErrorKind::InUse, line);
        }
        let mut record = record.clone();
        record.end();
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Delete(reply));
    }

    /// Begins to give everything back. The name is free from now on, unless a second attempt needs it.
    pub(super) fn purge(&mut self, id: AllocationId, then: Then) {
        let record = &self.entry(id).record;
        let (name, grants) = (record.name.clone(), record.grants.len());
        let line = format!("allocation {name} ({id}) is given back");
        match self.names.get(&name) == Some(&id) && self.entry(id).record.phase == Phase::Deleting {
            true => self.tell(EventKind::Deleted, &name, line),
            false => tracing::info!("{line}"),
        }
        if !matches!(then, Then::TryAgain(..)) {
            self.free_name(id);
        }
        self.uncount(id);
        self.drop_hand_over(id);
        self.purging.insert(id);
        self.entry(id).work =
            Work::Purging(Purge { then, grants: vec![State::Open { failures: 0 }; grants] });
        (0..grants).for_each(|grant| self.purge_grant(id, grant));
        self.purge_progressed(id);
        self.release_queue(id);
    }

    /// Gives back what an earlier process left: at each appliance when it is heard, or from the moment `at` on.
    pub(super) fn purge_when_heard(&mut self, id: AllocationId, at: Duration) {
        self.free_name(id);
        self.uncount(id);
        self.purging.insert(id);
        let grants = vec![State::Again { at, failures: 0 }; self.entry(id).record.grants.len()];
        self.entry(id).work = Work::Purging(Purge { then: Then::Nothing, grants });
        self.purge_progressed(id);
    }

    fn free_name(&mut self, id: AllocationId) {
        let name = self.entry(id).record.name.clone();
        if self.names.get(&name) == Some(&id) {
            self.names.remove(&name);
        }
    }

    fn purge_grant(&mut self, id: AllocationId, grant: usize) {
        let record = &self.entry(id).record;
        let (appliance, grant_id) = (record.grants[grant].appliance, record.grants[grant].id);
        let call = match record.phase {
            Phase::Undoing => Call::Purge(id, grant_id),
            _ => Call::Revoke(grant_id),
        };
        let there = self.inventory.info(appliance).filter(|_| !self.is_gone(appliance));
        match there.map(|info| info.control.clone()) {
            Some(control) => self.call(appliance, control, call, Awaited::Purged(id, grant)),
            None => *self.purge_state(id, grant) = State::Done,
        }
    }

    pub(super) fn purged(&mut self, id: AllocationId, grant: usize, result: Result<Answer, CallError>) {
        let (now, event) = (self.now.at, self.clock);
        let appliance = self.entry(id).record.grants[grant].appliance;
        let State::Open { failures } = *self.purge_state(id, grant) else { return };
        let gone = self.is_gone(appliance);
        *self.purge_state(id, grant) = match result {
            Err(error) if !gone => {
                let name = self.inventory.name(appliance);
                tracing::warn!("appliance {name} has not given back allocation {id} yet: {error}");
                let pause = PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
                State::Again { at: now + pause, failures: failures + 1 }
            }
            _ => {
                // The memory is free only once it is cleared. Until then the last heartbeat counts too much as free,
                // and it may even be older than the allocation.
                self.inventory.settle(id, appliance, event);
                State::Done
            }
        };
        self.purge_progressed(id);
    }

    fn purge_progressed(&mut self, id: AllocationId) {
        let Work::Purging(purge) = &mut self.entry(id).work else { return };
        let first_round = purge.grants.iter().any(|state| matches!(state, State::Open { failures: 0 }));
        let all = purge.grants.iter().all(|state| matches!(state, State::Done));
        if first_round {
            return;
        }
        let then = std::mem::replace(&mut purge.then, Then::Nothing);
        self.free_name(id);
        match then {
            Then::Nothing => {}
            Then::Answer(reply, result) => self.reply(reply, result),
            Then::TryAgain(wish) => self.place(*wish),
        }
        // Requests that waited for the allocation now find the second attempt, or nothing.
        self.release_queue(id);
        if all {
            self.store(vec![Change::AllocationGone(id)], Awaited::RecordGone(id));
        }
    }

    fn purge_state(&mut self, id: AllocationId, grant: usize) -> &mut State {
        match &mut self.entry(id).work {
            Work::Purging(purge) => &mut purge.grants[grant],
            _ => unreachable!("nothing interrupts a purge"),
        }
    }

    /// Repeats the calls whose pause is over.
    pub(super) fn start_due_purges(&mut self) {
        let now = self.now.at;
        for (id, grant, failures) in self.purges_waiting(|at, _| at <= now) {
            *self.purge_state(id, grant) = State::Open { failures };
            self.purge_grant(id, grant);
            self.purge_progressed(id);
        }
    }

    /// The appliance is there again, or gone for good: its pauses end now.
    pub(super) fn hasten_purges(&mut self, appliance: ApplianceId) {
        let now = self.now.at;
        for (id, grant, failures) in self.purges_waiting(|_, of| of == appliance) {
            *self.purge_state(id, grant) = State::Again { at: now, failures };
        }
    }

    fn purges_waiting(
        &self,
        wanted: impl Fn(Duration, ApplianceId) -> bool,
    ) -> Vec<(AllocationId, usize, u32)> {
        let mut found = Vec::new();
        for id in &self.purging {
            let Some(entry) = self.allocations.get(id) else { continue };
            let Work::Purging(purge) = &entry.work else { continue };
            for (index, (state, grant)) in purge.grants.iter().zip(&entry.record.grants).enumerate() {
                if let State::Again { at, failures } = *state
                    && wanted(at, grant.appliance)
                {
                    found.push((*id, index, failures));
                }
            }
        }
        found
    }
}
