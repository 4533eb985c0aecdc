//! The decision.
//!
//! Growing considers the free space in the daemon's own areas. Shrinking requires a quarter more free space
//! than growing does, and time: so the next step never needs what was just removed.

use xpm_protocol::api::swapd::Origin;
use xpm_protocol::units::ByteSize;

use super::{
    AREA_LEN_MIN, AREAS_MAX, Action, Area, Cause, Decision, Phase, Reading, Rules, Standing, Wish, fits,
};

/// The additional free space that shrinking requires, as a fraction (1/4) of what growing requires.
const EASE: u64 = 4;

/// Decides the next action. One at a time: an area is made only while none is being made, and removed only
/// while none is being removed.
pub fn decide(rules: &Rules, standing: &Standing, reading: &Reading) -> Decision {
    if standing.rests {
        return rest(rules, standing, reading);
    }
    let mut reasons = Vec::new();
    let mut most = Wish::None;
    for step in [lost, ending, base, grow, shrink] {
        match step(rules, standing, reading) {
            Verdict::Do(action, reason) => return Decision { action, reason, wish: most },
            Verdict::Not(wish, reason) => {
                most = most.max(wish);
                reasons.push(reason);
            }
            Verdict::Nothing => {}
        }
    }
    let reason = match reasons.is_empty() {
        true => "there is enough, and not too much".to_owned(),
        false => reasons.join("; "),
    };
    Decision { action: Action::Hold, reason, wish: most }
}

/// While the policy rests, only areas are removed that would be lost otherwise.
fn rest(rules: &Rules, standing: &Standing, reading: &Reading) -> Decision {
    for step in [lost, ending] {
        if let Verdict::Do(action @ Action::Drain { .. }, reason) = step(rules, standing, reading) {
            return Decision { action, reason, wish: Wish::None };
        }
    }
    Decision { action: Action::Hold, reason: "the policy rests".to_owned(), wish: Wish::None }
}

/// Stores the parts of a reading and a decision that later decisions need.
pub fn observe(rules: &Rules, standing: &mut Standing, reading: &Reading, action: &Action) {
    let wanted = reading.pressed || wants(rules, standing, reading).is_some();
    if wanted || *action != Action::Hold || standing.making || standing.leaving().is_some() {
        standing.calm_since = reading.now;
    }
    if matches!(action, Action::Drain { cause: Cause::Calm, .. }) {
        standing.next_step = rules.step;
    }
    if reading.now.saturating_sub(standing.calm_since) >= rules.shrink_after {
        standing.next_step = rules.step;
    }
}

/// The step after one of this size, in bytes. The caller uses it when that step's area is on, not when it was
/// refused.
pub fn step_after(rules: &Rules, size: u64) -> u64 {
    size.saturating_mul(2).clamp(rules.step, rules.step_max)
}

enum Verdict {
    Do(Action, String),
    /// The action is wanted but not possible now.
    Not(Wish, String),
    Nothing,
}

fn drain(area: &Area, cause: Cause, reason: String) -> Verdict {
    Verdict::Do(Action::Drain { name: area.name.clone(), cause }, reason)
}

/// An area whose memory is lost is removed, because data written to it would be lost.
fn lost(_: &Rules, standing: &Standing, reading: &Reading) -> Verdict {
    let area = standing.areas.iter().find(|area| area.lost && area.phase == Phase::On);
    match area {
        Some(area) if standing.leaving().is_none() && reading.now >= standing.drain_not_before => {
            drain(area, Cause::Lost, format!("the memory of {} is gone", area.name))
        }
        Some(_) | None => Verdict::Nothing,
    }
}

/// An area whose allocation is going to end is removed in time, after room was made if that is needed.
fn ending(rules: &Rules, standing: &Standing, reading: &Reading) -> Verdict {
    let area = standing.areas.iter().find(|area| area.ending && area.phase == Phase::On);
    let Some(area) = area else { return Verdict::Nothing };
    match (fits(rules, standing, reading, area), standing.leaving()) {
        (Ok(()), None) if reading.now >= standing.drain_not_before => {
            drain(area, Cause::Ending, format!("the allocation of {} is going to end", area.name))
        }
        (Ok(()), _) => Verdict::Nothing,
        (Err(why), _) => {
            let reason = format!("the allocation of {} is going to end: {why}", area.name);
            make(rules, standing, reading, area.used, Origin::Step, reason)
        }
    }
}

fn base(rules: &Rules, standing: &Standing, reading: &Reading) -> Verdict {
    let missing = rules.base.saturating_sub(standing.lasting_size());
    match missing < AREA_LEN_MIN {
        true => Verdict::Nothing,
        false => {
            let reason = format!("{} of the base are missing", ByteSize(missing));
            make(rules, standing, reading, missing, Origin::Base, reason)
        }
    }
}

