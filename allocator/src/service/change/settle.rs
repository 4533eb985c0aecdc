//! The switch of a change to its new side, and the end of the change.

use xpm_protocol::api::allocator::ChangeKind;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ByteSize, Epoch};

use super::super::drain::AGAIN;
use super::super::purge::Then;
use super::super::{AfterStore, Awaited, ReplyTo, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, Phase, Stage};

/// Result of a change.
#[derive(Debug)]
pub(in super::super) enum Over {
    /// The new side holds.
    Done(Option<ReplyTo>),
    /// The old side stays, for this reason.
    Refused(String),
}

impl Service {
    /// All grants exist: the owner carries the change out, or, without an owner, the appliances do.
    pub(in super::super) fn change_is_open(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let what = describe(change.kind);
        self.tell(EventKind::ChangeOpen, &record.name, format!("`{}` can {what}", record.name));
        self.answer_change(id);
        if record.owner.is_some() {
            return self.finish_work(id);
        }
        self.carry_out(id);
    }

    /// Makes the other side the one that holds. Once this is durable, nothing reverts it.
    pub(in super::super) fn switch_change(&mut self, id: AllocationId, reply: Option<ReplyTo>) {
        let (mut record, mut change) = self.record_and_change(id);
        change.stage = Stage::Switched;
        record.version = change.number;
        std::mem::swap(&mut record.size, &mut change.size);
        std::mem::swap(&mut record.grants, &mut change.grants);
        std::mem::swap(&mut record.slots, &mut change.slots);
        record.change = Some(Box::new(change));
        self.store_change(id, record, AfterStore::ChangeSwitched(reply));
    }

    pub(in super::super) fn change_is_switched(&mut self, id: AllocationId, reply: Option<ReplyTo>) {
        if self.entry(id).record.owner.is_none() {
            return self.end_change(id, Over::Done(reply));
        }
        // Before any other work is done to the allocation, its owner has to hear that the change holds.
        self.entry(id).work = Work::Idle;
        if let Some(reply) = reply {
            self.answer_orders(reply, id);
        }
        self.release_queue(id);
    }

    /// Ends a change as its stage allows. A change that is `Switched` ends by giving the old side back, any other by
    /// giving the new side back. A request that wants to change the owner waits for this.
    pub(in super::super) fn settle_change(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let over = match change.stage {
            Stage::Switched => Over::Done(None),
            _ => Over::Refused(format!("`{}` is as it was: its owner changed meanwhile", record.name)),
        };
        self.end_change(id, over);
    }

    /// Takes the change from the record. In the same step the grants that only its other side had become a record of
    /// their own, to be given back.
    pub(in super::super) fn end_change(&mut self, id: AllocationId, over: Over) {
        let (mut record, change) = self.record_and_change(id);
        let mut rest = AllocationRecord {
            grants: change.grants,
            slots: Vec::new(),
            phase: Phase::Deleting,
            owner: None,
            next: None,
            change: None,
            reclaim: None,
            epoch: Epoch::FIRST,
            ..record.clone()
        };
        rest.grants.retain(|grant| record.grants.iter().all(|kept| kept.id != grant.id));
        let event = self.clock;
        rest.grants.iter().for_each(|grant| self.inventory.settle(id, grant.appliance, event));
        record.change = None;
        record.grants.iter_mut().for_each(|grant| grant.from = None);
        let mut batch = vec![Change::Allocation(Box::new(record.clone()))];
        if !rest.grants.is_empty() {
            // Both in one batch: a reader of the store finds both records or neither.
            match self.random_id() {
                Ok(random) => rest.id = AllocationId::from_u128(random),
                Err(error) => {
                    tracing::error!("a change of `{}` cannot end: {}", record.name, error.1);
                    return self.finish_work(id);
                }
            }
            batch.push(Change::Allocation(Box::new(rest.clone())));
        }
        self.entry(id).work = Work::Storing;
        let rest = Some(Box::new(rest)).filter(|rest| !rest.grants.is_empty());
        self.store(batch, Awaited::Record(Box::new(record), AfterStore::ChangeOver(over, rest)));
    }

    pub(in super::super) fn change_is_over(
        &mut self,
        id: AllocationId,
        over: Over,
        rest: Option<Box<AllocationRecord>>,
    ) {
        if let Some(rest) = rest {
            let rest_id = rest.id;
            self.insert(*rest, Work::Idle);
            self.purge(rest_id, Then::Nothing);
        }
        let record = &self.entry(id).record;
        let (name, size) = (record.name.clone(), ByteSize(record.size));
        match over {
            Over::Done(reply) => {
                self.tell(EventKind::Changed, &name, format!("`{name}` is changed: it has {size}"));
                if let Some(reply) = reply {
                    self.answer_orders(reply, id);
                }
            }
            Over::Refused(why) => {
                self.tell(EventKind::ChangeRefused, &name, why.clone());
                let rests = self.now.at + AGAIN;
                let side = &mut self.entry(id).side;
                (side.refused, side.rests_until) = (Some(why), Some(rests));
            }
        }
        self.answer_change(id);
        self.finish_work(id);
    }
}

const fn describe(kind: ChangeKind) -> &'static str {
    match kind {
        ChangeKind::Grow => "grow",
        ChangeKind::Shrink => "shrink",
        ChangeKind::Move => "move",
    }
}
