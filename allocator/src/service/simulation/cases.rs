//! Creation, ownership, deletion and lost grants: one test for each story.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Map, Resize, SlabMap, SlabPlace};
use xpm_protocol::{ApplianceId, ByteSize, ClientId, Epoch, Name};

use super::super::{Call, Effect, Event, Outcome, ReplyTo, Request};
use super::world::{Fate, World};
use super::{INTERVAL, MIB, attach, create, delete, detach};
use crate::store::MetadataStore as _;
use crate::store::record::{NextEpoch, Phase};

fn kind(result: Result<Outcome, ApiError>) -> ErrorKind {
    result.unwrap_err().0
}

fn map(result: Result<Outcome, ApiError>) -> Map {
    match result.unwrap() {
        Outcome::Owned(owned) => owned.map,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_allocation_is_made_attached_and_deleted() {
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
fn slabs_with_names_are_kept_for_the_next_owner() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    let slab = |name: &str, at: u64, len: u64| {
        (name.parse().unwrap(), SlabPlace { offset: ByteSize(at * MIB), len: ByteSize(len * MIB) })
    };
    let set = |client: u128, number: u64, slabs: &[(Name, SlabPlace)]| Request::Slabs {
        name: "a".parse().unwrap(),
        client: ClientId::from_u128(client),
        slabs: SlabMap { number, slabs: slabs.iter().cloned().collect() },
    };
    let two = [slab("x", 0, 16), slab("y", 16, 2)];
    assert_eq!(kind(world.answer(set(1, 1, &two))), ErrorKind::Conflict, "nobody owns it");
    assert_eq!(map(world.answer(attach("a", 1, false))).slabs, SlabMap::default());
    world.answer(set(1, 1, &two)).unwrap();
    world.answer(set(1, 1, &two)).unwrap();
    assert_eq!(kind(world.answer(set(1, 1, &two[..1]))), ErrorKind::Conflict, "another one has this number");
    assert_eq!(kind(world.answer(set(1, 3, &two[..1]))), ErrorKind::Conflict, "one is missing in between");
    for wrong in [
        vec![slab("x", 0, 16), slab("y", 8, 8)],
        vec![slab("x", 1, 2)],
        vec![slab("x", 0, 1)],
        vec![slab("x", 0, 6)],
        vec![slab("x", 62, 4)],
        vec![slab("x", 1 << 43, 2)],
        (0..257).map(|n| slab(&format!("s{n}"), 0, 2)).collect(),
    ] {
        assert_eq!(kind(world.answer(set(1, 2, &wrong))), ErrorKind::Invalid, "{wrong:?}");
    }
    let smaller =
        |to: u64| Request::Resize { name: "a".parse().unwrap(), resize: Resize { size: ByteSize(to * MIB) } };
    assert_eq!(kind(world.answer(smaller(16))), ErrorKind::Conflict);
    world.crash(false);
    world.mend();
    world.answer(detach("a", 1)).unwrap();
    let known = map(world.answer(attach("a", 2, false))).slabs;
    assert_eq!(known, SlabMap { number: 1, slabs: two.iter().cloned().collect() });
    assert_eq!(kind(world.answer(set(1, 2, &[]))), ErrorKind::Conflict, "it is not the owner any more");
    world.answer(set(2, 2, &[])).unwrap();
    assert_eq!(map(world.answer(attach("a", 2, false))).slabs, SlabMap { number: 2, ..SlabMap::default() });
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

/// Carries out all pending effects; calls that raise an epoch get this fate.
fn finish_raising(world: &mut World, fate: Fate) {
    while !world.pending.is_empty() {
        let raises = |effect: &Effect| matches!(effect, Effect::Call(_, _, Call::Raise(..)));
        match world.pending.iter().position(raises) {
            Some(at) => world.step(at, fate),
            None => world.step(0, Fate::Works),
        }
    }
}

/// Answers a request; calls that raise an epoch get this fate.
fn raise(world: &mut World, request: Request, fate: Fate) -> Result<Outcome, ApiError> {
    let reply = world.ask(request);
    finish_raising(world, fate);
    world.answers.remove(&reply).unwrap()
}

fn next_epoch(world: &mut World) -> Option<NextEpoch> {
    world.durable.load().unwrap().allocations.remove(0).next
}

#[test]
fn an_owner_goes_on_where_no_appliance_can_have_another_epoch() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    let first = map(world.answer(attach("a", 1, false)));
    assert_eq!(kind(raise(&mut world, attach("a", 2, true), Fate::Refused)), ErrorKind::NoSpace);
    assert_eq!(next_epoch(&mut world), None);
    assert_eq!(map(world.answer(attach("a", 1, false))), first);
    world.check();
}

#[test]
fn an_epoch_that_an_appliance_may_have_heard_of_keeps_its_keys() {
    for fate in [Fate::ArrivesLate, Fate::AnswerIsLost] {
        let mut world = World::new(&[64 * MIB; 2]);
        world.answer(create("a", 64, Some(2))).unwrap();
        world.answer(attach("a", 1, false)).unwrap();
        assert_eq!(kind(raise(&mut world, attach("a", 2, true), fate)), ErrorKind::Unavailable);
        let next = next_epoch(&mut world).unwrap();
        // Both refuse the second time, which says nothing about the first calls: these may still arrive.
        raise(&mut world, attach("a", 2, true), Fate::Refused).unwrap_err();
        assert_eq!(next_epoch(&mut world), Some(next.clone()));
        world.arrive(0);
        world.arrive(0);
        let second = map(world.answer(attach("a", 2, true)));
        assert!(second.epoch == next.epoch && second.grants.iter().map(|one| &one.key).eq(&next.keys));
        world.check();
    }
}

#[test]
fn keys_that_a_recovery_made_are_not_dropped() {
    let mut world = World::new(&[64 * MIB]);
    world.answer(create("a", 64, None)).unwrap();
    world.answer(attach("a", 1, false)).unwrap();
    // The client has lost its map, so no process knows the keys of this epoch.
    world.lose_disk(Vec::new());
    let next = next_epoch(&mut world);
    raise(&mut world, attach("a", 1, false), Fate::Refused).unwrap_err();
    assert!(next.is_some() && next_epoch(&mut world) == next);
    let map = map(world.answer(attach("a", 1, false)));
    assert_eq!(map.epoch, next.unwrap().epoch, "its keys are those that the appliance has");
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
fn two_creations_at_once_get_different_memory() {
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
fn memory_given_back_is_not_free_before_it_is_cleared() {
    let mut world = World::new(&[64 * MIB; 1]);
    let id = ApplianceId::from_u128(1);
    world.appliances.get_mut(&id).unwrap().slow = true;
    world.answer(create("a", 64, None)).unwrap();
    world.answer(delete("a", false)).unwrap();
    let reply = world.ask(create("a", 64, None));
    world.finish();
    assert!(world.open.contains(&reply), "it waits");
    let appliance = world.appliances.get_mut(&id).unwrap();
    assert_eq!(appliance.refusals, 0, "the allocator knew");
    appliance.clearing = 0;
    world.event(Event::Tick);
    world.finish();
    assert!(world.answers.remove(&reply).unwrap().is_ok());
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
}

#[test]
fn a_grant_without_record_is_freed_after_its_grace() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    world.answer(create("kept", 32, None)).unwrap();
    // The metadata lack `a`, as a copy from before its creation would.
    let mut loaded = world.durable.load().unwrap();
    loaded.allocations.retain(|record| record.name.as_str() == "kept");
    world.durable = crate::store::memory::MemoryStore::of(loaded);
    world.crash(false);
    let garbage = |world: &mut World| match world.answer(Request::Garbage).unwrap() {
        Outcome::Garbage(found) => found,
        other => panic!("{other:?}"),
    };
    for _ in 0..2 {
        assert_eq!(garbage(&mut world), [], "seen once is not seen");
        world.pass(Duration::from_secs(31));
        world.finish();
    }
    world.pass(Duration::from_secs(31));
    world.finish();
    let found = garbage(&mut world);
    assert_eq!(found.iter().map(|one| one.bytes.0).sum::<u64>(), 64 * MIB, "{found:?}");
    for _ in 0..8 {
        world.pass(Duration::from_secs(60));
        world.finish();
        assert_eq!(garbage(&mut world).len(), found.len(), "it has its time of grace");
    }
    for _ in 0..3 {
        world.pass(Duration::from_secs(60));
        world.finish();
    }
    assert_eq!(garbage(&mut world), []);
    world.check();
}

#[test]
fn grants_that_an_appliance_lost_are_reported() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    let lost = |world: &mut World| match world.answer(Request::Allocations).unwrap() {
        Outcome::Allocations(all) => all[0].lost.clone(),
        other => panic!("{other:?}"),
    };
    let one = world.appliances.values_mut().next().unwrap();
    let kept = (std::mem::take(&mut one.grants), std::mem::take(&mut one.regions));
    for _ in 0..4 {
        world.pass(Duration::from_secs(31));
        world.finish();
    }
    assert_eq!(lost(&mut world), ["a1"]);
    let one = world.appliances.values_mut().next().unwrap();
    (one.grants, one.regions) = kept;
    for _ in 0..2 {
        world.pass(Duration::from_secs(31));
        world.finish();
    }
    assert!(lost(&mut world).is_empty(), "it was found again");
    world.check();
}
