//! The service against scripted appliances, with faults between any two steps.
//!
//! The world keeps what was made durable, a few appliances with real bookkeeping of regions,
//! reservations and grants, and the calls and answers that are on their way. A seeded script of
//! requests, faults, crashes and passing time drives it; at its end everything is mended and time
//! passes. Then each appliance must have exactly the grants of the record, nothing reserved, and
//! no request may be without its one answer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Attach, Create, Heartbeat, Map};
use xpm_protocol::api::appliance::{Commit, Region, RegionState, Reserve};
use xpm_protocol::{
    AllocationId, ApplianceId, ByteSize, ClientId, Epoch, GrantId, GrantKey, HostId, RegionId,
};

use super::*;
use crate::store::memory::MemoryStore;
use crate::store::record::Phase;
use crate::store::{MetadataStore as _, SCHEMA};
use crate::testing::appliance;

const MIB: u64 = 1 << 20;
const TTL: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(5);

/// An appliance as its interface describes it.
struct Appliance {
    record: crate::store::ApplianceRecord,
    capacity: u64,
    regions: BTreeMap<RegionId, Held>,
    grants: BTreeMap<GrantId, Granted>,
    next_region: u128,
    /// Bytes that were given back and are not cleared yet.
    clearing: u64,
    refusals: u32,
    away: bool,
}

struct Held {
    allocation: AllocationId,
    len: u64,
    until: Duration,
    grant: Option<GrantId>,
}

#[derive(Debug, Clone, PartialEq)]
struct Granted {
    epoch: Epoch,
    key: GrantKey,
    regions: Vec<RegionId>,
}

impl Appliance {
    fn new(number: u128, capacity: u64) -> Appliance {
        Appliance {
            record: appliance(number),
            capacity,
            regions: BTreeMap::new(),
            grants: BTreeMap::new(),
            next_region: number << 64,
            clearing: 0,
            refusals: 0,
            away: false,
        }
    }

    fn heartbeat(&self) -> Heartbeat {
        let mut status = self.record.status.clone();
        status.capacity = ByteSize(self.capacity);
        status.free = ByteSize(self.free());
        status.granted = ByteSize(self.capacity - self.free() - self.clearing);
        Heartbeat { info: self.record.info.clone(), status }
    }

    fn free(&self) -> u64 {
        self.capacity - self.clearing - self.regions.values().map(|region| region.len).sum::<u64>()
    }

    fn expire(&mut self, now: Duration) {
        self.regions.retain(|_, region| region.grant.is_some() || region.until > now);
    }

    fn carry_out(&mut self, now: Duration, call: &Call) -> Result<Answer, CallError> {
        self.expire(now);
        match call {
            Call::Status => Ok(Answer::Status(Box::new(self.heartbeat().status))),
            Call::Reserve(reserve) => self.reserve(now, reserve),
            Call::Commit(id, commit) => self.commit(*id, commit),
            Call::Revoke(id) => {
                self.revoke(*id);
                Ok(Answer::Done)
            }
            Call::Purge(allocation, id) => {
                self.revoke(*id);
                self.regions.retain(|_, region| region.allocation != *allocation);
                Ok(Answer::Done)
            }
        }
    }

    fn reserve(&mut self, now: Duration, reserve: &Reserve) -> Result<Answer, CallError> {
        let len = reserve.region_len.0;
        if u64::from(reserve.count) * len > self.free() {
            self.refusals += 1;
            return Err(CallError::Refused(ErrorKind::NoSpace, "no room".into()));
        }
        let made = |_| {
            self.next_region += 1;
            let id = RegionId::from_u128(self.next_region);
            let held = Held { allocation: reserve.allocation, len, until: now + reserve.ttl.0, grant: None };
            self.regions.insert(id, held);
            Region {
                id,
                len: ByteSize(len),
                state: RegionState::Reserved,
                allocation: None,
                grant: None,
                resident: ByteSize(0),
            }
        };
        Ok(Answer::Regions((0..reserve.count).map(made).collect()))
    }

