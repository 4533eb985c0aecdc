//! Makes an allocation, in two phases.
//!
//! 1. The intent is recorded: grant ids, keys and places are chosen, and durable before any appliance hears of them.
//! 2. Each appliance reserves regions. A reservation that is not committed in time undoes itself.
//! 3. When all appliances have reserved, each makes its reservation a grant.
//! 4. When all have committed, `Ready` is recorded, and only then the request is answered.
//!
//! When an appliance refuses or does not answer, the record turns to `Undoing` and everything is given back. Then the
//! request is tried once more, as a new allocation of the same name, without the appliances that failed.

use std::collections::HashMap;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, RegionSlot};
use xpm_protocol::api::appliance::{self as appliance_api, Region};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Epoch, GrantId, GrantKey, RegionId, Span};

use super::asking::Asked;
use super::describe::Fingerprint;
use super::purge::Then;
use super::wish::{Looked, Wish};
use super::{AfterStore, Answer, Awaited, Call, CallError, Entry, Outcome, Service, Work, audit};
use crate::store::Change;
use crate::store::record::{AllocationRecord, GrantRecord, Phase};
use crate::strategy::Placement;

/// Number of attempts for one request.
const ATTEMPTS_MAX: u8 = 2;

/// An allocation that is being made.
#[derive(Debug)]
pub(super) struct Creation {
    wish: Wish,
    /// Calls without an answer yet.
    open: usize,
    /// Failed calls, by grant.
    failures: Vec<(usize, CallError)>,
    /// Reserved regions, by grant.
    regions: Vec<Vec<RegionId>>,
    /// Warnings for the requester.
    warnings: Vec<String>,
}

impl Service {
    pub(super) fn begin(&mut self, wish: Wish, looked: Looked, placement: &Placement) {
        let Looked { asked, mut decision, .. } = looked;
        let record = match self.intent(&wish, &asked, placement) {
            Ok(record) => record,
            Err(error) => return self.reject(&wish, error),
        };
        for grant in &record.grants {
            self.inventory.promise(record.id, grant.appliance, record.bytes_of(grant));
        }
        decision.allocation = Some(record.id);
        let warnings = decision.warnings.clone();
        let regions = vec![Vec::new(); record.grants.len()];
        let creation = Creation { wish, open: 0, failures: Vec::new(), regions, warnings };
        self.insert(record.clone(), Work::Creating(Box::new(creation)));
        let decision = self.decision_change(decision);
        let intent = Change::Allocation(Box::new(record.clone()));
        self.store(vec![intent, decision], Awaited::Record(Box::new(record), AfterStore::Reserve));
    }

    fn intent(
        &mut self,
        wish: &Wish,
        asked: &Asked,
        placement: &Placement,
    ) -> Result<AllocationRecord, ApiError> {
        let mut grants: Vec<GrantRecord> = Vec::new();
        let mut index_of: HashMap<ApplianceId, usize> = HashMap::new();
        let mut slots = Vec::with_capacity(placement.regions.len());
        for &appliance in &placement.regions {
            let index = *index_of.entry(appliance).or_insert(grants.len());
            if index == grants.len() {
                let (id, key) = (GrantId::from_u128(0), GrantKey::from_bytes([0; 32]));
                grants.push(GrantRecord { id, appliance, key, count: 0, regions: Vec::new(), from: None });
            }
            slots.push(RegionSlot { grant: index as u32, slot: grants[index].count });
            grants[index].count += 1;
        }
        self.name_grants(&mut grants)?;
        let taken = placement.regions.len() as u64 * placement.region_len;
        let over_soft = asked.limits.iter().any(|check| audit::is_over_soft(check, taken));
        let mut terms = asked.terms.clone();
        terms.reclaimable |= over_soft;
        Ok(AllocationRecord {
            id: AllocationId::from_u128(self.random_id()?),
            name: wish.create.name.clone(),
            size: asked.demand.size,
            layout: asked.layout,
            region_len: placement.region_len,
            created: self.now.unix,
            phase: Phase::Creating,
            epoch: Epoch::FIRST,
            owner: None,
            revealed: false,
            next: None,
            grants,
            slots,
            terms,
            idle_since: self.now.unix,
            reclaim: None,
            version: 0,
            changes: 0,
            change: None,
            slabs: Default::default(),
            given_up: Default::default(),
            standby: None,
            handover: None,
            block_size: Some(wish.create.block_size.unwrap_or_default()),
            keyless: false,
        })
    }

