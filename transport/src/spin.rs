//! How long to look again before blocking.
//!
//! Blocking costs a wake-up (tens of microseconds), looking again costs a core. So a thread looks again for as long as it
//! may when that would have saved it from blocking the last time, for half as long when it would not, and soon not at all.

use std::time::{Duration, Instant};

/// Below one of so many parts of the longest time it is not looked at all.
const LEAST_PART: u32 = 16;

/// An adaptive busy wait of one thread.
#[derive(Debug, Clone)]
pub struct Spin {
    longest: Duration,
    now: Duration,
    began: Option<Instant>,
}

impl Spin {
    /// A busy wait of at most `longest`; zero: none.
    pub const fn new(longest: Duration) -> Spin {
        Spin { longest, now: longest, began: None }
    }

    /// Something was there, whether it was looked or blocked for: the next wait starts anew.
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

    /// Whether waits begin with looking at present.
    pub fn looks(&self) -> bool {
        !self.now.is_zero()
    }

    /// After a turn that had something to do, or had not: whether to look again rather than block. Where waits do not
    /// begin with looking, who had something to do need not look whether there is more of it: blocking tells.
    pub fn looks_again(&mut self, busy: bool) -> bool {
        if busy {
            self.reset();
        }
        busy && self.looks() || self.goes_on()
    }

    /// Nothing was there: whether to look again rather than block. The first call of a wait starts it.
    pub fn goes_on(&mut self) -> bool {
        if self.longest.is_zero() {
            return false;
        }
        let now = Instant::now();
        let goes_on = now.duration_since(*self.began.get_or_insert(now)) < self.now;
        if goes_on {
            // Who else wants this core gets it: the other end may run on it.
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
    fn none_never_looks_again() {
        let mut spin = Spin::new(Duration::ZERO);
        assert!(!spin.goes_on());
        spin.reset();
        assert!(!spin.goes_on());
    }

    #[test]
    fn who_blocks_after_each_turn_looks_again_when_waits_are_short() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        spin.now = Duration::ZERO;
        assert!(!spin.looks_again(true), "it blocks, without a look");
        assert!(spin.looks_again(true), "looking would have saved it from that");
        assert!(spin.looks_again(false), "nothing was there, for less than an hour");
        spin.now = Duration::ZERO;
        assert!(!spin.looks_again(false));
    }

    #[test]
    fn a_wait_in_vain_halves_the_next_until_there_is_none() {
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
    fn a_wait_lasts_until_something_was_there() {
        let mut spin = Spin::new(LONGEST);
        while spin.goes_on() {}
        std::thread::sleep(LONGEST);
        assert!(!spin.goes_on(), "the same wait");
        spin.reset();
        assert_eq!(spin.now, LONGEST / 2);
        assert!(spin.goes_on(), "a new one");
    }
}