fn grow(rules: &Rules, standing: &Standing, reading: &Reading) -> Verdict {
    let Some(reason) = wants(rules, standing, reading) else { return Verdict::Nothing };
    if let Some((area, Cause::Calm)) = standing.leaving() {
        return Verdict::Do(
            Action::Stay { name: area.name.clone() },
            format!("{reason}: {} stays", area.name),
        );
    }
    let step = standing.next_step.clamp(rules.step, rules.step_max);
    match make(rules, standing, reading, step, Origin::Step, reason) {
        // There is still some free swap: only the decision shows that pressure asks for more than the
        // operator allows.
        Verdict::Not(Wish::Forbidden, reason) if !runs_low(rules, standing) => {
            Verdict::Not(Wish::None, reason)
        }
        verdict => verdict,
    }
}

fn runs_low(rules: &Rules, standing: &Standing) -> bool {
    standing.free() < rules.free_below.of(standing.lasting_size())
}

/// The reason for wanting more swap, if there is one.
fn wants(rules: &Rules, standing: &Standing, reading: &Reading) -> Option<String> {
    let (free, size) = (standing.free(), standing.lasting_size());
    let not_on: u64 =
        standing.lasting().filter(|area| area.phase == Phase::NotOn).map(|area| area.size).sum();
    // Areas that are being made count as free: they will be on in a moment, or there is a trouble, which is
    // shown.
    let free = free + not_on;
    let below = rules.free_below.of(size);
    if free < below {
        return Some(format!(
            "{} of {} are free, less than {}",
            ByteSize(free),
            ByteSize(size),
            ByteSize(below)
        ));
    }
    let below = rules.pressure_free_below.of(size);
    let short = free < below || size == 0;
    (reading.pressed && short).then(|| {
        format!(
            "tasks wait for memory, and {} of {} are free, less than {}",
            ByteSize(free),
            ByteSize(size),
            ByteSize(below)
        )
    })
}

/// Makes an area of `size`, or of the rest that the maximum allows.
fn make(
    rules: &Rules,
    standing: &Standing,
    reading: &Reading,
    size: u64,
    origin: Origin,
    reason: String,
) -> Verdict {
    if standing.making {
        return Verdict::Not(Wish::Later, format!("{reason}; an area is being made"));
    }
    let room = rules.maximum.saturating_sub(standing.size());
    if room < AREA_LEN_MIN {
        let reason = format!("{reason}; the maximum of {} is there", ByteSize(rules.maximum));
        return Verdict::Not(Wish::Forbidden, reason);
    }
    if standing.areas.len() >= AREAS_MAX {
        let reason = format!("{reason}; there are {AREAS_MAX} areas, the most: enlarge `grow.step`");
        return Verdict::Not(Wish::Forbidden, reason);
    }
    if reading.now < standing.make_not_before {
        return Verdict::Not(Wish::Later, format!("{reason}; it was refused, and is tried again later"));
    }
    let size = size.next_multiple_of(AREA_LEN_MIN).min(room / AREA_LEN_MIN * AREA_LEN_MIN);
    Verdict::Do(Action::Make { size, origin }, reason)
}

fn shrink(rules: &Rules, standing: &Standing, reading: &Reading) -> Verdict {
    let calm = reading.now.saturating_sub(standing.calm_since) >= rules.shrink_after;
    let busy = standing.making || standing.leaving().is_some();
    if !calm || busy || reading.pressed || reading.now < standing.drain_not_before {
        return Verdict::Nothing;
    }
    let steps = standing.lasting().filter(|area| area.phase == Phase::On && area.origin == Origin::Step);
    let spare = steps.filter(|area| can_spare(rules, standing, reading, area));
    match spare.min_by_key(|area| (area.used, std::cmp::Reverse(area.size))) {
        Some(area) => drain(area, Cause::Calm, format!("it is calm, and {} is not needed", area.name)),
        None => Verdict::Nothing,
    }
}

/// Whether the base and enough free space are left without the area.
fn can_spare(rules: &Rules, standing: &Standing, reading: &Reading, area: &Area) -> bool {
    let size = standing.lasting_size() - area.size;
    let free = standing.free().saturating_sub(area.free());
    let below = rules.free_below.of(size);
    let needed = (below + below / EASE).max(rules.pressure_free_below.of(size));
    let enough = match size {
        // The last area is removed only when none of it is needed: growing must then require no free space.
        0 => rules.free_below.of(0) == 0,
        _ => free >= area.used && free - area.used >= needed,
    };
    size >= rules.base && enough && fits(rules, standing, reading, area).is_ok()
}
