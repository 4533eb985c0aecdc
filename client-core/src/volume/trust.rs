//! Decides when a refusal by an appliance is believed.
//!
//! An appliance answers "no such export" after it lost the memory, but also while it restores its memory
//! after a restart; and an attacker who can redirect packets can forge this answer. So a single refusal makes
//! I/O wait, and ends no I/O.
//!
//! ```text
//!            refused                      refused, several times over the limit,
//!   trusted ---------> refused ----------------------------------------------+
//!      ^                 |   while the allocator was silent for the limit     |
//!      |  connected      |  the allocator: lost, deleted, another's           v
//!      +-----------------+-------------------------------------------------> lost
//!      +----------------------------------------------- connected ------------+
//! ```

use std::time::{Duration, Instant};

/// How long refusals have to last before they count without the allocator's confirmation.
pub const REFUSAL_LIMIT: Duration = Duration::from_secs(30);
/// Least number of refusals within that time.
const REFUSALS_MIN: u32 = 3;

/// The refusals of one grant, and the allocator's statements about it. See the module's documentation.
#[derive(Debug)]
pub struct Trust {
    limit: Duration,
    /// Time of the first refusal since the last connection, and the number of refusals since.
    refused: Option<(Instant, u32)>,
    /// Time of the allocator's last statement that the ownership is valid.
    heard: Option<Instant>,
    /// The allocator's statement that the grant's memory is gone, if that was its last one.
    gone: Option<String>,
    /// Whether refusals never count, however long they last, because another client may have the allocation
    /// and give it back.
    word_only: bool,
}

impl Trust {
    /// The state of a grant without refusals. `limit` is [`REFUSAL_LIMIT`] except in tests and where an
    /// operator sets another value.
    pub const fn new(limit: Duration) -> Trust {
        Trust { limit, refused: None, heard: None, gone: None, word_only: false }
    }

    /// Sets whether only the allocator's statement ends I/O.
    pub const fn set_word_only(&mut self, word_only: bool) {
        self.word_only = word_only;
    }

    /// Whether I/O waits for the allocator's statement, however long that takes.
    pub const fn waits_for_word(&self) -> bool {
        self.word_only && self.refused.is_some()
    }

    /// The appliance admitted the client: an appliance that knows the key has the data.
    pub fn connected(&mut self) {
        (self.refused, self.gone) = (None, None);
    }

    /// The appliance answered that it does not know the grant.
    pub fn refused(&mut self, now: Instant) {
        let (since, count) = self.refused.unwrap_or((now, 0));
        self.refused = Some((since, count.saturating_add(1)));
    }

    /// Whether the appliance's last answer was a refusal.
    pub const fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// The allocator states that the ownership is valid, and that the memory exists.
    pub fn holds(&mut self, now: Instant) {
        (self.heard, self.gone) = (Some(now), None);
    }

    /// The allocator states that the grant's allocation or memory is lost, deleted, or another client's.
    pub fn gone(&mut self, why: &str) {
        self.gone = Some(why.to_owned());
    }

    /// The reason why I/O ends. None: I/O waits.
    pub fn lost(&self, now: Instant) -> Option<String> {
        if let Some(why) = &self.gone {
            return Some(why.clone());
        }
        let (since, count) = self.refused.filter(|_| !self.word_only)?;
        let lasts = |since: Instant| now.saturating_duration_since(since) >= self.limit;
        let proven = count >= REFUSALS_MIN && lasts(since) && self.heard.is_none_or(lasts);
        proven.then(|| {
            format!(
                "the appliance has said for {} s that it does not know the grant, and no allocator says anything else: its \
                 memory is gone, or another client owns it",
                now.saturating_duration_since(since).as_secs()
            )
        })
    }

    /// Pause between two attempts while the appliance refuses.
    pub fn pause(&self, longest: Duration) -> Duration {
        longest.min(self.limit / (REFUSALS_MIN + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = REFUSAL_LIMIT;

    fn refused_until(trust: &mut Trust, from: Instant, last: Duration) -> Instant {
        (0..=10).for_each(|step| trust.refused(from + last * step / 10));
        from + last
    }

    #[test]
    fn one_refusal_ends_no_io_and_many_do_after_the_limit() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        trust.refused(start);
        assert_eq!(trust.lost(start + LIMIT * 10), None, "one answer");
        let now = refused_until(&mut trust, start, LIMIT - Duration::from_millis(1));
        assert_eq!(trust.lost(now), None);
        assert!(trust.lost(start + LIMIT).is_some());
    }

    #[test]
    fn a_connection_resets_the_refusals() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        let middle = refused_until(&mut trust, start, LIMIT / 2);
        trust.connected();
        let now = refused_until(&mut trust, middle, LIMIT * 9 / 10);
        assert_eq!(trust.lost(now), None);
        assert!(trust.lost(middle + LIMIT).is_some());
    }

    #[test]
    fn io_to_a_contested_allocation_ends_only_by_the_allocators_answer() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        trust.set_word_only(true);
        let now = refused_until(&mut trust, start, LIMIT * 100);
        assert_eq!(trust.lost(now), None);
        assert!(trust.waits_for_word());
        trust.gone("another's");
        assert_eq!(trust.lost(now).as_deref(), Some("another's"));
        trust.connected();
        assert!(!trust.waits_for_word());
        let now = refused_until(&mut trust, now, LIMIT);
        trust.set_word_only(false);
        assert!(trust.lost(now).is_some(), "as before");
    }

    #[test]
    fn the_allocators_answer_counts_at_once() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        let now = refused_until(&mut trust, start, LIMIT * 2);
        trust.holds(now - Duration::from_secs(1));
        assert_eq!(trust.lost(now), None, "it says that the memory is there");
        assert!(trust.lost(now + LIMIT).is_some(), "it has been silent since");
        trust.gone("deleted");
        assert_eq!(trust.lost(now).as_deref(), Some("deleted"));
        trust.holds(now);
        assert_eq!(trust.lost(now), None);
        trust.gone("deleted");
        trust.connected();
        assert_eq!(trust.lost(now + LIMIT), None);
    }
}
