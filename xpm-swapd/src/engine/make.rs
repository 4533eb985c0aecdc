//! Making an area: intent, allocation, device, header, on. Each step first checks whether it is done, so that
//! several lives can make one area together, and a life can make it again after a restart of the machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use xpm_control::proc;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, AllocationState, Create};
use xpm_protocol::api::blk::{AttachDevice, Device, Form};
use xpm_protocol::api::swapd::Origin;
use xpm_protocol::units::{ByteSize, REGION_LEN_MAX, REGION_LEN_MIN};
use xpm_protocol::{Name, policy::Labels};

use super::{Daemon, Seen};
use crate::error::{Error, Step as _};
use crate::os::header::{self, Content};
use crate::os::{area, table};
use crate::policy::{AREA_LEN_MIN, step_after};
use crate::state::{AreaId, Record, Stage};

/// The label that marks an allocation of this daemon.
const LABEL: &str = "xpm-swapd";
/// Time limit of an order to the allocator or to xpm-blk.
const ORDER_LIMIT: Duration = Duration::from_secs(60);
/// How often a refused size is halved.
const HALVINGS: u32 = 2;
/// Largest number of an area.
const NUMBER_MAX: u32 = 9999;

/// The name of growing in the log and the status.
pub(super) const GROW: &str = "grow";

impl Daemon {
    /// Records that an area is to be made, under the first free number.
    pub(super) fn intend(&self, size: u64, origin: Origin) -> Result<Record, Error> {
        let id = AreaId::random()?;
        let host = self.host.clone();
        let record = self.store.change(|state| {
            let name = |number| format!("swap-{host}-{number}").parse::<Name>();
            let free = (1..=NUMBER_MAX)
                .filter_map(|number| name(number).ok())
                .find(|name| state.area(name).is_none() && !state.foreign.contains(name));
            let record = Record { name: free?, size: ByteSize(size), id, origin, stage: Stage::Making };
            state.areas.push(record.clone());
            Some(record)
        })?;
        record.ok_or_else(|| Error::internal(format!("there is no free name `swap-{}-N`", self.host)))
    }

