//! Single decisions, and a simulated machine under any load.

use std::time::Duration;

use proptest::prelude::*;
use xpm_protocol::api::swapd::Origin;

use super::*;

const MIB: u64 = 1 << 20;

fn rules() -> Rules {
    Rules {
        base: 64 * MIB,
        maximum: 1024 * MIB,
        free_below: "25%".parse().unwrap(),
        pressure_free_below: "50%".parse().unwrap(),
        step: 64 * MIB,
        step_max: 256 * MIB,
        shrink_after: Duration::from_secs(30),
        margin: "10%".parse().unwrap(),
    }
}

fn area(number: u32, size: u64, used: u64, origin: Origin) -> Area {
    Area {
        name: format!("swap-h-{number}").parse().unwrap(),
        size: size * MIB,
        used: used * MIB,
        origin,
        phase: Phase::On,
        ending: false,
        lost: false,
    }
}

fn standing(areas: Vec<Area>) -> Standing {
    Standing { areas, ..Standing::default() }
}

fn at(seconds: u64) -> Reading {
    Reading {
        now: Duration::from_secs(seconds),
        memory: 512 * MIB,
        available: 256 * MIB,
        ..Reading::default()
    }
}

fn made(standing: &Standing, reading: &Reading) -> Option<u64> {
    match decide(&rules(), standing, reading).action {
        Action::Make { size, .. } => Some(size / MIB),
        _ => None,
    }
}

#[test]
fn the_base_exists_at_once() {
    assert_eq!(made(&standing(vec![]), &at(0)), Some(64));
    assert_eq!(made(&standing(vec![area(1, 64, 0, Origin::Base)]), &at(0)), None);
    let refused = Standing { make_not_before: Duration::from_secs(5), ..standing(vec![]) };
    assert_eq!(made(&refused, &at(4)), None);
    assert_eq!(made(&refused, &at(5)), Some(64));
}

#[test]
fn it_grows_when_little_is_free_and_earlier_under_pressure() {
    let little = standing(vec![area(1, 64, 50, Origin::Base)]);
    assert_eq!(made(&little, &at(1)), Some(64));
    let half = standing(vec![area(1, 64, 40, Origin::Base)]);
    assert_eq!(made(&half, &at(1)), None);
    assert_eq!(made(&half, &Reading { pressed: true, ..at(1) }), Some(64));
    let plenty = standing(vec![area(1, 64, 10, Origin::Base)]);
    assert_eq!(made(&plenty, &Reading { pressed: true, ..at(1) }), None, "more swap would not help");
}

#[test]
fn steps_double_up_to_the_largest_and_the_maximum() {
    let mut standing = standing(vec![area(1, 64, 60, Origin::Base)]);
    let mut sizes = Vec::new();
    for number in 2..8 {
        let decision = decide(&rules(), &standing, &at(1));
        let Action::Make { size, .. } = decision.action else { break };
        observe(&rules(), &mut standing, &at(1), &decision.action);
        assert_eq!(
            decide(&rules(), &standing, &at(1)),
            decision,
            "a step that was refused is not larger next"
        );
        standing.next_step = step_after(&rules(), size);
        sizes.push(size / MIB);
        standing.areas.push(area(number, size / MIB, size / MIB, Origin::Step));
    }
    assert_eq!(sizes, [64, 128, 256, 256, 256]);
    let decision = decide(&rules(), &standing, &at(1));
    assert_eq!(decision.action, Action::Hold);
    assert_eq!(decision.wish, Wish::Forbidden);
    assert!(decision.reason.contains("maximum of 1GiB"), "{}", decision.reason);
}

#[test]
fn the_maximum_is_a_trouble_when_swap_runs_low_but_not_for_pressure_alone() {
    let pressed = Reading { pressed: true, ..at(1) };
    for (used, wish) in [(600, Wish::None), (900, Wish::Forbidden)] {
        let full = standing(vec![area(1, 1024, used, Origin::Base)]);
        assert_eq!(decide(&rules(), &full, &pressed).wish, wish, "{used}");
    }
}