    fn commit(&mut self, id: GrantId, commit: &Commit) -> Result<Answer, CallError> {
        let refused = |line: &str| Err(CallError::Refused(ErrorKind::Conflict, line.into()));
        let wanted =
            Granted { epoch: commit.epoch, key: commit.key.clone(), regions: commit.regions.clone() };
        if let Some(grant) = self.grants.get_mut(&id) {
            if commit.epoch < grant.epoch || commit.regions != grant.regions {
                return refused("an older epoch, or other regions");
            }
            assert!(commit.epoch > grant.epoch || *grant == wanted, "one epoch has one key");
            *grant = wanted;
            return Ok(Answer::Done);
        }
        let free = |region: &RegionId| {
            self.regions
                .get(region)
                .is_some_and(|held| held.grant.is_none() && held.allocation == commit.allocation)
        };
        if !commit.regions.iter().all(free) {
            return refused("the reservation is over");
        }
        for region in &commit.regions {
            self.regions.get_mut(region).unwrap().grant = Some(id);
        }
        self.grants.insert(id, wanted);
        Ok(Answer::Done)
    }

    fn revoke(&mut self, id: GrantId) {
        self.grants.remove(&id);
        self.regions.retain(|_, region| region.grant != Some(id));
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Works,
    NeverArrives,
    /// It is given up, and arrives afterwards.
    ArrivesLate,
    AnswerIsLost,
    Refused,
}

struct World {
    service: Service,
    durable: MemoryStore,
    now: Duration,
    appliances: BTreeMap<ApplianceId, Appliance>,
    /// Calls that were given up and are still on their way.
    late: Vec<(ApplianceId, Call)>,
    /// What the service wants done and is not done yet.
    pending: VecDeque<Effect>,
    asked: u64,
    open: BTreeSet<ReplyTo>,
    answers: BTreeMap<ReplyTo, Result<Outcome, ApiError>>,
}

impl World {
    fn new(capacities: &[u64]) -> World {
        let mut world = World {
            service: new_service(0),
            durable: MemoryStore::default(),
            now: Duration::ZERO,
            appliances: BTreeMap::new(),
            late: Vec::new(),
            pending: VecDeque::new(),
            asked: 0,
            open: BTreeSet::new(),
            answers: BTreeMap::new(),
        };
        for (index, capacity) in capacities.iter().enumerate() {
            let one = Appliance::new(index as u128 + 1, *capacity);
            world.appliances.insert(one.record.info.id, one);
        }
        world.beat();
        world.finish();
        world
    }

    fn event(&mut self, event: Event) {
        let now = Moment { at: self.now, unix: self.now.as_secs() };
        let effects = self.service.handle(now, event);
        self.pending.extend(effects);
    }

    fn ask(&mut self, request: Request) -> ReplyTo {
        self.asked += 1;
        let reply = ReplyTo(self.asked);
        self.open.insert(reply);
        self.event(Event::Request(reply, request));
        reply
    }

    /// Every appliance that is there sends its heartbeat.
    fn beat(&mut self) {
        let now = self.now;
        let here = self.appliances.values_mut().filter(|one| !one.away);
        let beats: Vec<Heartbeat> = here
            .map(|one| {
                one.expire(now);
                one.heartbeat()
            })
            .collect();
        for heartbeat in beats {
            self.ask(Request::Heartbeat(Box::new(heartbeat)));
        }
    }

    /// Does one thing that is pending: stores in order, calls in any order.
    fn step(&mut self, choice: usize, fate: Fate) {
        let Some(effect) = self.take(choice) else { return };
        match effect {
            Effect::Reply(reply, result) => {
                assert!(self.open.remove(&reply), "{reply:?} was answered already");
                self.answers.insert(reply, result);
            }
            Effect::Store(ticket, batch) => {
                self.durable.commit(&[batch]).unwrap();
                self.event(Event::Stored(ticket));
            }
            Effect::Call(ticket, target, call) => {
                let result = self.call(target.appliance, &call, fate);
                self.event(Event::Called(ticket, result));
            }
        }
    }

