//! Removing an area: swapoff, device, allocation, record. Each step first checks whether it is done. Until
//! swapoff has ended it can be cancelled, and the area stays as it was.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xpm_control::proc;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;

use super::{Daemon, Job};
use crate::error::Error;
use crate::os::hand::Ended;
use crate::os::table;
use crate::policy::Cause;
use crate::state::{Record, Stage};

/// Interval of signalling the swapoff process to stop, until it does.
const STOP_EVERY: Duration = Duration::from_millis(100);
/// How often removing a device is tried while another program, such as udev, queries it.
const DETACH_TRIES: u32 = 10;
const DETACH_PAUSE: Duration = Duration::from_millis(300);
/// Time limit of an order.
const ORDER_LIMIT: Duration = Duration::from_secs(60);
/// Pause before swapoff is tried again while the machine shuts down.
const AGAIN: Duration = Duration::from_millis(500);

/// The name of removing in the log and the status.
pub(super) const DRAIN: &str = "drain";

impl Daemon {
    /// Starts removing an area, beside the loop.
    pub(super) fn begin_leave(self: &Arc<Daemon>, name: &Name, cause: Cause, why: &str) -> Result<(), Error> {
        let calm = cause == Cause::Calm;
        let state = self.store.get();
        let Some(record) = state.area(name) else { return Ok(()) };
        let entry = self.entry(record);
        let path = entry.as_ref().map(|entry| entry.path.clone());
        let stage = Stage::Leaving { calm, path };
        self.store.change(|state| state.set_stage(name, stage.clone()))?;
        let record = Record { stage, ..record.clone() };
        let job = Job {
            name: name.clone(),
            why: why.to_owned(),
            from: entry.map_or(0, |entry| entry.used),
            since: Instant::now(),
            stop: Arc::new(AtomicBool::new(false)),
        };
        let stop = Arc::clone(&job.stop);
        self.live().leaving = Some(job);
        let daemon = Arc::clone(self);
        tokio::spawn(async move { daemon.leave(record, &stop).await });
        Ok(())
    }

    /// Continues a removal that an earlier life or an earlier try began. An area that was only not needed is
    /// kept instead.
    pub(super) fn go_on_leaving(self: &Arc<Daemon>, record: &Record) -> Result<(), Error> {
        match (&record.stage, self.entry(record)) {
            (Stage::Leaving { calm: true, .. }, Some(entry)) => {
                let stage = Stage::On { boot: self.boot, path: entry.path };
                self.store.change(|state| state.set_stage(&record.name, stage))
            }
            _ => self.begin_leave(&record.name, Cause::Hand, "it was begun before"),
        }
    }

    /// Turns all areas off and keeps their records, because the machine shuts down: xpm-blk and the network
    /// end after this process. systemd turns swap off at the same time, and gives up after its own time
    /// limit; so this continues until no area is on.
    pub(crate) async fn turn_all_off(&self) {
        for record in &self.store.get().areas {
            let Some(path) = self.path(record) else { continue };
            while proc::swaps().is_ok_and(|swaps| table::find(&swaps, &path).is_some()) {
                match self.hand.turn_off(PathBuf::from(&path)).await {
                    Ended::Off => tracing::info!("{} is off", record.name),
                    Ended::Stopped | Ended::Killed | Ended::Refused(_) => tokio::time::sleep(AGAIN).await,
                }
            }
        }
    }

    async fn leave(self: Arc<Daemon>, record: Record, stop: &AtomicBool) {
        let name = record.name.clone();
        let left = match self.entry(&record) {
            Some(entry) => self.turn_off(&record, &entry.path, stop).await,
            None => Ok(true),
        };
        let left = match left {
            Ok(true) => self.give_back(&record).await,
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        match left {
            Ok(()) => self.well(DRAIN),
            Err(error) => {
                let pause = self.pause_of(DRAIN);
                self.trouble(DRAIN, &format!("{name}: {error}"), Some(pause));
                self.live().drain_not_before = self.now() + pause;
            }
        }
        self.live().leaving = None;
        self.wake();
    }

    /// Turns the area off; returns false when that was cancelled.
    async fn turn_off(&self, record: &Record, path: &str, stop: &AtomicBool) -> Result<bool, Error> {
        let ended = self.turn_off_unless_told(path, stop).await;
        if ended == Ended::Off {
            tracing::info!("{} is off", record.name);
            return Ok(true);
        }
        let stage = Stage::On { boot: self.boot, path: path.to_owned() };
        self.store.change(|state| state.set_stage(&record.name, stage))?;
        match ended {
            Ended::Off => Ok(true),
            Ended::Stopped => {
                tracing::info!("{} stays", record.name);
                Ok(false)
            }
            Ended::Killed => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "swapoff of {path} was ended by the kernel for lack of memory; the area is on as \
                 before"
                ),
            )),
            Ended::Refused(number) => {
                let why = std::io::Error::from_raw_os_error(number);
                Err(Error::internal(format!("swapoff of {path}: {why}; it is on as before")))
            }
        }
    }

    async fn turn_off_unless_told(&self, path: &str, stop: &AtomicBool) -> Ended {
        let mut off = std::pin::pin!(self.hand.turn_off(PathBuf::from(path)));
        loop {
            tokio::select! {
                ended = &mut off => return ended,
                () = tokio::time::sleep(STOP_EVERY) => if stop.load(Ordering::Relaxed) {
                    self.hand.stop();
                },
            }
        }
    }

    /// Removes the device, the allocation and the record of an area that is off.
    async fn give_back(&self, record: &Record) -> Result<(), Error> {
        let name = &record.name;
        self.detach(name).await?;
        match self.is_ours(record).await {
            Ok(Some(_)) => {
                let client = self.allocator.clone().with_limit(ORDER_LIMIT);
                let deleted = client.delete(&format!("/v1/allocations/{name}")).await;
                not_there_is_fine(deleted.map_err(|error| Error::of("allocator", &error)))?;
            }
            // The allocation belongs to another user by now.
            Ok(None) => {}
            Err(error) => not_there_is_fine(Err(error))?,
        }
        self.store.change(|state| state.areas.retain(|area| area.name != *name))?;
        self.live().seen.remove(name);
        self.well(&format!("end of {name}"));
        self.well(&format!("device of {name}"));
        self.well(&format!("area {name}"));
        tracing::info!("{name} is given back");
        Ok(())
    }

    async fn detach(&self, name: &Name) -> Result<(), Error> {
        let client = self.blk.clone().with_limit(ORDER_LIMIT);
        let mut tries = 0;
        loop {
            let detached = client.delete(&format!("/v1/devices/{name}")).await;
            let detached = not_there_is_fine(detached.map_err(|error| Error::of("xpm-blk", &error)));
            match detached {
                Err(error) if error.kind() == ErrorKind::InUse && tries < DETACH_TRIES => {
                    tries += 1;
                    tokio::time::sleep(DETACH_PAUSE).await;
                }
                detached => return detached,
            }
        }
    }
}

fn not_there_is_fine(done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(error) if Daemon::is_not_there(&error) => Ok(()),
        done => done,
    }
}
