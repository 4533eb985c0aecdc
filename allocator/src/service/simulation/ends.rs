//! Time that does not count against ends of allocations: one test for each story.

use std::time::Duration;

use xpm_protocol::api::allocator::{AllocationState, EndReason};

use super::attach;
use super::policies::{asked, kinds, make, pass, show, state, world};
use super::world::World;
use super::{MIB, TTL};

const LEASE: &str =
    "[[account]]\nname = 'a'\nlease = { duration = '100s', warning = '20s', grace = '30s' }\n";
const DAY: i64 = 86_400;

fn leased() -> World {
    let mut world = world(&[128 * MIB], LEASE);
    make(&mut world, asked("x", 16, "a")).unwrap();
    world.answer(attach("x", 1, false)).unwrap();
    world
}

fn told(world: &mut World, kind: &str) -> usize {
    kinds(world).iter().filter(|one| one.starts_with(&format!("{kind} "))).count()
}

fn ends(world: &mut World, of: &str) -> u64 {
    show(world, of).unwrap().lease.unwrap().ends
}

/// Restarts the allocator two days later.
fn begin_anew_after_two_days(world: &mut World) {
    world.now += Duration::from_secs(2 * DAY.unsigned_abs());
    world.crash(false);
    world.finish();
    world.pass(Duration::ZERO);
    world.finish();
}

#[test]
fn a_jump_of_three_seconds_changes_nothing() {
    for ahead in [DAY, -DAY, 110, 30 * DAY] {
        let mut world = leased();
        pass(&mut world, 20);
        begin_anew_after_two_days(&mut world);
        let before = ends(&mut world, "x");
        world.clock_ahead = ahead;
        pass(&mut world, 3);
        world.clock_ahead = 0;
        pass(&mut world, 20);
        assert_eq!(ends(&mut world, "x"), before);
        assert_eq!((told(&mut world, "clock-jumped"), told(&mut world, "clock-back")), (1, 1));
        assert_eq!(told(&mut world, "lease-warning"), 0);
        world.check();
    }
}

#[test]
fn a_clock_that_is_set_takes_leases_with_it() {
    for ahead in [DAY, -DAY] {
        let mut world = leased();
        begin_anew_after_two_days(&mut world);
        let before = ends(&mut world, "x");
        world.clock_ahead = ahead;
        pass(&mut world, 20);
        assert_eq!(ends(&mut world, "x"), before.saturating_add_signed(ahead));
        // Events survive a restart, and each process announces once more what was announced before it.
        let told_before = told(&mut world, "lease-ended");
        world.crash(false);
        world.finish();
        pass(&mut world, 10);
        let after = ends(&mut world, "x");
        assert!(
            after.abs_diff(before.saturating_add_signed(ahead)) <= 12,
            "a restart moves it by its own time"
        );
        pass(&mut world, 130);
        assert_eq!(told(&mut world, "lease-ended") - told_before, 1, "and it does end");
        pass(&mut world, 60);
        assert_eq!(state(&mut world, "x"), None);
        world.check();
    }
}

#[test]
fn an_unreachable_owner_gets_its_time() {
    let mut world = leased();
    pass(&mut world, 82);
    assert_eq!(told(&mut world, "lease-warning"), 1);
    world.appliances.values_mut().for_each(|one| one.away = true);
    pass(&mut world, 1000);
    assert_eq!(state(&mut world, "x"), Some(AllocationState::Ready));
    assert_eq!(told(&mut world, "lease-ended"), 0, "nobody hears it");
    world.appliances.values_mut().for_each(|one| one.away = false);
    pass(&mut world, 5);
    assert_eq!(told(&mut world, "lease-moved"), 1);
    assert_eq!(told(&mut world, "freed"), 0);
    pass(&mut world, 200);
    assert_eq!((told(&mut world, "lease-ended"), state(&mut world, "x")), (1, None));
    world.mend();
    world.check();
}

#[test]
fn hours_that_ended_while_the_allocator_was_away_are_announced_first() {
    let text = "
[[account]]
name = 'night'
hours = [{ from = '00:00', to = '00:10' }]
at-close = 'end'
lease = { duration = '2h', warning = '60s', grace = '60s' }
";
    let mut world = world(&[128 * MIB], text);
    make(&mut world, asked("n", 16, "night")).unwrap();
    world.answer(attach("n", 1, false)).unwrap();
    pass(&mut world, 30);
    world.now = Duration::from_secs(7200);
    world.crash(false);
    world.finish();
    pass(&mut world, 5);
    let ending = show(&mut world, "n").unwrap().ending.unwrap();
    assert_eq!(ending.reason, EndReason::Hours);
    assert!(ending.frees >= 7200 + 120, "the whole warning and the whole grace: {ending:?}");
    pass(&mut world, 50);
    assert_eq!((told(&mut world, "hours-warning"), told(&mut world, "hours-ended")), (1, 0));
    pass(&mut world, 50);
    assert_eq!((told(&mut world, "hours-ended"), told(&mut world, "freed")), (1, 0));
    pass(&mut world, 60);
    assert_eq!(state(&mut world, "n"), None);
    world.mend();
    world.check();
}

#[test]
fn an_announced_end_is_not_hurried_by_a_restart() {
    let mut world = leased();
    pass(&mut world, 125);
    assert_eq!(told(&mut world, "lease-ended"), 1);
    let frees = show(&mut world, "x").unwrap().lease.unwrap().frees;
    world.now += TTL * 10;
    world.crash(false);
    world.finish();
    assert_eq!(told(&mut world, "lease-moved"), 1, "by the absence: what a start tells is kept");
    // The appliances answered the new process's question; that does not show that they can reach the allocator.
    world.appliances.values_mut().for_each(|one| one.away = true);
    pass(&mut world, 30);
    assert_eq!(state(&mut world, "x"), Some(AllocationState::Ready), "nobody was heard yet");
    world.appliances.values_mut().for_each(|one| one.away = false);
    pass(&mut world, 6);
    let moved = show(&mut world, "x").unwrap().lease.unwrap().frees;
    assert!(moved >= frees + 600 + 25, "{moved} and {frees}");
    pass(&mut world, 60);
    assert_eq!(state(&mut world, "x"), None);
    world.mend();
    world.check();
}