#[test]
fn it_shrinks_by_the_emptiest_after_calm_when_that_fits() {
    let areas =
        vec![area(1, 64, 0, Origin::Base), area(2, 64, 30, Origin::Step), area(3, 128, 5, Origin::Step)];
    let calm = standing(areas);
    assert_eq!(decide(&rules(), &calm, &at(29)).action, Action::Hold);
    let drained = |decision: Decision| match decision.action {
        Action::Drain { name, cause: Cause::Calm } => name.to_string(),
        other => panic!("{other:?}: {}", decision.reason),
    };
    // Without the third area, 35 of 128 are used: more than half is free. The same holds without the second.
    assert_eq!(drained(decide(&rules(), &calm, &at(30))), "swap-h-3");
    let full = Reading { available: 0, ..at(30) };
    assert_eq!(drained(decide(&rules(), &calm, &full)), "swap-h-3", "there is room in other areas");
    let mut busy = calm.clone();
    busy.areas[0].used = 60 * MIB;
    busy.areas[1].used = 60 * MIB;
    assert_eq!(decide(&rules(), &busy, &at(30)).action, Action::Hold);
}

#[test]
fn areas_made_by_hand_and_the_base_stay() {
    let areas = vec![area(1, 64, 0, Origin::Base), area(2, 64, 0, Origin::Hand)];
    assert_eq!(decide(&rules(), &standing(areas), &at(100)).action, Action::Hold);
}

#[test]
fn shrinking_is_cancelled_when_more_is_wanted() {
    let mut areas = vec![area(1, 64, 60, Origin::Base), area(2, 64, 20, Origin::Step)];
    areas[1].phase = Phase::Leaving(Cause::Calm);
    let decision = decide(&rules(), &standing(areas.clone()), &at(1));
    assert!(matches!(decision.action, Action::Stay { .. }), "{decision:?}");
    areas[1].phase = Phase::Leaving(Cause::Hand);
    let decision = decide(&rules(), &standing(areas), &at(1));
    assert!(matches!(decision.action, Action::Make { .. }), "{decision:?}");
}

#[test]
fn an_area_that_is_going_to_end_is_removed_in_time() {
    let mut areas = vec![area(1, 64, 60, Origin::Base), area(2, 128, 10, Origin::Step)];
    areas[0].ending = true;
    let decision = decide(&rules(), &standing(areas.clone()), &at(1));
    assert!(matches!(decision.action, Action::Drain { cause: Cause::Ending, .. }), "{decision:?}");
    areas[1].used = 128 * MIB;
    let full = Reading { available: 0, ..at(1) };
    let decision = decide(&rules(), &standing(areas), &full);
    assert!(matches!(decision.action, Action::Make { size, .. } if size >= 60 * MIB), "{decision:?}");
}

#[test]
fn an_area_whose_memory_is_lost_is_removed_at_once() {
    let mut areas = vec![area(1, 64, 60, Origin::Base)];
    areas[0].lost = true;
    let decision = decide(&rules(), &standing(areas), &Reading { available: 0, ..at(0) });
    assert!(matches!(decision.action, Action::Drain { cause: Cause::Lost, .. }), "{decision:?}");
}

#[test]
fn a_resting_policy_takes_no_action() {
    let rests = Standing { rests: true, ..standing(vec![]) };
    assert_eq!(decide(&rules(), &rests, &at(100)).action, Action::Hold);
    // Except for areas that would be lost.
    let mut areas = vec![area(1, 64, 10, Origin::Base)];
    areas[0].ending = true;
    let rests = Standing { rests: true, ..standing(areas) };
    assert!(matches!(decide(&rules(), &rests, &at(100)).action, Action::Drain { .. }));
    let full = Reading { available: 0, ..at(100) };
    assert_eq!(decide(&rules(), &rests, &full).action, Action::Hold, "nothing is made");
}

/// A simulated machine: a load that wants memory, areas that fill in order, and the daemon's actions,
/// executed at once or after some checks.
struct Machine {
    rules: Rules,
    standing: Standing,
    memory: u64,
    now: u64,
    made: u32,
    job: Option<(u64, Action)>,
    last_make: Option<u64>,
}

impl Machine {
    fn new(rules: Rules) -> Machine {
        let standing = Standing::default();
        Machine { rules, standing, memory: 512 * MIB, now: 0, made: 0, job: None, last_make: None }
    }

    /// One check with a load of `wanted` bytes; returns the decided action.
    fn look(&mut self, wanted: u64, delay: u64) -> Action {
        self.now += 1;
        self.finish();
        let swapped = wanted.saturating_sub(self.memory);
        let mut left = swapped;
        for area in &mut self.standing.areas {
            area.used = if area.phase == Phase::NotOn { 0 } else { left.min(area.size) };
            left -= area.used;
        }
        let reading = Reading {
            now: Duration::from_secs(self.now),
            memory: self.memory,
            available: self.memory.saturating_sub(wanted),
            pressed: left > 0,
            ..Reading::default()
        };
        let action = decide(&self.rules, &self.standing, &reading).action;
        self.check(&reading, &action);
        observe(&self.rules, &mut self.standing, &reading, &action);
        self.begin(&action, delay);
        action
    }

