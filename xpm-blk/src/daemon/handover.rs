//! Standing by for an allocation, and handing it over while it is in use. `records.rs` has the states.
//!
//! Only the allocator decides the role of a device. Its statement arrives by event, by regular questions, and
//! because appliances refuse the old keys; until it arrives, I/O waits. A new role is recorded before I/O
//! resumes, and I/O is stopped before the role is recorded.

use std::sync::Arc;

use xpm_client_core::Volume;
use xpm_client_core::owner::{Guard, Known, Word};
use xpm_protocol::GrantKey;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Map, Part, Report};
use xpm_protocol::api::blk::{AttachDevice, Form};

use super::orders::refused;
use super::{Attached, Daemon, blocking};
use crate::error::DeviceError;
use crate::records::{Record, Role};

impl Daemon {
    /// Follows the allocator's statement that this client has only this part in an allocation: its I/O waits
    /// from now on.
    pub(super) async fn take_part(self: &Arc<Daemon>, attached: &Arc<Attached>, part: Part) {
        let role = match part {
            Part::StandsBy => Role::StandsBy,
            Part::Holds { handover, to } => Role::HandedOver { handover, to },
        };
        let name = attached.record().request.name;
        let Some(why) = role.waits() else { return };
        let Some(volume) = attached.shown.volume() else {
            return tracing::error!(
                "allocation {name} is another client's, and its device cannot wait: I/O fails"
            );
        };
        volume.hold_all(&why);
        tracing::info!("allocation {name}: {why}");
        let kept = self.keep(attached, move |record| {
            if role == Role::StandsBy {
                record.map.grants.iter_mut().for_each(|grant| grant.key = GrantKey::NONE);
            }
            record.role = role;
        });
        if let Err(error) = kept.await {
            tracing::error!("allocation {name}: {error}; its keys are requested again at the next start");
        }
    }

    /// For a standby device: begins if this client is the owner now, and otherwise ensures that it still
    /// stands by.
    pub(super) async fn stand_by_or_begin(self: &Arc<Daemon>, attached: &Arc<Attached>) {
        let record = attached.record();
        let name = &record.request.name;
        match self.owner.orders(name).await {
            Ok(orders) => match orders.part {
                None => self.begin(attached, orders.contested).await,
                Some(Part::StandsBy) => {}
                Some(part) => self.take_part(attached, part).await,
            },
            // The standby was withdrawn, or the allocator lost its records.
            Err(error) if error.kind() == ErrorKind::Conflict => {
                let Err(error) = self.stand_by(&record.request).await else { return };
                tracing::warn!("allocation {name} does not stand by here any more: {error}");
                if let Some(volume) = attached.shown.volume() {
                    volume.hold_all(&format!("it does not stand by any more: {error}"));
                }
            }
            Err(error) => tracing::debug!("allocation {name}: {}", xpm_control::error_line(&error)),
        }
    }

    /// For a device that was handed over: resumes if the hand-over was rolled back, and ends if it was
    /// committed.
    pub(super) async fn wait_or_go_on(self: &Arc<Daemon>, attached: &Arc<Attached>) {
        let record = attached.record();
        let name = record.request.name.clone();
        let guard = Guard::new(self.owner.clone(), name.clone());
        match guard.word(Known::from(&record.map)).await {
            Some(Word::Holds { .. }) => self.begin(attached, true).await,
            Some(Word::Ended { why, recorded: true }) => self.end_handed_over(attached, &why).await,
            // An allocator that lost its metadata has no record; its answer ends no device.
            Some(Word::Ended { why, recorded: false }) => {
                tracing::warn!("{why}; its device here waits until it is detached by force");
            }
            Some(Word::Waits { .. }) | None => {}
        }
    }