    /// One of the calls that were given up arrives after all.
    fn arrive(&mut self, choice: usize) {
        if !self.late.is_empty() {
            let (id, call) = self.late.swap_remove(choice % self.late.len());
            let _ = self.call(id, &call, Fate::Works);
        }
    }

    fn take(&mut self, choice: usize) -> Option<Effect> {
        let index = choice % self.pending.len().max(1);
        let index = match self.pending.get(index)? {
            Effect::Store(..) => {
                self.pending.iter().position(|effect| matches!(effect, Effect::Store(..)))?
            }
            _ => index,
        };
        self.pending.remove(index)
    }

    fn call(&mut self, id: ApplianceId, call: &Call, fate: Fate) -> Result<Answer, CallError> {
        let failed = || Err(CallError::Failed("no answer".into()));
        let appliance = self.appliances.get_mut(&id).unwrap();
        match fate {
            _ if appliance.away => failed(),
            Fate::NeverArrives => failed(),
            Fate::ArrivesLate => {
                self.late.push((id, call.clone()));
                failed()
            }
            Fate::Refused => Err(CallError::Refused(ErrorKind::NoSpace, "a whim".into())),
            Fate::AnswerIsLost => {
                let _ = appliance.carry_out(self.now, call);
                failed()
            }
            Fate::Works => appliance.carry_out(self.now, call),
        }
    }

    fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.pending.is_empty() {
                return;
            }
            self.step(0, Fate::Works);
        }
        panic!("it never comes to rest");
    }

    /// The allocator is killed: what was not durable is gone, calls on their way may still arrive.
    fn crash(&mut self, arriving: bool) {
        let late: Vec<Effect> = self.pending.drain(..).collect();
        self.open.clear();
        self.service = new_service(self.asked);
        self.now += Duration::from_secs(1);
        let now = Moment { at: self.now, unix: self.now.as_secs() };
        let loaded = self.durable.load().unwrap();
        let effects = self.service.restore(now, loaded);
        self.pending.extend(effects);
        for effect in late {
            if let Effect::Call(_, target, call) = effect
                && arriving
            {
                self.late.push((target.appliance, call));
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.beat();
        self.event(Event::Tick);
    }

    /// Everything is there again, and enough time passes for every undo.
    fn mend(&mut self) {
        self.appliances.values_mut().for_each(|one| one.away = false);
        self.finish();
        while !self.late.is_empty() {
            self.arrive(0);
        }
        for _ in 0..4 {
            self.pass(TTL);
            self.finish();
        }
    }

    fn check(&mut self) {
        assert!(self.open.is_empty(), "without an answer: {:?}", self.open);
        let loaded = self.durable.load().unwrap();
        let mut granted = 0;
        for record in &loaded.allocations {
            assert_eq!(record.phase, Phase::Ready, "{}", record.name);
            for (index, grant) in record.grants.iter().enumerate() {
                let held = &self.appliances[&grant.appliance].grants[&grant.id];
                assert_eq!(held.regions, grant.regions);
                let now = (record.epoch, &grant.key);
                let next = record.next.as_ref().map(|next| (next.epoch, &next.keys[index]));
                assert!(
                    now == (held.epoch, &held.key) || next == Some((held.epoch, &held.key)),
                    "{}",
                    record.name
                );
                granted += 1;
            }
        }
        let grants: usize = self.appliances.values().map(|one| one.grants.len()).sum();
        assert_eq!(grants, granted, "a grant that no record has");
        for one in self.appliances.values() {
            assert!(one.regions.values().all(|region| region.grant.is_some()), "a reservation stayed");
        }
    }

    fn answer(&mut self, request: Request) -> Result<Outcome, ApiError> {
        let reply = self.ask(request);
        self.finish();
        self.answers.remove(&reply).unwrap()
    }
}

/// Random numbers that differ from those of the service before a crash.
fn new_service(life: u64) -> Service {
    let mut count = 0_u64;
    let dice = move || {
        count += 1;
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&count.to_le_bytes());
        bytes[8..16].copy_from_slice(&(life + 1).to_le_bytes());
        Ok(bytes)
    };
    Service::new(Settings { interval: INTERVAL, reserve_ttl: TTL }, Box::new(dice))
}

