//! How long to look again before blocking.
//!
//! Blocking costs a wake-up (tens of microseconds), looking again costs a core. So a thread looks
//! again for a short while after it had something to do, longer when that has paid off
//! before, and not at all when it has not for some time.

use std::time::{Duration, Instant};

/// An adaptive busy wait of one thread.
#[derive(Debug, Clone)]
pub struct Spin {
    longest: Duration,
    now: Duration,
    since: Option<Instant>,
}

impl Spin {
    /// A busy wait of at most `longest`; zero: none.
    pub const fn new(longest: Duration) -> Spin {
        Spin { longest, now: longest, since: None }
    }

    /// Something was there: the next wait starts anew. A find while looking doubles the time.
    pub fn reset(&mut self) {
        if self.since.take().is_some() {
            self.now = (self.now * 2).clamp(self.longest / 16, self.longest);
        }
    }

    /// Nothing was there: whether to look again rather than block. The first call of a wait reads
    /// the clock; a wait that ends without a find halves the next one's time.
    pub fn goes_on(&mut self) -> bool {
        if self.longest.is_zero() {
            return false;
        }
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) < self.now {
            // Who else wants this core gets it: the other end may run on it.
            std::thread::yield_now();
            return true;
        }
        self.since = None;
        self.now = (self.now / 2).max(self.longest / 16);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_never_looks_again() {
        assert!(!Spin::new(Duration::ZERO).goes_on());
    }

    #[test]
    fn a_wait_in_vain_halves_the_next_and_a_find_doubles_it() {
        let mut spin = Spin::new(Duration::from_micros(160));
        while spin.goes_on() {}
        assert_eq!(spin.now, Duration::from_micros(80));
        assert!(spin.goes_on() || spin.now < Duration::from_micros(80));
        spin.since = Some(Instant::now());
        let before = spin.now;
        spin.reset();
        assert_eq!(spin.now, before * 2);
        spin.since = Some(Instant::now());
        spin.reset();
        spin.since = Some(Instant::now());
        spin.reset();
        assert_eq!(spin.now, Duration::from_micros(160), "never above the longest");
    }
}
