//! How much local memory a mapping may use: a fixed size, or a share of what there is to spare, which
//! shrinks when memory is short.

use std::io;

use crate::page::window::PAGE;
use xpm_control::spare::{Seen, Spare};

/// Percent of the time that programs may wait for memory.
const PRESSURE_MAX: f64 = 10.0;
/// The default lower limit of a share, in bytes.
const LEAST: u64 = 16 << 20;

/// Local memory that a mapping may use as cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// This number of bytes, at least [`Budget::MIN`].
    Fixed(u64),
    /// A part of the memory that is available to this process, on the machine and in its cgroups. The budget is
    /// adjusted twice a second. While programs wait for memory for more than a tenth of the time, and this wait does
    /// not decrease, the budget shrinks by an eighth each time; otherwise it grows by a sixteenth, or shrinks by an
    /// eighth, towards the share.
    Share {
        /// The part of the available memory: more than 0, at most 1.
        share: f64,
        /// Lower limit in bytes.
        min: u64,
        /// Upper limit in bytes.
        max: u64,
    },
}

impl Budget {
    /// Least local memory in bytes.
    pub const MIN: u64 = 256 << 10;

    /// A share of the available memory in percent, 1 to 100: at least 16 MiB, and at most as much as is mapped.
    pub fn percent(percent: u8) -> Budget {
        Budget::Share { share: f64::from(percent) / 100.0, min: LEAST, max: u64::MAX }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let least = match self {
            Budget::Fixed(bytes) => *bytes,
            Budget::Share { share, min, max } => {
                if !(*share > 0.0 && *share <= 1.0) {
                    return Err(format!(
                        "a share of {}% of the available memory cannot be: choose 1% to 100%",
                        share * 100.0
                    ));
                }
                if min > max {
                    return Err(format!("the least budget, {min} bytes, is more than the most, {max}"));
                }
                *min
            }
        };
        match least < Self::MIN {
            true => Err(format!("a budget of {least} bytes is too small: choose at least {}", Self::MIN)),
            false => Ok(()),
        }
    }

    /// Limits a share to the size of the mapped memory in bytes, plus the reserve that is kept free: more is useless.
    pub(crate) fn within(self, size: u64) -> Budget {
        match self {
            Budget::Fixed(_) => self,
            Budget::Share { share, min, max } => {
                let most = size + size / 16;
                Budget::Share { share, min: min.min(most), max: max.min(most) }
            }
        }
    }
}

/// Adjusts a budget to the available memory.
pub(crate) struct Governor {
    budget: Budget,
    /// None for a fixed budget.
    spare: Option<Spare>,
    /// The previous value of the memory pressure, in percent of time.
    pressure: f64,
}

impl Governor {
    pub(crate) fn new(budget: Budget) -> io::Result<Governor> {
        let spare = match budget {
            Budget::Fixed(_) => None,
            Budget::Share { .. } => Some(Spare::open()?),
        };
        Ok(Governor { budget, spare, pressure: 0.0 })
    }

    /// The initial budget in pages.
    pub(crate) fn first(&mut self) -> usize {
        let (min, max) = match self.budget {
            Budget::Fixed(bytes) => return bytes as usize / PAGE,
            Budget::Share { min, max, .. } => (min as usize / PAGE, max as usize / PAGE),
        };
        let seen = self.spare.as_mut().and_then(Spare::look);
        let calm = seen.filter(|seen| seen.pressure <= PRESSURE_MAX);
        calm.map_or(min, |seen| self.goal(seen.available, 0).clamp(min, max))
    }

    /// The next budget in pages; none if it does not change. Reads a few files.
    pub(crate) fn next(&mut self, now: usize, resident: usize) -> Option<usize> {
        let seen = self.spare.as_mut()?.look()?;
        self.after(now, resident, seen)
    }

    fn after(&mut self, now: usize, resident: usize, seen: Seen) -> Option<usize> {
        let Budget::Share { min, max, .. } = self.budget else { return None };
        let before = std::mem::replace(&mut self.pressure, seen.pressure);
        let goal = self.goal(seen.available, resident);
        let (less, more) = (now - now / 8, now + (now / 16).max(16));
        let next = match seen.pressure > PRESSURE_MAX {
            // The pressure is an average, which falls for seconds after the last wait: a falling one is no reason to
            // shrink further.
            true if seen.pressure < before => now.min(less.max(goal)),
            true => less,
            false if now > goal => less.max(goal),
            false => more.min(goal),
        };
        let next = next.clamp(min as usize / PAGE, max as usize / PAGE);
        // While pages still have to leave to reach the present budget, faults wait for that. The budget shrinks
        // further only after they could continue.
        let leaves = next < now && resident > now;
        (next != now && !leaves).then_some(next)
    }

