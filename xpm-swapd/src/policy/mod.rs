//! What is to be done about the machine's swap: a pure function of the rules, of what there is, and
//! of what was seen.
//!
//! * [`Rules`]: what the operator wants.
//! * [`Standing`]: what there is, and what is remembered between two decisions.
//! * [`Reading`]: what the machine looks like now.
//! * [`decide`]: what follows from that, with its reason.

mod decide;
#[cfg(test)]
mod tests;

use std::time::Duration;

use xpm_protocol::policy::Amount;
use xpm_protocol::units::{ByteSize, REGION_LEN_MIN};
use xpm_protocol::{Name, api::swapd::Origin};

pub use decide::{decide, observe};

/// Smallest area that is made, in bytes: the smallest region.
pub const AREA_LEN_MIN: u64 = REGION_LEN_MIN;
/// Most areas at once. The kernel has places for about 23 to 29 swap areas (`MAX_SWAPFILES` in
/// include/linux/swap.h, by its configuration), of which some are left to others.
pub const AREAS_MAX: usize = 16;

/// What the operator wants. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// There at once.
    pub base: u64,
    /// Never more than this.
    pub maximum: u64,
    /// It grows when less than this is free.
    pub free_below: Amount,
    /// It grows under pressure when less than this is free.
    pub pressure_free_below: Amount,
    /// The first step.
    pub step: u64,
    /// The largest step.
    pub step_max: u64,
    /// It shrinks after so much calm.
    pub shrink_after: Duration,
    /// Memory that stays available when what was swapped out comes back.
    pub margin: Amount,
}

/// What there is, and what is remembered. Moments are times since the daemon started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// The areas.
    pub areas: Vec<Area>,
    /// The next step, in bytes; 0: the first one.
    pub next_step: u64,
    /// Since when it is calm: nothing was wanted, and nothing changed.
    pub calm_since: Duration,
    /// Nothing is done by itself.
    pub rests: bool,
    /// An area is being made.
    pub making: bool,
    /// Nothing is made before.
    pub make_not_before: Duration,
    /// Nothing is taken away before.
    pub drain_not_before: Duration,
}

/// Swap on one allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// Its name.
    pub name: Name,
    /// Its size in bytes.
    pub size: u64,
    /// What of it is in use, in bytes.
    pub used: u64,
    /// Why it is there.
    pub origin: Origin,
    /// How far it is.
    pub phase: Phase,
    /// Its allocation is going to end.
    pub ending: bool,
    /// Its memory is gone.
    pub lost: bool,
}

/// How far an area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is not on: being made, or turned off by somebody else.
    NotOn,
    /// It is on.
    On,
    /// It is being taken away, because of calm or because it has to.
    Leaving(Cause),
    /// It is off, and has to be given back still.
    Gone,
}

/// Why an area is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is not needed.
    Calm,
    /// Its allocation is going to end.
    Ending,
    /// Its memory is gone.
    Lost,
    /// By hand.
    Hand,
}

/// What the machine looks like. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reading {
    /// Time since the daemon started.
    pub now: Duration,
    /// Memory of the machine.
    pub memory: u64,
    /// What of it could be had without swapping.
    pub available: u64,
    /// Free swap that others made, the last resort left out.
    pub others_free: u64,
    /// Free swap of the last resort.
    pub fallback_free: u64,
    /// The threshold of memory pressure was passed since the last look.
    pub pressed: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Hold,
    /// An area of this size is made.
    Make {
        /// In bytes.
        size: u64,
        /// Why.
        origin: Origin,
    },
    /// An area is taken away.
    Drain {
        /// Which one.
        name: Name,
        /// Why.
        cause: Cause,
    },
    /// An area that is being taken away stays.
    Stay {
        /// Which one.
        name: Name,
    },
}

/// What is to be done, and why, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What.
    pub action: Action,
    /// Why.
    pub reason: String,
    /// Whether more is wanted than is made now.
    pub wish: Wish,
}

/// Whether more is wanted than is made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// It is not.
    None,
    /// It is, and is tried later.
    Later,
    /// It is, and the operator's rules do not allow it.
    Forbidden,
}

impl Standing {
    /// Bytes of all areas, also of those that are leaving.
    pub fn size(&self) -> u64 {
        self.areas.iter().map(|area| area.size).sum()
    }

    /// Areas that pages go to, and will.
    fn lasting(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().filter(|area| area.lasts())
    }

    /// Bytes that are free in areas that last.
    pub fn free(&self) -> u64 {
        self.lasting().filter(|area| area.phase == Phase::On).map(Area::free).sum()
    }

    /// Bytes of areas that last.
    pub fn lasting_size(&self) -> u64 {
        self.lasting().map(|area| area.size).sum()
    }

    /// The area that is being taken away by itself or by hand.
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

/// Whether what an area holds fits elsewhere: into other swap, or into memory with the margin left.
///
/// # Errors
/// In one line, what there is and what is needed.
pub fn fits(rules: &Rules, standing: &Standing, reading: &Reading, area: &Area) -> Result<(), String> {
    fits_all(rules, standing, reading, std::slice::from_ref(&area.name))
}

/// Whether what some areas hold together fits elsewhere, as [`fits`] says it.
///
/// # Errors
/// In one line, what there is and what is needed.
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
