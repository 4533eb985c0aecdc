//! Decides the next action on the machine's swap: a pure function of the rules, of the present areas, and of
//! the readings.
//!
//! * [`Rules`]: the operator's settings.
//! * [`Standing`]: the present areas, and the state between two decisions.
//! * [`Reading`]: the present state of the machine.
//! * [`decide`]: the decision, with its reason.

mod decide;
#[cfg(test)]
mod tests;

use std::time::Duration;

use xpm_protocol::policy::Amount;
use xpm_protocol::units::{ByteSize, REGION_LEN_MIN};
use xpm_protocol::{Name, api::swapd::Origin};

pub use decide::{decide, observe, step_after};

/// Smallest area in bytes: the smallest region.
pub const AREA_LEN_MIN: u64 = REGION_LEN_MIN;
/// Most areas at once. The kernel supports about 23 to 29 swap areas (`MAX_SWAPFILES` in
/// include/linux/swap.h, depending on its configuration), of which some are left to others.
pub const AREAS_MAX: usize = 16;

/// The operator's settings. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Swap that exists from the start.
    pub base: u64,
    /// Upper limit of swap.
    pub maximum: u64,
    /// Grow when less than this is free.
    pub free_below: Amount,
    /// Grow under pressure when less than this is free.
    pub pressure_free_below: Amount,
    /// The first step.
    pub step: u64,
    /// The largest step.
    pub step_max: u64,
    /// Shrink after memory was calm for this long.
    pub shrink_after: Duration,
    /// Memory that has to stay available when swapped-out pages come back.
    pub margin: Amount,
}

/// The present areas, and the state between two decisions. Times are durations since the daemon started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// The areas.
    pub areas: Vec<Area>,
    /// The next step, in bytes; 0: the first one.
    pub next_step: u64,
    /// Start of the calm: since then no more swap was wanted, and no area changed.
    pub calm_since: Duration,
    /// Whether the policy rests, so that it takes no action by itself.
    pub rests: bool,
    /// Whether an area is being made.
    pub making: bool,
    /// No area is made before this time.
    pub make_not_before: Duration,
    /// No area is removed before this time.
    pub drain_not_before: Duration,
}

/// Swap on one allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size: u64,
    /// Used bytes.
    pub used: u64,
    /// Why it was made.
    pub origin: Origin,
    /// Its phase.
    pub phase: Phase,
    /// Whether its allocation is going to end.
    pub ending: bool,
    /// Whether its memory is lost.
    pub lost: bool,
}

/// The phase of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is not on: it is being made, or others turned it off.
    NotOn,
    /// It is on.
    On,
    /// It is being removed, for this cause.
    Leaving(Cause),
    /// It is off, and its allocation has to be given back.
    Gone,
}

/// Why an area is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is not needed.
    Calm,
    /// Its allocation is going to end.
    Ending,
    /// Its memory is lost.
    Lost,
    /// An operator requested it.
    Hand,
}

/// The present state of the machine. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reading {
    /// Time since the daemon started.
    pub now: Duration,
    /// Memory of the machine.
    pub memory: u64,
    /// Memory that is available without swapping.
    pub available: u64,
    /// Free swap of others, without the last resort.
    pub others_free: u64,
    /// Free swap of the last resort.
    pub fallback_free: u64,
    /// Whether the threshold of memory pressure was exceeded since the last check.
    pub pressed: bool,
}

/// An action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// No action.
    Hold,
    /// Make an area of this size.
    Make {
        /// The size in bytes.
        size: u64,
        /// The reason for making it.
        origin: Origin,
    },
    /// Remove an area.
    Drain {
        /// The area.
        name: Name,
        /// The cause.
        cause: Cause,
    },
    /// Cancel the removal of an area.
    Stay {
        /// The area.
        name: Name,
    },
}

/// An action, and its reason in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The action.
    pub action: Action,
    /// The reason.
    pub reason: String,
    /// Whether more swap is wanted than is made now.
    pub wish: Wish,
}

/// Whether more swap is wanted than is made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// No more is wanted.
    None,
    /// More is wanted, and is tried later.
    Later,
    /// More is wanted, and the operator's rules do not allow it.
    Forbidden,
}

impl Standing {
    /// Size of all areas in bytes, including those being removed.
    pub fn size(&self) -> u64 {
        self.areas.iter().map(|area| area.size).sum()
    }

    /// Areas that receive pages now or soon, and are not being removed.
    fn lasting(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().filter(|area| area.lasts())
    }

    /// Free bytes in lasting areas.
    pub fn free(&self) -> u64 {
        self.lasting().filter(|area| area.phase == Phase::On).map(Area::free).sum()
    }

    /// Size of the lasting areas in bytes.
    pub fn lasting_size(&self) -> u64 {
        self.lasting().map(|area| area.size).sum()
    }

    /// The area that is being removed, by the policy or by hand.
    pub fn leaving(&self) -> Option<(&Area, Cause)> {
        self.areas.iter().find_map(|area| match area.phase {
            Phase::Leaving(cause) => Some((area, cause)),
            Phase::On | Phase::NotOn | Phase::Gone => None,
        })
    }
}

impl Area {
    fn lasts(&self) -> bool {
        !self.ending && !self.lost && !matches!(self.phase, Phase::Leaving(_) | Phase::Gone)
    }

    fn free(&self) -> u64 {
        self.size.saturating_sub(self.used)
    }
}

/// Whether the content of an area fits elsewhere: into other swap, or into memory with the margin left.
///
/// # Errors
/// In one line, the available and the needed room.
pub fn fits(rules: &Rules, standing: &Standing, reading: &Reading, area: &Area) -> Result<(), String> {
    fits_all(rules, standing, reading, std::slice::from_ref(&area.name))
}

/// Whether the contents of several areas together fit elsewhere, as in [`fits`].
///
/// # Errors
/// In one line, the available and the needed room.
pub fn fits_all(rules: &Rules, standing: &Standing, reading: &Reading, names: &[Name]) -> Result<(), String> {
    let is_one = |area: &&Area| names.contains(&area.name);
    let used: u64 = standing.areas.iter().filter(is_one).map(|area| area.used).sum();
    let others = standing.lasting().filter(|other| other.phase == Phase::On && !is_one(other));
    let swap = others.map(Area::free).sum::<u64>() + reading.others_free + reading.fallback_free;
    let memory = reading.available.saturating_sub(rules.margin.of(reading.memory));
    match used <= swap + memory {
        true => Ok(()),
        false => Err(format!(
            "{} used in {}, and there is room for {} in other swap and {} in memory",
            ByteSize(used),
            names.iter().map(Name::as_str).collect::<Vec<_>>().join(", "),
            ByteSize(swap),
            ByteSize(memory)
        )),
    }
}
