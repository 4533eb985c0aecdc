//! Detaching: refused while somebody uses the device, unless forced.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{DeviceState, Form};

use super::{Attached, Busy, Daemon, Slot, blocking};
use crate::error::DeviceError;
use crate::usage;

/// Requests that take longer than this count as users.
const MOMENT: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

impl Daemon {
    /// Takes a device away and gives its allocation back. Runs to its end even if nobody waits for
    /// it any more.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the users, unless `force` is set.
    pub async fn detach(self: &Arc<Daemon>, name: Name, force: bool) -> Result<(), DeviceError> {
        let daemon = Arc::clone(self);
        let task = tokio::spawn(async move { daemon.detach_now(&name, force).await });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(DeviceError::new(ErrorKind::Internal, format!("detaching failed: {error}"))),
        }
    }

    async fn detach_now(self: &Arc<Daemon>, name: &Name, force: bool) -> Result<(), DeviceError> {
        let before = self.begin_detach(name)?;
        if let Slot::Shown(attached) = &before {
            let attached = Arc::clone(attached);
            if let Err(error) = blocking(move || take_away(&attached, force)).await {
                self.set(name, Some(before));
                return Err(error);
            }
        }
        drop(before);
        self.owe(name).await;
        let (daemon, record) = (Arc::clone(self), name.clone());
        let removed = blocking(move || daemon.records.remove(&record)).await;
        self.give_back(name).await;
        self.set(name, None);
        tracing::info!("allocation {name} is no longer shown");
        removed
    }

    /// Marks the slot and returns what it was.
    fn begin_detach(&self, name: &Name) -> Result<Slot, DeviceError> {
        let mut slots = self.slots();
        match slots.get(name) {
            None => Err(unknown(name)),
            Some(Slot::Busy(busy)) => {
                let what = format!("allocation {name} is {} just now", busy.doing);
                Err(DeviceError::new(ErrorKind::Conflict, what))
            }
            Some(Slot::Shown(_) | Slot::Waiting(_)) => {
                let before = slots.remove(name).ok_or_else(|| unknown(name))?;
                slots.insert(
                    name.clone(),
                    Slot::Busy(Busy { doing: "being detached", before: before.record() }),
                );
                Ok(before)
            }
        }
    }

    /// Devices that somebody uses and that need this process, with their users; at the end of the
    /// process. Can wait for the devices' I/O.
    pub(crate) fn in_use(&self) -> Vec<String> {
        let slots: Vec<Slot> = self.slots().values().cloned().collect();
        let needed = slots.iter().filter_map(|slot| match slot {
            Slot::Shown(attached) if !attached.shown.outlives_process() => Some(attached),
            _ => None,
        });
        let shown = needed
            .filter(|attached| attached.shown.disk().is_some())
            .map(|attached| (attached.shown.path(), users_of(attached, true)));
        // The users of a device that is not served again yet wait for just that.
        let waiting = slots.iter().filter(|slot| !matches!(slot, Slot::Shown(_))).filter_map(|slot| {
            let record = slot.record().filter(|record| record.request.form == Form::Ublk)?;
            let disk = format!("ublkb{}", record.number?);
            Some((format!("/dev/{disk}"), usage::users(&disk)))
        });
        shown
            .chain(waiting)
            .filter(|(_, users)| !users.is_empty())
            .map(|(path, users)| format!("{path}: {}", users.join(", ")))
            .collect()
    }

    /// Takes every device away at the end of the process, and keeps their records, so that the next
    /// one shows them again. What outlives the process, or waits for the next one, is left alone while it is used.
    pub(crate) fn take_all_away(&self) {
        let slots = std::mem::take(&mut *self.slots());
        for (name, slot) in slots {
            let Slot::Shown(attached) = slot else { continue };
            let (goes_on, waits) =
                (attached.shown.outlives_process(), attached.shown.waits_for_next_process());
            if (goes_on || waits) && !users_of(&attached, true).is_empty() {
                let what =
                    if goes_on { "goes on without this process" } else { "waits for the next process" };
                tracing::info!("{} is in use and {what}", attached.shown.path());
                continue;
            }
            let stuck = in_flight_still(&attached) > 0;
            if let Err(error) = attached.shown.hide(stuck) {
                tracing::warn!("allocation {name}: {error}");
            }
        }
    }
}

pub(super) fn unknown(name: &Name) -> DeviceError {
    DeviceError::new(
        ErrorKind::NotFound,
        format!("allocation {name} is not shown here; `xpm blk list` lists what is"),
    )
}

fn take_away(attached: &Attached, force: bool) -> Result<(), DeviceError> {
    let mut users = users_of(attached, !force);
    let in_flight = in_flight_still(attached);
    if in_flight > 0 {
        users.push(format!("{in_flight} requests in flight"));
    }
    if !force && !users.is_empty() {
        return Err(refusal(attached, &users));
    }
    let stuck = in_flight > 0 || attached.shown.health().state != DeviceState::Live;
    attached.shown.hide(force && stuck)
}

/// Requests that are in flight for longer than a moment: with them the device cannot be taken away
/// without failing them, because its end waits for theirs.
fn in_flight_still(attached: &Attached) -> u64 {
    let limit = Instant::now() + MOMENT;
    loop {
        let in_flight = attached.shown.health().in_flight;
        if in_flight == 0 || Instant::now() >= limit {
            return in_flight;
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn refusal(attached: &Attached, users: &[String]) -> DeviceError {
    let path = attached.shown.path();
    let request = attached.record().request;
    let way_out = match request.form {
        Form::NbdSocket(_) => "disconnect them".to_owned(),
        Form::VhostUser(_) => "shut it down, or take the disk out of it".to_owned(),
        _ if users.iter().any(|user| user == "swap") => format!("run `swapoff {path}`"),
        _ if users.iter().any(|user| user.starts_with("mounted")) => format!("run `umount {path}`"),
        _ => "wait for them or stop them".to_owned(),
    };
    let what = format!(
        "{path} (allocation {}) is in use: {}; {way_out} first, or use --force and lose what is not written back",
        request.name,
        users.join(", ")
    );
    DeviceError::new(ErrorKind::InUse, what)
}

/// Who uses a device now. `thorough` also looks for those who opened it for themselves alone, which
/// can wait for the device's I/O.
pub(super) fn users_of(attached: &Attached, thorough: bool) -> Vec<String> {
    let Some(disk) = attached.shown.disk() else {
        let form = attached.record().request.form;
        return match (form, attached.shown.clients()) {
            (_, 0) => Vec::new(),
            (Form::VhostUser(_), _) => vec!["a virtual machine".to_owned()],
            (_, 1) => vec!["1 NBD client".to_owned()],
            (_, count) => vec![format!("{count} NBD clients")],
        };
    };
    let mut users = usage::users(disk);
    if thorough && users.is_empty() && usage::is_claimed(disk) {
        users.push("opened exclusively by another program".to_owned());
    }
    users
}
