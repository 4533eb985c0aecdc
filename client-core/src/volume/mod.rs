//! [`Volume`]: an allocation in use at this client. Its size and the places of its regions can change while
//! it is used; see [`Volume::change`].

mod change;
mod channel;
mod connector;
mod moves;
mod orders;
mod plan;
mod port;
#[cfg(test)]
mod tests;
mod trust;

use std::io;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_protocol::api::allocator::{Grant, Map, SlabMap};
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::api::blk::{DeviceState, Hold, LinkState, LinkStatus, TransportKind};
use xpm_protocol::{ApplianceId, HostId, Name, Visitor};
use xpm_transport::io::{IoError, Kind};

use crate::owner::{Guarded, Trouble, Word};

pub use self::change::{Change, ChangeError, Run};
pub use self::channel::Channel;
use self::connector::{Connector, LinkOptions};
use self::moves::Progress;
use self::orders::Mailbox;
pub use self::plan::{Leg, Legs, MapError, Plan};
pub(crate) use self::port::Bell;
use self::port::Port;
pub use self::trust::{REFUSAL_LIMIT, Trust};

/// The user of the volume gives queue numbers from this one on; the volume itself gives the lower ones.
const QUEUES_NUMBERED: u16 = 1 << 15;

/// The parameters of a volume's use.
#[derive(Debug, Clone)]
pub struct VolumeOptions {
    /// How long I/O is held while an appliance cannot be reached.
    pub hold: Hold,
    /// The only transport to use; none: the best one for each appliance.
    pub transport: Option<TransportKind>,
    /// Transports that are used only if `transport` names them.
    pub forbidden: Vec<TransportKind>,
    /// Time limit of a connection attempt.
    pub connect_limit: Duration,
    /// Most operations in flight on one channel.
    pub depth: usize,
    /// Random number of this use of the allocation: appliances distinguish its connections from those of an
    /// earlier use by it.
    pub session: u128,
    /// Generation of the first connections. They are newer than connections of the same session and queue
    /// with a lower generation, which the appliances close. 0 where no earlier use has this session.
    pub generation: u32,
    /// The kernel that this process runs on; none if unknown.
    pub host: Option<HostId>,
    /// How long an appliance has to refuse a grant, while no allocator answers, before I/O to the appliance
    /// fails; [`REFUSAL_LIMIT`] is the usual value.
    pub refusal_limit: Duration,
    /// The life of the client. An appliance admits one life of a client, and the lives that follow it. None:
    /// connections name no life, and appliances do not check it.
    pub visitor: Option<Visitor>,
    /// Opens the volume held, for this reason: no appliance is connected, and all I/O waits, whatever `hold`
    /// says, until [`Volume::go_on`]. None: the volume connects at once.
    pub held: Option<String>,
    /// The initial value of [`Volume::set_contested`].
    pub contested: bool,
}

/// Why a volume cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The map is invalid.
    #[error("the map of allocation `{name}` cannot be used: {source}")]
    Map {
        /// The allocation.
        name: String,
        /// The defect of the map.
        source: MapError,
    },
    /// No thread could be started.
    #[error("cannot start a thread that connects to an appliance: {0}")]
    Thread(io::Error),
    /// An appliance could not be reached in time.
    #[error("appliance `{appliance}` is not connected after {limit:?}: {reason}")]
    NotReady {
        /// The appliance.
        appliance: String,
        /// The time limit.
        limit: Duration,
        /// The error of the last attempt.
        reason: String,
    },
}

/// The state of a volume.
#[derive(Debug, Clone)]
pub struct VolumeStatus {
    /// Whether I/O passes.
    pub state: DeviceState,
    /// The paths to its appliances, in the order of the map's grants.
    pub links: Vec<LinkStatus>,
    /// Counts of the operations since the volume was opened.
    pub counters: Counters,
    /// Operations in flight.
    pub in_flight: u64,
}

/// An allocation in use. Clones share the same volume; dropping the last clone and the last channel closes
/// the connections.
#[derive(Clone)]
pub struct Volume {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    options: VolumeOptions,
    links: LinkOptions,
    /// Name of the allocation.
    name: String,
    /// Named slabs, as of the time when the volume was opened.
    slabs: SlabMap,
    queues: AtomicU16,
    /// A channel without I/O, which exists until the first other channel is made: it connects, so that the
    /// state of the appliances is known before a user has to wait for them.
    probe: Mutex<Option<Channel>>,
}

