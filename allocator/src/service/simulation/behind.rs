//! Outdated metadata, and metadata that cannot be written: one test for each story.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{AllocationState, MetadataState};
use xpm_protocol::{ClientId, Name};

use super::super::{Event, Request};
use super::policies::{asked, kinds, make, pass, show, state};
use super::world::World;
use super::{MIB, attach, create, delete};
use crate::store::MetadataStore as _;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn outdated_metadata_judge_and_change_nothing() {
    let mut world = World::new(&[256 * MIB; 2]);
    world.answer(create("a", 32, None)).unwrap();
    world.answer(attach("a", 1, false)).unwrap();
    // Half made in the snapshot: undoing it would free memory that is in use since.
    world.ask(create("half", 32, None));
    world.step(0, super::world::Fate::Works);
    let yesterday = world.durable.clone();
    world.finish();
    world.answer(create("b", 32, None)).unwrap();
    world.answer(delete("b", false)).unwrap();
    let resize = xpm_protocol::api::allocator::Resize { size: xpm_protocol::ByteSize(64 * MIB) };
    world.answer(Request::Resize { name: name("half"), resize }).unwrap();
    pass(&mut world, 30);
    let before: Vec<usize> = world.appliances.values().map(|one| one.grants.len()).collect();
    let today = std::mem::replace(&mut world.durable, yesterday);
    world.crash(false);
    world.finish();
    pass(&mut world, 2000);
    let behind = world.behind().expect("it is noticed");
    assert!(behind.text.contains("recover --from-network"), "{}", behind.text);
    assert!(kinds(&mut world).contains(&"metadata-behind allocator".to_owned()));
    for kind in ["lost", "garbage-found", "garbage-freed", "freed"] {
        assert!(!kinds(&mut world).iter().any(|one| one.starts_with(kind)), "{kind}");
    }
    let requests = [
        Request::Allocation(name("a")),
        Request::Orders { name: name("a"), client: ClientId::from_u128(1), known: None },
        create("c", 16, None),
        delete("a", true),
        attach("a", 1, false),
    ];
    for request in requests {
        assert_eq!(world.answer(request).unwrap_err().0, ErrorKind::Unavailable);
    }
    let after: Vec<usize> = world.appliances.values().map(|one| one.grants.len()).collect();
    assert_eq!(before, after, "no appliance was told anything");
    // With the present metadata all is as it was.
    world.durable = today;
    world.crash(false);
    world.mend();
    assert_eq!(state(&mut world, "half"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn an_owner_can_report_the_newer_state() {
    let mut world = World::new(&[256 * MIB]);
    world.answer(create("a", 32, None)).unwrap();
    world.answer(attach("a", 1, false)).unwrap();
    let ours = world.durable.load().unwrap().state.unwrap();
    let orders =
        |known| Request::Orders { name: name("a"), client: ClientId::from_u128(1), known: Some(known) };
    world.answer(orders(ours)).unwrap();
    let other_pool = xpm_protocol::PoolId::from_u128(99);
    world.answer(orders(MetadataState { pool: other_pool, number: 1 << 40 })).unwrap();
    assert_eq!(world.behind(), None);
    let refused = world.answer(orders(MetadataState { number: ours.number + 1, ..ours })).unwrap_err();
    assert_eq!(refused.0, ErrorKind::Unavailable);
    assert!(world.behind().unwrap().who.starts_with("client "));
}

#[test]
fn without_room_to_write_it_answers_and_later_goes_on() {
    let mut world = World::new(&[256 * MIB]);
    make(&mut world, asked("a", 32, "")).unwrap();
    world.event(Event::Writing(Some("the disk is full".to_owned())));
    world.finish();
    let (kind, line) = make(&mut world, asked("b", 32, "")).unwrap_err();
    assert_eq!((kind, line.as_str()), (ErrorKind::Unavailable, "the disk is full"));
    assert_eq!(show(&mut world, "a").unwrap().state, AllocationState::Ready);
    pass(&mut world, 100);
    assert!(world.pending.is_empty(), "nothing is to be written");
    world.event(Event::Writing(None));
    world.now += Duration::from_secs(1);
    make(&mut world, asked("b", 32, "")).unwrap();
    let kinds = kinds(&mut world);
    for kind in ["metadata-read-only allocator", "metadata-writable allocator"] {
        assert!(kinds.contains(&kind.to_owned()), "{kinds:?}");
    }
    world.check();
}
