//! Giving up an appliance that does not come back: I/O to it ends for good. The operator tells the allocator,
//! whose statement arrives by event or by question, or this daemon if the allocator cannot be reached.

use std::sync::Arc;

use xpm_client_core::owner::lost_on;
use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{DeviceUse, Orders, Report};
use xpm_protocol::api::blk::{Device, Form, LinkState};
use xpm_protocol::{ApplianceId, Name};

use super::detach::users_of;
use super::{Attached, Daemon, Slot, Waiting, blocking};
use crate::error::DeviceError;
use crate::records::Record;
use crate::show::end_left;

impl Daemon {
    /// Reports the use of an allocation to the allocator, and gives up the appliances that its answer names.
    /// In a task of its own: a change in progress may wait for exactly that.
    pub(super) fn look_for_losses(self: &Arc<Daemon>, name: &Name) {
        let (daemon, name) = (Arc::clone(self), name.clone());
        let attached = match self.slots().get(&name).cloned() {
            Some(Slot::Shown(attached)) => attached,
            Some(Slot::Waiting(_)) => {
                return drop(tokio::spawn(async move { daemon.look_waiting(&name).await }));
            }
            Some(Slot::Busy(_)) | None => return,
        };
        tokio::spawn(async move {
            let record = attached.record();
            if record.role.waits().is_some() || !daemon.is_registered(&record).await {
                return;
            }
            let shown = Arc::clone(&attached);
            let used = blocking(move || {
                Ok(DeviceUse { device: shown.shown.path(), users: users_of(&shown, false) })
            });
            let Ok(used) = used.await else { return };
            let Ok(orders) = daemon.orders_with_use(&name, used).await else { return };
            let orders = daemon.tell_given_up(&attached.record(), orders).await;
            for lender in orders.given_up {
                daemon.give_up(&attached, lender.appliance, lender.name.clone()).await;
            }
        });
    }

    /// As [`Daemon::look_for_losses`], for a device that is not served now and whose I/O the kernel may hold.
    async fn look_waiting(self: &Arc<Daemon>, name: &Name) {
        let Ok(orders) = self.owner.orders(name).await else { return };
        let Some(Slot::Waiting(waiting)) = self.slots().get(name).cloned() else { return };
        let orders = self.tell_given_up(&waiting.record, orders).await;
        for lender in orders.given_up {
            self.give_up_waiting(name, lender.appliance, &lender.name).await;
        }
    }

    /// Reports the appliances that the operator gave up here. The record keeps them until the allocator has
    /// received the report.
    async fn tell_given_up(&self, record: &Record, mut orders: Orders) -> Orders {
        for appliance in record.given_up.keys() {
            if orders.given_up.iter().any(|known| known.appliance == *appliance) {
                continue;
            }
            let report = Report::GaveUp { appliance: *appliance };
            match self.owner.say(&record.request.name, &report).await {
                Ok(new) => orders = new,
                // Also an allocator of a version without this report; the report is repeated with the next
                // question.
                Err(error) => tracing::debug!("allocation {}: {}", record.request.name, error_line(&error)),
            }
        }
        orders
    }

    async fn give_up_waiting(self: &Arc<Daemon>, name: &Name, appliance: ApplianceId, lender: &Name) {
        let Some(Slot::Waiting(waiting)) = self.slots().get(name).cloned() else { return };
        let (mut record, why) = (waiting.record.clone(), lost_on(lender));
        if record.given_up.insert(appliance, why.clone()).is_some() {
            return;
        }
        let new = Waiting { record: record.clone(), reason: why.clone(), since: waiting.since };
        {
            // Another task may be showing the device by now; then it is checked again soon.
            let mut slots = self.slots();
            match slots.get(name) {
                Some(Slot::Waiting(now)) if Arc::ptr_eq(now, &waiting) => {
                    slots.insert(name.clone(), Slot::Waiting(Arc::new(new)));
                }
                _ => return,
            }
        }
        tracing::error!("allocation {name} is {why}; I/O to what lay there fails");
        let daemon = Arc::clone(self);
        let done = blocking(move || {
            let kept = daemon.records.save(&record);
            if record.request.form == Form::NbdDirect {
                end_left(&record, daemon.owner.client)?;
            }
            kept
        });
        if let Err(error) = done.await {
            tracing::error!("allocation {name}: {error}");
        }
    }

