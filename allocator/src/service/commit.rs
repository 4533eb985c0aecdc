//! Making an allocation, in two phases.
//!
//! 1. The intent is recorded: grant ids, keys and places are chosen, and durable before any
//!    appliance hears of them.
//! 2. Each appliance reserves regions, with a time limit after which it undoes that by itself.
//! 3. When all have, each makes its reservation a grant.
//! 4. When all have, `Ready` is recorded, and only then the request is answered.
//!
//! When an appliance refuses or does not answer, the record turns to `Undoing` and everything is
//! given back; then the whole is tried once more, as a new allocation of the same name, without
//! the appliances that failed.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Create, RegionSlot};
use xpm_protocol::api::appliance::{self as appliance_api, Region};
use xpm_protocol::layout::{COLUMNS_MAX, STRIPE_UNIT_DEFAULT};
use xpm_protocol::units::{PAGE_LEN, is_region_len};
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Epoch, GrantId, Layout, RegionId, Span};

use super::purge::Then;
use super::{AfterStore, Answer, Awaited, Call, CallError, Entry, Outcome, ReplyTo, Service, Work};
use crate::store::record::{AllocationRecord, GrantRecord, Phase};
use crate::strategy::{self, Candidate, Demand, NoPlace, Placement};

/// How often an allocation is tried.
const ATTEMPTS_MAX: u8 = 2;

/// How long a request waits for memory that is being cleared; with two attempts it is still
/// answered before a client with the usual time limit gives up.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request on its way to an allocation.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    reply: ReplyTo,
    create: Create,
    demand: Demand,
    layout: Layout,
    attempt: u8,
    /// Appliances that failed an earlier attempt.
    failed: Vec<ApplianceId>,
    /// Whether the appliances were asked what they have because there seemed to be no room.
    refreshed: bool,
    /// When it no longer waits for memory that is being cleared.
    patience: Option<Duration>,
}

/// An allocation that is being made.
#[derive(Debug)]
pub(super) struct Creation {
    wish: Wish,
    /// Calls that are not answered.
    open: usize,
    /// What went wrong, by grant.
    failures: Vec<(usize, CallError)>,
    /// Regions that were reserved, by grant.
    regions: Vec<Vec<RegionId>>,
}

/// A wish that waits for fresh samples of the appliances.
#[derive(Debug)]
pub(super) struct Refresh {
    wish: Wish,
    open: usize,
}

impl Service {
    pub(super) fn create(&mut self, reply: ReplyTo, create: Create) {
        let (demand, layout) = match demand_of(&create) {
            Ok(valid) => valid,
            Err(line) => return self.refuse(reply, ErrorKind::Invalid, line),
        };
        let failed = Vec::new();
        self.place(Wish {
            reply,
            create,
            demand,
            layout,
            attempt: 1,
            failed,
            refreshed: false,
            patience: None,
        });
    }

    /// Finds a place and begins. Where there seems to be no room, the appliances are asked first
    /// what they have, for memory given back a moment ago is in no heartbeat yet; and where what
    /// they are clearing would do, that is waited for.
    fn place(&mut self, mut wish: Wish) {
        if let Err(error) = self.check_name(&wish) {
            return self.reply(wish.reply, Err(error));
        }
        wish.demand.seed = self.count;
        let snapshot = self.inventory.snapshot(self.now.at, &wish.failed);
        match strategy::place(&snapshot, &wish.demand) {
            Ok(placement) => self.begin(wish, &placement),
            Err(NoPlace::NoSpace { .. }) if !wish.refreshed && snapshot.iter().any(|one| one.up) => {
                self.refresh(wish);
            }
            Err(NoPlace::NoSpace { .. }) if self.may_wait(&mut wish, snapshot) => self.parked.push(wish),
            Err(error @ NoPlace::NoSpace { .. }) => {
                self.refuse(wish.reply, ErrorKind::NoSpace, error.to_string());
            }
            Err(error @ NoPlace::TooManyRegions) => {
                self.refuse(wish.reply, ErrorKind::Invalid, error.to_string());
            }
        }
    }

