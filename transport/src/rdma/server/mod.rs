//! The appliance's end: listens for clients, registers the memory of grants, and revokes it.
//!
//! Nothing here is on the path of an access: that is between the client and the device. Three threads
//! do the work: one answers the connection manager, one lets clients in over TCP, one registers memory.
//!
//! **Fencing.** [`RdmaServer::close_group`] deregisters the grant's memory: when it returns, nothing of the
//! grant is reachable any more. Its queue pairs, which lead nowhere then, are destroyed a little later, so that a
//! client which goes on learns by a refused access what happened. [`RdmaServer::shut_out`] destroys the queue
//! pairs of a queue's earlier connections at once, for the memory stays registered.

mod admit;
mod doorman;
mod grant;
mod state;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use xpm_protocol::nbd::SessionTag;
use xpm_protocol::{Epoch, GrantKey};

use self::doorman::Doorman;
pub use self::grant::Lent;
use self::grant::{DeviceGrant, Job};
use self::state::{Key, Phase, State};
use super::cm::{Channel, Event, Id, Kind, host_addresses};
use super::errors;
use super::plain::Port as PlainPort;
use super::verbs::{CompletionQueue, Device};
use super::wire::short_session;

/// Requests for connections that may wait.
const BACKLOG: i32 = 128;

/// What clients may connect to.
pub trait Grants: Send + Sync {
    /// The group of the grant with this key, if it lets clients in.
    fn find(&self, key: &GrantKey) -> Option<u128>;
}

/// Serves grants by RDMA. Its threads, and all that is registered, end when it is dropped.
pub struct RdmaServer {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    /// Readable when the doorman has to end.
    over: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    // First, for what it holds uses what follows.
    state: Mutex<State>,
    _listeners: Vec<Listener>,
    ports: Vec<Port>,
    /// None: there is no connection manager.
    events: Option<Arc<Channel>>,
    grants: Arc<dyn Grants>,
    jobs: Sender<Job>,
    /// Readable when the thread that answers has something to look at.
    bell: OwnedFd,
    stopped: AtomicBool,
}

struct Listener {
    /// Listens as long as it lives.
    id: Id,
    address: SocketAddr,
}

/// A device that something listens on.
struct Port {
    /// Of all queue pairs; nothing ever ends in it, for they only answer.
    completions: Mutex<CompletionQueue>,
    device: Arc<Device>,
}

impl RdmaServer {
    /// Listens at an address, or, where its IP address is unspecified (`0.0.0.0`), at every
    /// address of this host behind which there is an RDMA device.
    ///
    /// # Errors
    /// Why there is no RDMA, in words that say what to do.
    pub fn start(address: SocketAddr, grants: Arc<dyn Grants>) -> Result<RdmaServer, String> {
        RdmaServer::listen(address, grants).map_err(|error| errors::explain(&error))
    }