/// The state that channels share with the volume.
struct Shared {
    live: Mutex<Live>,
    tallies: Mutex<Tallies>,
}

/// The valid plan and its paths, and the change in progress.
struct Live {
    plan: Arc<Plan>,
    /// Paths by the numbers that the plan uses for grants; none where a path ended.
    ways: Vec<Option<Arc<Connector>>>,
    members: Vec<Member>,
    change: Option<Underway>,
}

/// The part of a channel that a change needs.
struct Member {
    queue: u16,
    mailbox: Arc<Mailbox>,
}

/// The state of a change that a channel needs when it is created during the change.
#[derive(Clone, Default)]
struct Underway {
    progress: Option<Progress>,
    /// No I/O goes beyond this offset any more, and a write ends only when both places have it.
    firm: Option<u64>,
    /// The plan for reads, while writes go to both places.
    reads: Option<Arc<Plan>>,
}

/// Counters of the open channels, and the sum of the counters of closed ones.
#[derive(Default)]
struct Tallies {
    open: Vec<Arc<Tally>>,
    closed: Counters,
}

/// Counters of one channel, written by the channel's thread only.
#[derive(Default)]
struct Tally {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    trims: AtomicU64,
    errors: AtomicU64,
    in_flight: AtomicU64,
}

impl Volume {
    /// Checks the map and begins to connect, without waiting for it. I/O on channels waits until the
    /// appliances that it needs are connected.
    ///
    /// # Errors
    /// [`OpenError::Map`], or [`OpenError::Thread`] when the system cannot create another thread.
    pub fn open(map: &Map, options: VolumeOptions) -> Result<Volume, OpenError> {
        let plan = Plan::new(map).map_err(|source| OpenError::Map { name: map.name.to_string(), source })?;
        let links = LinkOptions {
            host: options.host,
            epoch: map.epoch,
            transport: options.transport,
            forbidden: options.forbidden.clone(),
            limit: options.connect_limit,
            // An operation of a channel can have many legs on one link.
            depth: options.depth * 2,
            session: options.session,
            generation: options.generation,
            refusal_limit: options.refusal_limit,
            hold: match options.hold {
                Hold::Forever => None,
                Hold::For(span) => Some(span.0),
            },
            alarm: Arc::default(),
            visitor: options.visitor.clone(),
            held: options.held.clone(),
            contested: options.contested,
        };
        let live = Live { plan: Arc::new(plan), ways: Vec::new(), members: Vec::new(), change: None };
        let shared = Arc::new(Shared { live: Mutex::new(live), tallies: Mutex::default() });
        for grant in &map.grants {
            // An error drops `shared`, which stops the connectors that run already.
            let connector = Connector::start(grant.clone(), links.clone()).map_err(OpenError::Thread)?;
            shared.live().ways.push(Some(connector));
        }
        let slabs = map.slabs.clone();
        let name = map.name.to_string();
        let inner =
            Inner { shared, options, links, name, slabs, queues: AtomicU16::new(0), probe: Mutex::default() };
        let probe = inner.channel().map_err(OpenError::Thread)?;
        *inner.probe() = Some(probe);
        Ok(Volume { inner: Arc::new(inner) })
    }

    /// Size in bytes; a change can alter it.
    pub fn size(&self) -> u64 {
        self.inner.shared.live().plan.size()
    }

    /// Whether a change waits for channels to follow; a poll of each channel lets them follow.
    pub fn waits_for_channels(&self) -> bool {
        self.inner.shared.live().members.iter().any(|member| member.mailbox.is_waited_for())
    }

    /// Name of the allocation.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Named slabs, as of the time when the volume was opened.
    pub fn slabs(&self) -> &SlabMap {
        &self.inner.slabs
    }

    /// Most operations in flight on each channel.
    pub fn depth(&self) -> usize {
        self.inner.options.depth
    }

