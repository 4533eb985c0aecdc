//! The session of a connected front end: its description of the guest's memory and rings, and the running
//! queues.
//!
//! A ring is served once the front end has sent all necessary data: its place, a kick descriptor, and that it
//! is enabled. A change of these stops the queue first, which ends when no request is in flight any more;
//! only the call descriptor, the error descriptor and the memory can change while it runs.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use xpm_client_core::Volume;
use xpm_protocol::BlockSize;
use xpm_transport::spin::Spin;

use super::config::{self, feature};
use super::inflight::{self, Inflight};
use super::memory::{GuestMemory, Region, RegionInfo, Terms};
use super::message::{self, Reply, Request, protocol};
use super::queue::{DeviceFacts, Order, QueueParts, Worker};
use super::ring::{Addresses, Broken, Features, Parts, Ring, SIZE_MAX};
use crate::watch::Pulse;

/// How long a queue that is stopped waits for requests in flight. Longer than any I/O takes unless it is
/// held; the guest's monitor is blocked meanwhile.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Interval of checking whether a queue that does not answer has failed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Most regions of guest memory; QEMU's limit.
const REGIONS_MAX: usize = 509;

const PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::CONFIGURE_MEM_SLOTS;

/// The properties of a device, shared by all its front ends.
pub(super) struct Device {
    /// The allocation's name.
    pub(super) name: String,
    pub(super) volume: Volume,
    pub(super) facts: Arc<DeviceFacts>,
    /// Most queues.
    pub(super) queues: u16,
    /// Logical block size.
    pub(super) block_size: BlockSize,
    /// Longest busy wait of a queue.
    pub(super) spin: Duration,
    /// Whether guest memory that can shrink is accepted.
    pub(super) allow_unsealed: bool,
    /// The socket on which the connected front end wants to be notified of changes of the configuration
    /// space.
    pub(super) listener: Mutex<Option<UnixStream>>,
}

impl Device {
    pub(super) fn listener(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the front end read the configuration space again; none if it has no such socket.
    pub(super) fn tell_config_change(&self) -> Option<io::Result<()>> {
        self.listener().as_ref().map(message::tell_config_change)
    }
}

/// Why a request is refused, in one line.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// The queue does not exist.
    #[error("queue {index} of a device with {queues}: give the guest no more, or attach with --queues")]
    NoQueue {
        /// The requested queue.
        index: u16,
        /// Number of queues.
        queues: u16,
    },
    /// An invalid value.
    #[error("{0}")]
    Invalid(String),
    /// The ring cannot be used.
    #[error("{0}")]
    Ring(Broken),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// The front end's description of a ring.
#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    /// Next entry to be taken.
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    enabled: bool,
    worker: Option<Worker>,
}

/// A connection of a front end.
pub(super) struct Session {
    device: Arc<Device>,
    features: u64,
    memory: Arc<GuestMemory>,
    /// The requirements on its memory.
    terms: Terms,
    inflight: Option<Inflight>,
    vrings: Vec<Vring>,
}

impl Session {
    pub(super) fn new(device: Arc<Device>) -> Session {
        let vrings = std::iter::repeat_with(Vring::default).take(usize::from(device.queues)).collect();
        let terms = Terms { allow_unsealed: device.allow_unsealed, failed: Arc::default() };
        Session { device, features: 0, memory: Arc::default(), terms, inflight: None, vrings }
    }

    /// Whether at least one queue is served.
    pub(super) fn serves(&self) -> bool {
        self.vrings.iter().any(|vring| vring.worker.is_some())
    }

