//! Determines the present state: from the kernel's tables each time, from xpm-blk and the allocator every few
//! seconds, and without delay when an event concerns one of the allocations.

use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_control::proc::{self, Swap};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, EndReason, Event, Renew};
use xpm_protocol::api::blk::{Device, DeviceState};

use super::{Daemon, Seen};
use crate::error::{Error, Step as _};
use crate::os::table;
use crate::policy::{Area, Cause, Phase, Reading, Standing};
use crate::state::{Record, Rest, Stage, State};

/// Interval of asking xpm-blk for its devices.
const ASK_BLK_EVERY: Duration = Duration::from_secs(5);
/// Interval of asking the allocator for the allocations.
const ASK_ALLOCATOR_EVERY: Duration = Duration::from_secs(10);
/// Pause before an allocator that did not answer is listened to again.
const LISTEN_PAUSE: Duration = Duration::from_secs(5);
/// Time limit of an answer that waits for an event.
const LISTEN_LIMIT: Duration = Duration::from_secs(30);

impl Daemon {
    /// The present state of the machine.
    pub(super) fn look(self: &Arc<Daemon>) -> Result<Reading, Error> {
        let names: Vec<Name> = self.store.get().areas.into_iter().map(|area| area.name).collect();
        let due = |asked: Option<Instant>, every| asked.is_none_or(|asked| asked.elapsed() >= every);
        // Beside the loop, because an answer may take long.
        if due(self.live().asked_blk, ASK_BLK_EVERY) {
            self.live().asked_blk = Some(Instant::now());
            tokio::spawn(Arc::clone(self).ask_blk(names.clone()));
        }
        if !names.is_empty() && due(self.live().asked_allocator, ASK_ALLOCATOR_EVERY) {
            self.live().asked_allocator = Some(Instant::now());
            tokio::spawn(Arc::clone(self).ask_allocator(names));
        }
        let pressed = self.watch.as_ref().is_some_and(crate::os::pressure::Watch::take);
        let state = self.store.get();
        let swaps = proc::swaps().at("read /proc/swaps")?;
        let memory = table::memory().at("read /proc/meminfo")?;
        let mut live = self.live();
        if pressed {
            live.pressed = Some(Instant::now());
        }
        (live.swaps, live.memory) = (swaps, memory);
        drop(live);
        Ok(self.reading(&state, pressed))
    }

    /// The last known state, for the policy.
    pub(super) fn reading(&self, state: &State, pressed: bool) -> Reading {
        let others: u64 = self.others(state).iter().map(|entry| entry.size.saturating_sub(entry.used)).sum();
        let fallback = self.fallback_entry().map_or(0, |entry| entry.size.saturating_sub(entry.used));
        let memory = self.live().memory;
        Reading {
            now: self.now(),
            memory: memory.total,
            available: memory.available,
            others_free: others,
            fallback_free: fallback,
            pressed,
        }
    }

    /// Swap that is neither an area nor the last resort.
    pub(super) fn others(&self, state: &State) -> Vec<Swap> {
        let swaps = self.live().swaps.clone();
        let mut ours: Vec<Swap> = state.areas.iter().filter_map(|area| self.entry(area)).collect();
        ours.extend(self.fallback_entry());
        swaps.into_iter().filter(|entry| ours.iter().all(|one| one.path != entry.path)).collect()
    }

    /// The last resort's entry in the table of swap.
    pub(super) fn fallback_entry(&self) -> Option<Swap> {
        let path = self.config.fallback.as_ref()?.path.to_str()?.to_owned();
        table::find(&self.live().swaps, &path).cloned()
    }

    /// An area's entry in the table of swap: by the path where it was turned on, or where xpm-blk shows it.
    pub(super) fn entry(&self, area: &Record) -> Option<Swap> {
        let path = self.path(area)?;
        table::find(&self.live().swaps, &path).cloned()
    }

    /// The path of an area: where xpm-blk shows it, or, while xpm-blk does not answer, where it was turned
    /// on.
    pub(super) fn path(&self, area: &Record) -> Option<String> {
        let seen = self.live().seen.get(&area.name).and_then(|seen| seen.path.clone());
        seen.or_else(|| match &area.stage {
            Stage::On { boot, path } if *boot == self.boot => Some(path.clone()),
            Stage::Leaving { path, .. } => path.clone(),
            Stage::On { .. } | Stage::Making => None,
        })
    }

    /// The present areas, for the policy.
    pub(super) fn standing(&self, state: &State) -> Standing {
        let areas = state.areas.iter().map(|record| self.area(record)).collect();
        let live = self.live();
        Standing {
            areas,
            next_step: state.next_step.0,
            calm_since: live.calm_since,
            rests: state.rest.is_some(),
            making: live.making.is_some(),
            make_not_before: live.make_not_before,
            drain_not_before: live.drain_not_before,
        }
    }

    fn area(&self, record: &Record) -> Area {
        let entry = self.entry(record);
        let seen = self.live().seen.get(&record.name).cloned().unwrap_or_default();
        let phase = match (&record.stage, &entry) {
            (Stage::Leaving { .. }, None) => Phase::Gone,
            (Stage::Leaving { calm: true, .. }, Some(_)) => Phase::Leaving(Cause::Calm),
            (Stage::Leaving { calm: false, .. }, Some(_)) => Phase::Leaving(Cause::Hand),
            (Stage::Making | Stage::On { .. }, None) => Phase::NotOn,
            (Stage::Making | Stage::On { .. }, Some(_)) => Phase::On,
        };
        Area {
            name: record.name.clone(),
            size: record.size.0,
            used: entry.map_or(0, |entry| entry.used),
            origin: record.origin,
            phase,
            ending: seen.ending.is_some(),
            lost: seen.device == Some(DeviceState::Lost),
        }
    }

