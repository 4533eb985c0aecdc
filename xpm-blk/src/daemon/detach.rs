//! Detaching: refused while the device is in use, unless forced.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{Cache, Device, DeviceState, Form, LinkState};

use super::{Attached, Busy, Daemon, Slot, blocking};
use crate::error::DeviceError;
use crate::records::Record;
use crate::usage;

/// Requests in flight for longer than this count as use.
const MOMENT: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Clients that stay connected to a socket for longer than this count as users.
const LOOK: Duration = Duration::from_secs(2);

impl Daemon {
    /// Removes a device and gives its allocation back. Runs to its end even if its caller no longer waits.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the users, unless `force` is set.
    pub async fn detach(self: &Arc<Daemon>, name: Name, force: bool) -> Result<(), DeviceError> {
        let daemon = Arc::clone(self);
        let task = tokio::spawn(async move {
            daemon.detach_now(&name, force).await?;
            // Of a tree that is gone; none of anything else.
            for file in daemon.files_of(&name) {
                if let Err(error) = daemon.detach_now(&file, true).await {
                    tracing::warn!("{error}");
                }
            }
            Ok(())
        });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(DeviceError::new(ErrorKind::Internal, format!("detaching failed: {error}"))),
        }
    }

    async fn detach_now(self: &Arc<Daemon>, name: &Name, force: bool) -> Result<(), DeviceError> {
        let before = self.begin_detach(name)?;
        let taken = match &before {
            Slot::Shown(attached) => {
                let attached = Arc::clone(attached);
                let taken = move || {
                    take_away(&attached, force)?;
                    attached.end_keeping();
                    Ok(())
                };
                blocking(taken).await
            }
            Slot::Waiting(waiting) if !force => {
                let record = waiting.record.clone();
                blocking(move || check_left(&record)).await
            }
            Slot::Waiting(_) | Slot::Busy(_) => Ok(()),
        };
        if let Err(error) = taken {
            self.set(name, Some(before));
            return Err(error);
        }
        let given_up = before.record().map(|record| record.given_up.into_keys().collect());
        drop(before);
        self.owe(name, given_up.unwrap_or_default()).await;
        let (daemon, record) = (Arc::clone(self), name.clone());
        let removed = blocking(move || daemon.records.remove(&record)).await;
        self.give_back(name).await;
        self.set(name, None);
        tracing::info!("allocation {name} is no longer shown");
        removed
    }

    /// Ends all I/O of a device with an error, for good. The device stays until it is detached.
    ///
    /// # Errors
    /// When the device is not shown, or its form cannot do this.
    pub async fn abort(self: &Arc<Daemon>, name: &Name) -> Result<Device, DeviceError> {
        let Some(Slot::Shown(attached)) = self.slots().get(name).cloned() else {
            return Err(self.unknown(name));
        };
        let device = Arc::clone(&attached);
        blocking(move || device.shown.abort()).await?;
        tracing::error!("{} (allocation {name}) is aborted: its I/O fails", attached.shown.path());
        Ok(self.view_of(&attached))
    }

    /// The state of the kernel's cache of a device's data; with `drop`, after the cache was dropped, which
    /// blocks until changed data are written back.
    ///
    /// # Errors
    /// When the device is not shown, or its form has no cache of its own.
    pub async fn cache(self: &Arc<Daemon>, name: &Name, drop: bool) -> Result<Cache, DeviceError> {
        let Some(Slot::Shown(attached)) = self.slots().get(name).cloned() else {
            return Err(self.unknown(name));
        };
        blocking(move || attached.shown.cache(drop)).await
    }

    pub(super) fn unknown(&self, name: &Name) -> DeviceError {
        let word = self.config.program.word();
        let what = format!("allocation {name} is not shown here; `xpm {word} list` lists what is");
        DeviceError::new(ErrorKind::NotFound, what)
    }

    /// Marks the slot as busy and returns its previous state.
    fn begin_detach(&self, name: &Name) -> Result<Slot, DeviceError> {
        let mut slots = self.slots();
        match slots.get(name) {
            None => Err(self.unknown(name)),
            Some(Slot::Busy(busy)) => {
                let what = format!("allocation {name} is {} just now", busy.doing);
                Err(DeviceError::new(ErrorKind::Conflict, what))
            }
            Some(Slot::Shown(_) | Slot::Waiting(_)) => {
                let before = slots.remove(name).ok_or_else(|| self.unknown(name))?;
                slots.insert(
                    name.clone(),
                    Slot::Busy(Busy { doing: "being detached", before: before.record() }),
                );
                Ok(before)
            }
        }
    }

    /// Used devices that need this process, with their users; called at the end of the process. Can wait for
    /// the devices' I/O.
    pub(crate) fn in_use(&self) -> Vec<String> {
        let slots: Vec<Slot> = self.slots().values().cloned().collect();
        let needed = slots.iter().filter_map(|slot| match slot {
            Slot::Shown(attached) if !attached.shown.outlives_process() => Some(attached),
            _ => None,
        });
        let shown = needed
            .filter(|attached| attached.shown.disk().is_some() || attached.shown.descriptor().is_some())
            .map(|attached| (attached.shown.path(), users_of(attached, true)));
        // The users of a device that is not served yet wait for it to be served.
        let waiting = slots.iter().filter(|slot| !matches!(slot, Slot::Shown(_))).filter_map(|slot| {
            let disk = slot.record().filter(|record| record.request.form == Form::Ublk)?.left_disk()?;
            Some((format!("/dev/{disk}"), usage::users(&disk)))
        });
        shown
            .chain(waiting)
            .filter(|(_, users)| !users.is_empty())
            .map(|(path, users)| format!("{path}: {}", users.join(", ")))
            .collect()
    }

    /// Removes every device at the end of the process, and keeps the records, so that the next process shows
    /// the devices again. A used device that outlives the process, or waits for the next one, is left alone.
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