    fn listen(address: SocketAddr, grants: Arc<dyn Grants>) -> io::Result<RdmaServer> {
        let door = match Door::managed(address) {
            Ok(door) => door,
            // Without the connection manager, clients are let in over TCP alone.
            Err(error) => Door::plain(address).ok().filter(|door| !door.addresses.is_empty()).ok_or(error)?,
        };
        let (door, doors) = door.open()?;
        let (jobs, work) = channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let state = Mutex::new(State::default());
        let Door { addresses, listeners, ports, events } = door;
        let stopped = AtomicBool::new(false);
        let shared =
            Arc::new(Shared { state, _listeners: listeners, ports, events, grants, jobs, bell, stopped });
        let mut server = RdmaServer { shared, addresses, over: over.clone(), threads: Vec::new() };
        server.spawn("xpm-rdma-cm", Shared::answer)?;
        server.spawn("xpm-rdma-reg", move |shared| shared.register_all(&work))?;
        server.spawn("xpm-rdma-tcp", move |shared| Doorman::new(doors, over).run(shared))?;
        Ok(server)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&shared))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// The names of the devices that it listens on.
    pub fn devices(&self) -> Vec<String> {
        self.shared.ports.iter().map(|port| port.device.name()).collect()
    }

    /// Begins to register the memory of a grant, its regions in order and of one length; clients are
    /// let in when that is done. A grant that is open already is closed first.
    pub fn open_group(&self, group: u128, epoch: Epoch, regions: Vec<Arc<dyn Lent>>) {
        self.close_group(group);
        let ticket = self.shared.lock().begin(group, epoch);
        // Nobody hears it only when the thread has ended with the server.
        let _ = self.shared.jobs.send(Job::Register { group, ticket, regions });
    }

    /// Revokes a grant. When this returns, no access of its clients lands any more. Blocks for up to some
    /// milliseconds for each region.
    pub fn close_group(&self, group: u128) {
        self.shared.lock().close(group);
        self.shared.ring();
    }

    /// The same, for memory that is about to be shared with a process of this host: clients are told so.
    pub fn withdraw(&self, group: u128) {
        self.shared.lock().withdraw(group);
        self.shared.ring();
    }

    /// Destroys the connections of a session's queue that are older than this one.
    pub fn shut_out(&self, group: u128, session: SessionTag) {
        let SessionTag { id, queue, generation } = session;
        self.shared.lock().shut_out(group, short_session(id), queue, generation);
    }

    /// Destroys all connections of a group; those that come after are let in.
    pub fn shut_all_out(&self, group: u128) {
        self.shared.lock().shut_all_out(group);
    }

    /// Connections of a group, or of all.
    pub fn connections(&self, group: Option<u128>) -> usize {
        self.shared.lock().connections(group)
    }

    /// Whether clients of the group are let in. None: not registered, and not being registered.
    pub fn is_ready(&self, group: u128) -> Option<bool> {
        self.shared.lock().phase(group).map(|phase| matches!(phase, Phase::Ready(_)))
    }
}

impl Drop for RdmaServer {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.ring();
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
        let _ = self.shared.jobs.send(Job::Stop);
        for thread in self.threads.drain(..) {
            // A panic of it was reported when it happened.
            let _ = thread.join();
        }
        self.shared.lock().close_all();
    }
}

/// Where clients come in.
struct Door {
    addresses: Vec<SocketAddr>,
    listeners: Vec<Listener>,
    ports: Vec<Port>,
    events: Option<Arc<Channel>>,
}