    async fn ask_blk(self: Arc<Daemon>, names: Vec<Name>) {
        let client = self.blk.clone().with_limit(ASK_BLK_EVERY);
        let asked: Result<Vec<Device>, _> = client.get("/v1/devices").await;
        let devices = match asked {
            Ok(devices) => devices,
            Err(error) => {
                let error = Error::of("xpm-blk", &error);
                return self.trouble("xpm-blk", &error.to_string(), Some(ASK_BLK_EVERY));
            }
        };
        self.well("xpm-blk");
        for name in &names {
            let device = devices.iter().find(|device| device.name == *name);
            {
                let mut live = self.live();
                let seen = live.seen.entry(name.clone()).or_default();
                seen.path = device.map(|device| device.path.clone()).filter(|path| path.starts_with('/'));
                seen.device = device.map(|device| device.state);
            }
            let what = format!("device of {name}");
            match device.map(|device| device.state) {
                Some(DeviceState::Lost) => {
                    self.trouble(&what, "its memory is gone, and I/O to it fails: it is taken away", None);
                }
                Some(DeviceState::Holding) => {
                    let why =
                        format!("an appliance is out of reach, and I/O to it waits: `xpm blk show {name}`");
                    self.trouble(&what, &why, None);
                }
                Some(DeviceState::Live) | None => self.well(&what),
            }
        }
    }

    async fn ask_allocator(self: Arc<Daemon>, names: Vec<Name>) {
        for name in names {
            let asked: Result<Allocation, _> = self.allocator.get(&format!("/v1/allocations/{name}")).await;
            if let Ok(allocation) = asked {
                self.hear_end(&name, allocation).await;
            }
        }
    }

    /// Handles an announced end. If a longer lease is possible, it is requested once.
    async fn hear_end(&self, name: &Name, allocation: Allocation) {
        let what = format!("end of {name}");
        let Some(ending) = allocation.ending else {
            if let Some(seen) = self.live().seen.get_mut(name) {
                seen.ending = None;
            }
            return self.well(&what);
        };
        let known: Seen = self.live().seen.get(name).cloned().unwrap_or_default();
        let renewable = allocation.lease.is_some_and(|lease| lease.renewable);
        if ending.reason == EndReason::Lease && renewable && known.renewed != Some(ending.frees) {
            self.live().seen.entry(name.clone()).or_default().renewed = Some(ending.frees);
            let path = format!("/v1/allocations/{name}/renewal");
            let renewed: Result<Allocation, _> = self.allocator.post(&path, &Renew::default()).await;
            match renewed {
                Ok(renewed) if renewed.ending.is_none() => {
                    tracing::info!("the lease of {name} was renewed");
                    return self.well(&what);
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("the lease of {name}: {}", Error::of("allocator", &error)),
            }
        }
        self.trouble(&what, &format!("{}: it is taken away in time", ending.text), None);
        self.live().seen.entry(name.clone()).or_default().ending = Some(ending);
        self.wake();
    }

    /// Listens to the allocator until it is dropped, and lets the allocator be asked without delay when an
    /// event concerns an allocation.
    pub(crate) async fn listen(self: Arc<Daemon>) {
        let client = self.allocator.clone().with_limit(LISTEN_LIMIT);
        let mut last: Option<u64> = None;
        loop {
            let path = match last {
                Some(last) => format!("/v1/events?after={last}&wait=true"),
                None => "/v1/events?after=0&wait=false".to_owned(),
            };
            let heard: Result<Vec<Event>, _> = client.get(&path).await;
            let Ok(events) = heard else {
                // The allocator may number events anew when it is back.
                last = None;
                tokio::time::sleep(LISTEN_PAUSE).await;
                continue;
            };
            let known = self.store.get();
            if last.is_some() && events.iter().any(|event| known.area(&event.subject).is_some()) {
                let mut live = self.live();
                (live.asked_allocator, live.asked_blk) = (None, None);
                drop(live);
                self.wake();
            }
            last = Some(events.last().map_or(last.unwrap_or(0), |event| event.number));
        }
    }

    /// Handles an area that was on under this kernel and is off now: another program or person turned it off,
    /// by hand or because the machine shuts down. The daemon then does nothing until that party resumes it.
    pub(super) fn notice_what_others_turned_off(&self) -> Result<(), Error> {
        let state = self.store.get();
        if state.rest.is_some() {
            return Ok(());
        }
        // Read after the records, because an area is recorded as on only after it is on.
        self.live().swaps = proc::swaps().at("read /proc/swaps")?;
        let off = state.areas.iter().find(|area| {
            matches!(&area.stage, Stage::On { boot, .. } if *boot == self.boot) && self.entry(area).is_none()
        });
        let Some(area) = off else { return Ok(()) };
        if self.live().making.as_ref() == Some(&area.name) {
            return Ok(());
        }
        let why =
            format!("{} was turned off by somebody else; `xpm swap resume` turns it on again", area.name);
        tracing::warn!("the policy rests: {why}");
        let rest = Rest { why, boot: self.boot, by_drain: false };
        self.store.change(|state| state.rest = Some(rest))
    }

    /// Whether a refusal means that an area's allocation does not exist.
    pub(super) fn is_not_there(error: &Error) -> bool {
        error.kind() == ErrorKind::NotFound
    }
}
