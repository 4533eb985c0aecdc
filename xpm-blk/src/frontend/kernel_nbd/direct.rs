//! Form `nbd-direct`: the kernel gets connections that lead to the appliance itself. No process of this
//! machine takes part in an I/O; this process only replaces connections that broke.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_timeout};
use tokio::sync::Notify;
use xpm_client_core::owner::{Guarded, Trouble, Word};
use xpm_client_core::volume::Trust;
use xpm_protocol::Visitor;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Grant, Map, RegionSlot};
use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::api::blk::{DeviceState, LinkState, LinkStatus, TransportKind};
use xpm_protocol::layout::Layout;
use xpm_protocol::nbd::{ExportName, SessionTag, TransmissionFlags};
use xpm_protocol::units::Span;
use xpm_transport::names::Names;
use xpm_transport::nbd::client::{
    ConnectError, Connected, Target, connect_as, connect_first, describe, describe_first,
};

use super::Shared;
use super::source::Source;
use crate::error::{DeviceError, Step};
use crate::frontend::Health;
use crate::sysfs::Statistics;

/// Time limit for a connection and its handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Time limit for an appliance to answer a check.
const ASK_LIMIT: Duration = Duration::from_secs(4);
/// How long to wait for names when addresses are known that did not work.
const NAMES_PATIENCE: Duration = Duration::from_secs(1);

/// The source of sockets that lead to the one appliance of an allocation.
pub(super) struct Direct {
    grant: Grant,
    transport: Option<TransportKind>,
    targets: Mutex<Vec<(TransportKind, Way)>>,
    names: Names,
    visitor: Option<Visitor>,
    session: u128,
    generation: AtomicU32,
    flags: TransmissionFlags,
    sockets: Mutex<Vec<Option<OwnedFd>>>,
    /// The previous sockets, which the kernel may not have released completely.
    replaced: Mutex<Vec<Option<OwnedFd>>>,
    link: Mutex<Link>,
    alarm: Arc<Notify>,
    /// Number of sockets passed to the kernel since the start.
    given: AtomicU64,
}

/// A path to the appliance.
#[derive(Debug, Clone)]
enum Way {
    Tcp(Endpoints),
    Unix(PathBuf),
}

struct Link {
    state: LinkState,
    since: Instant,
    transport: TransportKind,
    reason: Option<String>,
    trust: Trust,
    /// Start of the time in which every attempt failed.
    failing: Option<Instant>,
    /// Whether the appliance is given up, so that the state no longer changes.
    given_up: bool,
}

impl Direct {
    /// Time limit of a request: a request sent on a connection that broke is sent again on another one after
    /// this time, so this is also the pause when an appliance is restarted.
    ///
    /// With one connection, its requests are sent again on its replacement only, and before that the
    /// appliance has closed the old one. With several, they are sent again on the next working connection,
    /// which closes no old one: therefore the limit is longer than TCP takes to give up on a silent peer (see
    /// `xpm_transport::nbd::client`), so that the old connection's queue is empty.
    pub(super) const fn timeout(queues: u16) -> Duration {
        Duration::from_secs(if queues == 1 { 10 } else { 15 })
    }

    /// The session names the connections of this device for as long as the device exists, across restarts of
    /// this process; the connections of this life begin with its generation.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the allocation is not linear on one appliance.
    pub(super) fn new(
        shared: Shared<'_>,
        (session, generation): (u128, u32),
        queues: u16,
        transport: Option<TransportKind>,
    ) -> Result<Direct, DeviceError> {
        let grant = the_only_grant(shared.map)?.clone();
        let targets = targets(&grant, transport)?;
        Ok(Direct {
            flags: TransmissionFlags::HAS_FLAGS,
            link: Mutex::new(Link {
                state: LinkState::Connecting,
                since: Instant::now(),
                transport: targets[0].0,
                reason: None,
                trust: Trust::new(shared.refusal_limit),
                failing: None,
                given_up: false,
            }),
            alarm: Arc::default(),
            grant,
            transport,
            targets: Mutex::new(targets),
            names: Names::default(),
            visitor: shared.visitor.cloned(),
            session,
            generation: AtomicU32::new(generation),
            sockets: Mutex::new((0..queues).map(|_| None).collect()),
            replaced: Mutex::new((0..queues).map(|_| None).collect()),
            given: AtomicU64::new(0),
        })
    }

