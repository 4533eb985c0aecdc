//! Giving up the memory of an appliance that does not come back, by order of the operator.
//!
//! ```text
//!   silent --(operator)--> given up --(heard again)--> clearing --(has no grant)--> up
//!                            |
//!                            +-- every allocation on it: `given_up` is recorded, its owner is told
//! ```
//!
//! The mark of the appliance is durable first. Then each allocation is marked, as soon as no other work is done to
//! it. An owner is told only of marks in its allocation's record, so it never hears of a mark that a crash can undo.
//! The mark of an allocation is permanent: data on that appliance stay lost even if the machine returns, for the
//! owner has had I/O errors since and may have written elsewhere. The mark of the appliance ends when the machine is
//! heard again and every grant that it still had is revoked, which clears the memory. Until then the appliance does not
//! count as up, and gets no allocation.

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{ApplianceState, LostLender};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId};

use super::{AfterStore, Answer, Awaited, Call, CallError, Entry, Outcome, ReplyTo, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, Phase};

impl Service {
    /// Gives the memory of an appliance up.
    pub(super) fn give_up_appliance(&mut self, reply: ReplyTo, id: ApplianceId) {
        let Some(mut record) = self.inventory.record(id) else {
            return self.refuse(reply, ErrorKind::NotFound, format!("no appliance has the id {id}"));
        };
        let name = self.inventory.name(id);
        if self.inventory.state(id, self.now.at) == Some(ApplianceState::Up) {
            let line = format!(
                "appliance {name} is heard, so its memory is not lost: `xpm appliance drain {name}` empties it. If it is to be \
                 given up all the same, end its process first"
            );
            return self.refuse(reply, ErrorKind::InUse, line);
        }
        record.given_up = Some(record.given_up.unwrap_or(self.now.unix));
        self.inventory.set_given_up(id, record.given_up);
        self.store(vec![Change::Appliance(Box::new(record))], Awaited::GivenUp(id, reply));
    }

    /// The mark of the appliance is durable.
    pub(super) fn appliance_given_up(&mut self, id: ApplianceId, reply: ReplyTo) {
        let hit: Vec<AllocationId> = self.on(id).map(|entry| entry.record.id).collect();
        let line = format!(
            "appliance {} ({id}) is given up: {} allocations have lost what they had there",
            self.inventory.name(id),
            hit.len()
        );
        self.tell_of_appliance(EventKind::ApplianceLost, id, true, line);
        self.hasten_purges(id);
        self.give_up_grants();
        let shown = hit.into_iter().map(|one| self.view(one)).collect();
        self.reply(reply, Ok(Outcome::Allocations(shown)));
    }

    /// Whole allocations with a grant on the appliance.
    fn on(&self, id: ApplianceId) -> impl Iterator<Item = &Entry> {
        self.allocations
            .values()
            .filter(move |entry| entry.record.phase == Phase::Ready && entry.record.grant_on(id).is_some())
    }

    /// Marks the allocations to which no work is done. A busy allocation is marked at a later tick.
    pub(super) fn give_up_grants(&mut self) {
        for appliance in self.inventory.all_given_up() {
            let unmarked = |entry: &&Entry| {
                matches!(entry.work, Work::Idle) && !entry.record.given_up.contains(&appliance)
            };
            let ids: Vec<AllocationId> =
                self.on(appliance).filter(unmarked).map(|entry| entry.record.id).collect();
            for id in ids {
                let mut record = self.entry(id).record.clone();
                record.given_up.insert(appliance);
                self.entry(id).work = Work::Storing;
                self.store_record(record, AfterStore::GivenUp(appliance));
            }
        }
    }

    /// The mark of an allocation is durable: its owner hears of it.
    pub(super) fn allocation_given_up(&mut self, id: AllocationId, appliance: ApplianceId) {
        let name = self.entry(id).record.name.clone();
        let line = format!(
            "`{name}` is lost on {}: that appliance is given up, and I/O to what lay there fails from now on",
            self.inventory.name(appliance)
        );
        tracing::warn!("{line}");
        self.tell(EventKind::LenderLost, &name, line);
        self.finish_work(id);
    }