fn create(name: &str, mib: u64, stripe: Option<u32>) -> Request {
    let region_len = Some(ByteSize(16 * MIB));
    Request::Create(Create {
        name: name.parse().unwrap(),
        size: ByteSize(mib * MIB),
        stripe,
        stripe_unit: None,
        region_len,
    })
}

fn attach(name: &str, client: u128, force: bool) -> Request {
    let attach = Attach {
        client: ClientId::from_u128(client),
        host: HostId::from_u128(1),
        host_name: format!("host{client}"),
        purpose: "ublk".into(),
        force,
    };
    Request::Attach { name: name.parse().unwrap(), attach }
}

fn delete(name: &str, force: bool) -> Request {
    Request::Delete { name: name.parse().unwrap(), force }
}

fn detach(name: &str, client: u128) -> Request {
    Request::Detach { name: name.parse().unwrap(), client: ClientId::from_u128(client) }
}

fn kind(result: Result<Outcome, ApiError>) -> ErrorKind {
    result.unwrap_err().0
}

fn map(result: Result<Outcome, ApiError>) -> Map {
    match result.unwrap() {
        Outcome::Map(map) => *map,
        other => panic!("{other:?}"),
    }
}

#[test]
fn made_attached_and_deleted() {
    let mut world = World::new(&[128 * MIB; 3]);
    world.answer(create("a", 96, Some(3))).unwrap();
    assert_eq!(kind(world.answer(create("a", 16, None))), ErrorKind::Conflict);
    let first = map(world.answer(attach("a", 1, false)));
    assert_eq!((first.epoch, first.grants.len(), first.regions.len()), (Epoch::FIRST, 3, 6));
    assert_eq!(map(world.answer(attach("a", 1, false))), first, "the same client gets the same map");
    assert_eq!(kind(world.answer(delete("a", false))), ErrorKind::InUse);
    world.answer(detach("a", 1)).unwrap();
    world.answer(delete("a", false)).unwrap();
    assert_eq!(kind(world.answer(attach("a", 1, false))), ErrorKind::NotFound);
    world.answer(create("a", 384, Some(3))).unwrap();
    world.check();
}

#[test]
fn a_new_owner_cuts_the_old_one_off() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    let first = map(world.answer(attach("a", 1, false)));
    assert_eq!(kind(world.answer(attach("a", 2, false))), ErrorKind::InUse);
    let second = map(world.answer(attach("a", 2, true)));
    assert_eq!(second.epoch, first.epoch.next());
    assert!(first.grants.iter().zip(&second.grants).all(|(old, new)| old.key != new.key && old.id == new.id));
    world.answer(detach("a", 1)).unwrap();
    assert_eq!(
        kind(world.answer(attach("a", 1, false))),
        ErrorKind::InUse,
        "a late detach of the old one changes nothing"
    );
    world.answer(detach("a", 2)).unwrap();
    let third = map(world.answer(attach("a", 1, false)));
    assert_eq!(third.epoch, second.epoch.next(), "keys once known are never valid for another");
    world.check();
}

#[test]
fn a_change_of_owner_waits_for_every_appliance() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 32, Some(2))).unwrap();
    let first = map(world.answer(attach("a", 1, false)));
    world.appliances.values_mut().next().unwrap().away = true;
    assert_eq!(kind(world.answer(attach("a", 2, true))), ErrorKind::Unavailable);
    world.crash(false);
    world.mend();
    let again = map(world.answer(attach("a", 1, false)));
    assert_eq!(
        again.epoch,
        first.epoch.next(),
        "the owner stays, with the epoch that some appliances have already"
    );
    assert_eq!(kind(world.answer(attach("a", 2, false))), ErrorKind::InUse);
    world.check();
}

