//! After a restart: show again what was shown before, with no help of the allocator; then attach
//! what the configuration lists.

use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::AttachDevice;

use super::{Busy, Daemon, Slot, Waiting};
use crate::error::DeviceError;
use crate::records::Record;
use crate::show::Readiness;

const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LONGEST: Duration = Duration::from_secs(15);

impl Daemon {
    /// Starts to show every record, and then every device of the configuration that is in none,
    /// again and again until it is shown or detached. Returns at once.
    ///
    /// # Errors
    /// When the records cannot be used.
    pub(crate) fn restore(self: &Arc<Daemon>) -> Result<(), DeviceError> {
        let records = self.records.load()?;
        let listed = self.config.device.iter();
        let new = listed.filter(|device| records.iter().all(|record| record.request.name != device.name));
        let new: Vec<AttachDevice> = new.cloned().collect();
        for record in records {
            self.wait(&record, "it is being shown".to_owned(), Instant::now());
            tokio::spawn(Arc::clone(self).show_again(record));
        }
        for device in new {
            tokio::spawn(Arc::clone(self).attach_listed(device));
        }
        Ok(())
    }

    fn wait(&self, record: &Record, reason: String, since: Instant) {
        let waiting = Waiting { record: record.clone(), reason, since };
        self.set(&record.request.name, Some(Slot::Waiting(Arc::new(waiting))));
    }

    async fn show_again(self: Arc<Daemon>, record: Record) {
        let name = record.request.name.clone();
        let since = Instant::now();
        let mut pause = PAUSE_FIRST;
        loop {
            if !self.mark_busy(&name) {
                return;
            }
            let shown = match self.check_safety(&record.request.form) {
                Ok(()) => self.show(record.clone(), Readiness::Later).await.map(drop),
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

    /// False when the slot was detached meanwhile.
    fn mark_busy(&self, name: &Name) -> bool {
        let mut slots = self.slots();
        let Some(Slot::Waiting(waiting)) = slots.get(name) else { return false };
        let before = Some(Box::new(waiting.record.clone()));
        slots.insert(name.clone(), Slot::Busy(Busy { doing: "being shown again", before }));
        true
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
