//! Random scripts and single stories of two allocations that are handed over together between two clients, to and
//! fro, with faults.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Drain, HandOverAll, Handover, HandoverState, Map, Orders, Part, Report, Resize,
};
use xpm_protocol::{ByteSize, ClientId, GrantKey, Name, RegionId};

use super::super::{Outcome, ReplyTo, Request, Which};
use super::world::{Fate, World};
use super::{MIB, attach, create, delete, detach};
use crate::store::MetadataStore as _;
use crate::store::record::{AllocationRecord, Phase};

const NAMES: [&str; 2] = ["a", "b"];

fn name(of: usize) -> Name {
    NAMES[of].parse().unwrap()
}

const fn id(client: usize) -> ClientId {
    ClientId::from_u128(client as u128)
}

fn stand_by(of: usize, client: usize, force: bool) -> Request {
    match attach(NAMES[of], client as u128, force) {
        Request::Attach { name, attach, .. } => Request::StandBy { name, attach },
        other => other,
    }
}

fn hand_over(names: &[usize], to: usize, force: bool) -> Request {
    let names = names.iter().map(|of| name(*of)).collect();
    Request::HandOverAll(HandOverAll { names, to: id(to).to_string(), force })
}

fn orders(of: usize, client: usize) -> Request {
    Request::Orders { name: name(of), client: id(client), known: None }
}

fn report(of: usize, client: usize, report: Report) -> Request {
    Request::Report { name: name(of), client: id(client), report }
}

#[derive(Debug, Clone)]
enum Move {
    StandBy(usize, usize),
    Notes(usize, usize),
    HandOver(usize, bool),
    Commit,
    RollBack,
    /// A client asks for its orders, or for its keys if the orders say that it is the owner.
    Asks(usize, usize),
    Writes(usize, usize, usize),
    Resize(usize, u64),
    Drain(usize),
    Steps(Vec<(usize, u8)>),
    Finish,
    Pass(u64),
    Arrive(usize),
    Away(usize, bool),
    Crash(bool),
}

fn moves() -> impl Strategy<Value = Move> {
    let (of, client) = (0..2_usize, 0..2_usize);
    prop_oneof![
        6 => (of.clone(), client.clone()).prop_map(|(of, client)| Move::StandBy(of, client)),
        6 => (of.clone(), client.clone()).prop_map(|(of, client)| Move::Notes(of, client)),
        8 => (client.clone(), any::<bool>()).prop_map(|(to, force)| Move::HandOver(to, force)),
        3 => Just(Move::Commit),
        4 => Just(Move::RollBack),
        16 => (of.clone(), client.clone()).prop_map(|(of, client)| Move::Asks(of, client)),
        10 => (of.clone(), client, 0..4_usize).prop_map(|(of, client, region)| Move::Writes(of, client, region)),
        1 => (of.clone(), 1..6_u64).prop_map(|(of, regions)| Move::Resize(of, regions)),
        1 => (0..2_usize).prop_map(Move::Drain),
        10 => prop::collection::vec((any::<usize>(), any::<u8>()), 1..20).prop_map(Move::Steps),
        10 => Just(Move::Finish),
        2 => (0..40_u64).prop_map(Move::Pass),
        1 => any::<usize>().prop_map(Move::Arrive),
        1 => (0..2_usize, prop::bool::weighted(0.3)).prop_map(|(one, away)| Move::Away(one, away)),
        1 => any::<bool>().prop_map(Move::Crash),
    ]
}

/// State of a client with regard to one allocation.
#[derive(Default)]
struct Has {
    map: Option<Map>,
    asked: Option<ReplyTo>,
}

struct Pair {
    world: World,
    /// By allocation and client.
    has: [[Has; 2]; 2],
    written: BTreeMap<(usize, usize), u64>,
    stamp: u64,
    seen: BTreeMap<&'static str, u32>,
}

