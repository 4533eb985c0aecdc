//! When a refusal is believed.
//!
//! An appliance answers "no such export" after it lost the memory, but also while it takes its memory back after a
//! restart, and whoever can redirect packets can forge this answer. So one such answer holds I/O and ends nothing.
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

/// How long refusals have to last before they count without the allocator's word.
pub const REFUSAL_LIMIT: Duration = Duration::from_secs(30);
/// Refusals within that time at least.
const REFUSALS_MIN: u32 = 3;

/// What is known of one grant's refusals. See the module's documentation.
#[derive(Debug)]
pub struct Trust {
    limit: Duration,
    /// Time of the first refusal since the last connection, and refusals since.
    refused: Option<(Instant, u32)>,
    /// When the allocator said last that the ownership holds.
    heard: Option<Instant>,
    /// What the allocator said instead.
    gone: Option<String>,
    /// No refusal counts, however long they last: another client may have the allocation and give it back.
    word_only: bool,
}

impl Trust {
    /// A grant that nobody has refused. `limit` is [`REFUSAL_LIMIT`] except in tests and where an operator says so.
    pub const fn new(limit: Duration) -> Trust {
        Trust { limit, refused: None, heard: None, gone: None, word_only: false }
    }

    /// Whether only the allocator's word ends I/O from now on.
    pub const fn set_word_only(&mut self, word_only: bool) {
        self.word_only = word_only;
    }

    /// Whether I/O waits for the allocator's word, however long that takes.
    pub const fn waits_for_word(&self) -> bool {
        self.word_only && self.refused.is_some()
    }

    /// The appliance let us in: who knows the key has the data.
    pub fn connected(&mut self) {
        (self.refused, self.gone) = (None, None);
    }

    /// The appliance says that it does not know the grant.
    pub fn refused(&mut self, now: Instant) {
        let (since, count) = self.refused.unwrap_or((now, 0));
        self.refused = Some((since, count.saturating_add(1)));
    }

    /// Whether the appliance's last word was a refusal.
    pub const fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// The allocator says that the ownership holds, and that the memory is there.
    pub fn holds(&mut self, now: Instant) {
        (self.heard, self.gone) = (Some(now), None);
    }

    /// The allocator says that what the grant is of is lost, deleted, or another client's.
    pub fn gone(&mut self, why: &str) {
        self.gone = Some(why.to_owned());
    }

    /// Why I/O ends. None: it is held.
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
    fn one_refusal_ends_nothing_and_many_do_so_after_the_limit() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        trust.refused(start);
        assert_eq!(trust.lost(start + LIMIT * 10), None, "one answer");
        let now = refused_until(&mut trust, start, LIMIT - Duration::from_millis(1));
        assert_eq!(trust.lost(now), None);
        assert!(trust.lost(start + LIMIT).is_some());
    }

    #[test]
    fn a_connection_in_between_begins_it_anew() {
        let (mut trust, start) = (Trust::new(LIMIT), Instant::now());
        let middle = refused_until(&mut trust, start, LIMIT / 2);
        trust.connected();
        let now = refused_until(&mut trust, middle, LIMIT * 9 / 10);
        assert_eq!(trust.lost(now), None);
        assert!(trust.lost(middle + LIMIT).is_some());
    }

    #[test]
    fn what_is_contested_ends_by_the_allocators_word_only() {
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
    fn the_allocator_is_believed_at_once() {
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
