//! The time of day that the service judges by.
//!
//! The clock of a machine can be wrong for a while: a wrong answer of a time server, a hand that slips. So it is
//! compared with the clock that measures spans. As long as both agree, the time of day is what the machine says. When
//! they differ by more than [`SLEW`], the service goes on with the time that it expected. When the machine keeps to its
//! new time for [`HOLD`], that time is taken, and the ends that allocations were promised move with it.
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

/// Difference that is no jump: rounding, and a time server that corrects the clock by small steps; seconds.
const SLEW: u64 = 2;
/// How often the clock is followed, so that it can drift for as long as it likes.
const FOLLOW_EVERY: Duration = Duration::from_secs(10);
/// How long the machine has to keep to another time before that is taken.
const HOLD: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// A moment at which the time of day was right.
    right: Option<Moment>,
    doubt: Option<Doubt>,
}

#[derive(Debug)]
struct Doubt {
    since: Duration,
    /// What the machine is ahead by, in seconds.
    ahead: i64,
}

/// What happened to the clock. Numbers are seconds that the machine is ahead by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It jumped.
    Jumped(i64),
    /// It is as it was before.
    Back,
    /// It was right to jump: its time is taken.
    Taken(i64),
}

impl Clock {
    /// Whether the machine says another time than is judged by.
    pub(super) fn is_doubted(&self) -> bool {
        self.doubt.is_some()
    }

    /// The time of day to judge by, in seconds since 1970, when the machine says `moment`.
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