impl Pair {
    fn new() -> Pair {
        let mut world = World::new(&[128 * MIB; 2]);
        for of in NAMES {
            world.answer(create(of, 32, Some(2))).unwrap();
        }
        let mut pair = Pair {
            world,
            has: Default::default(),
            written: BTreeMap::new(),
            stamp: 0,
            seen: BTreeMap::new(),
        };
        for of in 0..2 {
            pair.has[of][0].map = Some(pair.own(of, 0));
        }
        pair
    }

    fn own(&mut self, of: usize, client: usize) -> Map {
        match self.world.answer(attach(NAMES[of], client as u128, false)) {
            Ok(Outcome::Owned(owned)) => owned.map,
            other => panic!("{other:?}"),
        }
    }

    fn record(&mut self, of: usize) -> AllocationRecord {
        let loaded = self.world.durable.load().unwrap();
        let found =
            loaded.allocations.into_iter().find(|one| one.name == name(of) && one.phase == Phase::Ready);
        found.expect("nothing deletes it")
    }

    fn owner(&mut self, of: usize) -> usize {
        let owner = self.record(of).owner.expect("nobody lets go");
        owner.client.as_u128() as usize
    }

    fn act(&mut self, made: Move) {
        match made {
            Move::StandBy(of, client) => {
                self.world.ask(stand_by(of, client, false));
            }
            Move::Notes(of, client) => {
                self.world.ask(report(of, client, Report::Holds));
            }
            Move::HandOver(to, force) => {
                self.world.ask(hand_over(&[0, 1], to, force));
            }
            Move::Commit => {
                self.world.ask(Request::CommitHandover(Which::Of(name(0))));
            }
            Move::RollBack => {
                self.world.ask(Request::RollBackHandover(Which::Of(name(1))));
            }
            Move::Asks(of, client) => self.asks(of, client),
            Move::Writes(of, client, region) => self.writes(of, client, region),
            Move::Resize(of, regions) => {
                let resize = Resize { size: ByteSize(regions * 16 * MIB) };
                self.world.ask(Request::Resize { name: name(of), resize });
            }
            Move::Drain(one) => {
                let id = *self.world.appliances.keys().nth(one).unwrap();
                self.world.ask(Request::Drain { id, drain: Drain::default() });
            }
            Move::Steps(steps) => {
                for (choice, fate) in steps {
                    let fate = match fate % 24 {
                        0 => Fate::NeverArrives,
                        1 => Fate::AnswerIsLost,
                        2 => Fate::Refused,
                        3 => Fate::ArrivesLate,
                        _ => Fate::Works,
                    };
                    self.world.step(choice, fate);
                    self.check();
                }
            }
            Move::Finish => self.world.finish(),
            Move::Pass(seconds) => self.world.pass(Duration::from_secs(seconds)),
            Move::Arrive(choice) => self.world.arrive(choice),
            Move::Away(one, away) => {
                self.world.appliances.values_mut().nth(one).unwrap().away = away;
            }
            Move::Crash(arriving) => {
                self.world.crash(arriving);
                self.has.as_flattened_mut().iter_mut().for_each(|has| has.asked = None);
            }
        }
    }

    fn asks(&mut self, of: usize, client: usize) {
        if let Some(asked) = self.has[of][client].asked {
            let Some(answer) = self.world.answers.remove(&asked) else { return };
            self.has[of][client].asked = None;
            match answer {
                Ok(Outcome::Owned(owned)) => {
                    let map = owned.map;
                    assert!(map.grants.iter().all(|grant| grant.key != GrantKey::NONE));
                    self.has[of][client].map = Some(map);
                }
                Ok(Outcome::Orders(orders)) => self.obeys(of, client, &orders),
                Ok(other) => panic!("{other:?}"),
                Err(error) if error.0 == ErrorKind::Conflict => self.has[of][client].map = None,
                Err(_) => {}
            }
            return;
        }
        self.has[of][client].asked = Some(self.world.ask(orders(of, client)));
    }

