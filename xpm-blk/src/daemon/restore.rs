//! After a restart: shows again all devices that were shown before, without the allocator; then attaches the
//! devices in the configuration.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{AttachDevice, Form};

use super::{Busy, Daemon, Slot, Waiting, blocking};
use crate::error::DeviceError;
use crate::frontend::kernel_nbd;
use crate::frontend::ublk::{self, Mark};
use crate::owed::Debts;
use crate::program::Program;
use crate::records::{Record, Told};
use crate::show::Readiness;

/// How long the first devices that are taken over may take before the others follow.
const FIRST_LIMIT: Duration = Duration::from_secs(5);
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LONGEST: Duration = Duration::from_secs(15);

impl Daemon {
    /// Starts to show every record, and then every device of the configuration without a record, repeatedly
    /// until it is shown or detached. Does not block.
    ///
    /// # Errors
    /// When the records cannot be used.
    pub(crate) fn restore(self: &Arc<Daemon>) -> Result<(), DeviceError> {
        let debts = Debts::load(&self.config.state());
        let (pending, mut records): (Vec<Record>, Vec<Record>) =
            self.records.load()?.into_iter().partition(|record| record.pending);
        pending.iter().for_each(|record| self.undo(record));
        // The device was removed, and the process ended before its record was removed.
        let left: Vec<Name> = records.iter().map(|record| record.request.name.clone()).collect();
        for name in left.iter().filter(|name| debts.has(name) && self.is_new(name)) {
            self.records.remove(name)?;
        }
        records.retain(|record| !debts.has(&record.request.name) || !self.is_new(&record.request.name));
        self.show_debts(&debts);
        if let Ok(mut known) = self.debts.try_lock() {
            *known = debts;
        }
        let wanted: Vec<Mark> =
            records.iter().map(|record| Mark::new(self.owner.client, record.session)).collect();
        let client = self.owner.client;
        let wanted_nbd: Vec<String> =
            records.iter().map(|record| kernel_nbd::identifier(client, &record.map)).collect();
        if self.config.program == Program::Blk {
            let lines = ublk::remove_orphans(client, &wanted);
            for line in lines.into_iter().chain(kernel_nbd::remove_orphans(client, &wanted_nbd)) {
                tracing::warn!("{line}");
            }
        }
        let listed = self.config.device.iter();
        let new = listed.filter(|device| records.iter().all(|record| record.request.name != device.name));
        let new: Vec<AttachDevice> = new.filter(|device| self.is_new(&device.name)).cloned().collect();
        for mut record in records {
            if self.is_new(&record.request.name) {
                record.begin_life(Told::ByDisk);
                (record.request.force, record.request.lose) = (false, false);
                self.wait(&record, "it is being shown".to_owned(), Instant::now());
                tokio::spawn(Arc::clone(self).show_again(record, Readiness::Later));
            }
        }
        for device in new {
            tokio::spawn(Arc::clone(self).attach_listed(device));
        }
        Ok(())
    }

