//! How much an appliance is wanted.

use super::Candidate;

/// A larger score is wanted more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score(u64);

/// Most free memory first. `taken` are the bytes that this decision has given it already.
pub fn score(candidate: &Candidate, taken: u64) -> Score {
    Score(candidate.free.saturating_sub(taken))
}