    fn obeys(&mut self, of: usize, client: usize, orders: &Orders) {
        let has = &mut self.has[of][client];
        match &orders.part {
            Some(Part::StandsBy) => has.map = None,
            // The client keeps its old keys, which no appliance accepts.
            Some(Part::Holds { .. }) => {}
            None => {
                let same = has.map.as_ref().is_some_and(|map| Some(map.epoch) == orders.epoch);
                if !same {
                    has.asked = Some(self.world.ask(attach(NAMES[of], client as u128, false)));
                }
            }
        }
    }

    fn place(&self, map: &Map, region: usize) -> Option<(xpm_protocol::ApplianceId, RegionId)> {
        let slot = map.regions[region % map.regions.len()];
        let grant = &map.grants[slot.grant as usize];
        let held = self.world.appliances[&grant.appliance].grants.get(&grant.id)?;
        (held.key == grant.key).then(|| (grant.appliance, held.regions[slot.slot as usize]))
    }

    /// A write lands if the appliance accepts the client's key; no appliance does while the client is not the owner.
    fn writes(&mut self, of: usize, client: usize, region: usize) {
        let Some(map) = &self.has[of][client].map else { return };
        let region = region % map.regions.len();
        let Some((appliance, at)) = self.place(map, region) else { return };
        assert_eq!(self.owner(of), client, "who is not the owner writes to {}", NAMES[of]);
        self.stamp += 1;
        let stamp = self.stamp;
        let held = self.world.appliances.get_mut(&appliance).and_then(|one| one.regions.get_mut(&at));
        held.unwrap().content = stamp;
        self.written.insert((of, region), stamp);
    }