    /// Creates a channel for one more queue.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub fn channel(&self) -> io::Result<Channel> {
        let channel = self.inner.channel()?;
        *self.inner.probe() = None;
        Ok(channel)
    }

    /// Creates a channel for the queue that has this number in every use of the allocation with this session.
    /// The connections of the channel shut out those of the queue's earlier channels, also of a process that
    /// died. Only one channel of a queue may exist at a time.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub fn channel_of(&self, queue: u16) -> io::Result<Channel> {
        let channel = self.inner.channel_numbered(QUEUES_NUMBERED | queue)?;
        *self.inner.probe() = None;
        Ok(channel)
    }

    /// Waits until every appliance is connected once, by a temporary channel of its own.
    ///
    /// # Errors
    /// [`OpenError::NotReady`] when an appliance is not connected in time, or does not know the grant.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), OpenError> {
        let start = Instant::now();
        let _channel = self.channel().map_err(OpenError::Thread)?;
        loop {
            let status = self.status();
            let Some(missing) = status.links.iter().find(|link| link.state != LinkState::Up) else {
                return Ok(());
            };
            if missing.state == LinkState::Lost || self.is_refused() || start.elapsed() >= limit {
                return Err(OpenError::NotReady {
                    appliance: missing.appliance_name.to_string(),
                    limit,
                    reason: missing.reason.clone().unwrap_or_else(|| "no answer".to_owned()),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether an appliance answers that it does not know the grant: waiting for this appliance at the start
    /// is useless.
    fn is_refused(&self) -> bool {
        self.troubles().iter().any(|trouble| trouble.refused)
    }

    /// Whether some regions lie on the appliance of this name.
    pub fn is_on(&self, appliance: &Name) -> bool {
        self.connectors().iter().any(|connector| connector.grant().appliance_name == *appliance)
    }

    /// The grants that the volume has paths to now.
    pub(crate) fn grants(&self) -> Vec<Grant> {
        self.connectors().iter().map(|connector| connector.grant().clone()).collect()
    }

    fn connectors(&self) -> Vec<Arc<Connector>> {
        self.inner.shared.live().ways.iter().flatten().cloned().collect()
    }

    /// Gives an appliance up for good: from now on, pending and new I/O to it ends with an error. `why` is
    /// shown to operators. Returns whether the appliance was not given up before. Does not block.
    pub fn give_up(&self, appliance: ApplianceId, why: &str) -> bool {
        let connectors = self.connectors();
        let of_it = connectors.iter().filter(|connector| connector.grant().appliance == appliance);
        of_it.fold(false, |news, connector| connector.give_up(why) | news)
    }

    /// Disconnects every appliance, and makes all I/O wait, whatever its time limit, until [`Volume::go_on`]
    /// or [`Volume::end_all`]. `why` is shown to operators. Does not block.
    pub fn hold_all(&self, why: &str) {
        self.connectors().iter().for_each(|connector| connector.hold(why));
    }

    /// Connects by the keys and addresses of this map, and resumes the waiting I/O. The map must contain the
    /// same grants and have the same size. Does not block.
    ///
    /// # Errors
    /// When the map differs in grants or size; the volume is unchanged then.
    pub fn go_on(&self, map: &Map) -> Result<(), ChangeError> {
        let connectors = self.connectors();
        let grant_of = |connector: &Arc<Connector>| {
            let id = connector.grant().id;
            Some((connector.clone(), map.grants.iter().find(|grant| grant.id == id)?.clone()))
        };
        let known: Option<Vec<_>> = connectors.iter().map(grant_of).collect();
        let fits = map.grants.len() == connectors.len() && map.size.0 == self.size();
        let Some(known) = known.filter(|_| fits) else {
            let what = "the allocation lies elsewhere, or has another size, than when it was attached";
            return Err(ChangeError::Unfit(what.to_owned()));
        };
        known.iter().for_each(|(connector, grant)| connector.go_on(grant, map.epoch));
        Ok(())
    }

    /// From now on all I/O ends with an error, for good. `why` is shown to operators. Does not block.
    pub fn end_all(&self, why: &str) {
        for connector in self.connectors() {
            connector.give_up(why);
        }
    }

    /// Sets whether another client may have the allocation and give it back. While this is true, refusals of
    /// appliances end no I/O, however long they last; only the allocator's answer does.
    pub fn set_contested(&self, contested: bool) {
        self.connectors().iter().for_each(|connector| connector.set_contested(contested));
    }

    /// The state of the volume. Takes locks that no I/O waits for.
    pub fn status(&self) -> VolumeStatus {
        if let Some(probe) = &mut *self.inner.probe() {
            // The probe posts no operation, so polling it returns no completion; it updates the state of the
            // links.
            probe.arm();
            probe.poll(&mut Vec::new());
        }
        let links: Vec<LinkStatus> = self.connectors().iter().map(|connector| connector.status()).collect();
        let state = match links.iter().map(|link| link.state).max() {
            Some(LinkState::Lost) => DeviceState::Lost,
            Some(LinkState::Connecting) => DeviceState::Holding,
            Some(LinkState::Up) | None => DeviceState::Live,
        };
        let (counters, in_flight) = self.inner.shared.sum();
        VolumeStatus { state, links, counters, in_flight }
    }
}

impl Guarded for Volume {
    fn troubles(&self) -> Vec<Trouble> {
        self.connectors().iter().filter_map(|connector| connector.trouble()).collect()
    }

    fn hear(&self, word: &Word) {
        self.connectors().iter().for_each(|connector| connector.hear(word));
    }

    fn alarm(&self) -> Arc<Notify> {
        self.inner.links.alarm.clone()
    }
}

impl Inner {
    fn probe(&self) -> std::sync::MutexGuard<'_, Option<Channel>> {
        self.probe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self) -> io::Result<Channel> {
        self.channel_numbered(self.queues.fetch_add(1, Ordering::Relaxed) & !QUEUES_NUMBERED)
    }

    fn channel_numbered(&self, queue: u16) -> io::Result<Channel> {
        let mailbox = Arc::new(Mailbox::new(Arc::new(Bell::new()?)));
        let hold = match self.options.hold {
            Hold::Forever => None,
            Hold::For(span) => Some(span.0),
        };
        // Locked until the channel is a member: the channel takes part in a change from the change's next
        // step on, and learns the earlier steps here.
        let mut live = self.shared.live();
        let port = |connector: &Option<Arc<Connector>>| {
            (Arc::new(Port::new(queue, mailbox.bell().clone())), connector.clone())
        };
        let ports: Vec<_> = live.ways.iter().map(port).collect();
        let mut channel = Channel::new(
            live.plan.clone(),
            self.shared.clone(),
            ports.clone(),
            mailbox.clone(),
            (self.options.depth, hold),
        )?;
        if let Some(underway) = live.change.clone() {
            channel.join(underway);
        }
        live.members.retain(|member| !member.mailbox.is_closed());
        live.members.push(Member { queue, mailbox });
        drop(live);
        for (port, connector) in ports {
            if let Some(connector) = connector {
                connector.add(port);
            }
        }
        Ok(channel)
    }
}

impl Shared {
    /// Critical sections consist of assignments only, so a poisoned lock is safe to use.
    fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tallies(&self) -> std::sync::MutexGuard<'_, Tallies> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_tally(&self, tally: &Arc<Tally>) {
        self.tallies().open.push(tally.clone());
    }

    fn remove_tally(&self, tally: &Arc<Tally>) {
        let mut tallies = self.tallies();
        tallies.open.retain(|open| !Arc::ptr_eq(open, tally));
        tally.add_to(&mut tallies.closed);
    }

    fn sum(&self) -> (Counters, u64) {
        let tallies = self.tallies();
        let mut counters = tallies.closed;
        tallies.open.iter().for_each(|tally| tally.add_to(&mut counters));
        (counters, tallies.open.iter().map(|tally| tally.in_flight.load(Ordering::Relaxed)).sum())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Wakes the task that guards the volume: its work is over.
        self.links.alarm.notify_one();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.live().ways.iter().flatten().for_each(|connector| connector.stop());
    }
}

impl Tally {
    fn ended(&self, kind: Kind, len: u64, result: Result<(), IoError>) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let add =
            |counter: &AtomicU64, by| counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
        match (kind, result) {
            (_, Err(_)) => add(&self.errors, 1),
            (Kind::Read, Ok(())) => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            (Kind::Write, Ok(())) => {
                add(&self.writes, 1);
                add(&self.write_bytes, len);
            }
            (Kind::Trim | Kind::Zero, Ok(())) => add(&self.trims, 1),
            (Kind::Flush, Ok(())) => {}
        }
    }

    fn add_to(&self, sum: &mut Counters) {
        sum.reads += self.reads.load(Ordering::Relaxed);
        sum.read_bytes += self.read_bytes.load(Ordering::Relaxed);
        sum.writes += self.writes.load(Ordering::Relaxed);
        sum.write_bytes += self.write_bytes.load(Ordering::Relaxed);
        sum.trims += self.trims.load(Ordering::Relaxed);
        sum.errors += self.errors.load(Ordering::Relaxed);
    }
}
