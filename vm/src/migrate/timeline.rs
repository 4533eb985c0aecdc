//! Where the time goes while a machine is stopped.

use std::time::{Duration, Instant};

/// A step of a move, and how long the stopped machine waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waited {
    /// Its name, which does not change between versions.
    pub step: &'static str,
    /// How long it took.
    pub took: Duration,
}

/// The steps so far, one after the other without a gap.
#[derive(Debug)]
pub(crate) struct Timeline {
    last: Instant,
    steps: Vec<Waited>,
}

impl Timeline {
    /// Begins now.
    pub(crate) fn begin() -> Timeline {
        Timeline { last: Instant::now(), steps: Vec::new() }
    }

    /// Ends a step now; it began when the step before ended.
    pub(crate) fn mark(&mut self, step: &'static str) {
        let now = Instant::now();
        self.steps.push(Waited { step, took: now - self.last });
        self.last = now;
    }

    /// The steps.
    pub(crate) fn steps(&self) -> Vec<Waited> {
        self.steps.clone()
    }
}
