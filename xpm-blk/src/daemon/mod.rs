//! The daemon's devices: the only owner of the set of shown allocations, and of every change to it.
//!
//! Each allocation has a slot from the first request until it is gone. Steps that take time run with the slot
//! marked as busy, outside of the lock, on threads that may block.

mod allocator;
mod attach;
mod detach;
mod guard;
mod handover;
pub(crate) mod herald;
pub(crate) mod lookout;
mod lost;
mod orders;
mod restore;
pub(crate) mod trees;
mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use xpm_client_core::Change;
use xpm_client_core::owner::Owner;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Ending;
use xpm_protocol::api::blk::{Form, Owed, Status};
use xpm_protocol::units::Span;
use xpm_safety as safety;
use xpm_transport::nbd::server::Server;

use crate::config::Config;
use crate::error::DeviceError;
use crate::frontend::fuse::tree::Trees;
use crate::frontend::{self, Shown};
use crate::owed::Debts;
use crate::records::{Record, Records};
use crate::standby::keeper::Keeper;

/// The running daemon.
pub struct Daemon {
    config: Config,
    owner: Owner,
    records: Arc<Records>,
    keeper: Keeper,
    server: Server,
    slots: Mutex<BTreeMap<Name, Slot>>,
    /// Allocations whose end is announced.
    endings: Mutex<BTreeMap<Name, Ending>>,
    /// Allocations that this life registered with the allocator: none, or why the allocator refused.
    registered: Mutex<BTreeMap<Name, Option<String>>>,
    /// Allocations that have to be given back. Locked while the allocator is told to take one back, or to
    /// assign it anew.
    debts: tokio::sync::Mutex<Debts>,
    /// A copy of the debts for the status.
    owed: Mutex<Vec<Owed>>,
    /// Trees of files.
    trees: Trees,
    /// Allocations whose orders are being executed, and whether new orders may have arrived since.
    obeying: Mutex<BTreeMap<Name, bool>>,
    started: Instant,
}

/// The parts that a daemon is made of.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) owner: Owner,
    pub(crate) records: Arc<Records>,
    pub(crate) keeper: Keeper,
    pub(crate) server: Server,
}

#[derive(Clone)]
enum Slot {
    /// An operation works on it.
    Busy(Busy),
    /// It was shown before the restart and is not shown again yet, for this reason.
    Waiting(Arc<Waiting>),
    /// It is shown.
    Shown(Arc<Attached>),
}

#[derive(Clone)]
struct Busy {
    /// The operation in progress.
    doing: &'static str,
    /// The record of the device that was shown, or is to be shown again.
    before: Option<Box<Record>>,
}

impl Slot {
    fn record(&self) -> Option<Box<Record>> {
        match self {
            Slot::Busy(busy) => busy.before.clone(),
            Slot::Waiting(waiting) => Some(Box::new(waiting.record.clone())),
            Slot::Shown(attached) => Some(Box::new(attached.record())),
        }
    }
}

struct Waiting {
    record: Record,
    reason: String,
    since: Instant,
}

/// A shown allocation.
struct Attached {
    /// The record, as it is on disk.
    record: Mutex<Record>,
    shown: Box<dyn Shown>,
    /// Whether the record is kept on disk: not any more once the device is detached. Locked while a record is written,
    /// so that the last change is the one on disk, and a late one does not bring a removed record back.
    keeping: Mutex<bool>,
    /// A firm change: writes go to both places until it is known which map is valid.
    change: Mutex<Option<Change>>,
    since: Instant,
}

impl Attached {
    fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the record, on disk first.
    fn keep_with(&self, records: &Records, change: impl FnOnce(&mut Record)) -> Result<(), DeviceError> {
        let change = |record: &mut Record| {
            change(record);
            true
        };
        self.amend(records, change).map(drop)
    }

    /// Writes the unchanged record once more.
    fn write_down(&self, records: &Records) -> Result<(), DeviceError> {
        self.keep_with(records, |_| {})
    }

    /// Saves the record as `amend` changes it, on disk first. Returns false when `amend` changes nothing.
    fn amend(&self, records: &Records, amend: impl FnOnce(&mut Record) -> bool) -> Result<bool, DeviceError> {
        let kept = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that no concurrent change is overwritten.
        let mut record = self.record();
        if !amend(&mut record) {
            return Ok(false);
        }
        if *kept {
            records.save(&record)?;
        }
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
        Ok(true)
    }

    /// The device is detached: its record is written no more. Blocks while one is being written.
    fn end_keeping(&self) {
        *self.keeping.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    fn change(&self) -> MutexGuard<'_, Option<Change>> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    pub(crate) fn new(parts: Parts) -> Daemon {
        let state = parts.config.state();
        let Parts { config, owner, records, keeper, server } = parts;
        Daemon {
            config,
            owner,
            records,
            keeper,
            server,
            slots: Mutex::new(BTreeMap::new()),
            endings: Mutex::new(BTreeMap::new()),
            debts: tokio::sync::Mutex::new(Debts::none(&state)),
            owed: Mutex::default(),
            registered: Mutex::default(),
            trees: Trees::new(),
            obeying: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// The status of the daemon.
    pub fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            client: self.owner.client,
            pid: std::process::id(),
            uptime: whole_seconds(self.started),
            allocator: self.owner.allocator.base().to_owned(),
            devices: self.slots().len() as u64,
            safety: self.config.program.safety(),
            standby: Some(self.keeper.status()),
            owed: self.owed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The keeper of the standby.
    pub(crate) const fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<Name, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn endings(&self) -> MutexGuard<'_, BTreeMap<Name, Ending>> {
        self.endings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registered(&self) -> MutexGuard<'_, BTreeMap<Name, Option<String>>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, name: &Name, slot: Option<Slot>) {
        match slot {
            Some(slot) => drop(self.slots().insert(name.clone(), slot)),
            None => {
                self.slots().remove(name);
                self.endings().remove(name);
                self.registered().remove(name);
            }
        }
    }

    /// Refuses a device that can carry swap while this process is not safe for it.
    fn check_safety(&self, form: &Form) -> Result<(), DeviceError> {
        if !frontend::can_carry_swap(form) || self.config.allow_unsafe_swap {
            return Ok(());
        }
        match safety::missing(&self.config.program.safety()) {
            None => Ok(()),
            Some(missing) => Err(DeviceError::new(
                ErrorKind::Unsupported,
                format!(
                    "memory is reclaimed to {form}, and this process is not safe for that: {missing}. Mend it and start {} \
                     again{}, or accept it with `allow-unsafe-swap = true`",
                    self.config.program.name(),
                    if form.is_of_files() { "" } else { ", show it as nbd-socket" }
                ),
            )),
        }
    }
}

/// Runs work that may block, on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
) -> Result<T, DeviceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(DeviceError::new(ErrorKind::Internal, format!("a control task failed: {error}"))),
    }
}

fn whole_seconds(since: Instant) -> Span {
    Span(std::time::Duration::from_secs(since.elapsed().as_secs()))
}