    fn check(&self, reading: &Reading, action: &Action) {
        match action {
            Action::Make { size, .. } => {
                assert!(*size >= AREA_LEN_MIN);
                assert!(self.standing.size() + size <= self.rules.maximum, "beyond the maximum");
            }
            Action::Drain { name, cause: Cause::Calm } => {
                let area = self.standing.areas.iter().find(|area| area.name == *name).unwrap();
                fits(&self.rules, &self.standing, reading, area).unwrap();
                assert!(self.standing.lasting_size() - area.size >= self.rules.base, "below the base");
                let since = self.last_make.map(|made| self.now - made);
                assert!(since.is_none_or(|since| since >= self.rules.shrink_after.as_secs()), "flaps");
            }
            Action::Drain { .. } | Action::Stay { .. } | Action::Hold => {}
        }
    }

    fn begin(&mut self, action: &Action, delay: u64) {
        match action {
            Action::Make { size, origin } => {
                self.made += 1;
                self.standing.making = true;
                self.last_make = Some(self.now);
                self.standing.areas.push(Area {
                    phase: Phase::NotOn,
                    size: *size,
                    ..area(self.made, 0, 0, *origin)
                });
            }
            Action::Drain { name, cause } => {
                let area = self.standing.areas.iter_mut().find(|area| area.name == *name).unwrap();
                area.phase = Phase::Leaving(*cause);
            }
            Action::Stay { name } => {
                let area = self.standing.areas.iter_mut().find(|area| area.name == *name).unwrap();
                area.phase = Phase::On;
                self.job = None;
                return;
            }
            Action::Hold => return,
        }
        self.job = Some((self.now + delay, action.clone()));
    }

    fn finish(&mut self) {
        let Some((_, action)) = self.job.take_if(|(due, _)| *due <= self.now) else { return };
        match action {
            Action::Make { size, origin } => {
                self.standing.making = false;
                if origin == Origin::Step {
                    self.standing.next_step = step_after(&self.rules, size);
                }
                self.standing.areas.iter_mut().for_each(|area| {
                    if area.phase == Phase::NotOn {
                        area.phase = Phase::On;
                    }
                });
            }
            Action::Drain { name, .. } => self.standing.areas.retain(|area| area.name != name),
            Action::Stay { .. } | Action::Hold => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Under any load: the maximum is kept, no area is removed whose content does not fit or that was just
    /// made; and when the load stays constant, the actions cease after a while.
    #[test]
    fn it_follows_any_load_and_comes_to_rest(
        base in 0_u64..5,
        maximum in 5_u64..40,
        step in 1_u64..5,
        loads in prop::collection::vec((0_u64..3000, 1_u64..60), 1..12),
        delay in 1_u64..5,
    ) {
        let rules = Rules {
            base: base * AREA_LEN_MIN,
            maximum: maximum * AREA_LEN_MIN,
            step: step * AREA_LEN_MIN,
            step_max: 4 * step * AREA_LEN_MIN,
            ..rules()
        };
        let mut machine = Machine::new(rules);
        for &(mib, seconds) in &loads {
            for _ in 0..seconds {
                machine.look(mib * MIB, delay);
            }
        }
        let last = loads.last().unwrap().0 * MIB;
        for _ in 0..3000 {
            machine.look(last, delay);
        }
        for _ in 0..200 {
            prop_assert_eq!(machine.look(last, delay), Action::Hold);
        }
    }

    /// While the pool grants and the maximum allows, there is room for the swapped-out pages, with some to
    /// spare.
    #[test]
    fn there_is_room_for_the_wanted_swap(mib in 0_u64..2000) {
        let rules = Rules { maximum: 8192 * MIB, ..rules() };
        let mut machine = Machine::new(rules);
        for _ in 0..200 {
            machine.look(mib * MIB, 1);
        }
        let swapped = (mib * MIB).saturating_sub(machine.memory);
        prop_assert!(machine.standing.free() * 4 >= machine.standing.size());
        prop_assert!(machine.standing.size() >= swapped);
    }
}
