//! Devices of the kernel's own nbd driver, made by netlink.
//!
//! Both forms are the same to the kernel and differ in the destination of its sockets: this process (`nbd`)
//! or the appliance itself (`nbd-direct`). The driver gives its sockets access to memory reserves
//! (SOCK_MEMALLOC), which no user process can do with its own: writing swap over `nbd-direct` needs no memory
//! of any process.
//!
//! The number of sockets is the number of hardware queues. The default is one: then a request never moves to
//! another socket while the first one may still execute it.

mod direct;
mod local;
mod netlink;
mod orphans;
mod source;
mod watcher;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use xpm_client_core::Volume;
use xpm_client_core::owner::Guarded;
use xpm_protocol::api::allocator::Map;
use xpm_protocol::api::blk::{Hold, TransportKind};
use xpm_protocol::{ApplianceId, ClientId, Visitor};
use xpm_transport::nbd::server::Server;

use self::direct::Direct;
use self::local::Local;
use self::netlink::{Connect, NbdControl};
pub use self::orphans::remove as remove_orphans;
use self::source::Source;
use self::watcher::Watcher;
use super::{Health, Shape, Shown};
use crate::error::{DeviceError, Step};
use crate::links::Label;
use crate::sysfs::{self, Statistics};

/// How long requests that never fail wait for a new connection: ten years.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A device of the kernel's nbd driver.
pub struct NbdDevice {
    wiring: Wiring,
    disk: String,
    label: Label,
    /// The counters at the start, because the driver's devices continue counting over several uses.
    before: Statistics,
    source: Arc<dyn Source>,
    watcher: Mutex<Option<Watcher>>,
    /// Locked while the driver is given sockets or told to end; true once it was told to end.
    ended: Arc<Mutex<bool>>,
    outlives_process: bool,
}

/// The connection between a device and the driver.
#[derive(Debug, Clone)]
struct Wiring {
    index: u32,
    /// See [`identifier`]: the driver requires it before it accepts new sockets.
    identifier: String,
    timeout: Option<Duration>,
    dead_timeout: Duration,
    /// Logical block size in bytes.
    block_len: u64,
}

/// How long the kernel's receiver of an ended connection has to stop using it.
const RECEIVER_LEAVES: Duration = Duration::from_millis(200);

impl Wiring {
    /// Replaces dead sockets of the device.
    ///
    /// Linux 6.12 frees a replaced socket although its receiver may still wait there, if the sender noticed
    /// that the socket is dead (`nbd_reconnect_socket` in drivers/block/nbd.c), and then follows a null
    /// pointer. So the receiver, which the end of the connection wakes, gets time to leave.
    fn reconfigure(&self, control: &mut NbdControl, sockets: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        thread::sleep(RECEIVER_LEAVES);
        let timeouts = (self.timeout, self.dead_timeout);
        control
            .reconfigure(self.index, &self.identifier, timeouts, sockets)
            .at(format!("give /dev/nbd{} new connections", self.index))
    }
}

/// The parameters of an allocation that both forms need.
#[derive(Debug, Clone, Copy)]
pub struct Shared<'a> {
    /// The client that shows it.
    pub client: ClientId,
    /// The life of the client that shows it.
    pub visitor: Option<&'a Visitor>,
    /// The map of the allocation.
    pub map: &'a Map,
    /// How long I/O waits while the other end cannot be reached.
    pub hold: Hold,
    /// How long refusals of an appliance have to last before they count without the allocator's confirmation.
    pub refusal_limit: Duration,
}

/// Whether this kernel has its nbd driver loaded.
///
/// # Errors
/// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) with the missing part.
pub fn check_support() -> Result<(), DeviceError> {
    NbdControl::open().map(drop)
}

impl NbdDevice {
    /// Form `nbd`: `server` serves `volume` to the kernel; `group` names the device's connections at the
    /// server. If another process left a device of this allocation, it is taken over together with its
    /// waiting requests.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` if the driver is not loaded.
    pub fn show(
        shared: Shared<'_>,
        volume: Volume,
        server: Server,
        group: u128,
        shape: &Shape,
    ) -> Result<NbdDevice, DeviceError> {
        let timeout = if shape.queues == 1 { Local::TIMEOUT_OF_ONE } else { Local::TIMEOUT_OF_SEVERAL };
        let source = Arc::new(Local::new(server, volume, group, shape.queues));
        NbdDevice::start(shared, timeout, source, shape, false)
    }