    /// Gives each grant its id and key. The random bytes for all grants are fetched by one call.
    pub(super) fn name_grants(&mut self, grants: &mut [GrantRecord]) -> Result<(), ApiError> {
        let mut random = vec![[0_u8; 48]; grants.len()];
        self.fill_random(random.as_flattened_mut())?;
        for (grant, random) in grants.iter_mut().zip(random) {
            let (mut id, mut key) = ([0; 16], [0; 32]);
            id.copy_from_slice(&random[..16]);
            key.copy_from_slice(&random[16..]);
            (grant.id, grant.key) = (GrantId::from_u128(u128::from_ne_bytes(id)), GrantKey::from_bytes(key));
        }
        Ok(())
    }

    pub(super) fn reserve(&mut self, id: AllocationId) {
        let ttl = Span(self.settings.reserve_ttl);
        let record = &self.entry(id).record;
        let region_len = ByteSize(record.region_len);
        let wanted: Vec<_> = record.grants.iter().map(|grant| (grant.appliance, grant.count)).collect();
        self.creation(id).open = wanted.len();
        for (index, (appliance, count)) in wanted.into_iter().enumerate() {
            let reserve = appliance_api::Reserve { allocation: id, count, region_len, ttl };
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Reserve(reserve), Awaited::Reserved(id, index));
        }
    }

    pub(super) fn reserved(&mut self, id: AllocationId, grant: usize, result: Result<Answer, CallError>) {
        let record = &self.entry(id).record;
        let (appliance, count) = (record.grants[grant].appliance, record.grants[grant].count);
        match result.and_then(|answer| checked_regions(answer, count, record.region_len)) {
            Ok(regions) => {
                self.creation(id).regions[grant] = regions;
                let event = self.clock;
                self.inventory.settle(id, appliance, event);
                self.sample_soon(appliance);
            }
            Err(error) => {
                if matches!(error, CallError::Refused(..)) {
                    self.inventory.forget(id, appliance);
                }
                self.inventory.blame(appliance);
                self.creation(id).failures.push((grant, error));
            }
        }
        if self.call_ended(id) {
            match self.creation(id).failures.is_empty() {
                true => self.commit(id),
                false => self.undo(id),
            }
        }
    }

    fn commit(&mut self, id: AllocationId) {
        let Entry { record, work: Work::Creating(creation), described, .. } = self.entry(id) else { return };
        creation.open = record.grants.len();
        let mut whole = AllocationRecord { phase: Phase::Ready, ..record.clone() };
        for (grant, regions) in whole.grants.iter_mut().zip(&creation.regions) {
            grant.regions = regions.clone();
        }
        let descriptor = whole.descriptor();
        *described = Some(Fingerprint::of(descriptor.as_deref()));
        let commit = |(grant, regions): (&GrantRecord, &Vec<RegionId>)| {
            let (name, key) = (record.name.clone(), grant.key.clone());
            let commit = appliance_api::Commit {
                allocation: id,
                name,
                epoch: record.epoch,
                key,
                regions: regions.clone(),
                from: None,
                descriptor: descriptor.clone(),
            };
            (grant.appliance, Call::Commit(grant.id, commit))
        };
        let calls: Vec<_> = record.grants.iter().zip(&creation.regions).map(commit).collect();
        for (index, (appliance, call)) in calls.into_iter().enumerate() {
            let control = self.control_of(appliance);
            self.call(appliance, control, call, Awaited::Committed(id, index));
        }
    }

    pub(super) fn committed(&mut self, id: AllocationId, grant: usize, result: Result<Answer, CallError>) {
        if let Err(error) = result {
            self.creation(id).failures.push((grant, error));
        }
        if self.call_ended(id) {
            match self.creation(id).failures.is_empty() {
                true => self.record_ready(id),
                false => self.undo(id),
            }
        }
    }

    fn record_ready(&mut self, id: AllocationId) {
        let regions = std::mem::take(&mut self.creation(id).regions);
        let mut record = self.entry(id).record.clone();
        record.phase = Phase::Ready;
        for (grant, regions) in record.grants.iter_mut().zip(regions) {
            grant.regions = regions;
        }
        self.store_record(record, AfterStore::Ready);
    }

    pub(super) fn created(&mut self, id: AllocationId) {
        let (reply, warnings) = (self.creation(id).wish.reply, self.creation(id).warnings.clone());
        let record = &self.entry(id).record;
        let name = record.name.clone();
        let line = format!("allocation {name} ({id}) of {} is ready", ByteSize(record.size));
        self.tell(EventKind::Created, &name, line);
        match reply {
            Some(reply) => {
                let shown = Allocation { warnings, ..self.view(id) };
                self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
            }
            None => {
                self.leaves_queue(&name);
                self.tell(EventKind::Served, &name, format!("`{name}` is made after waiting"));
            }
        }
        self.finish_work(id);
    }

    /// Gives everything back. A second attempt waits for that, because it may need the same memory.
    fn undo(&mut self, id: AllocationId) {
        let Entry { record, work: Work::Creating(creation), .. } = self.entry(id) else { return };
        let failed: Vec<ApplianceId> =
            creation.failures.iter().map(|(grant, _)| record.grants[*grant].appliance).collect();
        let failures = std::mem::take(&mut creation.failures);
        let mut wish = creation.wish.clone();
        let mut record = record.clone();
        record.phase = Phase::Undoing;
        let error = self.explain(&record, &failures);
        tracing::warn!("allocation {} ({id}), attempt {}: {}", record.name, wish.attempt, error.1);
        let then = match wish.attempt < ATTEMPTS_MAX {
            true => {
                wish.attempt += 1;
                wish.failed.extend(failed);
                wish.refreshed = false;
                wish.earlier = Some(error.1);
                Then::TryAgain(Box::new(wish))
            }
            false => match wish.reply {
                Some(reply) => Then::Answer(reply, Err(error)),
                None => {
                    self.back_to_queue(&record.name, error.1);
                    Then::Nothing
                }
            },
        };
        self.store_record(record, AfterStore::Undo(then));
    }

    fn explain(&self, record: &AllocationRecord, failures: &[(usize, CallError)]) -> ApiError {
        let full =
            failures.iter().all(|(_, error)| matches!(error, CallError::Refused(ErrorKind::NoSpace, _)));
        let kind = if full { ErrorKind::NoSpace } else { ErrorKind::Unavailable };
        let line = |(grant, error): &(usize, CallError)| {
            format!("appliance {}: {error}", self.inventory.name(record.grants[*grant].appliance))
        };
        let lines: Vec<String> = failures.iter().map(line).collect();
        ApiError(
            kind,
            format!("`{}` was not made, and nothing of it stays: {}", record.name, lines.join("; ")),
        )
    }

    fn call_ended(&mut self, id: AllocationId) -> bool {
        let creation = self.creation(id);
        creation.open -= 1;
        creation.open == 0
    }

    fn creation(&mut self, id: AllocationId) -> &mut Creation {
        match &mut self.entry(id).work {
            Work::Creating(creation) => creation,
            _ => unreachable!("nothing interrupts a creation"),
        }
    }
}