    /// Whether there is room once everything that is being cleared is free, and time to wait.
    fn may_wait(&self, wish: &mut Wish, mut snapshot: Vec<Candidate>) -> bool {
        let until = *wish.patience.get_or_insert(self.now.at + PATIENCE);
        for candidate in &mut snapshot {
            candidate.free = candidate.free.saturating_add(candidate.clearing);
        }
        self.now.at < until && strategy::place(&snapshot, &wish.demand).is_ok()
    }

    /// Looks again for those that wait.
    pub(super) fn unpark(&mut self) {
        for wish in std::mem::take(&mut self.parked) {
            self.refresh(wish);
        }
    }

    fn check_name(&self, wish: &Wish) -> Result<(), ApiError> {
        let name = &wish.create.name;
        match self.names.contains_key(name) {
            false => Ok(()),
            true => {
                let line = format!(
                    "an allocation named `{name}` is there already: choose another name, or delete that one"
                );
                Err(ApiError(ErrorKind::Conflict, line))
            }
        }
    }

    fn refresh(&mut self, mut wish: Wish) {
        wish.refreshed = true;
        let up = self.inventory.up(self.now.at);
        if up.is_empty() {
            return self.place(wish);
        }
        self.count += 1;
        let asked = self.count;
        self.refreshes.insert(asked, Refresh { wish, open: up.len() });
        for appliance in up {
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Status, Awaited::Sampled { asked, appliance });
        }
    }

    pub(super) fn sampled(&mut self, asked: u64, appliance: ApplianceId, result: Result<Answer, CallError>) {
        if let Ok(Answer::Status(status)) = result {
            self.inventory.sample(appliance, asked, *status);
        }
        let refresh =
            self.refreshes.get_mut(&asked).expect("a refresh stays until all its calls are answered");
        refresh.open -= 1;
        if refresh.open == 0
            && let Some(done) = self.refreshes.remove(&asked)
        {
            self.place(done.wish);
        }
    }

    fn begin(&mut self, wish: Wish, placement: &Placement) {
        let record = match self.intent(&wish, placement) {
            Ok(record) => record,
            Err(error) => return self.reply(wish.reply, Err(error)),
        };
        for grant in &record.grants {
            self.inventory.promise(record.id, grant.appliance, record.bytes_of(grant));
        }
        let creation =
            Creation { wish, open: 0, failures: Vec::new(), regions: vec![Vec::new(); record.grants.len()] };
        let entry =
            Entry { record: record.clone(), work: Work::Creating(creation), queue: Default::default() };
        self.names.insert(record.name.clone(), record.id);
        self.allocations.insert(record.id, entry);
        self.store_record(record, AfterStore::Reserve);
    }

    fn intent(&mut self, wish: &Wish, placement: &Placement) -> Result<AllocationRecord, ApiError> {
        let mut grants: Vec<GrantRecord> = Vec::new();
        let mut slots = Vec::with_capacity(placement.regions.len());
        for &appliance in &placement.regions {
            let index = match grants.iter().position(|grant| grant.appliance == appliance) {
                Some(index) => index,
                None => {
                    let id = GrantId::from_u128(self.random_id()?);
                    grants.push(GrantRecord {
                        id,
                        appliance,
                        key: self.random_key()?,
                        count: 0,
                        regions: Vec::new(),
                    });
                    grants.len() - 1
                }
            };
            slots.push(RegionSlot { grant: index as u32, slot: grants[index].count });
            grants[index].count += 1;
        }
        Ok(AllocationRecord {
            id: AllocationId::from_u128(self.random_id()?),
            name: wish.create.name.clone(),
            size: wish.demand.size,
            layout: wish.layout,
            region_len: placement.region_len,
            created: self.now.unix,
            phase: Phase::Creating,
            epoch: Epoch::FIRST,
            owner: None,
            revealed: false,
            next: None,
            grants,
            slots,
        })
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
                let event = self.count;
                self.inventory.settle(id, appliance, event);
            }
            Err(error) => {
                if matches!(error, CallError::Refused(..)) {
                    self.inventory.forget(id, appliance);
                }
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
        let Entry { record, work: Work::Creating(creation), .. } = self.entry(id) else { return };
        creation.open = record.grants.len();
        let commit = |(grant, regions): (&GrantRecord, &Vec<RegionId>)| {
            let (name, key) = (record.name.clone(), grant.key.clone());
            let commit = appliance_api::Commit {
                allocation: id,
                name,
                epoch: record.epoch,
                key,
                regions: regions.clone(),
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
        let reply = self.creation(id).wish.reply;
        let record = &self.entry(id).record;
        tracing::info!("allocation {} ({id}) of {} is ready", record.name, ByteSize(record.size));
        let shown = self.view(id);
        self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        self.finish_work(id);
    }

    /// Gives everything back. A second attempt waits for that, because it may need the memory.
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
                Then::TryAgain(Box::new(wish), error)
            }
            false => Then::Answer(wish.reply, Err(error)),
        };
        self.store_record(record, AfterStore::Undo(then));
    }

    /// The second attempt, once the first is undone as far as its appliances answer.
    pub(super) fn try_again(&mut self, wish: Wish, first: &ApiError) {
        let reply = wish.reply;
        self.place(wish);
        // Where there is nobody else to ask, why the first attempt failed says more than that.
        for effect in &mut self.effects {
            if let super::Effect::Reply(to, Err(ApiError(ErrorKind::NoSpace, line))) = effect
                && *to == reply
            {
                *line = format!("{}; without the appliances that failed: {line}", first.1);
            }
        }
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

/// The regions of an answer, if they are what was asked for.
fn checked_regions(answer: Answer, count: u32, region_len: u64) -> Result<Vec<RegionId>, CallError> {
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

/// Checks a request and says what it means.
fn demand_of(create: &Create) -> Result<(Demand, Layout), String> {
    let size = create.size.0.checked_next_multiple_of(PAGE_LEN).filter(|&size| size > 0);
    let size =
        size.ok_or("a size is 1 byte to 16 EiB less a page: say how much memory is wanted, such as 1GiB")?;
    let region_len = create.region_len.map(|len| len.0);
    if let Some(len) = region_len.filter(|&len| !is_region_len(len)) {
        return Err(format!("a region is a power of two of 16MiB to 64GiB long, not {len} bytes"));
    }
    let columns = create.stripe.unwrap_or(1);
    if !(1..=COLUMNS_MAX).contains(&columns) {
        return Err(format!("a stripe goes over 1 to {COLUMNS_MAX} regions, not {columns}"));
    }
    let unit = create.stripe_unit.map_or(STRIPE_UNIT_DEFAULT, |unit| unit.0);
    let layout = match columns {
        1 if create.stripe_unit.is_some() => {
            return Err("a stripe unit means nothing without a stripe over 2 regions or more".to_owned());
        }
        1 => Layout::Linear,
        _ => Layout::Striped { columns, unit },
    };
    layout
        .check(region_len.unwrap_or(xpm_protocol::units::REGION_LEN_MAX))
        .map_err(|error| error.to_string())?;
    let unit = if columns == 1 { 0 } else { unit };
    Ok((Demand { size, columns, unit, region_len, seed: 0 }, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(size: u64) -> Create {
        Create {
            name: "a".parse().unwrap(),
            size: ByteSize(size),
            stripe: None,
            stripe_unit: None,
            region_len: None,
        }
    }

    #[test]
    fn what_is_asked_for_is_checked() {
        assert_eq!(demand_of(&create(1)).unwrap().0.size, PAGE_LEN);
        let odd = |change: fn(&mut Create)| {
            let mut create = create(1 << 30);
            change(&mut create);
            demand_of(&create).unwrap_err()
        };
        assert!(demand_of(&create(0)).unwrap_err().contains("1GiB"));
        assert!(demand_of(&create(u64::MAX)).is_err());
        assert!(odd(|create| create.stripe = Some(0)).contains("not 0"));
        assert!(odd(|create| create.stripe = Some(1025)).contains("1024"));
        assert!(odd(|create| create.stripe_unit = Some(ByteSize(65536))).contains("without a stripe"));
        assert!(odd(|create| create.region_len = Some(ByteSize(1 << 20))).contains("16MiB"));
        assert!(odd(|create| create.region_len = Some(ByteSize(3 << 24))).contains("power of two"));
        let unit_too_long = |create: &mut Create| {
            create.stripe = Some(2);
            create.stripe_unit = Some(ByteSize(1 << 25));
            create.region_len = Some(ByteSize(1 << 24));
        };
        assert!(odd(unit_too_long).contains("stripe unit"));
    }

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
