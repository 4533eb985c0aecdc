//! [`Spin`]: how long a thread polls before it blocks.
//!
//! Blocking costs a wake-up (tens of microseconds), polling costs a core. So a thread polls for the longest
//! allowed time when polling would have avoided its last block, for half of the previous time when it would
//! not have, and after a few such waits not at all.

use std::time::{Duration, Instant};

/// A polling time below this fraction of the longest (1/16) counts as zero.
const LEAST_PART: u32 = 16;

/// An adaptive busy wait of one thread.
#[derive(Debug, Clone)]
pub struct Spin {
    longest: Duration,
    now: Duration,
    began: Option<Instant>,
}

impl Spin {
    /// A busy wait of at most `longest`; zero disables polling.
    pub const fn new(longest: Duration) -> Spin {
        Spin { longest, now: longest, began: None }
    }

    /// Ends the wait: work arrived, while polling or while blocked. The next wait starts anew.
    pub fn reset(&mut self) {
        if let Some(began) = self.began.take() {
            self.learn(began.elapsed());
        }
    }

    fn learn(&mut self, waited: Duration) {
        self.now = if waited <= self.longest { self.longest } else { self.now / 2 };
        if self.now < self.longest / LEAST_PART {
            self.now = Duration::ZERO;
        }
    }

    /// Whether waits begin with polling at present.
    pub fn looks(&self) -> bool {
        !self.now.is_zero()
    }

    /// Called after a turn; `busy` says whether the turn had work. Returns whether to poll again rather than block.
    /// While polling is switched off ([`Spin::looks`] is false), it says to block even after a busy turn: if there is
    /// more work, the blocking call returns at once.
    pub fn looks_again(&mut self, busy: bool) -> bool {
        if busy {
            self.reset();
        }
        busy && self.looks() || self.goes_on()
    }

    /// No work was there: returns whether to poll again rather than block. The first call of a wait starts
    /// its clock.
    pub fn goes_on(&mut self) -> bool {
        if self.longest.is_zero() {
            return false;
        }
        let now = Instant::now();
        let goes_on = now.duration_since(*self.began.get_or_insert(now)) < self.now;
        if goes_on {
            // Other threads that need this core get it: the other end may run on it.
            std::thread::yield_now();
        }
        goes_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(160);

    #[test]
    fn zero_never_polls() {
        let mut spin = Spin::new(Duration::ZERO);
        assert!(!spin.goes_on());
        spin.reset();
        assert!(!spin.goes_on());
    }

    #[test]
    fn polling_resumes_when_blocking_waits_are_short() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        spin.now = Duration::ZERO;
        assert!(!spin.looks_again(true), "it blocks, without a look");
        assert!(spin.looks_again(true), "looking would have saved it from that");
        assert!(spin.looks_again(false), "nothing was there, for less than an hour");
        spin.now = Duration::ZERO;
        assert!(!spin.looks_again(false));
    }

    #[test]
    fn a_fruitless_poll_halves_the_next_until_polling_stops() {
        let mut spin = Spin::new(LONGEST);
        let mut seen = Vec::new();
        for _ in 0..6 {
            spin.learn(LONGEST * 3);
            seen.push(spin.now.as_micros());
        }
        assert_eq!(seen, [80, 40, 20, 10, 0, 0]);
        assert!(!spin.goes_on(), "a wait without a look");
        spin.learn(LONGEST);
        assert_eq!(spin.now, LONGEST, "looking would have saved it from blocking");
    }

    #[test]
    fn a_wait_lasts_until_reset() {
        let mut spin = Spin::new(LONGEST);
        while spin.goes_on() {}
        std::thread::sleep(LONGEST);
        assert!(!spin.goes_on(), "the same wait");
        spin.reset();
        assert_eq!(spin.now, LONGEST / 2);
        assert!(spin.goes_on(), "a new one");
    }
}
