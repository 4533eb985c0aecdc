//! Two appliances with one id.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Heartbeat;
use xpm_protocol::{InstallationId, Life, MachineId, SeatId};

use super::super::Request;
use super::world::World;
use super::{INTERVAL, MIB};

fn life(machine: u128, seat: u128, number: u64) -> Option<Life> {
    let (machine, installation) = (MachineId::from_u128(machine), InstallationId::from_u128(5));
    Some(Life { machine, installation, seat: SeatId::from_u128(seat), number })
}

/// A heartbeat of the only appliance, in this life and with this control port.
fn beat(world: &World, life: Option<Life>, port: u16) -> Heartbeat {
    let mut beat = world.appliances.values().next().unwrap().heartbeat();
    (beat.info.life, beat.info.control) = (life, format!("http://10.0.0.1:{port}"));
    beat
}

fn hear(world: &mut World, life: Option<Life>, port: u16) -> Result<(), ErrorKind> {
    let beat = beat(world, life, port);
    world.answer(Request::Heartbeat(Box::new(beat))).map(drop).map_err(|error| error.0)
}

/// A pool whose appliance sends heartbeats only when a test does it.
fn world() -> World {
    let mut world = World::new(&[64 * MIB]);
    world.appliances.values_mut().for_each(|one| one.away = true);
    world
}

#[test]
fn another_life_is_taken_when_the_one_before_is_silent() {
    let mut world = world();
    assert_eq!(hear(&mut world, life(1, 1, 3), 1), Ok(()), "the one of before there were lives follows it");
    assert_eq!(hear(&mut world, life(1, 1, 4), 1), Ok(()), "it has the lock");
    assert_eq!(hear(&mut world, life(1, 1, 3), 1), Ok(()), "its port shows that the other one has ended");
    assert_eq!(hear(&mut world, life(1, 1, 4), 1), Ok(()));
    for (copy, what) in [
        (life(9, 9, 5), "another machine"),
        (life(1, 2, 5), "another kernel"),
        (life(1, 2, 4), "a used number"),
        (life(1, 1, 3), "a past life"),
        (None, "a version of before there were lives"),
    ] {
        assert_eq!(hear(&mut world, copy, 2), Err(ErrorKind::Conflict), "{what}");
    }
    world.pass(INTERVAL * 4);
    assert_eq!(hear(&mut world, life(9, 9, 5), 2), Ok(()));
    assert_eq!(hear(&mut world, life(1, 1, 4), 1), Err(ErrorKind::Conflict), "now it is the other one");
    world.check();
}

#[test]
fn after_a_start_a_copy_that_is_heard_first_waits() {
    let mut world = world();
    assert_eq!(hear(&mut world, life(1, 1, 3), 1), Ok(()));
    world.crash(false);
    assert_eq!(hear(&mut world, life(9, 9, 4), 2), Err(ErrorKind::Conflict), "the first one may be there");
    assert_eq!(hear(&mut world, life(1, 1, 3), 1), Ok(()));
    world.crash(false);
    world.pass(INTERVAL * 3 + Duration::from_secs(1));
    assert_eq!(hear(&mut world, life(9, 9, 4), 2), Ok(()), "it was not heard since the start");
}