    /// Executes a request.
    ///
    /// # Errors
    /// When it is refused; then nothing has changed, except that its queue may have stopped.
    pub(super) fn handle(&mut self, request: Request) -> Result<Reply, Refused> {
        match request {
            Request::GetFeatures => return Ok(Reply::Number(feature::ALL)),
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetOwner => {}
            Request::ResetOwner => self.stop_all(DRAIN_LIMIT),
            Request::SetMemTable(regions) => self.set_memory(regions)?,
            Request::AddMemReg(info, file) => self.add_memory(info, &file)?,
            Request::RemMemReg(info) => self.remove_memory(info)?,
            Request::GetMaxMemSlots => return Ok(Reply::Number(REGIONS_MAX as u64)),
            Request::GetProtocolFeatures => return Ok(Reply::Number(PROTOCOL_FEATURES)),
            Request::SetProtocolFeatures(features) => check_protocol(features)?,
            Request::GetQueueNum => return Ok(Reply::Number(self.device.queues.into())),
            Request::SetBackendReqFd(socket) => *self.device.listener() = Some(socket.into()),
            Request::GetConfig { offset, len } => {
                let size = self.device.facts.size.load(std::sync::atomic::Ordering::Relaxed);
                return Ok(Reply::Config {
                    offset,
                    bytes: config::part((size, self.device.queues, self.device.block_size), offset, len),
                });
            }
            Request::SetConfig => return Err(invalid("the configuration space cannot be written")),
            Request::GetInflightFd(info) => {
                let (info, file) = inflight::create(info.queues, info.entries)?;
                return Ok(Reply::Inflight(info, file));
            }
            Request::SetInflightFd(info, file) => {
                self.inflight = Some(Inflight::map(info, &file, &self.terms)?);
            }
            Request::SetVringNum(index, size) => self.set_size(index, size)?,
            Request::SetVringAddr(index, addresses) => {
                self.stopped(index)?.addresses = Some(addresses);
                self.serve(index)?;
            }
            Request::SetVringBase(index, base) => {
                self.stopped(index)?.base =
                    u16::try_from(base).map_err(|_| invalid("a base that cannot be"))?;
            }
            Request::GetVringBase(index) => {
                let vring = self.stopped(index)?;
                (vring.kick, vring.call) = (None, None);
                return Ok(Reply::VringState(index, vring.base.into()));
            }
            Request::SetVringKick(index, kick) => {
                let kick =
                    kick.ok_or_else(|| invalid("a ring without kicks; it needs a descriptor for them"))?;
                self.stopped(index)?.kick = Some(Arc::new(kick));
                self.serve(index)?;
            }
            Request::SetVringCall(index, call) => {
                let call = call.map(Arc::new);
                let vring = self.vring(index)?;
                vring.call = call.clone();
                vring.tell(Order::Call(call));
            }
            Request::SetVringErr(index, error) => {
                let error = error.map(Arc::new);
                let vring = self.vring(index)?;
                vring.error = error.clone();
                vring.tell(Order::Error(error));
            }
            Request::SetVringEnable(index, enabled) => {
                if self.vring(index)?.enabled != enabled {
                    self.stopped(index)?.enabled = enabled;
                    self.serve(index)?;
                }
            }
        }
        Ok(Reply::Done)
    }

    /// Stops every queue, and waits up to `limit` for requests in flight.
    pub(super) fn stop_all(&mut self, limit: Duration) {
        let running = || self.vrings.iter().filter_map(|vring| vring.worker.as_ref());
        // All at once, so that the waits do not add up.
        running().for_each(|worker| worker.tell(Order::Stop(limit)));
        self.vrings.iter_mut().for_each(Vring::join);
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        if features & !feature::ALL != 0 {
            return Err(Refused::Invalid(format!("features {features:#x}, which are not offered")));
        }
        // A driver that does not read the block size assumes 512 bytes. No features are agreed on while there
        // is no driver.
        let blind = features != 0 && features & feature::BLK_SIZE == 0;
        if blind && self.device.block_size != BlockSize::B512 {
            return Err(Refused::Invalid(format!(
                "a guest whose driver does not support blocks of {} bytes: give it an allocation of `xpm \
                 alloc create --block-size 512`",
                self.device.block_size
            )));
        }
        if features != self.features {
            self.stop_all(DRAIN_LIMIT);
            self.features = features;
        }
        Ok(())
    }

    fn vring(&mut self, index: u16) -> Result<&mut Vring, Refused> {
        let queues = self.device.queues;
        self.vrings.get_mut(usize::from(index)).ok_or(Refused::NoQueue { index, queues })
    }

    /// A ring that is not in service now.
    fn stopped(&mut self, index: u16) -> Result<&mut Vring, Refused> {
        let vring = self.vring(index)?;
        vring.tell(Order::Stop(DRAIN_LIMIT));
        vring.join();
        Ok(vring)
    }