    /// Form `nbd-direct`: the sockets lead to the allocation's one appliance. The session is a random number
    /// that the device keeps across restarts of this process, and its generation is newer than those of its
    /// earlier lives.
    ///
    /// # Errors
    /// `ErrorKind::Invalid` when the allocation is not linear on one appliance, `ErrorKind::Unavailable` when
    /// the appliance cannot be reached.
    pub fn show_direct(
        shared: Shared<'_>,
        session: (u128, u32),
        transport: Option<TransportKind>,
        shape: &Shape,
    ) -> Result<NbdDevice, DeviceError> {
        let mut direct = Direct::new(shared, session, shape.queues, transport)?;
        direct.probe(shared.map.size.0)?;
        NbdDevice::start(shared, Some(Direct::timeout(shape.queues)), Arc::new(direct), shape, true)
    }

    /// Ends the device of this allocation that an earlier process left, if there is one: its I/O fails.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn end_left(client: ClientId, map: &Map) -> Result<(), DeviceError> {
        match device_of(&identifier(client, map)) {
            Some(index) => NbdControl::open()?.disconnect(index).at(format!("disconnect /dev/nbd{index}")),
            None => Ok(()),
        }
    }

    fn start(
        shared: Shared<'_>,
        timeout: Option<Duration>,
        source: Arc<dyn Source>,
        shape: &Shape,
        outlives_process: bool,
    ) -> Result<NbdDevice, DeviceError> {
        let mut wiring = Wiring {
            index: 0,
            identifier: identifier(shared.client, shared.map),
            timeout,
            dead_timeout: dead_timeout(shared.hold),
            block_len: shape.block_size.unwrap_or_default().bytes().into(),
        };
        let label = Label::new(&wiring.identifier, &shape.name);
        let is_new = device_of(&wiring.identifier).is_none();
        if is_new {
            label.announce();
        }
        let made = connect(&mut wiring, shared.map.size.0, &*source, shape);
        if made.is_err() {
            source.close();
            if is_new {
                label.remove("");
            }
        }
        made?;
        let disk = format!("nbd{}", wiring.index);
        let before = Statistics::of(&disk);
        let ended = Arc::new(Mutex::new(false));
        let watcher = Watcher::start(wiring.clone(), Arc::clone(&source), Arc::clone(&ended))?;
        // The kernel waits for all requests before it changes a setting, and requests of a device that was
        // taken over may wait for later steps of this process; such a device keeps its settings.
        if is_new {
            sysfs::tune(&disk);
            if wiring.timeout.is_none() {
                sysfs::set_look_interval(&disk, Local::LOOK_EVERY);
            }
            sysfs::tell_change(&disk);
            label.link(&disk);
        }
        Ok(NbdDevice {
            wiring,
            disk,
            label,
            before,
            source,
            watcher: Mutex::new(Some(watcher)),
            ended,
            outlives_process,
        })
    }
}

fn dead_timeout(hold: Hold) -> Duration {
    match hold {
        Hold::Forever => FOREVER,
        // The driver counts in seconds, and takes 0 for "do not wait".
        Hold::For(span) => Duration::from_secs(span.0.as_secs().max(1)),
    }
}

