//! Logs the state of devices, by their names: that I/O is held, lost, failed, or works again.
//!
//! It polls the state rather than receiving notifications: code on the I/O path never waits for a line to be
//! written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::blk::{DeviceState, LinkState};

use super::{Attached, Daemon, Slot, blocking};
use crate::frontend::Health;

/// Polling interval.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a device that was just shown, by this process or for the first time, may be connecting before
/// that is logged.
const BEGINS: Duration = Duration::from_secs(1);
/// Shortest time between two lines about failed I/O of one device.
const QUIET: Duration = Duration::from_secs(10);

/// Polls and logs, until it is dropped.
pub(crate) async fn run(daemon: Arc<Daemon>) {
    let mut known: BTreeMap<Name, Known> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let shown = daemon.shown();
        known.retain(|name, _| shown.iter().any(|(other, _)| other == name));
        // Queries to the kernel may block for a moment.
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

/// The last state of a device that was logged.
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

/// The appliances whose links are in this state, with the reasons.
fn of(health: &Health, state: LinkState) -> String {
    let links = health.links.iter().filter(|link| link.state == state);
    let one = |link: &xpm_protocol::api::blk::LinkStatus| match &link.reason {
        Some(reason) => format!("appliance {} ({reason})", link.appliance_name),
        None => format!("appliance {}", link.appliance_name),
    };
    links.map(one).collect::<Vec<_>>().join(", ")
}
