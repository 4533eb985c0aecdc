//! Attaching: owns the allocation, records it and shows it; undoes the earlier steps when a step fails.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{AttachDevice, Device, Form};
use xpm_protocol::{Name, Visitor};

use super::{Attached, Busy, Daemon, Slot, blocking};
use crate::config::check_device;
use crate::error::{DeviceError, Step};
use crate::frontend::nbd_socket::check_exposure;
use crate::frontend::{can_stand_by, check_support};
use crate::records::{Record, Role};
use crate::show::{Readiness, show};

impl Daemon {
    /// Shows an allocation. Runs to its end even if its caller no longer waits.
    ///
    /// # Errors
    /// The defect of the request, the allocator's refusal, or the feature that this machine lacks.
    pub async fn attach(self: &Arc<Daemon>, request: AttachDevice) -> Result<Device, DeviceError> {
        self.config.program.check(&request.form)?;
        check_device(&request).map_err(|error| DeviceError::new(ErrorKind::Invalid, error))?;
        self.check_safety(&request.form)?;
        if let Form::NbdSocket(place) = &request.form {
            // Checked before the allocator is asked.
            check_exposure(place, self.config.insecure)?;
        }
        if request.standby && !can_stand_by(&request.form) {
            return Err(DeviceError::unsupported(
                format!("a device of form {} cannot stand by: its I/O cannot wait that long", request.form),
                "use nbd-socket, vhost-user or a file (`xpm fs`)",
            ));
        }
        self.reserve(&request.name)?;
        let daemon = Arc::clone(self);
        let task = tokio::spawn(async move {
            let name = request.name.clone();
            let result = daemon.attach_reserved(request).await;
            if result.is_err() {
                daemon.set(&name, None);
            }
            result
        });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(DeviceError::new(ErrorKind::Internal, format!("attaching failed: {error}"))),
        }
    }

    fn reserve(&self, name: &Name) -> Result<(), DeviceError> {
        let mut slots = self.slots();
        let what = match slots.get(name) {
            None => {
                slots.insert(name.clone(), Slot::Busy(Busy { doing: "being attached", before: None }));
                return Ok(());
            }
            Some(Slot::Busy(busy)) => format!("allocation {name} is {} just now", busy.doing),
            Some(Slot::Waiting(_)) => format!("allocation {name} waits to be shown again; detach it first"),
            Some(Slot::Shown(attached)) => format!(
                "allocation {name} is shown already, as {} at {}; detach it first",
                attached.record().request.form,
                attached.shown.path()
            ),
        };
        Err(DeviceError::new(ErrorKind::Conflict, what))
    }

    async fn attach_reserved(self: &Arc<Daemon>, mut request: AttachDevice) -> Result<Device, DeviceError> {
        let form = request.form.clone();
        blocking(move || check_support(&form)).await?;
        let role = if request.standby { Role::StandsBy } else { Role::Owner };
        let map = match role {
            Role::StandsBy => self.stand_by_anew(&request).await?,
            _ => self.own_anew(&request).await?,
        };
        // These flags apply to this attach only: a copy of the record must not take the allocation from
        // another client.
        (request.force, request.lose, request.standby) = (false, false, false);
        if let Some(slab) = map.slabs.slabs.keys().next() {
            let line = format!(
                "allocation {} has slabs with names, such as `{slab}`, which a device would write over: remove them by the \
                 program that made them, or use another allocation",
                request.name
            );
            self.owe(&request.name, Vec::new()).await;
            self.give_back(&request.name).await;
            return Err(DeviceError::new(ErrorKind::Conflict, line));
        }
        let session = xpm_control::random::u128().at("make a session number")?;
        let name = request.name.clone();
        let record = Record { role, ..Record::new(request, map, session) };
        match self.show(record, Readiness::Required).await {
            Ok(attached) => {
                self.look_for_losses(&name);
                Ok(self.view_of(&attached))
            }
            Err(error) => {
                self.owe(&name, Vec::new()).await;
                self.give_back(&name).await;
                Err(error)
            }
        }
    }

    /// Shows a record's allocation and fills its slot. The record is saved before the allocation is shown, so
    /// that a restart finds every allocation that was ever shown.
    pub(super) async fn show(
        self: &Arc<Daemon>,
        record: Record,
        readiness: Readiness,
    ) -> Result<Arc<Attached>, DeviceError> {
        let daemon = Arc::clone(self);
        let attached = blocking(move || daemon.show_and_keep(record, readiness)).await?;
        let name = attached.record().request.name;
        self.set(&name, Some(Slot::Shown(Arc::clone(&attached))));
        self.guard(&attached);
        Ok(attached)
    }

    /// Removes the record of a failed attachment. The record of a device that existed before stays.
    fn undo_record(&self, record: &Record) {
        if record.pending
            && let Err(error) = self.records.remove(&record.request.name)
        {
            tracing::error!("{error}; it is forgotten at the next start");
        }
    }

    fn show_and_keep(&self, mut record: Record, readiness: Readiness) -> Result<Arc<Attached>, DeviceError> {
        // The record of a device that was taken over is written only after its users have it again: writing
        // may need their memory.
        let first = readiness != Readiness::TakenOver;
        if first {
            record.pending = readiness == Readiness::Required;
            if let Err(error) = self.records.save(&record) {
                self.undo_record(&record);
                return Err(error);
            }
        }
        let name = record.request.name.clone();
        let left = self.records.descriptor(&name).at("take over the descriptor of a device")?;
        let visitor = self.owner.life.map(|life| Visitor::new(life, &self.owner.host_name));
        let (shown, change) = match show(
            &record,
            &self.config,
            (self.owner.client, visitor.as_ref()),
            (&self.server, &self.trees),
            (readiness, left),
        ) {
            Ok(shown) => shown,
            Err(error) => {
                // A device that existed before is tried again; a new device is forgotten.
                self.undo_record(&record);
                return Err(error);
            }
        };
        record.number = shown.number();
        record.mounted = shown.mounted();
        if let Some(descriptor) = shown.descriptor()
            && let Err(error) = self.records.keep_descriptor(&name, descriptor)
        {
            // Only the successors of this process lack the descriptor.
            tracing::error!("allocation {name}: {error}: nothing can take it over");
        }
        let new = std::mem::take(&mut record.pending);
        if first && let Err(error) = self.records.save(&record) {
            if new {
                if let Err(error) = shown.hide(true) {
                    tracing::error!("{} cannot be taken away again: {error}", shown.path());
                }
                record.pending = true;
                self.undo_record(&record);
                return Err(error);
            }
            // The record was saved before; only the number may differ, which is a preference.
            tracing::error!("{error}");
        }
        tracing::info!("allocation {} is shown at {}", record.request.name, shown.path());
        Ok(Arc::new(Attached {
            record: Mutex::new(record),
            shown,
            keeping: Mutex::new(true),
            change: Mutex::new(change),
            since: Instant::now(),
        }))
    }
}