    /// The share in pages. Memory that this mapping uses already would be available without it.
    fn goal(&self, available: u64, resident: usize) -> usize {
        let Budget::Share { share, .. } = self.budget else { return 0 };
        ((available as f64 + (resident * PAGE) as f64) * share) as usize / PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = (1 << 30) / PAGE;

    fn governor() -> Governor {
        let budget = Budget::Share { share: 0.5, min: 1 << 30, max: 8 << 30 };
        Governor { budget, spare: None, pressure: 0.0 }
    }

    fn seen(gib: u64, pressure: f64) -> Seen {
        Seen { available: gib << 30, pressure }
    }

    #[test]
    fn it_follows_what_is_available() {
        let mut governor = governor();
        assert_eq!(governor.after(2 * PAGES, 0, seen(16, 0.0)), Some(2 * PAGES + PAGES / 8));
        assert_eq!(governor.after(8 * PAGES, 0, seen(16, 0.0)), None, "as much as it should be");
        assert_eq!(
            governor.after(4 * PAGES, 4 * PAGES, seen(4, 0.0)),
            None,
            "what it has counts as available"
        );
        assert_eq!(governor.after(4 * PAGES, 0, seen(1, 0.0)), Some(4 * PAGES - PAGES / 2));
        assert_eq!(governor.after(4 * PAGES, 5 * PAGES, seen(1, 0.0)), None, "one step is not done yet");
    }

    #[test]
    fn it_gives_way_under_pressure() {
        let mut governor = governor();
        assert_eq!(governor.after(4 * PAGES, 0, seen(64, 30.0)), Some(4 * PAGES - PAGES / 2));
        assert_eq!(governor.after(4 * PAGES, 0, seen(64, 30.0)), Some(4 * PAGES - PAGES / 2));
        assert_eq!(governor.after(4 * PAGES, 0, seen(64, 25.0)), None, "it becomes less");
        assert_eq!(governor.after(4 * PAGES, 0, seen(1, 20.0)), Some(4 * PAGES - PAGES / 2), "there is less");
        assert_eq!(governor.after(PAGES, 0, seen(64, 30.0)), None, "not below the least");
        assert_eq!(governor.after(4 * PAGES, 0, seen(64, 9.0)), Some(4 * PAGES + PAGES / 4));
    }

    #[test]
    fn it_begins_with_its_share() {
        let mut governor = Governor::new(Budget::percent(100).within(1 << 30)).unwrap();
        let seen = governor.spare.as_mut().unwrap().look().unwrap();
        let most = (1 << 30) + (1 << 26);
        let first = governor.first() * PAGE;
        assert!(
            seen.available < most || seen.pressure > 5.0 || first == most as usize,
            "{first} of {seen:?}"
        );
        assert_eq!(Governor::new(Budget::Fixed(1 << 30)).unwrap().first(), PAGES);
    }

    #[test]
    fn no_more_than_there_is_to_map() {
        let (share, mib) = (0.5, 1 << 20);
        let of = |min, max| Budget::Share { share, min, max };
        assert_eq!(Budget::percent(50).within(64 * mib), of(16 * mib, 68 * mib));
        assert_eq!(of(16 * mib, 32 * mib).within(64 * mib), of(16 * mib, 32 * mib));
        assert_eq!(of(256 * mib, 512 * mib).within(64 * mib), of(68 * mib, 68 * mib));
        assert_eq!(Budget::Fixed(128 * mib).within(64 * mib), Budget::Fixed(128 * mib));
    }

    #[test]
    fn budgets_that_cannot_be() {
        for budget in [
            Budget::Fixed(0),
            Budget::percent(0),
            Budget::percent(101),
            Budget::Share { share: f64::NAN, min: 1 << 20, max: 1 << 30 },
            Budget::Share { share: 0.5, min: 1 << 30, max: 1 << 20 },
        ] {
            assert!(budget.check().is_err(), "{budget:?}");
        }
        Budget::Fixed(Budget::MIN).check().unwrap();
        Budget::percent(1).check().unwrap();
    }
}
