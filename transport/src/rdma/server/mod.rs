//! The appliance's end of RDMA: listens for clients, registers the memory of grants, and revokes it.
//!
//! This code is not on the path of an access, which involves the client and the device only. Three threads do
//! the work: one answers the connection manager, one admits clients over TCP, one registers memory.
//!
//! **Fencing.** [`RdmaServer::close_group`] deregisters the grant's memory: when it returns, no memory of the
//! grant can be accessed any more. The grant's queue pairs, useless by then, are destroyed a little later, so
//! that a client which goes on learns of the revocation by a refused access. [`RdmaServer::shut_out`]
//! destroys the queue pairs of a queue's earlier connections at once, because the memory stays registered.

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

/// Most pending connection requests.
const BACKLOG: i32 = 128;

/// The grants that clients may connect to.
pub trait Grants: Send + Sync {
    /// The group of the grant with this key, if the grant admits clients.
    fn find(&self, key: &GrantKey) -> Option<u128>;
}

/// Serves grants by RDMA. Dropping it ends its threads and all registrations.
pub struct RdmaServer {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    /// Readable when the doorman thread has to end.
    over: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    // Dropped first, because its contents use the fields below.
    state: Mutex<State>,
    _listeners: Vec<Listener>,
    ports: Vec<Port>,
    /// None when there is no connection manager.
    events: Option<Arc<Channel>>,
    grants: Arc<dyn Grants>,
    jobs: Sender<Job>,
    /// Readable when the answering thread has work.
    bell: OwnedFd,
    stopped: AtomicBool,
}

struct Listener {
    /// Listens as long as it lives.
    id: Id,
    address: SocketAddr,
}

/// A device with at least one listener.
struct Port {
    /// The completion queue of all queue pairs. It never receives a completion, for these queue pairs only
    /// answer.
    completions: Mutex<CompletionQueue>,
    device: Arc<Device>,
}

impl RdmaServer {
    /// Listens at an address or, if its IP address is unspecified (`0.0.0.0`), at every address of this host
    /// that belongs to an RDMA device.
    ///
    /// # Errors
    /// The reason why RDMA is not available, and the remedy.
    pub fn start(address: SocketAddr, grants: Arc<dyn Grants>) -> Result<RdmaServer, String> {
        RdmaServer::listen(address, grants).map_err(|error| errors::explain(&error))
    }

    fn listen(address: SocketAddr, grants: Arc<dyn Grants>) -> io::Result<RdmaServer> {
        let door = match Door::managed(address) {
            Ok(door) => door,
            // Without the connection manager, clients are admitted over TCP only.
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

    /// The addresses that the server listens at.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// The names of the devices with listeners.
    pub fn devices(&self) -> Vec<String> {
        self.shared.ports.iter().map(|port| port.device.name()).collect()
    }

    /// Starts registering the memory of a grant: its regions in order and of equal length. Clients are
    /// admitted when all of it is registered. A grant that is open already is closed first.
    pub fn open_group(&self, group: u128, epoch: Epoch, regions: Vec<Arc<dyn Lent>>) {
        self.close_group(group);
        let ticket = self.shared.lock().begin(group, epoch);
        // Fails only when the thread has ended with the server.
        let _ = self.shared.jobs.send(Job::Register { group, ticket, regions });
    }

    /// Revokes a grant. When this returns, no access of its clients lands any more. Blocks for up to some
    /// milliseconds per region.
    pub fn close_group(&self, group: u128) {
        self.shared.lock().close(group);
        self.shared.ring();
    }

    /// As [`RdmaServer::close_group`], for memory that is about to be shared with a process of this host;
    /// clients receive this reason.
    pub fn withdraw(&self, group: u128) {
        self.shared.lock().withdraw(group);
        self.shared.ring();
    }

    /// Destroys the connections of the session's queue that are older than `session`.
    pub fn shut_out(&self, group: u128, session: SessionTag) {
        let SessionTag { id, queue, generation } = session;
        self.shared.lock().shut_out(group, short_session(id), queue, generation);
    }

    /// Destroys all connections of a group; later connections are admitted.
    pub fn shut_all_out(&self, group: u128) {
        self.shared.lock().shut_all_out(group);
    }

    /// Number of connections, of one group or of all.
    pub fn connections(&self, group: Option<u128>) -> usize {
        self.shared.lock().connections(group)
    }

    /// Whether clients of the group are admitted. None when the group's memory is neither registered nor
    /// being registered.
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
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
        self.shared.lock().close_all();
    }
}

/// The endpoints at which clients connect.
struct Door {
    addresses: Vec<SocketAddr>,
    listeners: Vec<Listener>,
    ports: Vec<Port>,
    events: Option<Arc<Channel>>,
}

impl Door {
    /// Endpoints with the connection manager.
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

    /// Endpoints over TCP only.
    fn plain(address: SocketAddr) -> io::Result<Door> {
        let devices = Device::all()?;
        let mut ips = candidates(address.ip())?;
        ips.retain(|ip| PlainPort::find(&devices, *ip).is_some());
        let addresses = ips.into_iter().map(|ip| SocketAddr::new(ip, address.port())).collect();
        let ports = devices.into_iter().map(Port::of).collect::<io::Result<_>>()?;
        Ok(Door { addresses, listeners: Vec::new(), ports, events: None })
    }

    /// Listens over TCP too, at the same addresses. Where this fails, only the connection manager is used.
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
    /// Every critical section leaves the state valid, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // The counter cannot overflow: the thread reads it whenever it is not zero.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Answers the connection manager until the server ends, and destroys expired connections.
    fn answer(&self) {
        loop {
            let tidied = self.lock().tidy();
            let limit = tidied.and_then(|limit| Timespec::try_from(limit).ok());
            let mut watched = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
            watched.extend(
                self.events.iter().map(|events| PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)),
            );
            // An error is an interruption; one more turn of the loop is harmless.
            let _ = poll(&mut watched, limit.as_ref());
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            if let Err(error) = self.events.as_ref().map_or(Ok(()), |events| self.take_all(events)) {
                tracing::error!("the RDMA connection manager admits no more clients: {error}");
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

    /// Executes registration jobs until the server ends.
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