    /// Asks the appliance for the capabilities of its export, and whether the export has at least `size`
    /// bytes.
    pub(super) fn probe(&mut self, size: u64) -> Result<(), DeviceError> {
        let queues = self.sockets().len();
        let Connected { info, .. } = self.connect(0)?;
        let at = || format!("the export of {} on appliance {}", self.grant.id, self.grant.appliance_name);
        if info.size < size {
            let what = format!("{} has {} bytes, the allocation {size}", at(), info.size);
            return Err(DeviceError::new(ErrorKind::Internal, what));
        }
        if queues > 1 && !info.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            let what = format!("{} allows one connection only: ask for 1 queue, not {queues}", at());
            return Err(DeviceError::new(ErrorKind::Invalid, what));
        }
        self.flags = info.flags;
        Ok(())
    }

    fn connect(&self, queue: u16) -> Result<Connected, DeviceError> {
        let mut last = None;
        for (transport, target) in &self.targets() {
            let name = || {
                let generation = self.generation.fetch_add(1, Ordering::Relaxed);
                let session = Some(SessionTag { id: self.session, queue, generation });
                ExportName { key: self.grant.key.clone(), session }
            };
            let visitor = self.visitor.as_ref();
            let made = match target {
                Way::Tcp(endpoints) => {
                    connect_first(&self.addresses(endpoints), name, visitor, CONNECT_LIMIT)
                }
                Way::Unix(path) => connect_as(&Target::Unix(path.clone()), &name(), visitor, CONNECT_LIMIT),
            };
            match made {
                Ok(connected) => {
                    self.connected(*transport);
                    return Ok(connected);
                }
                Err(error) => {
                    let refused = matches!(error, ConnectError::UnknownExport);
                    last = Some(self.failed(*transport, &error));
                    if refused {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| self.error(ErrorKind::Internal, "it has no address")))
    }

    /// The TCP addresses of the appliance, those of its names included. Names are waited for only when no
    /// other address is known, or the known addresses did not work the last time.
    fn addresses(&self, endpoints: &Endpoints) -> Vec<SocketAddr> {
        let patience = match (endpoints.nbd.is_empty(), self.link().failing.is_some()) {
            (true, _) => CONNECT_LIMIT,
            (false, true) => NAMES_PATIENCE,
            (false, false) => Duration::ZERO,
        };
        let mut all = endpoints.nbd.clone();
        let named = self.names.resolve(&endpoints.names, patience);
        all.extend(named.into_iter().filter(|address| !endpoints.nbd.contains(address)));
        all
    }

    fn targets(&self) -> Vec<(TransportKind, Way)> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self, transport: TransportKind) {
        let mut link = self.link();
        link.trust.connected();
        link.failing = None;
        link.note(LinkState::Up, transport, None);
    }

    /// Handles a failed attempt. I/O continues to wait, unless it is proven that the memory is gone.
    fn failed(&self, transport: TransportKind, error: &ConnectError) -> DeviceError {
        let refused = matches!(error, ConnectError::UnknownExport);
        let now = Instant::now();
        let mut link = self.link();
        let is_new = link.failing.is_none() || (refused && !link.trust.is_refused());
        link.failing.get_or_insert(now);
        let reason = match refused {
            true => "it does not know the grant; I/O waits for the allocator's word on it".to_owned(),
            false => error.to_string(),
        };
        if refused {
            link.trust.refused(now);
        }
        let kind = if refused { ErrorKind::NotFound } else { ErrorKind::Unavailable };
        let (state, reason) = match link.trust.lost(now) {
            Some(why) => (LinkState::Lost, why),
            None => (LinkState::Connecting, reason),
        };
        link.note(state, transport, Some(reason.clone()));
        drop(link);
        if is_new {
            self.alarm.notify_one();
        }
        self.error(kind, &reason)
    }

    fn error(&self, kind: ErrorKind, reason: &str) -> DeviceError {
        DeviceError::new(kind, format!("connect to appliance {}: {reason}", self.grant.appliance_name))
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn note(&mut self, state: LinkState, transport: TransportKind, reason: Option<String>) {
        if self.given_up {
            return;
        }
        if self.state != state {
            self.since = Instant::now();
        }
        (self.state, self.transport, self.reason) = (state, transport, reason);
    }
}

impl Guarded for Direct {
    fn troubles(&self) -> Vec<Trouble> {
        let link = self.link();
        let trouble = link.failing.filter(|_| !link.given_up).map(|since| Trouble {
            grant: self.grant.id,
            appliance: self.grant.appliance,
            refused: link.trust.is_refused(),
            since,
        });
        trouble.into_iter().collect()
    }

    fn hear(&self, word: &Word) {
        if let Word::Holds { endpoints, .. } = word
            && let Some(endpoints) = endpoints.get(&self.grant.id)
        {
            let grant = Grant { endpoints: endpoints.clone(), ..self.grant.clone() };
            if let Ok(new) = targets(&grant, self.transport) {
                *self.targets.lock().unwrap_or_else(PoisonError::into_inner) = new;
            }
        }
        let mut link = self.link();
        match word {
            _ if link.failing.is_none() => return,
            Word::Holds { lost, .. } if lost.contains(&self.grant.id) => {
                link.trust.gone("the allocator says that the appliance has lost what was there");
            }
            Word::Holds { .. } | Word::Waits { .. } => link.trust.holds(Instant::now()),
            Word::Ended { why, recorded } if *recorded || link.trust.is_refused() => {
                link.trust.gone(&format!("the allocator says that {why}"));
            }
            Word::Ended { .. } => {}
        }
        if let Some(why) = link.trust.lost(Instant::now()) {
            let transport = link.transport;
            link.note(LinkState::Lost, transport, Some(why));
        }
    }

    fn alarm(&self) -> Arc<Notify> {
        self.alarm.clone()
    }
}

impl Source for Direct {
    fn volume(&self) -> Option<&xpm_client_core::Volume> {
        None
    }

    fn guarded(&self) -> Option<&dyn Guarded> {
        Some(self)
    }

    fn look(&self) {
        if self.link().given_up {
            return;
        }
        let name = ExportName { key: self.grant.key.clone(), session: None };
        let used = self.link().transport;
        let Some((transport, way)) = self.targets().into_iter().find(|(kind, _)| *kind == used) else {
            return;
        };
        let looked = match &way {
            Way::Tcp(endpoints) => describe_first(&self.addresses(endpoints), &name, ASK_LIMIT),
            Way::Unix(path) => describe(&Target::Unix(path.clone()), &name, ASK_LIMIT),
        };
        match looked {
            Ok(_) => self.connected(transport),
            Err(error) => drop(self.failed(transport, &error)),
        }
    }

    fn server_flags(&self) -> u16 {
        self.flags.bits()
    }

    fn socket(&self, queue: u16) -> Result<OwnedFd, DeviceError> {
        if let Some(before) = self.sockets()[usize::from(queue)].take() {
            // Closed only together with the next one: see `Wiring::reconfigure`.
            self.replaced.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(queue)] = Some(before);
        }
        let Connected { stream, .. } = self.connect(queue)?;
        // The driver sets its own time limit on each socket that it takes: `dead` recognizes a dropped socket by
        // the missing limit.
        set_socket_timeout(&stream, Timeout::Send, None).at("prepare a socket for the kernel")?;
        set_socket_timeout(&stream, Timeout::Recv, None).at("prepare a socket for the kernel")?;
        // Whether the kernel's receiver blocks does not depend on the file's flags, but every other client
        // passes a blocking file.
        rustix::io::ioctl_fionbio(&stream, false).at("prepare a socket for the kernel")?;
        self.sockets()[usize::from(queue)] = Some(stream.try_clone().at("duplicate a socket")?);
        self.given.fetch_add(1, Ordering::Relaxed);
        Ok(stream)
    }

    fn dead(&self) -> Vec<u16> {
        if self.link().given_up {
            return Vec::new();
        }
        let sockets = self.sockets();
        let dead = sockets.iter().enumerate().filter(|(_, socket)| !socket.as_ref().is_some_and(is_served));
        dead.map(|(queue, _)| queue as u16).collect()
    }

    fn health(&self, statistics: Statistics) -> Health {
        let dead = !self.dead().is_empty();
        let queues = self.sockets().len() as u64;
        let link = self.link();
        let (state, link_state) = match link.state {
            LinkState::Lost => (DeviceState::Lost, LinkState::Lost),
            LinkState::Up if !dead => (DeviceState::Live, LinkState::Up),
            LinkState::Up | LinkState::Connecting => (DeviceState::Holding, LinkState::Connecting),
        };
        Health {
            state,
            links: vec![LinkStatus {
                appliance: self.grant.appliance,
                appliance_name: self.grant.appliance_name.clone(),
                transport: link.transport,
                state: link_state,
                since: Span(Duration::from_secs(link.since.elapsed().as_secs())),
                reconnects: self.given.load(Ordering::Relaxed).saturating_sub(queues),
                reason: link.reason.clone(),
            }],
            counters: statistics.counters(),
            in_flight: statistics.in_flight,
        }
    }

    fn give_up(&self, why: &str) -> bool {
        {
            let mut link = self.link();
            let transport = link.transport;
            link.note(LinkState::Lost, transport, Some(why.to_owned()));
            link.given_up = true;
        }
        // The driver sends a disconnect on each socket, behind the data in transit: this must not wait for
        // the peer.
        for socket in self.sockets().iter().flatten() {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
        true
    }

    fn close(&self) {
        self.sockets().iter_mut().for_each(|socket| *socket = None);
    }
}

/// Whether the kernel took the socket and its connection still works.
fn is_served(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let hung_up = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0);
    !hung_up && socket_timeout(socket.as_fd(), Timeout::Send).is_ok_and(|limit| limit.is_some())
}