    /// At every moment both allocations have the same owner, and no written data are lost.
    fn check(&mut self) {
        let records = [self.record(0), self.record(1)];
        let owner = |record: &AllocationRecord| record.owner.as_ref().map(|owner| owner.client);
        let state = |record: &AllocationRecord| record.handover.as_ref().map(|one| one.state);
        // When a hand-over fails, an allocation whose appliances heard nothing leaves it and keeps its owner.
        assert_eq!(owner(&records[0]), owner(&records[1]), "one of them has another owner");
        let [first, second] = [state(&records[0]), state(&records[1])];
        let parted = first != second;
        assert!(
            !parted
                || [first, second].contains(&None)
                    && [first, second].contains(&Some(HandoverState::Returning)),
            "{first:?} and {second:?}"
        );
        for state in [first, second].into_iter().flatten() {
            *self.seen.entry(state.as_str()).or_default() += 1;
        }
        for ((of, region), written) in &self.written {
            let record = &records[*of];
            let Some(slot) = record.slots.get(*region) else { continue };
            let grant = &record.grants[slot.grant as usize];
            let held = &self.world.appliances[&grant.appliance].regions[&grant.regions[slot.slot as usize]];
            assert_eq!(held.content, *written, "region {region} of {}", NAMES[*of]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn all_have_one_owner_at_any_time(script in prop::collection::vec(moves(), 20..120)) {
        let mut pair = Pair::new();
        for made in script {
            pair.act(made);
            pair.check();
        }
        pair.world.mend();
        pair.check();
        pair.world.check();
        for of in 0..2 {
            let handover = pair.record(of).handover;
            prop_assert!(handover.is_none_or(|one| one.state == HandoverState::Open), "it ends one way or the other");
            let owner = pair.owner(of);
            let map = pair.own(of, owner);
            for region in 0..map.regions.len() {
                prop_assert!(pair.place(&map, region).is_some(), "the owner reaches all of it");
            }
        }
    }
}

fn ready(pair: &mut Pair) {
    for of in 0..2 {
        pair.world.answer(stand_by(of, 1, false)).unwrap();
        pair.world.answer(report(of, 0, Report::Holds)).unwrap();
    }
}

fn done(pair: &mut Pair, request: Request) -> Handover {
    match pair.world.answer(request) {
        Ok(Outcome::Handover(handover)) => *handover,
        other => panic!("{other:?}"),
    }
}

fn part(pair: &mut Pair, of: usize, client: usize) -> Result<Option<Part>, ErrorKind> {
    match pair.world.answer(orders(of, client)) {
        Ok(Outcome::Orders(orders)) => Ok(orders.part),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.0),
    }
}

#[test]
fn a_handover_is_rolled_back_or_committed() {
    let mut pair = Pair::new();
    ready(&mut pair);
    assert_eq!(part(&mut pair, 0, 1), Ok(Some(Part::StandsBy)));
    let open = done(&mut pair, hand_over(&[0, 1], 1, false));
    assert_eq!((open.state, open.names.len()), (HandoverState::Open, 2));
    assert!(matches!(part(&mut pair, 1, 0), Ok(Some(Part::Holds { handover, .. })) if handover == open.id));
    assert_eq!(part(&mut pair, 1, 1), Ok(None), "it is the owner");
    let map = pair.own(0, 1);
    assert!(pair.place(&map, 0).is_some(), "it has the keys");
    let old = pair.has[0][0].map.clone().unwrap();
    assert!(pair.place(&old, 0).is_none(), "the old ones are dead");

    assert_eq!(done(&mut pair, Request::RollBackHandover(Which::Id(open.id))).state, HandoverState::Returned);
    assert_eq!((part(&mut pair, 0, 0), part(&mut pair, 0, 1)), (Ok(None), Ok(Some(Part::StandsBy))));
    assert!(pair.place(&map, 0).is_none(), "the new owner is none any more");
    let back = pair.own(0, 0);
    assert_eq!(back.epoch.0, 3);

    let open = done(&mut pair, hand_over(&[1, 0], 1, false));
    assert_eq!(done(&mut pair, Request::CommitHandover(Which::Of(name(1)))).state, HandoverState::Committed);
    assert_eq!(part(&mut pair, 0, 0), Err(ErrorKind::Conflict), "it has ended");
    assert_eq!(part(&mut pair, 0, 1), Ok(None));
    let refused = pair.world.answer(Request::RollBackHandover(Which::Id(open.id))).unwrap_err();
    assert_eq!(refused.0, ErrorKind::NotFound, "never back after that");
    pair.world.check();
}

#[test]
fn an_impossible_handover_is_refused_before_any_change() {
    let mut pair = Pair::new();
    let refused = |pair: &mut Pair, request| match pair.world.answer(request) {
        Err(error) => (error.0, error.1),
        Ok(other) => panic!("{other:?}"),
    };
    let (kind, why) = refused(&mut pair, hand_over(&[0, 1], 1, false));
    assert!(kind == ErrorKind::Conflict && why.contains("--standby"), "{why}");
    pair.world.answer(stand_by(0, 1, false)).unwrap();
    pair.world.answer(stand_by(1, 1, false)).unwrap();
    let (kind, why) = refused(&mut pair, hand_over(&[0, 1], 1, false));
    assert!(kind == ErrorKind::Unavailable && why.contains("cannot be made to wait"), "{why}");
    let why = "the kernel goes to the appliance itself".to_owned();
    pair.world.answer(report(0, 0, Report::Kept { why: why.clone() })).unwrap();
    assert!(refused(&mut pair, hand_over(&[0], 1, false)).1.contains(&why));
    ready(&mut pair);
    assert!(refused(&mut pair, hand_over(&[0, 0], 1, false)).1.contains("once"));
    assert_eq!(refused(&mut pair, stand_by(0, 0, false)).0, ErrorKind::Conflict, "it is the owner");
    assert_eq!(refused(&mut pair, stand_by(0, 7, false)).0, ErrorKind::InUse, "one at a time");
    let resize = Request::Resize { name: name(0), resize: Resize { size: ByteSize(64 * MIB) } };
    assert_eq!(refused(&mut pair, resize.clone()).0, ErrorKind::InUse);
    pair.world.appliances.values_mut().for_each(|one| one.away = true);
    pair.world.pass(Duration::from_secs(60));
    let (kind, why) = refused(&mut pair, hand_over(&[0, 1], 1, false));
    assert!(kind == ErrorKind::Unavailable && why.contains("is silent"), "{why}");
    pair.world.mend();
    assert_eq!(pair.record(0).epoch.0, 1, "no epoch was raised");

    done(&mut pair, hand_over(&[0, 1], 1, false));
    for request in [resize, detach("a", 0), detach("a", 1), attach("a", 0, true), attach("b", 7, true)] {
        let (kind, why) = refused(&mut pair, request);
        assert!(kind != ErrorKind::Internal && why.contains("--rollback"), "{why}");
    }
    assert_eq!(refused(&mut pair, detach("a", 0)).0, ErrorKind::InUse, "so that it is owed");
    assert_eq!(refused(&mut pair, delete("a", false)).0, ErrorKind::Conflict);
    pair.world.answer(delete("a", true)).unwrap();
    let left = done(&mut pair, Request::CommitHandover(Which::Of(name(1))));
    assert_eq!(left.names, [name(1)], "the other one goes on");
}

#[test]
fn a_restart_during_a_handover_returns_everything() {
    for steps in 0..8 {
        let mut pair = Pair::new();
        ready(&mut pair);
        pair.world.ask(hand_over(&[0, 1], 1, false));
        (0..steps).for_each(|_| pair.world.step(0, Fate::Works));
        pair.world.crash(false);
        pair.world.mend();
        pair.check();
        pair.world.check();
        match pair.record(0).handover {
            None => assert_eq!((pair.owner(0), pair.owner(1)), (0, 0), "after {steps} steps"),
            Some(open) => {
                assert_eq!((open.state, pair.owner(1)), (HandoverState::Open, 1), "after {steps} steps");
                done(&mut pair, Request::RollBackHandover(Which::Id(open.id)));
            }
        }
        let map = pair.own(1, 0);
        assert!(pair.place(&map, 0).is_some() && pair.place(&map, 1).is_some());
    }
}

#[test]
fn a_silent_appliance_delays_only_the_return() {
    let mut pair = Pair::new();
    ready(&mut pair);
    let open = done(&mut pair, hand_over(&[0, 1], 1, false));
    pair.world.appliances.values_mut().next().unwrap().away = true;
    let refused = pair.world.answer(Request::RollBackHandover(Which::Id(open.id))).unwrap_err();
    assert_eq!(refused.0, ErrorKind::Unavailable);
    assert_eq!(part(&mut pair, 0, 1), Ok(Some(Part::StandsBy)), "it waits");
    assert!(matches!(part(&mut pair, 0, 0), Ok(Some(Part::Holds { .. }))), "it waits as well");
    let Ok(Outcome::Handovers(list)) = pair.world.answer(Request::Handovers) else { panic!("no list") };
    assert!(list[0].stuck.as_ref().is_some_and(|why| why.contains("appliance")), "{list:?}");
    let Ok(Outcome::Status(status)) = pair.world.answer(Request::Status) else { panic!("no status") };
    assert!(status.problems.iter().any(|problem| problem.code == "HANDOVER_OPEN"), "{:?}", status.problems);
    pair.world.mend();
    assert_eq!((part(&mut pair, 0, 0), part(&mut pair, 1, 0)), (Ok(None), Ok(None)), "by itself");
    pair.world.check();
}

#[test]
fn an_open_handover_stays_open_and_becomes_a_problem() {
    let mut pair = Pair::new();
    ready(&mut pair);
    done(&mut pair, hand_over(&[0, 1], 1, false));
    let problems = |pair: &mut Pair| match pair.world.answer(Request::Status) {
        Ok(Outcome::Status(status)) => {
            status.problems.iter().filter(|one| one.code == "HANDOVER_OPEN").count()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(problems(&mut pair), 0);
    pair.world.crash(false);
    (0..20).for_each(|_| pair.world.pass(Duration::from_secs(30)));
    pair.world.finish();
    assert_eq!(problems(&mut pair), 1);
    assert_eq!(pair.owner(0), 1, "it never ends by itself");
    assert!(matches!(part(&mut pair, 0, 0), Ok(Some(Part::Holds { .. }))));
}
