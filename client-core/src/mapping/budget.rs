//! How much local memory a mapping may use: a fixed size, or a share of what the machine has to spare, which
//! shrinks when memory is short.
//!
//! Sources: /proc/pressure in psi(7) (Documentation/accounting/psi.rst of Linux), MemAvailable in proc_meminfo(5).

use super::window::PAGE;

/// Local memory that a mapping may use as cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// So many bytes, at least [`Budget::MIN`].
    Fixed(u64),
    /// A part of the memory that is available, looked at twice a second: programs that wait for memory for more than
    /// a tenth of the time take an eighth of it away each time; otherwise it grows by a sixteenth.
    Share {
        /// How much of what is available, from above 0 to 1.
        share: f64,
        /// Bytes that it does not shrink below.
        min: u64,
        /// Bytes that it does not grow beyond.
        max: u64,
    },
}

impl Budget {
    /// Least local memory in bytes.
    pub const MIN: u64 = 256 << 10;

    pub(super) fn check(&self) -> Result<(), String> {
        let least = match self {
            Budget::Fixed(bytes) => *bytes,
            Budget::Share { share, min, max } => {
                if !(*share > 0.0 && *share <= 1.0) {
                    return Err(format!(
                        "a share of {share} of the available memory cannot be: choose from above 0 to 1"
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

    /// Pages to begin with.
    pub(super) fn first(&self) -> usize {
        match self {
            Budget::Fixed(bytes) => *bytes as usize / PAGE,
            Budget::Share { min, .. } => {
                Governor(*self).budget(*min as usize / PAGE, 0).unwrap_or(*min as usize / PAGE)
            }
        }
    }
}

/// Follows what is available.
pub(super) struct Governor(pub(super) Budget);

impl Governor {
    /// The budget in pages that follows on this one; none where it stays. Reads two files of /proc.
    pub(super) fn budget(&self, now: usize, resident: usize) -> Option<usize> {
        let Budget::Share { .. } = self.0 else { return None };
        let available = available(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
        // A kernel without PSI tells nothing, and then what is available decides.
        let pressure = std::fs::read_to_string("/proc/pressure/memory")
            .ok()
            .and_then(|text| waiting(&text))
            .unwrap_or(0.0);
        self.next(now, resident, available, pressure)
    }

    fn next(&self, now: usize, resident: usize, available: u64, pressure: f64) -> Option<usize> {
        let Budget::Share { share, min, max } = self.0 else { return None };
        // What is used here already would be available without.
        let goal = (available as f64 + (resident * PAGE) as f64) * share / PAGE as f64;
        let grown = now + (now / 16).max(16);
        let next = match pressure > 10.0 {
            true => now - now / 8,
            false if now as f64 > goal => (now - now / 8).max(goal as usize),
            false => grown.min(goal as usize),
        };
        let next = next.clamp(min as usize / PAGE, max as usize / PAGE);
        (next != now).then_some(next)
    }
}

/// MemAvailable in bytes.
fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Percent of the last ten seconds in which some program waited for memory.
fn waiting(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = (1 << 30) / PAGE;

    fn governor() -> Governor {
        Governor(Budget::Share { share: 0.5, min: 1 << 30, max: 8 << 30 })
    }

    #[test]
    fn it_follows_what_is_available() {
        let governor = governor();
        assert_eq!(governor.next(2 * PAGES, 0, 16 << 30, 0.0), Some(2 * PAGES + PAGES / 8));
        assert_eq!(governor.next(8 * PAGES, 0, 16 << 30, 0.0), None, "as much as it should be");
        assert_eq!(
            governor.next(4 * PAGES, 4 * PAGES, 4 << 30, 0.0),
            None,
            "what it has counts as available"
        );
        assert_eq!(governor.next(4 * PAGES, 0, 1 << 30, 0.0), Some(4 * PAGES - PAGES / 2));
    }

    #[test]
    fn it_gives_way_under_pressure() {
        let governor = governor();
        assert_eq!(governor.next(4 * PAGES, 0, 64 << 30, 30.0), Some(4 * PAGES - PAGES / 2));
        assert_eq!(governor.next(PAGES, 0, 64 << 30, 30.0), None, "not below the least");
    }

    #[test]
    fn what_the_kernel_says() {
        let text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(waiting(text), Some(12.34));
        assert_eq!(waiting("nonsense"), None);
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
    }

    #[test]
    fn budgets_that_cannot_be() {
        for budget in [
            Budget::Fixed(0),
            Budget::Share { share: 0.0, min: 1 << 20, max: 1 << 30 },
            Budget::Share { share: f64::NAN, min: 1 << 20, max: 1 << 30 },
            Budget::Share { share: 0.5, min: 1 << 30, max: 1 << 20 },
        ] {
            assert!(budget.check().is_err(), "{budget:?}");
        }
        Budget::Fixed(Budget::MIN).check().unwrap();
    }
}
