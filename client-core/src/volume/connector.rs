//! The connector: one thread for each grant of a volume, which makes links when channels ask for them.
//! Control plane: it may block, allocate and log.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use xpm_protocol::HostId;
use xpm_protocol::api::allocator::Grant;
use xpm_protocol::api::blk::{LinkState, LinkStatus, TransportKind};
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_protocol::units::Span;
use xpm_transport::link::Link;
use xpm_transport::nbd::client::{ConnectError, NbdLink, Target};
use xpm_transport::shm::client::{ShmGrant, ShmLink};

use super::port::{Delivery, Port};

/// First pause after a failure.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts while the appliance is out of reach.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Pause between attempts after the appliance said that it does not know the grant. It may be taking
/// its memory back after a restart. Trying again is safe: an appliance that lost the memory lost the
/// key with it, so one that knows the key has the data.
const PAUSE_LOST: Duration = Duration::from_secs(3);

/// How links are made.
#[derive(Debug, Clone)]
pub(super) struct LinkOptions {
    pub(super) host: Option<HostId>,
    pub(super) transport: Option<TransportKind>,
    pub(super) limit: Duration,
    pub(super) depth: usize,
    pub(super) session: u128,
}

#[derive(Default)]
struct State {
    ports: Vec<Arc<Port>>,
    woken: bool,
    stopped: bool,
    transport: Option<TransportKind>,
    reason: Option<String>,
    /// How the last attempt ended, and when; counts while no channel is open.
    last: Option<(LinkState, Instant)>,
}

/// What the connector's thread shares with channels and with those who ask for its status.
pub(super) struct Connector {
    grant: Grant,
    options: LinkOptions,
    state: Mutex<State>,
    wake: Condvar,
}

impl Connector {
    pub(super) fn start(grant: Grant, options: LinkOptions) -> io::Result<Arc<Connector>> {
        let connector = Arc::new(Connector::idle(grant, options));
        let thread = connector.clone();
        std::thread::Builder::new().name("xpm-connect".to_owned()).spawn(move || Work::new(thread).run())?;
        Ok(connector)
    }