    /// The operator of an owner has given an appliance up on the owner's machine: I/O of that owner to the appliance
    /// fails, for good, even if the appliance is heard here.
    pub(super) fn hear_given_up(&mut self, reply: ReplyTo, id: AllocationId, appliance: ApplianceId) {
        let mut record = self.entry(id).record.clone();
        if record.grant_on(appliance).is_none() || !record.given_up.insert(appliance) {
            return self.answer_orders(reply, id);
        }
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::GaveUp(appliance, reply));
    }

    /// The mark that the owner asked for is durable.
    pub(super) fn owner_gave_up(&mut self, id: AllocationId, appliance: ApplianceId) {
        let record = &self.entry(id).record;
        let (name, owner) = (record.name.clone(), record.owner.as_ref().map(|owner| owner.host_name.clone()));
        let line = format!(
            "`{name}` is lost on {}: that appliance was given up on {}, and I/O to what lay there fails from now on",
            self.inventory.name(appliance),
            owner.unwrap_or_else(|| "its client".to_owned())
        );
        self.tell(EventKind::LenderLost, &name, line);
        self.finish_work(id);
    }

    /// Appliances whose memory the owner has to give up.
    pub(super) fn lost_lenders(&self, record: &AllocationRecord) -> Vec<LostLender> {
        let lender = |&appliance: &ApplianceId| {
            let name = match self.inventory.info(appliance) {
                Some(info) => info.name.clone(),
                // An id is always a valid name.
                None => appliance.to_string().parse().ok()?,
            };
            Some(LostLender { appliance, name })
        };
        record.given_up.iter().filter_map(lender).collect()
    }

    /// Whether the memory of an appliance counts as gone, so that it need not be given back.
    pub(super) fn is_gone(&self, id: ApplianceId) -> bool {
        self.inventory.info(id).is_none() || self.inventory.given_up(id).is_some()
    }

    /// Refuses requests that make no sense for an allocation that has lost memory.
    pub(super) fn check_not_lost(&self, record: &AllocationRecord) -> Result<(), ApiError> {
        if record.given_up.is_empty() {
            return Ok(());
        }
        let (name, lost) = (&record.name, self.lost_lenders(record));
        let on: Vec<&str> = lost.iter().map(|one| one.name.as_str()).collect();
        let line = format!(
            "`{name}` is lost on {}, which was given up: detach it where it is in use, then `xpm alloc delete {name}`",
            on.join(", ")
        );
        Err(ApiError(ErrorKind::Conflict, line))
    }

    /// Advice for a refusal that is due to a silent appliance: the end of a line, or empty.
    pub(super) fn advice_for_silent(&self, record: &AllocationRecord) -> String {
        let advice = record.appliances().into_iter().map(|id| self.advice_for_silent_one(id));
        advice.into_iter().find(|advice| !advice.is_empty()).unwrap_or_default()
    }

    /// The same for one appliance.
    pub(super) fn advice_for_silent_one(&self, id: ApplianceId) -> String {
        let silent = self.inventory.state(id, self.now.at) == Some(ApplianceState::Silent);
        if !silent || self.inventory.given_up(id).is_some() {
            return String::new();
        }
        let name = self.inventory.name(id);
        format!(
            ". Appliance {name} is silent: if that machine never comes back, `xpm appliance forget {name} --lost` gives its memory up"
        )
    }

    /// An appliance that was given up is heard again: it has to clear its old memory before it counts.
    pub(super) fn clear_returned(&mut self, id: ApplianceId) {
        if self.ask_grants_once(id) {
            let control = self.control_of(id);
            self.call(id, control, Call::Grants, Awaited::ReturnedListed(id));
        }
    }

    pub(super) fn returned_listed(&mut self, id: ApplianceId, result: Result<Answer, CallError>) {
        self.grants_answered(id);
        let Ok(Answer::Grants(grants)) = result else { return };
        for grant in &grants {
            let control = self.control_of(id);
            self.call(id, control, Call::Revoke(grant.id), Awaited::Ignored);
        }
        let marked = |entry: &Entry| entry.record.given_up.contains(&id);
        // The next heartbeat triggers another check.
        if !grants.is_empty() || !self.on(id).all(marked) || self.inventory.given_up(id).is_none() {
            return;
        }
        self.inventory.set_given_up(id, None);
        if let Some(record) = self.inventory.record(id) {
            self.store(vec![Change::Appliance(Box::new(record))], Awaited::Nothing);
        }
        let line = format!(
            "appliance {} ({id}), which was given up, is back: it has cleared all that it had lent, and lends anew",
            self.inventory.name(id)
        );
        self.tell_of_appliance(EventKind::ApplianceUp, id, false, line);
        self.look_soon(id);
    }
}
