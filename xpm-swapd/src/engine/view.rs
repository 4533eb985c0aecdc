//! The view of the control interface.

use std::time::Duration;

use xpm_protocol::api::swapd::{
    Area, AreaState, Decision, Fallback, Leaving, Memory, Other, Policy, Pressure, Rest, Status,
};
use xpm_protocol::units::ByteSize;

use super::Daemon;
use super::trouble::whole_seconds;
use crate::os::pressure;
use crate::policy::Action;
use crate::state::{Record, Stage};

impl Daemon {
    /// The complete status.
    pub(crate) fn status(&self) -> Status {
        let state = self.store.get();
        let others = self.others(&state).into_iter().map(|entry| Other {
            path: entry.path,
            size: ByteSize(entry.size),
            used: ByteSize(entry.used),
            priority: entry.priority,
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime: whole_seconds(self.now()),
            policy: self.policy(),
            areas: state.areas.iter().map(|record| self.view_of(record)).collect(),
            others: others.collect(),
            fallback: self.fallback(),
            memory: self.memory(),
            pressure: self.pressure(),
            decision: self.decision(),
            rest: state.rest.map(|rest| Rest { why: rest.why }),
            troubles: self.troubles(),
            settings: self.live().settings.clone(),
            safety: xpm_safety::keeper_items(),
        }
    }

    /// The status as one line, for the service manager.
    pub(crate) fn line(&self) -> String {
        let state = self.store.get();
        let entries: Vec<_> = state.areas.iter().filter_map(|area| self.entry(area)).collect();
        let sum = |part: fn(&xpm_control::proc::Swap) -> u64| ByteSize(entries.iter().map(part).sum());
        let trouble = self.troubles().first().map(|trouble| format!("; {}: {}", trouble.what, trouble.why));
        format!(
            "{} of external swap in {} areas, {} used{}",
            sum(|entry| entry.size),
            entries.len(),
            sum(|entry| entry.used),
            trouble.unwrap_or_default()
        )
    }

    fn policy(&self) -> Policy {
        let state = self.store.get();
        let size = self.standing(&state).lasting_size();
        Policy {
            base: ByteSize(self.rules.base),
            maximum: ByteSize(self.rules.maximum),
            priority: self.config.priority,
            next_step: ByteSize(state.next_step.0.clamp(self.rules.step, self.rules.step_max)),
            free_below: ByteSize(self.rules.free_below.of(size)),
            shrink_after: self.config.shrink.after,
        }
    }

    pub(super) fn view_of(&self, record: &Record) -> Area {
        let entry = self.entry(record);
        let live = self.live();
        let seen = live.seen.get(&record.name).cloned().unwrap_or_default();
        let used = ByteSize(entry.as_ref().map_or(0, |entry| entry.used));
        let job = live.leaving.as_ref().filter(|job| job.name == record.name).map(|job| Leaving {
            why: job.why.clone(),
            from: ByteSize(job.from),
            since: whole_seconds(job.since.elapsed()),
        });
        let waits = live.waiting.contains(&record.name).then(|| Leaving {
            why: "it waits for its turn".to_owned(),
            from: used,
            since: whole_seconds(Duration::ZERO),
        });
        let state = match (&record.stage, &entry) {
            (Stage::Leaving { .. }, Some(_)) => AreaState::Leaving,
            (Stage::Leaving { .. }, None) => AreaState::Gone,
            (Stage::Making | Stage::On { .. }, Some(_)) => AreaState::On,
            (Stage::Making, None) => AreaState::Making,
            (Stage::On { boot, .. }, None) if *boot == self.boot => AreaState::Off,
            (Stage::On { .. }, None) => AreaState::Making,
        };
        Area {
            name: record.name.clone(),
            path: entry.as_ref().map(|entry| entry.path.clone()).or(seen.path),
            form: self.config.device.form.clone(),
            size: record.size,
            used,
            state,
            origin: record.origin,
            device: seen.device,
            uuid: record.id.uuid(),
            leaving: job.or(waits),
            ending: seen.ending.map(|ending| ending.text),
        }
    }

    fn fallback(&self) -> Option<Fallback> {
        let wanted = self.config.fallback.as_ref()?;
        let entry = self.fallback_entry();
        Some(Fallback {
            path: wanted.path.display().to_string(),
            on: entry.is_some(),
            size: ByteSize(entry.as_ref().map_or(0, |entry| entry.size)),
            used: ByteSize(entry.as_ref().map_or(0, |entry| entry.used)),
            priority: entry.map_or(i32::from(wanted.priority), |entry| entry.priority),
        })
    }

    fn memory(&self) -> Memory {
        let memory = self.live().memory;
        Memory { total: ByteSize(memory.total), available: ByteSize(memory.available) }
    }

    fn pressure(&self) -> Pressure {
        Pressure {
            told: self.watch.is_some(),
            some_avg10: pressure::some_avg10().unwrap_or(0),
            last: self.live().pressed.map(|pressed| whole_seconds(pressed.elapsed())),
        }
    }

    fn decision(&self) -> Decision {
        let live = self.live();
        let Some((decision, since)) = &live.decision else {
            return Decision {
                action: "none yet".to_owned(),
                reason: "it has just started".to_owned(),
                since: whole_seconds(self.now()),
            };
        };
        let action = match &decision.action {
            Action::Hold => "hold".to_owned(),
            Action::Make { size, .. } => format!("grow by {}", ByteSize(*size)),
            Action::Drain { name, .. } => format!("take {name} away"),
            Action::Stay { name } => format!("keep {name}"),
        };
        Decision { action, reason: decision.reason.clone(), since: whole_seconds(since.elapsed()) }
    }
}