/// The grant whose export is the whole allocation: this requires a linear allocation on one appliance, with
/// its regions in the order of the grant.
fn the_only_grant(map: &Map) -> Result<&Grant, DeviceError> {
    let refuse = |why: String| {
        let what = format!(
            "allocation {} cannot be shown as nbd-direct: {why}; show it as ublk or nbd, or make it without --stripe \
             and small enough for one appliance",
            map.name
        );
        Err(DeviceError::new(ErrorKind::Invalid, what))
    };
    let in_order = |(place, slot): (usize, &RegionSlot)| slot.grant == 0 && slot.slot as usize == place;
    match (map.layout, map.grants.as_slice()) {
        (Layout::Striped { columns, .. }, _) => refuse(format!("it is striped over {columns} regions")),
        (Layout::Linear, [grant]) if map.regions.iter().enumerate().all(in_order) => Ok(grant),
        (Layout::Linear, [_]) => refuse("its regions are not in the order of the grant".to_owned()),
        (Layout::Linear, grants) => refuse(format!("it lies on {} appliances", grants.len())),
    }
}

fn targets(
    grant: &Grant,
    transport: Option<TransportKind>,
) -> Result<Vec<(TransportKind, Way)>, DeviceError> {
    let endpoints = &grant.endpoints;
    let has_tcp = !endpoints.nbd.is_empty() || !endpoints.names.is_empty();
    let tcp = || has_tcp.then(|| (TransportKind::NbdTcp, Way::Tcp(endpoints.clone()))).into_iter();
    let unix = || endpoints.nbd_unix.iter().map(|path| (TransportKind::NbdUnix, Way::Unix(path.clone())));
    let targets: Vec<_> = match transport {
        None => tcp().chain(unix().filter(|_| on_this_host(grant))).collect(),
        Some(TransportKind::NbdTcp) => tcp().collect(),
        Some(TransportKind::NbdUnix) => unix().collect(),
        Some(kind @ (TransportKind::Shm | TransportKind::Rdma)) => {
            let what = format!(
                "nbd-direct cannot use {kind}: the kernel's driver speaks to sockets only; leave the transport out"
            );
            return Err(DeviceError::new(ErrorKind::Invalid, what));
        }
    };
    if targets.is_empty() {
        let what = format!("appliance {} has no NBD address for nbd-direct", grant.appliance_name);
        return Err(DeviceError::new(ErrorKind::Invalid, what));
    }
    Ok(targets)
}

