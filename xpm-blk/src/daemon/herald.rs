//! Says in the log how devices fare, by their names: that I/O is held, lost, failed, or passes again.
//!
//! It looks rather than being told: what passes I/O never waits for somebody who writes a line.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::blk::{DeviceState, LinkState};

use super::{Attached, Daemon, Slot, blocking};
use crate::frontend::Health;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A device that has just been shown, by this process or the first time, may connect for so long without a word.
const BEGINS: Duration = Duration::from_secs(1);
/// Shortest time between two lines about I/O of one device that failed.
const QUIET: Duration = Duration::from_secs(10);

/// Looks and says, until it is dropped.
pub(crate) async fn run(daemon: Arc<Daemon>) {
    let mut known: BTreeMap<Name, Known> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let shown = daemon.shown();
        known.retain(|name, _| shown.iter().any(|(other, _)| other == name));
        // What is asked of the kernel may take a moment.
        let looked = blocking(move || {
            let look = |(name, attached): (Name, Arc<Attached>)| {
                let health = attached.shown.health();
                (name, attached.shown.path(), health, attached.since)
            };
            Ok(shown.into_iter().map(look).collect::<Vec<_>>())
        });
        let Ok(looked) = looked.await else { continue };
        for (name, path, health, since) in looked {
            let what = format!("{path} (allocation {name})");
            known.entry(name).or_insert_with(Known::new).hear(&what, &health, since.elapsed() >= BEGINS);
        }
    }
}

impl Daemon {
    fn shown(&self) -> Vec<(Name, Arc<Attached>)> {
        let slots = self.slots();
        let shown = slots.iter().filter_map(|(name, slot)| match slot {
            Slot::Shown(attached) => Some((name.clone(), Arc::clone(attached))),
            Slot::Busy(_) | Slot::Waiting(_) => None,
        });
        shown.collect()
    }
}

/// What was said last of a device.
struct Known {
    state: DeviceState,
    since: Instant,
    errors: u64,
    failed: Option<Instant>,
}

impl Known {
    fn new() -> Known {
        Known { state: DeviceState::Live, since: Instant::now(), errors: 0, failed: None }
    }

    fn hear(&mut self, what: &str, health: &Health, settled: bool) {
        if health.state != self.state && (settled || health.state != DeviceState::Holding) {
            let passed = self.since.elapsed().as_secs();
            (self.state, self.since) = (health.state, Instant::now());
            let (held, lost) = (of(health, LinkState::Connecting), of(health, LinkState::Lost));
            match health.state {
                DeviceState::Holding => tracing::warn!("{what} holds its I/O: no way to {held}"),
                DeviceState::Lost => tracing::error!("{what} is lost: I/O to what it had on {lost} fails"),
                DeviceState::Live => tracing::info!("{what} is back after {passed} s: I/O passes again"),
            }
        }
        let failed = health.counters.errors.saturating_sub(self.errors);
        if failed > 0 && self.failed.is_none_or(|at| at.elapsed() >= QUIET) {
            (self.errors, self.failed) = (health.counters.errors, Some(Instant::now()));
            tracing::error!("{what}: {failed} requests ended with an error");
        }
    }
}

/// The appliances in this state, with the reasons.
fn of(health: &Health, state: LinkState) -> String {
    let links = health.links.iter().filter(|link| link.state == state);
    let one = |link: &xpm_protocol::api::blk::LinkStatus| match &link.reason {
        Some(reason) => format!("appliance {} ({reason})", link.appliance_name),
        None => format!("appliance {}", link.appliance_name),
    };
    links.map(one).collect::<Vec<_>>().join(", ")
}