    fn set_size(&mut self, index: u16, size: u32) -> Result<(), Refused> {
        let fits = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= SIZE_MAX);
        let size = fits.ok_or_else(|| {
            Refused::Invalid(format!("a ring of {size} entries; it can have powers of two up to {SIZE_MAX}"))
        })?;
        self.stopped(index)?.size = size;
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<(RegionInfo, OwnedFd)>) -> Result<(), Refused> {
        let map = |(info, file): (RegionInfo, OwnedFd)| Region::map(info, &file, &self.terms).map(Arc::new);
        let regions: io::Result<Vec<Arc<Region>>> = regions.into_iter().map(map).collect();
        self.use_memory(GuestMemory::new(regions?)?)
    }

    fn add_memory(&mut self, info: RegionInfo, file: &OwnedFd) -> Result<(), Refused> {
        let mut regions = self.memory.regions().to_vec();
        if regions.len() >= REGIONS_MAX {
            return Err(invalid("more regions of guest memory than there can be"));
        }
        regions.push(Arc::new(Region::map(info, file, &self.terms)?));
        self.use_memory(GuestMemory::new(regions)?)
    }

    fn remove_memory(&mut self, info: RegionInfo) -> Result<(), Refused> {
        let same = |region: &RegionInfo| {
            (region.guest, region.len, region.user) == (info.guest, info.len, info.user)
        };
        let regions = self.memory.regions().iter().filter(|region| !same(&region.info()));
        let regions: Vec<Arc<Region>> = regions.cloned().collect();
        if regions.len() == self.memory.regions().len() {
            return Err(invalid("a region of guest memory to be removed that is not there"));
        }
        self.use_memory(GuestMemory::new(regions)?)
    }

    /// Switches to other memory. A ring that does not lie in it is no longer served.
    fn use_memory(&mut self, memory: GuestMemory) -> Result<(), Refused> {
        self.memory = Arc::new(memory);
        let mut outcome = Ok(());
        let mut waiting = Vec::new();
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            let (Some(worker), Some(addresses)) = (&vring.worker, vring.addresses) else { continue };
            match Parts::find(&self.memory, addresses, vring.size) {
                Ok(parts) => {
                    let (done, told) = sync_channel(1);
                    worker.tell(Order::Memory(Arc::clone(&self.memory), parts, done));
                    waiting.push((index, told));
                }
                Err(broken) => {
                    worker.tell(Order::Stop(DRAIN_LIMIT));
                    vring.join();
                    outcome = Err(Refused::Ring(broken));
                }
            }
        }
        // Once this is answered, the guest may use new memory, and its monitor may free the old memory.
        for (index, told) in waiting {
            let runs = || self.vrings[index].worker.as_ref().is_some_and(Worker::is_running);
            while told.recv_timeout(LOOK_AGAIN).is_err() && runs() {}
        }
        outcome
    }

    /// Serves a ring, if all necessary data have arrived.
    fn serve(&mut self, index: u16) -> Result<(), Refused> {
        let always = self.features & feature::PROTOCOL_FEATURES == 0;
        let vring = self.vring(index)?;
        let (Some(addresses), Some(kick)) = (vring.addresses, vring.kick.clone()) else { return Ok(()) };
        if vring.size == 0 || !(vring.enabled || always) || vring.worker.is_some() {
            return Ok(());
        }
        let (size, mut base) = (vring.size, vring.base);
        let (call, error) = (vring.call.clone(), vring.error.clone());
        let find = || Parts::find(&self.memory, addresses, size).map_err(Refused::Ring);
        let features = Features {
            event_index: self.features & feature::EVENT_IDX != 0,
            indirect: self.features & feature::INDIRECT_DESC != 0,
        };
        let mut tracker =
            self.inflight.as_ref().map(|all| all.queue(index, size)).transpose().map_err(Refused::Ring)?;
        let mut left = Vec::new();
        if let Some(tracker) = &mut tracker {
            let used = Ring::new(size, find()?, features, base).next_used();
            let recovered = tracker.recover(used).map_err(Refused::Ring)?;
            base = recovered.next_available.unwrap_or(base);
            left = recovered.heads;
        }
        let name = &self.device.name;
        if !left.is_empty() {
            tracing::info!("allocation {name}: {} requests of queue {index} are submitted again", left.len());
        }
        let thread = format!("xpm-vu-{}q{index}", name.chars().take(20).collect::<String>());
        let parts = QueueParts {
            pulse: Pulse::new(thread.clone())?,
            name: thread,
            ring: Ring::new(size, find()?, features, base),
            memory: Arc::clone(&self.memory),
            memory_failed: Arc::clone(&self.terms.failed),
            kick,
            call,
            error,
            tracker,
            left,
            channel: self.device.volume.channel_of(index)?,
            device: Arc::clone(&self.device.facts),
            spin: Spin::new(self.device.spin),
        };
        let vring = self.vring(index)?;
        vring.base = base;
        vring.worker = Some(Worker::start(parts)?);
        Ok(())
    }
}

impl Vring {
    /// Sends an order to its queue, if the queue runs.
    fn tell(&self, order: Order) {
        if let Some(worker) = &self.worker {
            worker.tell(order);
        }
    }

    /// Waits for the end of its queue, which was told to stop.
    fn join(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.base = worker.join();
        }
    }
}

fn check_protocol(features: u64) -> Result<(), Refused> {
    match features & !PROTOCOL_FEATURES {
        0 => Ok(()),
        more => Err(Refused::Invalid(format!("protocol features {more:#x}, which are not offered"))),
    }
}

fn invalid(what: &str) -> Refused {
    Refused::Invalid(what.to_owned())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop_all(DRAIN_LIMIT);
        *self.device.listener() = None;
    }
}