fn on_this_host(grant: &Grant) -> bool {
    xpm_control::host::host_id().is_ok_and(|id| id == grant.endpoints.host)
}

#[cfg(test)]
mod tests {
    use xpm_protocol::units::ByteSize;
    use xpm_protocol::{AllocationId, ApplianceId, Epoch, GrantId, GrantKey, HostId};

    use super::*;

    fn map(layout: Layout, grants: u32, regions: &[(u32, u32)]) -> Map {
        let grant = Grant {
            id: GrantId::from_u128(1),
            appliance: ApplianceId::from_u128(2),
            appliance_name: "a1".parse().unwrap(),
            endpoints: Endpoints {
                host: HostId::from_u128(3),
                nbd: vec!["127.0.0.1:1".parse().unwrap()],
                names: Vec::new(),
                rdma: Vec::new(),
                nbd_unix: Some("/nowhere".into()),
                shm: None,
            },
            key: GrantKey::from_bytes([4; 32]),
            regions: regions.len() as u32,
        };
        Map {
            name: "pool".parse().unwrap(),
            id: AllocationId::from_u128(5),
            epoch: Epoch(1),
            version: 0,
            size: ByteSize(1 << 24),
            layout,
            region_len: ByteSize(1 << 24),
            grants: vec![grant; grants as usize],
            regions: regions.iter().map(|&(grant, slot)| RegionSlot { grant, slot }).collect(),
            slabs: Default::default(),
            block_size: None,
        }
    }