    async fn orders_with_use(&self, name: &Name, used: DeviceUse) -> Result<Orders, ClientError> {
        match self.owner.say(name, &Report::Used(used)).await {
            // An allocator of a version without this report.
            Err(ClientError::Refused(body)) if body.kind == ErrorKind::Invalid => {
                self.owner.orders(name).await
            }
            orders => orders,
        }
    }

    /// Gives up an appliance of an allocation. Continues even if that cannot be recorded: after a restart,
    /// the allocator or the operator repeats it.
    async fn give_up(&self, attached: &Arc<Attached>, appliance: ApplianceId, lender: Name) {
        let mut record = attached.record();
        let why = lost_on(&lender);
        if record.given_up.insert(appliance, why.clone()).is_some() {
            return;
        }
        let (records, attached) = (Arc::clone(&self.records), Arc::clone(attached));
        let done = blocking(move || {
            let name = &attached.record().request.name;
            tracing::error!(
                "{} (allocation {name}) is {why}; I/O to what lay there fails",
                attached.shown.path()
            );
            let kept = attached.keep_with(&records, |record| {
                record.given_up.insert(appliance, why.clone());
            });
            attached.shown.give_up(appliance, &why);
            kept
        });
        if let Err(error) = done.await {
            tracing::error!("that {lender} is given up is forgotten at a restart: {error}");
        }
    }

    /// Gives up an appliance at once, by its name or id, for when the allocator cannot be reached. Returns
    /// the state of each device that had memory on it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when no device has memory on it, [`ErrorKind::InUse`] while it answers.
    pub async fn lose(self: &Arc<Daemon>, lender: &str) -> Result<Vec<Device>, DeviceError> {
        let slots: Vec<(Name, Slot)> =
            self.slots().iter().map(|(name, slot)| (name.clone(), slot.clone())).collect();
        let mut waiting = Vec::new();
        for (name, slot) in &slots {
            let Slot::Waiting(one) = slot else { continue };
            let grants = one.record.map.grants.iter();
            let mut of_it = grants.filter(|grant| {
                grant.appliance_name.as_str() == lender || grant.appliance.to_string() == lender
            });
            if let Some(grant) = of_it.next() {
                waiting.push((name.clone(), grant.appliance, grant.appliance_name.clone()));
            }
        }
        let shown = slots.into_iter().filter_map(|(_, slot)| match slot {
            Slot::Shown(attached) => Some(attached),
            _ => None,
        });
        let mut hit = Vec::new();
        for attached in shown {
            let links = attached.shown.health().links;
            let mut of_it = links.iter().filter(|link| {
                link.appliance_name.as_str() == lender || link.appliance.to_string() == lender
            });
            let Some(link) = of_it.next() else { continue };
            if link.state == LinkState::Up {
                let what = format!(
                    "appliance {} answers, so its memory is not lost ({} is connected to it); to give it up all the same, end its \
                     process first",
                    link.appliance_name,
                    attached.shown.path()
                );
                return Err(DeviceError::new(ErrorKind::InUse, what));
            }
            hit.push((Arc::clone(&attached), link.appliance, link.appliance_name.clone()));
        }
        if hit.is_empty() && waiting.is_empty() {
            let what = format!(
                "no device here has memory on an appliance `{lender}`; `xpm blk show NAME` lists those of a device"
            );
            return Err(DeviceError::new(ErrorKind::NotFound, what));
        }
        for (attached, appliance, name) in &hit {
            self.give_up(attached, *appliance, name.clone()).await;
        }
        for (name, appliance, lender) in &waiting {
            self.give_up_waiting(name, *appliance, lender).await;
        }
        let names = hit.iter().map(|(attached, ..)| attached.record().request.name);
        for name in names.chain(waiting.iter().map(|(name, ..)| name.clone())) {
            self.look_for_losses(&name);
        }
        let daemon = Arc::clone(self);
        blocking(move || Ok(hit.iter().map(|(attached, ..)| daemon.view_of(attached)).collect())).await
    }
}
