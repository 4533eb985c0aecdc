//! Asks the allocator about devices whose paths do not work: whether their memory is lost, and for the
//! present addresses. Changed addresses are saved in the record, so that a restart knows them.

use std::sync::{Arc, Weak};
use std::time::Duration;

use xpm_client_core::owner::{Guard, Heard, Known, Word};

use super::{Attached, Daemon, Slot, blocking};
use crate::records::Record;

impl Daemon {
    /// Guards a device in a task of its own, until the device is gone.
    pub(super) fn guard(self: &Arc<Daemon>, attached: &Arc<Attached>) {
        let Some(alarm) = attached.shown.guarded().map(xpm_client_core::owner::Guarded::alarm) else {
            return;
        };
        let guard = Guard::new(self.owner.clone(), attached.record().request.name);
        let (daemon, attached) = (Arc::clone(self), Arc::downgrade(attached));
        tokio::spawn(async move {
            while let Some(again) = look(&daemon, &guard, &attached).await {
                tokio::select! {
                    () = alarm.notified() => {}
                    () = tokio::time::sleep(again) => {}
                }
            }
        });
    }

    /// Triggers the guards of the devices that the news concern.
    pub(super) fn sound_alarms(&self, heard: &Heard) {
        for (name, slot) in &*self.slots() {
            let Slot::Shown(attached) = slot else { continue };
            let concerns = match heard {
                Heard::Appliance(of) => {
                    attached.record().map.grants.iter().any(|one| one.appliance_name == *of)
                }
                Heard::Allocation(_) | Heard::Missed => heard.may_order(name),
            };
            if let Some(guarded) = attached.shown.guarded().filter(|_| concerns) {
                guarded.alarm().notify_one();
            }
        }
    }
}

/// Asks once, if there is a reason. Returns the time until the next call; none when the device is gone.
async fn look(daemon: &Arc<Daemon>, guard: &Guard, attached: &Weak<Attached>) -> Option<Duration> {
    /// A device that works is checked only at this interval, to notice that it is gone.
    const IDLE: Duration = Duration::from_secs(60);
    let attached = attached.upgrade()?;
    let known = Known::from(&attached.record().map);
    let (word, again) = guard.look(known, attached.shown.guarded()?).await;
    if let Some(Word::Waits { .. }) = word {
        daemon.obey(&attached.record().request.name);
    }
    if let Some(Word::Holds { endpoints, .. }) = word {
        let (daemon, attached) = (Arc::clone(daemon), Arc::clone(&attached));
        let amended =
            blocking(move || attached.amend(&daemon.records, |record| move_grants(record, &endpoints)));
        if let Err(error) = amended.await {
            tracing::warn!("new addresses of appliances are not kept: {error}");
        }
    }
    Some(again.unwrap_or(IDLE))
}

type Endpoints = std::collections::BTreeMap<xpm_protocol::GrantId, xpm_protocol::api::appliance::Endpoints>;

/// Updates the addresses of a record's grants; returns whether any changed.
fn move_grants(record: &mut Record, endpoints: &Endpoints) -> bool {
    let mut has_moved = false;
    for grant in &mut record.map.grants {
        if let Some(new) = endpoints.get(&grant.id).filter(|new| **new != grant.endpoints) {
            grant.endpoints = new.clone();
            has_moved = true;
        }
    }
    has_moved
}
