//! Requests that wait, and orders right after a start: one test for each story.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{AllocationState, Create};
use xpm_protocol::{ByteSize, RequestId, Span};

use super::super::{Outcome, Request};
use super::policies::{TWO, asked, make, name, pass, show, state, waiting, world};
use super::world::World;
use super::{INTERVAL, MIB, create, delete};

#[test]
fn smaller_requests_pass_while_the_rest_could_serve_the_first() {
    let mut world = world(&[128 * MIB; 2], TWO);
    make(&mut world, asked("full", 192, "")).unwrap();
    assert_eq!(make(&mut world, waiting("large", 128, "")).unwrap().state, AllocationState::Waiting);
    make(&mut world, asked("small", 48, "")).unwrap();
    make(&mut world, asked("small2", 16, "")).unwrap();
    world.answer(delete("full", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "large"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn smaller_requests_do_not_pass_for_ever() {
    let mut world = world(&[128 * MIB; 2], TWO);
    make(&mut world, asked("a", 128, "")).unwrap();
    make(&mut world, asked("b", 96, "")).unwrap();
    make(&mut world, waiting("large", 192, "high")).unwrap();
    pass(&mut world, 2);
    make(&mut world, asked("s1", 32, "")).unwrap();
    world.answer(delete("b", false)).unwrap();
    pass(&mut world, 2);
    make(&mut world, asked("s2", 32, "")).unwrap();
    let (kind, line) = make(&mut world, asked("s3", 16, "")).unwrap_err();
    assert!(kind == ErrorKind::NoSpace && line.contains("held for a request that comes first"), "{line}");
    world.answer(delete("a", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "large"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn a_request_that_waits_for_days_blocks_no_other() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("a", 64, "")).unwrap();
    let days = Create { wait: Some(Span(Duration::from_secs(720 * 3600))), ..asked("all", 128, "") };
    make(&mut world, days).unwrap();
    assert!(make(&mut world, asked("small", 16, "")).unwrap_err().1.contains("held"));
    pass(&mut world, 610);
    make(&mut world, asked("small", 16, "")).unwrap();
    world.answer(delete("a", false)).unwrap();
    world.answer(delete("small", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "all"), Some(AllocationState::Ready), "it is still the first to be served");
    world.check();
}

#[test]
fn a_cancelled_request_does_not_come_back() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("full", 128, "")).unwrap();
    let again = |world: &mut World, id: u128, create: Create| {
        world.answer(Request::CreateAs(RequestId::from_u128(id), create)).map_err(|error| (error.0, error.1))
    };
    let Ok(Outcome::Allocation(first)) = again(&mut world, 1, waiting("x", 64, "")) else { panic!() };
    let Ok(Outcome::Allocation(same)) = again(&mut world, 1, waiting("x", 64, "")) else { panic!() };
    assert_eq!((first.id, same.waiting.unwrap().request), (same.id, Some(RequestId::from_u128(1))));
    assert_eq!(again(&mut world, 2, waiting("x", 64, "")).unwrap_err().0, ErrorKind::Conflict, "another one");
    world.answer(delete("x", false)).unwrap();
    let (kind, line) = again(&mut world, 1, waiting("x", 64, "")).unwrap_err();
    assert!(kind == ErrorKind::Conflict && line.contains("was taken back"), "{line}");
    assert_eq!(state(&mut world, "x"), None);
    again(&mut world, 3, waiting("x", 64, "")).unwrap();
    assert_eq!(state(&mut world, "x"), Some(AllocationState::Waiting), "asked anew");
    world.check();
}

#[test]
fn waiting_requests_of_an_account_are_limited() {
    let text = "[[account]]\nname = 'a'\nwaiting-max = 2\n[[account]]\nname = 'b'\nwaiting-max = 0\n";
    let mut world = world(&[128 * MIB], text);
    make(&mut world, asked("full", 128, "")).unwrap();
    make(&mut world, waiting("a1", 16, "a")).unwrap();
    make(&mut world, waiting("a2", 16, "a")).unwrap();
    let (kind, line) = make(&mut world, waiting("a3", 16, "a")).unwrap_err();
    assert!(kind == ErrorKind::Denied && line.contains("2 requests of account `a` wait already"), "{line}");
    assert!(make(&mut world, waiting("b1", 16, "b")).is_err());
    make(&mut world, waiting("n1", 16, "")).unwrap();
    world.answer(delete("a1", false)).unwrap();
    make(&mut world, waiting("a3", 16, "a")).unwrap();
}

#[test]
fn the_first_orders_wait_for_the_appliances_that_are_known() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("before", 16, Some(2))).unwrap();
    world.crash(false);
    world.answer(create("a", 64, Some(2))).unwrap();
    let made = show(&mut world, "a").unwrap();
    assert_ne!(made.regions[0].appliance, made.regions[1].appliance, "not only the first one that was heard");
    world.check();
}

#[test]
fn the_first_orders_do_not_wait_for_ever() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("before", 32, Some(2))).unwrap();
    world.appliances.values_mut().next().unwrap().away = true;
    world.crash(false);
    // A request that fits on the answering appliances does not wait for a silent one.
    world.answer(create("fits", 16, None)).unwrap();
    let wide = world.ask(create("wide", 64, None));
    world.finish();
    assert!(!world.answers.contains_key(&wide), "it waits for the other one");
    for _ in 0..3 {
        world.pass(INTERVAL);
        world.finish();
    }
    let (kind, line) = match world.answers.remove(&wide).unwrap() {
        Err(error) => (error.0, error.1),
        Ok(made) => panic!("{made:?}"),
    };
    assert!(kind == ErrorKind::NoSpace && line.contains("not heard since the allocator started"), "{line}");
    assert!(line.contains(": a1"), "{line}");
    world.mend();
}

#[test]
fn an_order_that_waits_for_an_appliance_gets_it() {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("before", 32, Some(2))).unwrap();
    let first = *world.appliances.keys().next().unwrap();
    world.appliances.get_mut(&first).unwrap().away = true;
    world.crash(false);
    let wide = world.ask(create("wide", 80, None));
    world.finish();
    world.appliances.get_mut(&first).unwrap().away = false;
    world.pass(INTERVAL);
    world.finish();
    assert!(world.answers.remove(&wide).unwrap().is_ok());
    world.check();
}

#[test]
fn memory_that_was_promised_counts_once() {
    let mut world = World::new(&[256 * MIB]);
    let free = |world: &mut World| match world.answer(Request::Status).unwrap() {
        Outcome::Status(status) => status.free,
        other => panic!("{other:?}"),
    };
    world.answer(create("a", 64, None)).unwrap();
    assert_eq!(free(&mut world), ByteSize(192 * MIB));
    // A heartbeat that includes the promised memory already.
    world.pass(INTERVAL);
    world.finish();
    assert_eq!(free(&mut world), ByteSize(192 * MIB));
    let decide = Request::Decide {
        create: Create {
            region_len: Some(ByteSize(16 * MIB)),
            ..Create::new(name("b"), ByteSize(192 * MIB))
        },
        all: false,
    };
    match world.answer(decide).unwrap() {
        Outcome::Decision(decision) => {
            assert!(matches!(decision.outcome, xpm_protocol::api::decision::DecisionOutcome::Placed { .. }));
        }
        other => panic!("{other:?}"),
    }
    world.check();
}
