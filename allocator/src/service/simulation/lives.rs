//! Two lives of one client, which compete for its allocation.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::appliance::Holder;
use xpm_protocol::{ClientId, InstallationId, Life, MachineId, SeatId};

use super::super::{Outcome, Request};
use super::world::World;
use super::{MIB, attach, create, detach};

/// Longer than the pauses between requests of a living owner.
const SILENCE: Duration = Duration::from_secs(40);

const fn life(machine: u128, seat: u128, number: u64) -> Life {
    Life {
        machine: MachineId::from_u128(machine),
        installation: InstallationId::from_u128(5),
        seat: SeatId::from_u128(seat),
        number,
    }
}

const FIRST: Life = life(1, 1, 3);
const SAME_KERNEL: Life = life(1, 1, 4);
const AFTER_A_REBOOT: Life = life(1, 2, 4);
const COPY: Life = life(9, 9, 4);

/// The result of a request: the epoch of the map, or the kind of refusal.
fn ask(world: &mut World, life: Life, request: Request) -> Result<u64, ErrorKind> {
    match world.answer(Request::As(life, Box::new(request))) {
        Ok(Outcome::Owned(owned)) => Ok(owned.map.epoch.0),
        Ok(_) => Ok(0),
        Err(error) => Err(error.0),
    }
}

fn orders() -> Request {
    Request::Orders { name: "a".parse().unwrap(), client: ClientId::from_u128(1), known: None }
}

fn owned() -> World {
    let mut world = World::new(&[64 * MIB; 2]);
    world.answer(create("a", 64, Some(2))).unwrap();
    assert_eq!(ask(&mut world, FIRST, attach("a", 1, false)), Ok(1));
    world
}

fn connect(world: &mut World, life: Option<Life>) {
    let holder = |life| Holder { life, host_name: "web1".to_owned() };
    world.appliances.values_mut().for_each(|one| one.living = life.into_iter().map(holder).collect());
}

#[test]
fn a_copy_is_refused_while_the_owner_is_heard_or_connected_and_then_fences_it() {
    let mut world = owned();
    assert_eq!(ask(&mut world, COPY, attach("a", 1, false)), Err(ErrorKind::InUse), "it was heard just now");
    assert_eq!(ask(&mut world, COPY, orders()), Err(ErrorKind::Conflict));
    connect(&mut world, Some(FIRST));
    world.pass(SILENCE);
    assert_eq!(ask(&mut world, COPY, attach("a", 1, false)), Err(ErrorKind::InUse), "it is connected");
    assert_eq!(ask(&mut world, FIRST, orders()), Ok(0));
    connect(&mut world, None);
    assert_eq!(ask(&mut world, COPY, attach("a", 1, false)), Err(ErrorKind::InUse), "it was heard again");
    world.pass(SILENCE);
    assert_eq!(ask(&mut world, COPY, attach("a", 1, false)), Ok(2), "the first one has ended: a new epoch");
    assert_eq!(ask(&mut world, FIRST, orders()), Err(ErrorKind::Conflict), "now it is the other one's");
    world.check();
}

#[test]
fn force_fences_the_present_life() {
    let mut world = owned();
    connect(&mut world, Some(FIRST));
    assert_eq!(ask(&mut world, COPY, attach("a", 1, true)), Ok(2));
    assert_eq!(ask(&mut world, COPY, attach("a", 1, true)), Ok(2), "it has it already");
    world.check();
}

#[test]
fn the_next_life_of_a_machine_goes_on_in_the_same_epoch() {
    let mut world = owned();
    connect(&mut world, Some(FIRST));
    assert_eq!(ask(&mut world, SAME_KERNEL, attach("a", 1, false)), Ok(1), "it has the lock");
    assert_eq!(ask(&mut world, FIRST, attach("a", 1, false)), Err(ErrorKind::InUse), "its life is over");
    let mut world = owned();
    connect(&mut world, Some(FIRST));
    assert_eq!(ask(&mut world, AFTER_A_REBOOT, orders()), Err(ErrorKind::Conflict), "first it attaches");
    assert_eq!(
        ask(&mut world, AFTER_A_REBOOT, attach("a", 1, false)),
        Err(ErrorKind::InUse),
        "a copy of all"
    );
    connect(&mut world, None);
    assert_eq!(ask(&mut world, AFTER_A_REBOOT, attach("a", 1, false)), Ok(1));
    assert_eq!(ask(&mut world, AFTER_A_REBOOT, orders()), Ok(0));
    let another = life(1, 3, 4);
    assert_eq!(ask(&mut world, another, attach("a", 1, false)), Err(ErrorKind::InUse), "its number is used");
    world.check();
}

#[test]
fn a_copy_gives_nothing_back() {
    let mut world = owned();
    assert_eq!(ask(&mut world, COPY, detach("a", 1)), Ok(0));
    assert_eq!(ask(&mut world, AFTER_A_REBOOT, detach("a", 1)), Err(ErrorKind::InUse), "it may be a copy");
    assert_eq!(ask(&mut world, FIRST, orders()), Ok(0), "it is still the first one's");
    world.pass(SILENCE);
    assert_eq!(ask(&mut world, AFTER_A_REBOOT, detach("a", 1)), Ok(0));
    assert_eq!(ask(&mut world, FIRST, orders()), Err(ErrorKind::Conflict), "nobody has it");
    world.check();
}

#[test]
fn a_client_without_life_is_identified_by_its_id() {
    let mut world = owned();
    assert!(world.answer(attach("a", 1, false)).is_ok());
    assert_eq!(ask(&mut world, COPY, attach("a", 1, false)), Ok(1), "nothing is known of the one before");
    world.check();
}