    /// Handles a hand-over that was undone before this owner learned of it: the allocation is its own, and
    /// appliances accept the new keys only.
    pub(super) async fn renew(self: &Arc<Daemon>, attached: &Arc<Attached>, contested: bool) {
        if let Some(volume) = attached.shown.volume() {
            volume.hold_all("its appliances have new keys, which are asked for");
        }
        self.begin(attached, contested).await;
    }

    /// Handles that this client owns the allocation: gets its keys, and resumes I/O.
    async fn begin(self: &Arc<Daemon>, attached: &Arc<Attached>, contested: bool) {
        let record = attached.record();
        let name = record.request.name.clone();
        let request = AttachDevice { force: false, lose: false, ..record.request.clone() };
        let begun = match self.own(&request).await {
            Ok(map) => self.go_on(attached, map, contested).await,
            Err(error) => Err(error),
        };
        match begun {
            Ok(()) => tracing::info!("allocation {name} is this host's: I/O goes on"),
            Err(error) => {
                tracing::error!("allocation {name} is this host's, and its I/O waits still: {error}");
            }
        }
    }

    async fn go_on(
        self: &Arc<Daemon>,
        attached: &Arc<Attached>,
        map: Map,
        contested: bool,
    ) -> Result<(), DeviceError> {
        if map.version != attached.record().map.version {
            let what = "it lies elsewhere than when it was attached: detach it by force, and attach it again";
            return Err(DeviceError::new(ErrorKind::Conflict, what));
        }
        let role = if contested { Role::Contested } else { Role::Owner };
        let new = map.clone();
        self.keep(attached, move |record| (record.map, record.role) = (new, role)).await?;
        let volume = attached.shown.volume().ok_or_else(no_volume)?;
        volume.set_contested(contested);
        volume.go_on(&map).map_err(refused)
    }

    /// Records whether another client may get the allocation one day, and reports to the allocator that this
    /// is done.
    pub(super) async fn note_contested(self: &Arc<Daemon>, attached: &Arc<Attached>, contested: bool) {
        let role = if contested { Role::Contested } else { Role::Owner };
        let record = attached.record();
        let name = &record.request.name;
        let Some(volume) = attached.shown.volume().cloned() else {
            if contested {
                let why = format!("it is shown as {}, which cannot wait", record.request.form);
                let _ = self.owner.say(name, &Report::Kept { why }).await;
            }
            return;
        };
        if record.role != role {
            let kept = self.keep(attached, move |record| record.role = role).await;
            if let Err(error) = kept {
                return tracing::error!("allocation {name}: {error}");
            }
            Volume::set_contested(&volume, contested);
        }
        // Also when it was recorded before, because the allocator may not know that.
        if contested {
            let _ = self.owner.say(name, &Report::Holds).await;
        }
    }

    /// Handles that the allocation belongs to another client for good.
    async fn end_handed_over(self: &Arc<Daemon>, attached: &Arc<Attached>, why: &str) {
        let Record { request, .. } = attached.record();
        tracing::info!("{why}, for good: its device here ends");
        if let Some(volume) = attached.shown.volume() {
            volume.end_all(why);
        }
        // A kernel device stays until it has no users. Users of a socket or a file are disconnected with it:
        // it must be gone when the allocation comes back, and programs that are about to end still have the
        // file open.
        let by_force = matches!(request.form, Form::NbdSocket(_) | Form::VhostUser(_) | Form::File(_));
        if let Err(error) = self.detach(request.name.clone(), by_force).await {
            tracing::warn!("allocation {}: {error}", request.name);
        }
    }

    async fn keep(
        self: &Arc<Daemon>,
        attached: &Arc<Attached>,
        change: impl FnOnce(&mut Record) + Send + 'static,
    ) -> Result<(), DeviceError> {
        let (daemon, attached) = (Arc::clone(self), Arc::clone(attached));
        blocking(move || attached.keep_with(&daemon.records, change)).await
    }
}

fn no_volume() -> DeviceError {
    DeviceError::new(ErrorKind::Internal, "the device has no volume")
}
