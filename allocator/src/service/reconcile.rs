//! Settles the steps that a restart finds half done.
//!
//! - `Creating`: no requester was told that the allocation exists, so it is undone.
//! - `Deleting`, `Undoing`: continued, at each appliance once it is heard.
//! - `Ready` with a next epoch: unchanged; the next attach finishes the change of owner.
//! - `Ready` with a hand-over that is `Raising` or `Returning`: the old owner gets the allocation back, once its
//!   appliances are heard (`handover.rs`).
//! - `Ready` with a change that is `Preparing`: the change is given up. With a change that is `Open` or `Switched`:
//!   the owner goes on with it; without an owner, the change is carried out or ended.
//!
//! Reservations need no action: an appliance drops them by itself when their time is over.

use std::time::Duration;

use xpm_protocol::AllocationId;
use xpm_protocol::api::allocator::ApplianceState;

use super::{Effect, Moment, Service, Work};
use crate::policy::Policy;
use crate::store::Loaded;
use crate::store::record::{AllocationRecord, Phase, Stage};

/// How long known appliances are waited for after a start, in heartbeat intervals.
const PATIENCE: u32 = 3;

impl Service {
    /// Loads the stored state; to be called once, before any event.
    pub fn restore(&mut self, now: Moment, loaded: Loaded) -> Vec<Effect> {
        self.now = now;
        self.now.unix = self.read_clock(now);
        self.state = loaded.state;
        // First, so that events of this process get higher numbers than the loaded ones.
        self.restore_events(loaded.events);
        for appliance in loaded.appliances {
            self.inventory.restore(appliance);
        }
        self.policy = Policy::load(loaded.revision, loaded.documents, loaded.written);
        let policy = &self.policy;
        self.inventory.profile(|name| policy.appliance(name));
        for (record, steps_from) in self.without_absence(loaded.allocations, loaded.alive) {
            self.restore_allocation(record, steps_from);
        }
        self.ask_who_is_there();
        self.save_events();
        debug_assert_eq!(self.check(), Ok(()));
        std::mem::take(&mut self.effects)
    }

    fn restore_allocation(&mut self, mut record: AllocationRecord, steps_from: u64) {
        let id = record.id;
        if record.phase == Phase::Creating {
            // The stored record may say `Creating` until it is removed: each start would undo it again.
            tracing::info!("allocation {} ({id}) was not finished: it is undone", record.name);
            record.phase = Phase::Undoing;
        }
        let ready = record.phase == Phase::Ready;
        if ready {
            self.restore_handover(&mut record, self.now.at + self.patience());
        }
        let (stage, owned) = (record.change.as_ref().map(|change| change.stage), record.owner.is_some());
        self.insert(record, Work::Idle);
        self.entry(id).steps_from = steps_from;
        self.set_timer(id);
        match stage {
            _ if !ready => self.purge_when_heard(id, self.now.at + self.patience()),
            Some(Stage::Open | Stage::Switched) if owned => {}
            Some(_) => drop(self.unsettled.insert(id, self.now.at + self.patience())),
            None => {}
        }
    }

    /// How long known appliances are waited for after a start. Their reports on the state of the metadata have to come
    /// first: if the metadata are outdated, memory that they list as half done may be in use since.
    fn patience(&self) -> Duration {
        self.settings.interval * PATIENCE
    }

    /// Settles the changes whose appliances were heard or are late.
    pub(super) fn settle_restored(&mut self) {
        let now = self.now.at;
        let heard = |id: &AllocationId| {
            let appliances = self.allocations.get(id).map(|entry| entry.record.appliances());
            appliances.is_none_or(|all| {
                all.iter().all(|one| self.inventory.state(*one, now) != Some(ApplianceState::Silent))
            })
        };
        let due: Vec<AllocationId> = self
            .unsettled
            .iter()
            .filter(|(id, until)| **until <= now || heard(id))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.unsettled.remove(&id);
            let Some(entry) = self.allocations.get(&id) else { continue };
            if !matches!(entry.work, Work::Idle) || entry.record.phase != Phase::Ready {
                continue;
            }
            let owned = entry.record.owner.is_some();
            match entry.record.change.as_ref().map(|change| change.stage) {
                Some(Stage::Preparing) => self.settle_change(id),
                Some(Stage::Open) if !owned => self.change_is_open(id),
                Some(Stage::Switched) if !owned => self.settle_change(id),
                _ => {}
            }
        }
    }
}