/// The regions of an answer, if their number and length are as requested.
pub(super) fn checked_regions(
    answer: Answer,
    count: u32,
    region_len: u64,
) -> Result<Vec<RegionId>, CallError> {
    let Answer::Regions(regions) = answer else {
        return Err(CallError::Failed("it answered something else".to_owned()));
    };
    let right = |region: &Region| region.len.0 == region_len;
    let mut ids: Vec<RegionId> = regions.iter().map(|region| region.id).collect();
    let answer = ids.clone();
    ids.sort_unstable();
    ids.dedup();
    match ids.len() == count as usize && regions.len() == ids.len() && regions.iter().all(right) {
        true => Ok(answer),
        false => Err(CallError::Failed(format!(
            "it reserved other regions than the {count} that it was asked for"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_appliances_are_checked() {
        let region = |id, len| Region {
            id: RegionId::from_u128(id),
            len: ByteSize(len),
            state: appliance_api::RegionState::Reserved,
            allocation: None,
            grant: None,
            resident: ByteSize(0),
        };
        let check = |regions: Vec<Region>| checked_regions(Answer::Regions(regions), 2, 16);
        let order = check(vec![region(9, 16), region(2, 16)]).unwrap();
        assert_eq!(order, [RegionId::from_u128(9), RegionId::from_u128(2)], "their order is kept");
        assert!(check(vec![region(1, 16)]).is_err());
        assert!(check(vec![region(1, 16), region(1, 16)]).is_err());
        assert!(check(vec![region(1, 16), region(2, 32)]).is_err());
        assert!(checked_regions(Answer::Done, 2, 16).is_err());
    }
}
