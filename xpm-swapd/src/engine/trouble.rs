//! Troubles: conditions that are logged once, loudly, and shown for as long as they last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use xpm_protocol::api::swapd;
use xpm_protocol::units::Span;

use super::Daemon;

/// First pause after a refusal; each further one is twice as long.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_LONGEST: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Troubles(BTreeMap<String, Trouble>);

struct Trouble {
    why: String,
    since: Instant,
    tries: u64,
    again: Option<Instant>,
}

impl Daemon {
    /// Records a trouble. A new trouble is logged.
    pub(super) fn trouble(&self, what: &str, why: &str, pause: Option<Duration>) {
        let mut live = self.live();
        let again = pause.map(|pause| Instant::now() + pause);
        match live.troubles.0.get_mut(what) {
            Some(trouble) => {
                why.clone_into(&mut trouble.why);
                trouble.tries += 1;
                trouble.again = again;
            }
            None => {
                tracing::error!("{what}: {why}");
                let trouble = Trouble { why: why.to_owned(), since: Instant::now(), tries: 1, again };
                live.troubles.0.insert(what.to_owned(), trouble);
            }
        }
    }

    /// Whether this trouble is present.
    pub(super) fn is_troubled(&self, what: &str) -> bool {
        self.live().troubles.0.contains_key(what)
    }

    /// Ends a trouble.
    pub(super) fn well(&self, what: &str) {
        if self.live().troubles.0.remove(what).is_some() {
            tracing::info!("{what}: it is over");
        }
    }

    /// How long to wait before the next try, including the try that just failed.
    pub(super) fn pause_of(&self, what: &str) -> Duration {
        let tries = self.live().troubles.0.get(what).map_or(0, |trouble| trouble.tries);
        let doublings = u32::try_from(tries).unwrap_or(u32::MAX).min(10);
        (PAUSE_FIRST * 2_u32.pow(doublings)).min(PAUSE_LONGEST)
    }

    pub(super) fn troubles(&self) -> Vec<swapd::Trouble> {
        let live = self.live();
        let view = |(what, trouble): (&String, &Trouble)| swapd::Trouble {
            what: what.clone(),
            why: trouble.why.clone(),
            since: whole_seconds(trouble.since.elapsed()),
            tries: trouble.tries,
            again: trouble.again.map(|again| whole_seconds(again.saturating_duration_since(Instant::now()))),
        };
        live.troubles.0.iter().map(view).collect()
    }
}

/// A duration for display.
pub(super) fn whole_seconds(time: Duration) -> Span {
    Span(Duration::from_secs(time.as_secs()))
}