    /// A connector without its thread.
    pub(super) fn idle(grant: Grant, options: LinkOptions) -> Connector {
        Connector { grant, options, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Only assignments happen under the lock, so a panic elsewhere leaves the state whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, port: Arc<Port>) {
        self.lock().ports.push(port);
        self.wake();
    }

    /// Some port wants a link, or was closed. The one lock that a channel takes, and only when a
    /// link went down.
    pub(super) fn wake(&self) {
        self.lock().woken = true;
        self.wake.notify_all();
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
    }

    pub(super) fn status(&self) -> LinkStatus {
        let state = self.lock();
        let live = || state.ports.iter().filter(|port| !port.is_closed());
        let worst = live()
            .map(|port| (port.state(), port.since()))
            .max_by_key(|(state, since)| (*state, std::cmp::Reverse(*since)))
            .or(state.last);
        let (link_state, since) = worst.unwrap_or((LinkState::Connecting, Instant::now()));
        LinkStatus {
            appliance: self.grant.appliance,
            appliance_name: self.grant.appliance_name.clone(),
            transport: state.transport.unwrap_or_else(|| self.first_choice()),
            state: link_state,
            since: Span(whole_millis(since.elapsed())),
            reconnects: live().map(|port| port.links().saturating_sub(1)).sum(),
            reason: state.reason.clone(),
        }
    }

    fn first_choice(&self) -> TransportKind {
        self.options.transport.unwrap_or(TransportKind::NbdTcp)
    }

    /// Whether the appliance runs on this kernel.
    fn is_local(&self) -> bool {
        self.options.host == Some(self.grant.endpoints.host)
    }
}

fn whole_millis(duration: Duration) -> Duration {
    Duration::from_millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// The connector's thread.
struct Work {
    connector: Arc<Connector>,
    /// Memory of the grant, shared by the links of all queues.
    shm: Weak<ShmGrant>,
    generation: u32,
    pause: Duration,
    random: u64,
}

impl Work {
    fn new(connector: Arc<Connector>) -> Work {
        let random = Arc::as_ptr(&connector) as u64 ^ u64::from(std::process::id());
        Work { connector, shm: Weak::new(), generation: 0, pause: PAUSE_MIN, random }
    }

    fn run(mut self) {
        while let Some(port) = self.next_port() {
            match self.connect(&port) {
                Ok((link, transport, reason)) => {
                    self.pause = PAUSE_MIN;
                    self.set(LinkState::Up, Some(transport), reason);
                    port.deliver(Delivery::Link(link));
                }
                Err(error) => self.failed(&port, &error),
            }
        }
    }

    /// Waits for a port that wants a link; none when the volume is closed.
    fn next_port(&self) -> Option<Arc<Port>> {
        let mut state = self.connector.lock();
        loop {
            if state.stopped {
                return None;
            }
            state.ports.retain(|port| !port.is_closed());
            if let Some(port) = state.ports.iter().find(|port| port.is_wanted()) {
                return Some(port.clone());
            }
            state.woken = false;
            state = self.connector.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set(&self, link: LinkState, transport: Option<TransportKind>, reason: Option<String>) {
        let mut state = self.connector.lock();
        if state.last.is_none_or(|(last, _)| last != link) {
            state.last = Some((link, Instant::now()));
        }
        state.transport = transport.or(state.transport);
        state.reason = reason;
    }

    fn failed(&mut self, port: &Port, error: &ConnectError) {
        let lost = matches!(error, ConnectError::UnknownExport);
        let name = &self.connector.grant.appliance_name;
        let reason = match lost {
            true => "the appliance does not know the grant: its memory is gone, or another client owns it"
                .to_owned(),
            false => error.to_string(),
        };
        if self.connector.lock().reason.as_ref() != Some(&reason) {
            tracing::warn!(appliance = %name, %reason, "no way to the appliance");
        }
        self.set(if lost { LinkState::Lost } else { LinkState::Connecting }, None, Some(reason));
        if lost {
            port.deliver(Delivery::Lost);
        }
        let longest = if lost { PAUSE_LOST } else { self.pause };
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.sleep(longest);
    }

    /// Sleeps for half of `longest` to all of it, so that clients of a dead appliance do not come
    /// back all at once. Ends early when the volume is closed.
    fn sleep(&mut self, longest: Duration) {
        // xorshift: any spread will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let pause = longest / 2 + longest.mul_f64((self.random % 1024) as f64 / 2048.0);
        let end = Instant::now() + pause;
        let mut state = self.connector.lock();
        while !state.stopped {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return;
            };
            state = self.connector.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The best link that can be had, and why it is not a better one.
    fn connect(&mut self, port: &Port) -> Result<Made, ConnectError> {
        let connector = self.connector.clone();
        let local = connector.is_local();
        match connector.options.transport {
            Some(TransportKind::Shm) => self.shm(),
            Some(TransportKind::NbdUnix) => self.unix(port),
            Some(TransportKind::NbdTcp) => self.tcp(port),
            None if local => match self.shm() {
                Err(ConnectError::UnknownExport) => Err(ConnectError::UnknownExport),
                Err(better) => self.unix(port).or_else(|_| self.tcp(port)).map(|(link, kind, _)| {
                    (link, kind, Some(format!("no shared memory with the appliance: {better}")))
                }),
                made => made,
            },
            None => self.tcp(port),
        }
    }

    fn shm(&mut self) -> Result<Made, ConnectError> {
        let grant = match self.shm.upgrade().filter(|grant| !grant.is_revoked()) {
            Some(grant) => grant,
            None => {
                let path = needed(self.connector.grant.endpoints.shm.as_deref(), "shared memory")?;
                xpm_transport::shm::client::connect(
                    path,
                    &self.connector.grant.key,
                    self.connector.options.limit,
                )?
            }
        };
        self.shm = Arc::downgrade(&grant);
        let link = ShmLink::new(grant, self.connector.options.depth);
        Ok((Box::new(link), TransportKind::Shm, None))
    }

    fn unix(&mut self, port: &Port) -> Result<Made, ConnectError> {
        let path = needed(self.connector.grant.endpoints.nbd_unix.as_deref(), "a unix socket")?;
        let link = self.nbd(&Target::Unix(path.to_owned()), port)?;
        Ok((link, TransportKind::NbdUnix, None))
    }

    fn tcp(&mut self, port: &Port) -> Result<Made, ConnectError> {
        let mut failure = ConnectError::Unreachable(io::Error::other("the appliance says no TCP address"));
        for address in self.connector.grant.endpoints.nbd.clone() {
            match self.nbd(&Target::Tcp(address), port) {
                Ok(link) => return Ok((link, TransportKind::NbdTcp, None)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn nbd(&mut self, target: &Target, port: &Port) -> Result<Box<dyn Link>, ConnectError> {
        // Each connection is newer than all before it, so the appliance shuts those of this queue out.
        self.generation = self.generation.wrapping_add(1);
        let options = &self.connector.options;
        let session = SessionTag { id: options.session, queue: port.queue, generation: self.generation };
        let name = ExportName { key: self.connector.grant.key.clone(), session: Some(session) };
        let connected = xpm_transport::nbd::client::connect(target, &name, options.limit)?;
        let link = NbdLink::new(connected, options.depth).map_err(ConnectError::Unreachable)?;
        Ok(Box::new(link))
    }
}

type Made = (Box<dyn Link>, TransportKind, Option<String>);

fn needed<'a>(path: Option<&'a Path>, what: &str) -> Result<&'a Path, ConnectError> {
    path.ok_or_else(|| ConnectError::Unreachable(io::Error::other(format!("the appliance offers no {what}"))))
}