#[test]
fn another_appliance_is_tried_once() {
    let mut world = World::new(&[256 * MIB, 128 * MIB]);
    let reply = world.ask(create("a", 16, None));
    while !matches!(world.pending.front(), Some(Effect::Call(..))) {
        world.step(0, Fate::Works);
    }
    world.step(0, Fate::Refused);
    world.finish();
    assert!(world.answers.remove(&reply).unwrap().is_ok());
    let second = &world.appliances[&ApplianceId::from_u128(2)];
    assert_eq!(second.grants.len(), 1);
    world.mend();
    world.check();
}

#[test]
fn two_at_once_do_not_book_the_same_memory() {
    let mut world = World::new(&[64 * MIB; 4]);
    let replies: Vec<ReplyTo> = (0..6).map(|n| world.ask(create(&format!("a{n}"), 48, Some(3)))).collect();
    world.finish();
    let made = replies.iter().filter(|reply| world.answers[reply].is_ok()).count();
    assert_eq!(made, 5, "sixteen regions, three each");
    assert!(world.appliances.values().all(|one| one.refusals == 0), "no appliance had to refuse");
    world.check();
}

#[test]
fn memory_given_back_is_there_at_once() {
    let mut world = World::new(&[64 * MIB; 1]);
    for _ in 0..10 {
        world.answer(create("a", 64, None)).unwrap();
        world.answer(delete("a", false)).unwrap();
    }
    assert!(world.answers.is_empty() || world.open.is_empty());
    world.check();
}

#[test]
fn memory_that_is_being_cleared_is_waited_for() {
    let mut world = World::new(&[64 * MIB; 1]);
    let id = ApplianceId::from_u128(1);
    world.appliances.get_mut(&id).unwrap().clearing = 48 * MIB;
    world.pass(INTERVAL);
    world.finish();
    let reply = world.ask(create("a", 64, None));
    world.finish();
    assert!(world.open.contains(&reply), "it waits");
    world.appliances.get_mut(&id).unwrap().clearing = 0;
    world.now += Duration::from_secs(1);
    world.event(Event::Tick);
    world.finish();
    assert!(world.answers.remove(&reply).unwrap().is_ok());
    world.answer(delete("a", false)).unwrap();

    world.appliances.get_mut(&id).unwrap().clearing = 48 * MIB;
    let too_much = world.answer(create("b", 65, None));
    assert_eq!(kind(too_much), ErrorKind::NoSpace, "it would not help to wait");
    let reply = world.ask(create("b", 64, None));
    for _ in 0..20 {
        world.now += Duration::from_secs(1);
        world.event(Event::Tick);
        world.finish();
    }
    assert_eq!(kind(world.answers.remove(&reply).unwrap()), ErrorKind::NoSpace, "it does not wait for ever");
    world.check();
}

#[test]
fn a_deletion_outlives_appliance_and_allocator() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    world.appliances.get_mut(&ApplianceId::from_u128(1)).unwrap().away = true;
    world.answer(delete("a", false)).unwrap();
    assert_eq!(world.durable.load().unwrap().allocations[0].phase, Phase::Deleting);
    world.answer(delete("a", false)).unwrap();
    world.crash(false);
    world.finish();
    world.mend();
    assert!(world.durable.load().unwrap().allocations.is_empty());
    world.check();
}

#[test]
fn an_appliance_is_forgotten_when_nothing_needs_it() {
    let mut world = World::new(&[64 * MIB]);
    let id = ApplianceId::from_u128(1);
    world.answer(create("a", 16, None)).unwrap();
    assert_eq!(kind(world.answer(Request::ForgetAppliance(id))), ErrorKind::InUse);
    world.appliances.get_mut(&id).unwrap().away = true;
    world.answer(delete("a", false)).unwrap();
    assert_eq!(
        kind(world.answer(Request::ForgetAppliance(id))),
        ErrorKind::InUse,
        "it is up and may confirm yet"
    );
    world.pass(INTERVAL * 4);
    world.finish();
    world.answer(Request::ForgetAppliance(id)).unwrap();
    world.pass(Duration::from_secs(1));
    world.finish();
    assert!(world.durable.load().unwrap().allocations.is_empty(), "its memory went with it");
    assert_eq!(kind(world.answer(Request::ForgetAppliance(id))), ErrorKind::NotFound);
}

