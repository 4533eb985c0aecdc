//! The time of day that the service judges by.
//!
//! The clock of a machine can be wrong for a while: a time server gives a wrong answer, or an operator mistypes. So
//! the service compares the time of day with the monotonic clock. As long as both agree, the time of day is the
//! machine's. When they differ by more than [`SLEW`], the service goes on with the time that it expected. When the
//! machine keeps to its new time for [`HOLD`], the service takes that time, and the promised ends of allocations move
//! with it.
//!
//! ```text
//!             differs                    keeps to it for HOLD
//!   [agrees] ----------> [doubted: expected time goes on] ----------> [agrees, new time]
//!      ^                        |   ^   |
//!      +------------------------+   +---+ differs in another way
//!             agrees again
//! ```

use std::time::Duration;

use super::Moment;

/// Largest difference that is no jump, in seconds: rounding, and small steps by which a time server corrects the
/// clock.
const SLEW: u64 = 2;
/// How often the reference moment is renewed. Slow drift, however long, is thus never a jump.
const FOLLOW_EVERY: Duration = Duration::from_secs(10);
/// How long the machine has to keep to a new time before it is taken.
const HOLD: Duration = Duration::from_secs(10);

/// Compares the two clocks; see the module.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// A moment at which the time of day was right.
    right: Option<Moment>,
    doubt: Option<Doubt>,
}

#[derive(Debug)]
struct Doubt {
    since: Duration,
    /// Seconds that the machine's time is ahead of the expected time.
    ahead: i64,
}

/// A change of the clock. Numbers are seconds that the machine is ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// The machine's clock jumped; the jump is doubted.
    Jumped(i64),
    /// The machine's clock is back at the expected time.
    Back,
    /// The machine kept to its new time, which is taken.
    Taken(i64),
}

impl Clock {
    /// Whether the machine's time of day differs from the time that is judged by.
    pub(super) fn is_doubted(&self) -> bool {
        self.doubt.is_some()
    }

    /// The time of day to judge by, in seconds since 1970, when the machine's clocks read `moment`.
    pub(super) fn read(&mut self, moment: Moment) -> (u64, Option<News>) {
        let Some(right) = self.right else {
            self.right = Some(moment);
            return (moment.unix, None);
        };
        let passed = moment.at.saturating_sub(right.at);
        let expected = right.unix.saturating_add(passed.as_secs());
        let ahead = moment.unix.cast_signed().saturating_sub(expected.cast_signed());
        if ahead.unsigned_abs() <= SLEW {
            if passed >= FOLLOW_EVERY {
                self.right = Some(moment);
            }
            return (moment.unix, self.doubt.take().map(|_| News::Back));
        }
        match &self.doubt {
            Some(doubt) if doubt.ahead.abs_diff(ahead) <= SLEW => {
                if moment.at.saturating_sub(doubt.since) < HOLD {
                    return (expected, None);
                }
                (self.right, self.doubt) = (Some(moment), None);
                (moment.unix, Some(News::Taken(ahead)))
            }
            _ => {
                self.doubt = Some(Doubt { since: moment.at, ahead });
                (expected, Some(News::Jumped(ahead)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, unix: u64) -> Moment {
        Moment { at: Duration::from_secs(seconds), unix }
    }

    #[test]
    fn a_jump_is_doubted_and_a_lasting_one_is_taken() {
        let mut clock = Clock::default();
        assert_eq!(clock.read(at(0, 1000)), (1000, None));
        assert_eq!(clock.read(at(1, 9000)), (1001, Some(News::Jumped(7999))));
        assert_eq!(clock.read(at(3, 9002)), (1003, None));
        assert_eq!(clock.read(at(4, 1004)), (1004, Some(News::Back)));
        assert_eq!(clock.read(at(5, 105)), (1005, Some(News::Jumped(-900))));
        assert_eq!(clock.read(at(9, 5000)), (1009, Some(News::Jumped(3991))));
        assert_eq!(clock.read(at(14, 5005)), (1014, None));
        assert_eq!(clock.read(at(19, 5010)), (5010, Some(News::Taken(3991))));
        assert_eq!(clock.read(at(20, 5011)), (5011, None));
    }

    #[test]
    fn a_clock_may_drift_for_as_long_as_it_likes() {
        let mut clock = Clock::default();
        clock.read(at(0, 1000));
        for second in 1..2000 {
            let unix = 1000 + second + second / 10;
            assert_eq!(clock.read(at(second, unix)), (unix, None));
        }
    }
}