/// Takes over the device that already shows this allocation, or creates one.
fn connect(wiring: &mut Wiring, size: u64, source: &dyn Source, shape: &Shape) -> Result<(), DeviceError> {
    let mut control = NbdControl::open()?;
    let left = device_of(&wiring.identifier);
    let sockets: Vec<OwnedFd> =
        (0..shape.queues).map(|queue| source.socket(queue)).collect::<Result<_, _>>()?;
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    if let Some(index) = left {
        tracing::info!("taking over /dev/nbd{index}, which an earlier xpm-blk left");
        wiring.index = index;
        source.shut_out_all();
        return wiring.reconfigure(&mut control, &sockets);
    }
    let mut request = Connect {
        index: shape.number.filter(|&index| matches!(control.connected(index), Ok(Some(false)))),
        size,
        block_len: wiring.block_len,
        timeout: wiring.timeout,
        dead_timeout: wiring.dead_timeout,
        server_flags: source.server_flags(),
        identifier: &wiring.identifier,
    };
    let index = control.connect(&request, &sockets).or_else(|error| match request.index.take() {
        // Another program took the device's previous number.
        Some(_) => control.connect(&request, &sockets),
        None => Err(error),
    });
    wiring.index = index.at("make a device of the kernel's nbd driver")?;
    Ok(())
}

/// The identifier of a device in the driver: `xpm-CLIENT-ALLOCATION-EPOCH`.
pub(crate) fn identifier(client: ClientId, map: &Map) -> String {
    format!("{}{}-{}", mark_of(client), map.id, map.epoch)
}

/// The prefix of the identifiers of all devices of a client.
fn mark_of(client: ClientId) -> String {
    format!("xpm-{}-", &client.to_string()[..8])
}

/// The connected nbd device with this identifier.
fn device_of(identifier: &str) -> Option<u32> {
    connected().into_iter().find_map(|(index, backend)| (backend == identifier).then_some(index))
}

/// Number and identifier of each connected nbd device that has an identifier.
fn connected() -> Vec<(u32, String)> {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = disks.filter_map(|disk| disk.file_name().into_string().ok());
    let device = |disk: String| {
        let index = disk.strip_prefix("nbd")?.parse().ok()?;
        sysfs::text(&disk, "pid")?;
        Some((index, sysfs::text(&disk, "backend")?))
    };
    names.filter_map(device).collect()
}

impl Shown for NbdDevice {
    fn path(&self) -> String {
        format!("/dev/{}", self.disk)
    }

    fn disk(&self) -> Option<&str> {
        Some(&self.disk)
    }

    fn number(&self) -> Option<u32> {
        Some(self.wiring.index)
    }

    fn health(&self) -> Health {
        self.source.health(Statistics::of(&self.disk).since(self.before))
    }

    fn volume(&self) -> Option<&Volume> {
        self.source.volume()
    }

    fn guarded(&self) -> Option<&dyn Guarded> {
        self.source.guarded()
    }

    /// The driver holds requests while it changes the size. Other threads of this process, which is locked in
    /// memory, answer the requests in flight.
    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        let Wiring { index, identifier, block_len, .. } = &self.wiring;
        let size = size / block_len * block_len;
        NbdControl::open()?.resize(*index, identifier, size).at(format!("resize /dev/nbd{index}"))?;
        Ok(None)
    }

    fn outlives_process(&self) -> bool {
        self.outlives_process
    }

    fn waits_for_next_process(&self) -> bool {
        true
    }

    /// The driver holds the requests of a device that leads to the appliance itself, and fails them when the
    /// device is ended. The device's node stays for as long as a program has it open.
    fn give_up(&self, appliance: ApplianceId, why: &str) {
        if let Some(volume) = self.source.volume() {
            volume.give_up(appliance, why);
        }
        if !self.source.give_up(why) {
            return;
        }
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended = true;
        let index = self.wiring.index;
        if let Err(error) = NbdControl::open().and_then(|mut control| control.disconnect(index).at("end it"))
        {
            tracing::error!("/dev/nbd{index} is {why}, and its I/O waits all the same: {error}");
        }
    }

    fn hide(&self, _give_up: bool) -> Result<(), DeviceError> {
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watcher) = watcher {
            watcher.stop();
        }
        let index = self.wiring.index;
        // A device that was ended may belong to another program by now.
        let ended = *self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if !ended || device_of(&self.wiring.identifier) == Some(index) {
            NbdControl::open()?.disconnect(index).at(format!("disconnect /dev/nbd{index}"))?;
        }
        self.source.close();
        self.label.remove(&self.disk);
        sysfs::tell_change(&self.disk);
        Ok(())
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        let watcher = self.watcher.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watcher) = watcher {
            watcher.stop();
        }
    }
}