#[test]
fn requests_for_one_allocation_wait_for_each_other() {
    let mut world = World::new(&[64 * MIB]);
    world.answer(create("a", 16, None)).unwrap();
    let first = world.ask(attach("a", 1, false));
    let second = world.ask(attach("a", 2, false));
    let third = world.ask(delete("a", true));
    let fourth = world.ask(attach("a", 3, false));
    world.finish();
    assert!(world.answers[&first].is_ok());
    assert_eq!(kind(world.answers[&second].clone()), ErrorKind::InUse);
    assert!(world.answers[&third].is_ok());
    assert_eq!(kind(world.answers[&fourth].clone()), ErrorKind::NotFound);
    world.mend();
    world.check();
    assert_eq!(SCHEMA, 1);
}

#[derive(Debug, Clone)]
enum Move {
    Create(u8, u64, u32),
    Attach(u8, u8, bool),
    Detach(u8, u8),
    Delete(u8, bool),
    Steps(Vec<(usize, u8)>),
    Pass(u64),
    Arrive(usize),
    Away(u8, bool),
    Crash(bool),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (0..4_u8, 1..200_u64, 1..4_u32).prop_map(|(name, mib, stripe)| Move::Create(name, mib, stripe)),
        3 => (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(name, client, force)| Move::Attach(name, client, force)),
        1 => (0..4_u8, 0..3_u8).prop_map(|(name, client)| Move::Detach(name, client)),
        2 => (0..4_u8, any::<bool>()).prop_map(|(name, force)| Move::Delete(name, force)),
        8 => prop::collection::vec((any::<usize>(), any::<u8>()), 1..20).prop_map(Move::Steps),
        2 => (0..90_u64).prop_map(Move::Pass),
        3 => any::<usize>().prop_map(Move::Arrive),
        1 => (0..3_u8, any::<bool>()).prop_map(|(one, away)| Move::Away(one, away)),
        1 => any::<bool>().prop_map(Move::Crash),
    ]
}

impl World {
    fn make(&mut self, made: Move) {
        let name = |name: u8| format!("v{name}");
        match made {
            Move::Create(of, mib, stripe) => drop(self.ask(create(&name(of), mib, Some(stripe)))),
            Move::Attach(of, client, force) => drop(self.ask(attach(&name(of), client.into(), force))),
            Move::Detach(of, client) => drop(self.ask(detach(&name(of), client.into()))),
            Move::Delete(of, force) => drop(self.ask(delete(&name(of), force))),
            Move::Steps(steps) => {
                steps.into_iter().for_each(|(choice, fate)| self.step(choice, fate_of(fate)));
            }
            Move::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
            Move::Arrive(choice) => self.arrive(choice),
            Move::Crash(arriving) => self.crash(arriving),
            Move::Away(one, away) => {
                if let Some(one) = self.appliances.values_mut().nth(one.into()) {
                    one.away = away;
                }
            }
        }
    }
}

fn fate_of(number: u8) -> Fate {
    match number % 16 {
        0 => Fate::NeverArrives,
        1 => Fate::AnswerIsLost,
        2 => Fate::Refused,
        3 => Fate::ArrivesLate,
        _ => Fate::Works,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whole_or_undone_whatever_happens(script in prop::collection::vec(moves(), 1..60)) {
        let mut world = World::new(&[160 * MIB, 96 * MIB, 224 * MIB]);
        script.into_iter().for_each(|made| world.make(made));
        world.mend();
        world.check();
    }
}
