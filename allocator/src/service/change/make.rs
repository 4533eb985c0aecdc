//! Makes the grants that a change needs.

use xpm_protocol::api::appliance::{Commit, Reserve};
use xpm_protocol::{AllocationId, ByteSize, RegionId, Span};

use super::super::commit::checked_regions;
use super::super::{AfterStore, Answer, Awaited, Call, CallError, Service, Work};
use super::settle::Over;
use crate::store::record::{AllocationRecord, ChangeRecord, GrantRecord, Stage};

/// Grants that are being made, by their index on the other side.
#[derive(Debug)]
pub(in super::super) struct Making {
    open: usize,
    failures: Vec<String>,
    /// Reserved regions, by grant.
    regions: Vec<Vec<RegionId>>,
}

impl Service {
    /// The intent is durable: reserves the regions.
    pub(in super::super) fn make_change(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let new = new_grants(&record, &change);
        let regions = change.grants.iter().map(|grant| grant.regions.clone()).collect();
        let wanted: Vec<usize> =
            new.into_iter().filter(|grant| change.grants[*grant].from.is_none()).collect();
        self.entry(id).work = Work::Changing(Making { open: wanted.len(), failures: Vec::new(), regions });
        if wanted.is_empty() {
            return self.commit_change(id);
        }
        let ttl = Span(self.settings.reserve_ttl);
        for grant in wanted {
            let GrantRecord { appliance, count, .. } = change.grants[grant];
            let reserve = Reserve { allocation: id, count, region_len: ByteSize(record.region_len), ttl };
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Reserve(reserve), Awaited::ChangeReserved(id, grant));
        }
    }

    pub(in super::super) fn change_reserved(
        &mut self,
        id: AllocationId,
        grant: usize,
        result: Result<Answer, CallError>,
    ) {
        let (record, change) = self.record_and_change(id);
        let GrantRecord { appliance, count, .. } = change.grants[grant];
        match result.and_then(|answer| checked_regions(answer, count, record.region_len)) {
            Ok(regions) => {
                let event = self.clock;
                self.inventory.settle(id, appliance, event);
                self.sample_soon(appliance);
                self.making(id).regions[grant] = regions;
            }
            Err(error) => {
                if matches!(error, CallError::Refused(..)) {
                    self.inventory.forget(id, appliance);
                }
                self.making_failed(id, appliance, &error);
            }
        }
        if self.making_ended(id) {
            match self.making(id).failures.is_empty() {
                true => self.commit_change(id),
                false => self.give_change_up(id),
            }
        }
    }

    fn commit_change(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let new = new_grants(&record, &change);
        if new.is_empty() {
            return self.open_change(id);
        }
        self.making(id).open = new.len();
        let mut whole = change.clone();
        whole.stage = Stage::Open;
        for (grant, regions) in whole.grants.iter_mut().zip(&self.making(id).regions) {
            grant.regions = regions.clone();
        }
        let descriptor = AllocationRecord { change: Some(Box::new(whole)), ..record.clone() }.descriptor();
        for grant in new {
            let GrantRecord { id: grant_id, appliance, key, from, .. } = &change.grants[grant];
            let commit = Commit {
                allocation: id,
                name: record.name.clone(),
                epoch: record.epoch,
                key: key.clone(),
                regions: self.making(id).regions[grant].clone(),
                from: *from,
                descriptor: descriptor.clone(),
            };
            let control = self.control_of(*appliance);
            let call = Call::Commit(*grant_id, commit);
            self.call(*appliance, control, call, Awaited::ChangeCommitted(id, grant));
        }
    }

    pub(in super::super) fn change_committed(
        &mut self,
        id: AllocationId,
        grant: usize,
        result: Result<Answer, CallError>,
    ) {
        if let Err(error) = result {
            let appliance = self.record_and_change(id).1.grants[grant].appliance;
            self.making_failed(id, appliance, &error);
        }
        if self.making_ended(id) {
            match self.making(id).failures.is_empty() {
                true => self.open_change(id),
                false => self.give_change_up(id),
            }
        }
    }

    fn open_change(&mut self, id: AllocationId) {
        let regions = std::mem::take(&mut self.making(id).regions);
        let (mut record, mut change) = self.record_and_change(id);
        change.stage = Stage::Open;
        for (grant, regions) in change.grants.iter_mut().zip(regions) {
            grant.regions = regions;
        }
        record.change = Some(Box::new(change));
        self.store_change(id, record, AfterStore::ChangeOpen);
    }

    fn give_change_up(&mut self, id: AllocationId) {
        let failures = self.making(id).failures.join("; ");
        let name = self.entry(id).record.name.clone();
        let why = format!("`{name}` is as it was: {failures}");
        self.end_change(id, Over::Refused(why));
    }

    fn making_failed(&mut self, id: AllocationId, appliance: xpm_protocol::ApplianceId, error: &CallError) {
        self.inventory.blame(appliance);
        let line = format!("appliance {}: {error}", self.inventory.name(appliance));
        self.making(id).failures.push(line);
    }

    fn making_ended(&mut self, id: AllocationId) -> bool {
        let making = self.making(id);
        making.open -= 1;
        making.open == 0
    }

    fn making(&mut self, id: AllocationId) -> &mut Making {
        match &mut self.entry(id).work {
            Work::Changing(making) => making,
            _ => unreachable!("nothing interrupts the making of grants"),
        }
    }

    /// The record and its change. A record has its change until the change is over.
    pub(super) fn record_and_change(&mut self, id: AllocationId) -> (AllocationRecord, ChangeRecord) {
        let record = self.entry(id).record.clone();
        let change = record.change.as_deref().cloned().expect("a change stays until it is over");
        (record, change)
    }
}

/// Indices of the grants that only the other side has.
fn new_grants(record: &AllocationRecord, change: &ChangeRecord) -> Vec<usize> {
    let is_new = |grant: &GrantRecord| record.grants.iter().all(|known| known.id != grant.id);
    (0..change.grants.len()).filter(|grant| is_new(&change.grants[*grant])).collect()
}