impl Door {
    /// By the connection manager.
    fn managed(address: SocketAddr) -> io::Result<Door> {
        let events = Channel::new()?;
        let (mut listeners, mut ports) = (Vec::new(), Vec::<Port>::new());
        for ip in candidates(address.ip())? {
            match Listener::new(&events, SocketAddr::new(ip, address.port())) {
                Ok(listener) => {
                    if !ports.iter().any(|port| port.device.is_of(&listener.id)) {
                        ports.push(Port::new(listener.address)?);
                    }
                    listeners.push(listener);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        if listeners.is_empty() {
            return Err(io::Error::other("no address of this host is on an RDMA device"));
        }
        let addresses = listeners.iter().map(|listener| listener.address).collect();
        Ok(Door { addresses, listeners, ports, events: Some(events) })
    }

    /// Over TCP alone.
    fn plain(address: SocketAddr) -> io::Result<Door> {
        let devices = Device::all()?;
        let mut ips = candidates(address.ip())?;
        ips.retain(|ip| PlainPort::find(&devices, *ip).is_some());
        let addresses = ips.into_iter().map(|ip| SocketAddr::new(ip, address.port())).collect();
        let ports = devices.into_iter().map(Port::of).collect::<io::Result<_>>()?;
        Ok(Door { addresses, listeners: Vec::new(), ports, events: None })
    }

    /// Listens over TCP too, at the same addresses. Where that cannot be, the connection manager has to do.
    fn open(mut self) -> io::Result<(Door, Vec<TcpListener>)> {
        let mut opened = Vec::new();
        for address in &self.addresses {
            let listener = TcpListener::bind(address);
            match listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)) {
                Ok(listener) => opened.push(listener),
                Err(error) if self.events.is_none() => return Err(error),
                Err(error) => tracing::warn!("RDMA at {address} needs the connection manager: TCP: {error}"),
            }
        }
        if self.events.is_none() {
            self.addresses = opened.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        }
        Ok((self, opened))
    }
}

/// The addresses to try.
fn candidates(ip: IpAddr) -> io::Result<Vec<IpAddr>> {
    if !ip.is_unspecified() {
        return Ok(vec![ip]);
    }
    let mut all = host_addresses()?;
    all.retain(|found| ip.is_ipv6() || found.is_ipv4());
    Ok(all)
}

impl Listener {
    fn new(events: &Arc<Channel>, address: SocketAddr) -> io::Result<Listener> {
        let id = Id::new(events)?;
        id.bind(address)?;
        if id.context().is_none() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        id.listen(BACKLOG)?;
        let address = id.local_address().unwrap_or(address);
        Ok(Listener { id, address })
    }
}

impl Port {
    fn new(mut address: SocketAddr) -> io::Result<Port> {
        address.set_port(0);
        let keeper = Id::new(&Channel::new()?)?;
        keeper.bind(address)?;
        Port::of(Device::of(keeper).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?)
    }

    fn of(device: Arc<Device>) -> io::Result<Port> {
        let completions = Mutex::new(CompletionQueue::new(device.clone(), 1)?);
        Ok(Port { completions, device })
    }
}

impl Shared {
    /// The state is whole whenever the lock is free, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It cannot be full: it is read whenever it is not empty.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Answers the connection manager until the server ends, and tidies up.
    fn answer(&self) {
        loop {
            let tidied = self.lock().tidy();
            let limit = tidied.and_then(|limit| Timespec::try_from(limit).ok());
            let mut watched = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
            watched.extend(
                self.events.iter().map(|events| PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)),
            );
            // A failure is an interruption, after which looking once more does no harm.
            let _ = poll(&mut watched, limit.as_ref());
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            if let Err(error) = self.events.as_ref().map_or(Ok(()), |events| self.take_all(events)) {
                tracing::error!("no more clients are let in by the RDMA connection manager: {error}");
                return;
            }
        }
    }

    fn take_all(&self, events: &Arc<Channel>) -> io::Result<()> {
        while let Some(event) = events.next()? {
            self.take(event);
        }
        Ok(())
    }

    fn take(&self, event: Event) {
        match (event.kind, event.request) {
            (Kind::Request, Some(id)) => self.decide(id, &event.said),
            (Kind::Disconnected | Kind::Failed | Kind::Rejected, _) => {
                self.lock().left(Key::Managed(event.id));
            }
            (Kind::DeviceRemoved, _) => {
                tracing::warn!("an RDMA device is gone: its clients have to use TCP");
                self.lock().left(Key::Managed(event.id));
            }
            _ => {}
        }
    }

    /// Registers what it is asked to, until the server ends.
    fn register_all(&self, work: &Receiver<Job>) {
        while let Ok(Job::Register { group, ticket, regions }) = work.recv() {
            let wanted = || self.lock().is_wanted(group, ticket);
            let made: io::Result<Vec<DeviceGrant>> =
                self.ports.iter().map(|port| DeviceGrant::register(&port.device, &regions, wanted)).collect();
            let phase = match made {
                Ok(made) => Phase::Ready(made),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(
                        "memory cannot be registered for RDMA ({error}), its clients have to use TCP; see \
                         `ulimit -l` (LimitMEMLOCK)"
                    );
                    Phase::Failed
                }
            };
            self.lock().finish(group, ticket, phase);
        }
    }
}