    #[test]
    fn only_a_linear_allocation_on_one_appliance_can_be_direct() {
        assert!(the_only_grant(&map(Layout::Linear, 1, &[(0, 0), (0, 1)])).is_ok());
        let refused = [
            (map(Layout::Linear, 1, &[(0, 1), (0, 0)]), "order"),
            (map(Layout::Linear, 2, &[(0, 0), (1, 0)]), "2 appliances"),
            (map(Layout::Striped { columns: 2, unit: 4096 }, 1, &[(0, 0), (0, 1)]), "striped"),
        ];
        for (map, reason) in refused {
            let error = the_only_grant(&map).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("ublk"), "{error}");
        }
    }

    #[test]
    fn targets_by_transport() {
        let map = map(Layout::Linear, 1, &[(0, 0)]);
        let kinds = |transport| {
            let targets = targets(&map.grants[0], transport).unwrap();
            targets.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(None), [TransportKind::NbdTcp], "the appliance is on another host");
        assert_eq!(kinds(Some(TransportKind::NbdUnix)), [TransportKind::NbdUnix]);
        assert!(targets(&map.grants[0], Some(TransportKind::Shm)).is_err());
    }

    #[test]
    fn a_socket_that_the_kernel_has_not_taken_is_not_served() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_served(&ours.try_clone().unwrap().into()));
        theirs.set_write_timeout(Some(Duration::from_secs(15))).unwrap();
        let theirs = OwnedFd::from(theirs);
        assert!(is_served(&theirs), "with the driver's limit set and the other end open");
        drop(ours);
        assert!(!is_served(&theirs), "and not once that is closed");
    }
}
