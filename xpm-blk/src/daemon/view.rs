//! The view of devices in the control interface.

use std::sync::Arc;
use std::time::Instant;

use xpm_protocol::Name;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::api::blk::{Device, DeviceState, LinkState, LinkStatus, TransportKind};

use super::detach::users_of;
use super::{Attached, Daemon, Slot, whole_seconds};
use crate::error::DeviceError;
use crate::records::Record;

impl Daemon {
    /// Every device, by name.
    pub fn devices(&self) -> Vec<Device> {
        let slots: Vec<Slot> = self.slots().values().cloned().collect();
        slots.iter().filter_map(|slot| self.view(slot)).collect()
    }

    /// A device, by name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](xpm_protocol::api::ErrorKind).
    pub fn device(&self, name: &Name) -> Result<Device, DeviceError> {
        let slot = self.slots().get(name).cloned();
        slot.and_then(|slot| self.view(&slot)).ok_or_else(|| self.unknown(name))
    }

    fn view(&self, slot: &Slot) -> Option<Device> {
        match slot {
            Slot::Busy(busy) => {
                let record = busy.before.as_ref()?;
                Some(self.view_without_path(record, &format!("it is {}", busy.doing), Instant::now()))
            }
            Slot::Waiting(waiting) => {
                Some(self.view_without_path(&waiting.record, &waiting.reason, waiting.since))
            }
            Slot::Shown(attached) => Some(self.view_of(attached)),
        }
    }

    pub(super) fn view_of(&self, attached: &Arc<Attached>) -> Device {
        let health = attached.shown.health();
        Device {
            path: attached.shown.path(),
            state: health.state,
            links: health.links,
            users: users_of(attached, false),
            counters: health.counters,
            in_flight: health.in_flight,
            age: whole_seconds(attached.since),
            ..self.outline(&attached.record())
        }
    }

    /// The view of a device that is not shown again yet, or no longer: it has no path, and the reason is
    /// shown at its links.
    fn view_without_path(&self, record: &Record, reason: &str, since: Instant) -> Device {
        let since = whole_seconds(since);
        let links = record.map.grants.iter().map(|grant| LinkStatus {
            appliance: grant.appliance,
            appliance_name: grant.appliance_name.clone(),
            transport: record.request.transport.unwrap_or(TransportKind::NbdTcp),
            state: match record.given_up.contains_key(&grant.appliance) {
                true => LinkState::Lost,
                false => LinkState::Connecting,
            },
            since,
            reconnects: 0,
            reason: Some(reason.to_owned()),
        });
        let state = if record.given_up.is_empty() { DeviceState::Holding } else { DeviceState::Lost };
        Device { state, links: links.collect(), age: since, ..self.outline(record) }
    }

    fn outline(&self, record: &Record) -> Device {
        let shape = self.config.shape(&record.request, None);
        Device {
            name: record.request.name.clone(),
            form: record.request.form.clone(),
            path: "-".to_owned(),
            size: record.map.size,
            epoch: record.map.epoch,
            queues: shape.queues,
            depth: shape.depth,
            state: DeviceState::Holding,
            links: Vec::new(),
            users: Vec::new(),
            counters: Counters::default(),
            in_flight: 0,
            age: xpm_protocol::Span::default(),
            block_size: record.block_size(),
            role: record.role.shown(),
            ending: self.endings().get(&record.request.name).map(|ending| ending.text.clone()),
        }
    }
}