fn take_away(attached: &Attached, force: bool) -> Result<(), DeviceError> {
    if !force {
        wait_for_looks(attached);
    }
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

/// A client that only queries a socket, such as `nbdinfo`, disconnects within a moment.
fn wait_for_looks(attached: &Attached) {
    let limit = Instant::now() + LOOK;
    while attached.shown.clients() > 0 && Instant::now() < limit {
        thread::sleep(LOOK_AGAIN);
    }
}

/// Refuses to forget a device that is not served but that the kernel keeps for its users.
fn check_left(record: &Record) -> Result<(), DeviceError> {
    let Some(disk) = record.left_disk() else { return Ok(()) };
    let mut users = usage::users(&disk);
    users.extend(usage::openers(&disk));
    if users.is_empty() {
        return Ok(());
    }
    let what = format!(
        "/dev/{disk} (allocation {}) is not served now, and is in use: {}; end that first, or use --force and lose what is not \
         written back",
        record.request.name,
        users.join(", ")
    );
    Err(DeviceError::new(ErrorKind::InUse, what))
}

/// Number of requests that are in flight for longer than a moment: with them the device cannot be removed
/// without failing them, because its removal waits for them.
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
        Form::File(_) | Form::Tree(_) => "end these programs".to_owned(),
        _ if users.iter().any(|user| user.starts_with("held by loop")) => {
            "run `umount` on what is mounted and `losetup --detach` on the loop device".to_owned()
        }
        _ if users.iter().any(|user| user == "swap") => format!("run `swapoff {path}`"),
        _ if users.iter().any(|user| user.starts_with("mounted")) => format!("run `umount {path}`"),
        _ => "wait for them or stop them".to_owned(),
    };
    let silent = attached.shown.health().links.into_iter().find(|link| link.state == LinkState::Connecting);
    let advice = silent.map_or_else(String::new, |link| advice_for_silent(&link.appliance_name));
    let what = format!(
        "{path} (allocation {}) is in use: {}; {way_out} first, or use --force and lose what is not written back{advice}",
        request.name,
        users.join(", ")
    );
    DeviceError::new(ErrorKind::InUse, what)
}

/// The advice for I/O that waits for an appliance, as the end of a line.
fn advice_for_silent(name: &Name) -> String {
    format!(
        ". Appliance {name} does not answer: if that machine never comes back, `xpm appliance forget {name} --lost` gives its \
         memory up (without the allocator: `xpm blk give-up {name}`)"
    )
}

/// The present users of a device. With `thorough`, also two searches that can block: the search for programs that
/// have the device open waits until programs that only query it are done, and the search for a program that opened
/// it exclusively opens the device itself, which can wait for the device's I/O.
pub(super) fn users_of(attached: &Attached, thorough: bool) -> Vec<String> {
    let Some(disk) = attached.shown.disk() else {
        let form = attached.record().request.form;
        return match (form, attached.shown.clients()) {
            (Form::File(_) | Form::Tree(_) | Form::InTree(_), _) => attached.shown.users(),
            (_, 0) => Vec::new(),
            (Form::VhostUser(_), _) => vec!["a virtual machine".to_owned()],
            (_, 1) => vec!["1 NBD client".to_owned()],
            (_, count) => vec![format!("{count} NBD clients")],
        };
    };
    let mut users = usage::users(disk);
    if thorough {
        users.extend(usage::openers(disk));
    }
    if thorough && users.is_empty() && usage::is_claimed(disk) {
        users.push("opened exclusively by another program".to_owned());
    }
    users
}