    /// Makes an area, or continues making it, beside the loop.
    pub(super) fn begin_make(self: &Arc<Daemon>, record: Record) {
        self.live().making = Some(record.name.clone());
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            // The loop learns of a failure by its trouble entry.
            let _ = daemon.make(record).await;
        });
    }

    /// Makes an area completely, and removes it again if that fails.
    pub(super) async fn make(self: &Arc<Daemon>, record: Record) -> Result<Record, Error> {
        let name = record.name.clone();
        let origin = record.origin;
        let was_on = !matches!(record.stage, Stage::Making);
        let made = self.make_steps(record).await;
        match &made {
            Ok(record) => {
                tracing::info!("{} of {} is on", record.name, record.size);
                self.well(GROW);
                self.well(&format!("area {name}"));
            }
            Err(error) if was_on => {
                let pause = self.pause_of(&format!("area {name}"));
                self.trouble(&format!("area {name}"), &error.to_string(), Some(pause));
                let again = self.now() + pause;
                self.live().again.insert(name.clone(), again);
            }
            Err(error) if self.store.get().foreign.contains(&name) => tracing::warn!("{error}"),
            Err(error) => {
                // A request by hand gets the error as its answer, and may ask for less.
                if origin != Origin::Hand {
                    let pause = self.pause_of(GROW);
                    self.trouble(GROW, &error.to_string(), Some(pause));
                    self.live().make_not_before = self.now() + pause;
                }
                self.store.change(|state| {
                    state.set_stage(&name, Stage::Leaving { calm: false, path: None });
                })?;
            }
        }
        self.live().making = None;
        self.wake();
        made
    }

    async fn make_steps(&self, record: Record) -> Result<Record, Error> {
        let record = self.allocate(record).await?;
        let path = self.attach(&record).await?;
        let (priority, discard) = (self.config.priority, self.config.device.discard);
        let id = record.id;
        let device = path.clone();
        blocking(move || turn_on(Path::new(&device), id, priority, discard)).await?;
        let stage = Stage::On { boot: self.boot, path };
        self.store.change(|state| {
            if record.origin == Origin::Step && record.stage == Stage::Making {
                state.next_step = ByteSize(step_after(&self.rules, record.size.0));
            }
            state.set_stage(&record.name, stage.clone());
        })?;
        Ok(Record { stage, ..record })
    }

    /// The allocation: creates it, or finds the one that was created already.
    async fn allocate(&self, mut record: Record) -> Result<Record, Error> {
        if !matches!(record.stage, Stage::Making) {
            // xpm-blk shows the allocation again by itself, and the allocator need not be reachable.
            return Ok(record);
        }
        let mut halvings = if record.origin == Origin::Hand { 0 } else { HALVINGS };
        loop {
            match self.create(&record).await {
                Ok(()) => return Ok(record),
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    self.check_ours(&record, &error).await?;
                    return Ok(record);
                }
                Err(error) => {
                    let half = record.size.0 / 2 / AREA_LEN_MIN * AREA_LEN_MIN;
                    if !error.is_refusal() || halvings == 0 || half < AREA_LEN_MIN {
                        if error.nothing_done() {
                            self.store.change(|state| state.areas.retain(|area| area.name != record.name))?;
                        }
                        return Err(error);
                    }
                    // A lasting refusal is tried again and again, and was logged the first time.
                    if !self.is_troubled(GROW) {
                        tracing::warn!("{}: {error}; half of it is asked for", record.name);
                    }
                    halvings -= 1;
                    record.size = ByteSize(half);
                    let (name, size) = (record.name.clone(), record.size);
                    self.store.change(|state| {
                        state
                            .areas
                            .iter_mut()
                            .filter(|area| area.name == name)
                            .for_each(|area| area.size = size);
                    })?;
                }
            }
        }
    }

    async fn create(&self, record: &Record) -> Result<(), Error> {
        let client = self.allocator.clone().with_limit(ORDER_LIMIT);
        let made: Result<Allocation, _> = client.post("/v1/allocations", &self.request(record)).await;
        let made = made.map_err(|error| Error::of("allocator", &error))?;
        made.warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", record.name));
        Ok(())
    }

    fn request(&self, record: &Record) -> Create {
        let device = &self.config.device;
        let mut labels: Labels = device.labels.clone();
        labels.insert(LABEL.parse().expect("it is a name"), record.id.label());
        // The kernel connects to one appliance only, so the allocation is one region.
        let whole = || record.size.0.next_power_of_two().clamp(REGION_LEN_MIN, REGION_LEN_MAX);
        let region_len =
            device.region_size.or_else(|| (device.form == Form::NbdDirect).then(|| ByteSize(whole())));
        Create {
            stripe: device.stripe,
            stripe_unit: device.stripe_unit,
            region_len,
            account: device.account.clone(),
            client: device.client.clone().or_else(|| self.host.parse().ok()),
            strategy: device.strategy.clone(),
            labels,
            ..Create::new(record.name.clone(), record.size)
        }
    }

    /// Handles that an allocation of this name exists. It is ours if it has our label; otherwise the name is
    /// taken, and is not tried again.
    async fn check_ours(&self, record: &Record, refusal: &Error) -> Result<(), Error> {
        match self.is_ours(record).await? {
            Some(AllocationState::Ready) => Ok(()),
            Some(state) => Err(Error::new(
                ErrorKind::Unavailable,
                format!("allocation {} is {state:?}: it is tried again", record.name),
            )),
            None => {
                let name = record.name.clone();
                self.store.change(|state| {
                    state.areas.retain(|area| area.name != name);
                    state.foreign.push(name);
                })?;
                let line = format!(
                    "allocation {} is there and not of this daemon's making ({refusal}): another name is taken",
                    record.name
                );
                Err(Error::conflict(line))
            }
        }
    }

    /// The state of an area's allocation; none if it belongs to another user.
    pub(super) async fn is_ours(&self, record: &Record) -> Result<Option<AllocationState>, Error> {
        let found: Result<Allocation, _> =
            self.allocator.get(&format!("/v1/allocations/{}", record.name)).await;
        let found = found.map_err(|error| Error::of("allocator", &error))?;
        let label = found.labels.iter().find(|(key, _)| key.as_str() == LABEL).map(|(_, value)| value);
        Ok((label == Some(&record.id.label())).then_some(found.state))
    }

    /// The path of the device: of an existing device, or of a new one.
    async fn attach(&self, record: &Record) -> Result<String, Error> {
        let name = &record.name;
        let found: Result<Device, _> = self.blk.get(&format!("/v1/devices/{name}")).await;
        let device = match found.map_err(|error| Error::of("xpm-blk", &error)) {
            Ok(device) => device,
            Err(error) if Daemon::is_not_there(&error) => {
                let device = &self.config.device;
                let request = AttachDevice {
                    transport: device.transport,
                    hold: Some(device.hold),
                    ..AttachDevice::new(name.clone(), device.form.clone())
                };
                let client = self.blk.clone().with_limit(ORDER_LIMIT);
                let shown: Result<Device, _> = client.post("/v1/devices", &request).await;
                shown.map_err(|error| Error::of("xpm-blk", &error))?
            }
            Err(error) => return Err(error),
        };
        if !device.path.starts_with('/') {
            let why = device.links.iter().find_map(|link| link.reason.clone()).unwrap_or_default();
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("xpm-blk does not show {name} yet: {why}"),
            ));
        }
        let seen = Seen { path: Some(device.path.clone()), device: Some(device.state), ..Seen::default() };
        self.live().seen.insert(name.clone(), seen);
        Ok(device.path)
    }
}

/// Turns swap on at a device that shows our allocation, unless it is on. Never overwrites data of other
/// users.
fn turn_on(path: &Path, id: AreaId, priority: u16, discard: bool) -> Result<(), Error> {
    let shown = path.display();
    let swaps = proc::swaps().at("read /proc/swaps")?;
    if table::find(&swaps, &path.to_string_lossy()).is_some() {
        return Ok(());
    }
    let content = header::look(path).at(format!("read {shown}"))?;
    match content {
        Content::Ours(found) if found == id.0 => {}
        Content::Blank => header::write(path, &id.0).at(format!("write the swap header of {shown}"))?,
        Content::Ours(_) | Content::Swap => return Err(foreign(path, "swap that another made")),
        Content::Foreign(what) => return Err(foreign(path, what)),
    }
    area::turn_on(path, priority, discard).at(format!("turn swap on at {shown}"))
}

fn foreign(path: &Path, what: &str) -> Error {
    Error::conflict(format!("{} has {what}: it is left as it is", path.display()))
}

/// Runs work that may block, on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("a task failed: {error}"))),
    }
}