    /// Undoes an attachment that an earlier life did not complete.
    fn undo(self: &Arc<Daemon>, record: &Record) {
        let name = record.request.name.clone();
        let given_up = record.given_up.keys().copied().collect();
        tracing::warn!("allocation {name} was being attached when the process ended: that is undone");
        if let Err(error) = self.records.remove(&name) {
            tracing::error!("{error}");
        }
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            daemon.owe(&name, given_up).await;
            daemon.give_back(&name).await;
        });
    }

    fn is_new(&self, name: &Name) -> bool {
        !self.slots().contains_key(name)
    }

    /// Takes over all devices of a dead process, first those that this host may need to continue at all.
    /// Reads and writes no file before these are shown or have failed. After that, [`Daemon::restore`] finds
    /// the other devices.
    pub(crate) async fn take_over(self: &Arc<Daemon>) {
        let (first, later): (Vec<Record>, Vec<Record>) = self
            .records
            .inherited()
            .into_iter()
            .filter(|record| !record.pending)
            .partition(|record| record.request.form == Form::Ublk || record.request.form.is_of_files());
        let (done, mut all_done) = mpsc::channel::<()>(1);
        for (record, done) in first.into_iter().map(|record| (record, Some(done.clone()))) {
            self.go_on_with(record, done);
        }
        drop(done);
        let _ = tokio::time::timeout(FIRST_LIMIT, all_done.recv()).await;
        later.into_iter().for_each(|record| self.go_on_with(record, None));
    }

    fn go_on_with(self: &Arc<Daemon>, mut record: Record, done: Option<mpsc::Sender<()>>) {
        record.begin_life(Told::ByItself);
        self.wait(&record, "it is being taken over".to_owned(), Instant::now());
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            let name = record.request.name.clone();
            daemon.clone().show_again(record, Readiness::TakenOver).await;
            drop(done);
            daemon.write_down(&name).await;
        });
    }

    /// Writes the record of a device that was taken over.
    async fn write_down(self: &Arc<Daemon>, name: &Name) {
        let Some(Slot::Shown(attached)) = self.slots().get(name).cloned() else { return };
        let daemon = Arc::clone(self);
        let written = blocking(move || attached.write_down(&daemon.records)).await;
        if let Err(error) = written {
            tracing::warn!("allocation {name}: {error}");
        }
    }

    fn wait(&self, record: &Record, reason: String, since: Instant) {
        let waiting = Waiting { record: record.clone(), reason, since };
        self.set(&record.request.name, Some(Slot::Waiting(Arc::new(waiting))));
    }

    /// A record of another machine, or of another installation, is shown only if the allocator permits it,
    /// because the device may be in use there.
    async fn may_show(&self, record: &mut Record) -> Result<(), DeviceError> {
        // A device that waits for the allocator's statement asks for it when it is shown.
        if record.is_of(self.owner.life.as_ref()) || record.role.waits().is_some() {
            return Ok(());
        }
        let owned = self.own(&record.request).await;
        let map = owned.map_err(|error| {
            let shown = record.life.map(|life| life.shown()).unwrap_or_default();
            let what = format!("it was shown on another machine ({shown}) and is not shown here: {error}");
            DeviceError::new(error.kind(), what)
        })?;
        // A change that was firm there was decided there.
        *record = Record { map, change: None, life: self.owner.life, ..record.clone() };
        Ok(())
    }

    async fn show_again(self: Arc<Daemon>, record: Record, readiness: Readiness) {
        let name = record.request.name.clone();
        let since = Instant::now();
        let mut pause = PAUSE_FIRST;
        loop {
            // The latest record: an appliance of it may have been given up since.
            let Some(mut record) = self.mark_busy(&name) else { return };
            let may = match readiness {
                Readiness::TakenOver => Ok(()),
                _ => match self.check_safety(&record.request.form) {
                    Ok(()) => self.may_show(&mut record).await,
                    error => error,
                },
            };
            let shown = match may {
                Ok(()) => self.show(record.clone(), readiness).await.map(drop),
                Err(error) => Err(error),
            };
            let Err(error) = shown else { return };
            if pause == PAUSE_FIRST {
                tracing::warn!("allocation {name} cannot be shown again yet: {error}");
            }
            self.wait(&record, error.to_string(), since);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_LONGEST);
        }
    }

    /// Marks the slot as busy and returns its record; none when the slot was detached meanwhile.
    fn mark_busy(&self, name: &Name) -> Option<Record> {
        let mut slots = self.slots();
        let Some(Slot::Waiting(waiting)) = slots.get(name) else { return None };
        let record = waiting.record.clone();
        let before = Some(Box::new(record.clone()));
        slots.insert(name.clone(), Slot::Busy(Busy { doing: "being shown again", before }));
        Some(record)
    }

    async fn attach_listed(self: Arc<Daemon>, device: AttachDevice) {
        let mut pause = PAUSE_FIRST;
        while let Err(error) = self.attach(device.clone()).await {
            if error.kind() == ErrorKind::Conflict {
                return;
            }
            if pause == PAUSE_FIRST {
                tracing::warn!("device {} of the configuration: {error}; trying again", device.name);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_LONGEST);
        }
    }
}
