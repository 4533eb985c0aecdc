//! The connector: one thread for each grant of a volume, which makes links when channels request them.
//! Control plane: it may block, allocate and log. `dial.rs` makes links by each transport.

mod dial;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_protocol::api::allocator::Grant;
use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::api::blk::{LinkState, LinkStatus, TransportKind};
use xpm_protocol::units::Span;
use xpm_protocol::{Epoch, GrantKey, HostId, Visitor};
use xpm_transport::link::Link;
use xpm_transport::names::Names;
use xpm_transport::nbd::client::ConnectError;
use xpm_transport::shm::client::ShmGrant;

use super::port::{Delivery, Port};
use super::trust::Trust;
use crate::owner::{Trouble, Word};

/// First pause after a failure.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts while the appliance is out of reach.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Pause between attempts after the appliance answered that it does not know the grant; it may be restoring
/// its memory after a restart. Trying again is safe: an appliance that lost the memory lost the key with it,
/// so an appliance that knows the key has the data.
const PAUSE_LOST: Duration = Duration::from_secs(3);
/// Shortest and longest time between two attempts to use a better transport than the present one.
const BETTER_AFTER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// Stack of the thread, in bytes; a process that serves swap has all of it locked. A debug build needs more.
const STACK_LEN: usize = if cfg!(debug_assertions) { 512 << 10 } else { 256 << 10 };
/// The queue number of connections that only test whether a transport works.
const PROBE_QUEUE: u16 = u16::MAX;

/// The reason that is shown while an appliance refuses.
const REFUSED: &str = "the appliance does not know the grant; I/O waits for the allocator's word on it";
/// Interval between two checks of an appliance whose links are up, and the time limit of a check: so the
/// state shown is at most 10 s old.
const LOOK: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(4));
/// Lower limit of both times, for a volume that holds I/O only briefly.
const LOOK_MIN: Duration = Duration::from_millis(250);

/// The interval between two checks, and the time limit of a check.
fn look_times(hold: Option<Duration>) -> (Duration, Duration) {
    let share = hold.map_or(Duration::MAX, |hold| (hold / 4).max(LOOK_MIN));
    (LOOK.0.min(share), LOOK.1.min(share))
}

/// The parameters of links.
#[derive(Debug, Clone)]
pub(super) struct LinkOptions {
    pub(super) host: Option<HostId>,
    pub(super) epoch: Epoch,
    /// The only transport to use.
    pub(super) transport: Option<TransportKind>,
    /// Transports not to use unless `transport` names them.
    pub(super) forbidden: Vec<TransportKind>,
    pub(super) limit: Duration,
    pub(super) depth: usize,
    pub(super) session: u128,
    /// Generation of the first connection; later ones count up from it.
    pub(super) generation: u32,
    /// How long refusals have to last before they count, where no allocator answers.
    pub(super) refusal_limit: Duration,
    /// How long I/O is held; none: without a limit.
    pub(super) hold: Option<Duration>,
    /// Notified when a path begins to fail, or to be refused.
    pub(super) alarm: Arc<Notify>,
    /// The life of the client that connections name.
    pub(super) visitor: Option<Visitor>,
    /// The reason for starting held; none: not held.
    pub(super) held: Option<String>,
    /// Whether only the allocator's statement ends I/O.
    pub(super) contested: bool,
}

/// The state of an appliance that does not answer though its links are up.
#[derive(Debug)]
struct Silent {
    since: Instant,
    reason: String,
    /// Whether the appliance was reached and answered that it does not know the grant.
    refused: bool,
}

/// The life of the path to one appliance, for one grant. All queues of a volume share it; each has a link of its own.
///
/// ```text
///                  links are made            the connection breaks, or checks fail
///   Connecting ------------------------> Up ---------------------------------------+
///     ^  |  ^                                                                      |
///     |  |  +----------------------------------------------------------------------+
///     |  |        I/O is held, and posted again in order on the next link
///     |  |
///     |  +-- the time of `hold` has passed --> I/O ends with an error; connecting continues
///     |  |
///     |  +-- the allocator reports the end of the ownership, refusals last for `refusal-limit`,
///     |  |   or the appliance is given up ---> Lost: no link is made, all I/O ends with an error
///     |  |
///     +--+-- new address (`moved`), new key and epoch (`renewed`): try again without a pause
/// ```
///
/// While `held` is set (a hand-over), no link is made and I/O waits without a limit.
struct State {
    ports: Vec<Arc<Port>>,
    woken: bool,
    stopped: bool,
    /// The present addresses of the appliance.
    endpoints: Endpoints,
    /// Whether the endpoints are new, so that they are tried without a pause.
    moved: bool,
    trust: Trust,
    /// Start of the time in which every attempt failed.
    failing: Option<Instant>,
    /// Start and reason of the time in which checks of an appliance with working links failed.
    silent: Option<Silent>,
    /// Whether the last attempt to enter the export was refused, as for a copied client. A check does not
    /// enter the export, so it cannot tell that this state is over.
    turned_away: bool,
    transport: Option<TransportKind>,
    reason: Option<String>,
    /// Result and time of the last attempt; used while no channel is open.
    last: Option<(LinkState, Instant)>,
    /// Why the appliance is given up: no link is made any more, and every channel receives
    /// [`Delivery::Lost`].
    given_up: Option<String>,
    /// Why no link is made and all I/O waits, without a limit.
    held: Option<String>,
    key: GrantKey,
    epoch: Epoch,
    /// Whether key and epoch changed since the last attempt to connect: links made with the old ones are
    /// discarded.
    renewed: bool,
}

/// The state that the connector's thread shares with channels and with readers of its status.
pub(super) struct Connector {
    grant: Grant,
    options: LinkOptions,
    state: Mutex<State>,
    wake: Condvar,
    /// Whether I/O waits beyond the operator's limit. Atomic, because channels take no lock.
    suspends: AtomicBool,
}

impl Connector {
    pub(super) fn start(grant: Grant, options: LinkOptions) -> io::Result<Arc<Connector>> {
        let connector = Arc::new(Connector::idle(grant, options));
        let thread = connector.clone();
        let builder = std::thread::Builder::new().name("xpm-connect".to_owned()).stack_size(STACK_LEN);
        crate::signals::blocked(|| builder.spawn(move || Work::new(thread).run()))?;
        Ok(connector)
    }

    /// A connector without its thread.
    pub(super) fn idle(grant: Grant, options: LinkOptions) -> Connector {
        let state = State {
            ports: Vec::new(),
            woken: false,
            stopped: false,
            endpoints: grant.endpoints.clone(),
            moved: false,
            trust: Trust::new(options.refusal_limit),
            failing: None,
            silent: None,
            turned_away: false,
            transport: None,
            reason: None,
            last: None,
            given_up: None,
            held: options.held.clone(),
            key: grant.key.clone(),
            epoch: options.epoch,
            renewed: false,
        };
        let suspends = AtomicBool::new(options.held.is_some());
        let connector =
            Connector { grant, options, state: Mutex::new(state), wake: Condvar::new(), suspends };
        connector.lock().trust.set_word_only(connector.options.contested);
        connector
    }

    /// Critical sections consist of assignments only, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, port: Arc<Port>) {
        let mut state = self.lock();
        if state.given_up.is_some() {
            port.deliver(Delivery::Lost);
        }
        state.ports.push(port);
        drop(state);
        self.wake();
    }

    /// Gives the appliance up for good: from now on its I/O ends with an error, whatever an attempt to
    /// connect is waiting for. Returns whether the appliance was not given up before.
    pub(super) fn give_up(&self, why: &str) -> bool {
        let mut state = self.lock();
        if state.given_up.is_some() {
            return false;
        }
        state.given_up = Some(why.to_owned());
        (state.reason, state.last) = (Some(why.to_owned()), Some((LinkState::Lost, Instant::now())));
        for port in state.ports.iter().filter(|port| !port.is_closed()) {
            port.deliver(Delivery::Lost);
        }
        drop(state);
        self.wake();
        true
    }

    /// From now on no link is used or made, and all I/O waits, whatever its time limit, until
    /// [`Connector::go_on`].
    pub(super) fn hold(&self, why: &str) {
        let mut state = self.lock();
        if state.given_up.is_some() {
            return;
        }
        state.trust.connected();
        (state.failing, state.silent, state.turned_away) = (None, None, false);
        state.note(LinkState::Connecting, None, Some(why.to_owned()));
        state.held = Some(why.to_owned());
        self.drop_links(&mut state);
    }

    /// Makes links again, with the key and the addresses of `grant`.
    pub(super) fn go_on(&self, grant: &Grant, epoch: Epoch) {
        let mut state = self.lock();
        (state.key, state.epoch, state.endpoints) = (grant.key.clone(), epoch, grant.endpoints.clone());
        (state.held, state.failing, state.silent, state.turned_away) = (None, None, None, false);
        (state.renewed, state.moved) = (true, true);
        state.trust.connected();
        state.note(LinkState::Connecting, None, None);
        self.drop_links(&mut state);
    }

    /// Sets whether only the allocator's statement ends I/O.
    pub(super) fn set_contested(&self, contested: bool) {
        let mut state = self.lock();
        state.trust.set_word_only(contested);
        self.note_suspension(&state);
    }

    /// Makes every channel drop its link.
    fn drop_links(&self, state: &mut State) {
        self.note_suspension(state);
        state.ports.iter().filter(|port| !port.is_closed()).for_each(|port| port.deliver(Delivery::Held));
        state.woken = true;
        self.wake.notify_all();
    }

    fn note_suspension(&self, state: &State) {
        self.suspends.store(state.held.is_some() || state.trust.waits_for_word(), Ordering::Release);
    }

    /// Whether I/O waits beyond the operator's limit.
    pub(super) fn suspends_limit(&self) -> bool {
        self.suspends.load(Ordering::Acquire)
    }

    pub(super) fn key(&self) -> GrantKey {
        self.lock().key.clone()
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.lock().epoch
    }

    /// Notifies the thread that a port requests a link, or was closed. This is the only lock that a channel
    /// takes, and only when a link went down.
    pub(super) fn wake(&self) {
        self.lock().woken = true;
        self.wake.notify_all();
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
    }

    pub(super) fn grant(&self) -> &Grant {
        &self.grant
    }

    fn endpoints(&self) -> Endpoints {
        self.lock().endpoints.clone()
    }

    /// The trouble of the path, for a guard that asks the allocator about it; none while the path works.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        let state = self.lock();
        if state.given_up.is_some() || state.held.is_some() {
            return None;
        }
        let failing = state.failing.filter(|_| state.ports.iter().any(|port| port.misses_link()));
        let since = failing.or(state.silent.as_ref().map(|silent| silent.since))?;
        let refused = state.trust.is_refused();
        Some(Trouble { grant: self.grant.id, appliance: self.grant.appliance, refused, since })
    }

    /// Takes the allocator's answer. A path that works is not changed: its appliance knows the grant.
    pub(super) fn hear(&self, word: &Word) {
        let mut state = self.lock();
        let now = Instant::now();
        if let Word::Holds { endpoints, .. } = word
            && let Some(endpoints) = endpoints.get(&self.grant.id)
            && *endpoints != state.endpoints
        {
            tracing::info!(appliance = %self.grant.appliance_name, "the appliance has other addresses now");
            state.endpoints = endpoints.clone();
            state.moved = true;
        }
        match word {
            _ if state.failing.is_none() && state.silent.is_none() => {}
            Word::Holds { lost, .. } if lost.contains(&self.grant.id) => {
                state.trust.gone("the allocator says that the appliance has lost what was there");
            }
            Word::Holds { .. } | Word::Waits { .. } => state.trust.holds(now),
            Word::Ended { why, recorded } if *recorded || state.trust.is_refused() => {
                state.trust.gone(&format!("the allocator says that {why}"));
            }
            Word::Ended { .. } => {}
        }
        self.tell_if_lost(&mut state, now);
        drop(state);
        self.wake.notify_all();
    }

    /// Ends the I/O of queues without a link if it is proven that they will get none. Runs under the lock
    /// that links are delivered under, so a queue that just received a link keeps it.
    fn tell_if_lost(&self, state: &mut State, now: Instant) -> bool {
        if state.given_up.is_some() {
            return true;
        }
        self.note_suspension(state);
        if state.held.is_some() {
            return false;
        }
        let Some(why) = state.trust.lost(now) else { return false };
        if state.reason.as_ref() != Some(&why) {
            tracing::error!(appliance = %self.grant.appliance_name, reason = %why, "I/O to the appliance fails");
        }
        // When the appliance refuses the grant, a link that still exists has ended without notice.
        let all = state.silent.as_ref().is_some_and(|silent| silent.refused);
        state.note(LinkState::Lost, None, Some(why));
        let losing = state.ports.iter().filter(|port| port.misses_link() || (all && !port.is_closed()));
        losing.for_each(|port| port.deliver(Delivery::Lost));
        true
    }

    /// Whether every queue has its link.
    pub(super) fn is_up(&self) -> bool {
        let state = self.lock();
        state.ports.iter().all(|port| port.is_closed() || port.state() == LinkState::Up)
    }

    pub(super) fn status(&self) -> LinkStatus {
        let first_choice = self.first_choice();
        let state = self.lock();
        let live = || state.ports.iter().filter(|port| !port.is_closed());
        let worst = live()
            .map(|port| (port.state(), port.since()))
            .max_by_key(|(state, since)| (*state, std::cmp::Reverse(*since)))
            .or(state.last);
        let given_up = state.given_up.as_ref().and(state.last);
        let (mut link_state, mut since) =
            given_up.or(worst).unwrap_or((LinkState::Connecting, Instant::now()));
        let mut reason = state.reason.clone();
        if let (LinkState::Up, Some(silent)) = (link_state, &state.silent) {
            (link_state, since) = (LinkState::Connecting, silent.since);
            reason = Some(silent.reason.clone());
        }
        LinkStatus {
            appliance: self.grant.appliance,
            appliance_name: self.grant.appliance_name.clone(),
            transport: state.transport.unwrap_or(first_choice),
            state: link_state,
            since: Span(whole_millis(since.elapsed())),
            reconnects: live().map(|port| port.links().saturating_sub(1)).sum(),
            reason,
        }
    }

    /// The time since which the appliance has not answered, if it is known not to answer.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        self.lock().silent.as_ref().map(|silent| silent.since)
    }

    fn first_choice(&self) -> TransportKind {
        self.choices().first().copied().unwrap_or(TransportKind::NbdTcp)
    }

    /// The transports to try, best first.
    fn choices(&self) -> Vec<TransportKind> {
        if let Some(only) = self.options.transport {
            return vec![only];
        }
        let endpoints = self.endpoints();
        let local = self.options.host == Some(endpoints.host);
        let all = [TransportKind::Shm, TransportKind::Rdma, TransportKind::NbdUnix, TransportKind::NbdTcp];
        let can_be = |kind: &TransportKind| match kind {
            TransportKind::Shm | TransportKind::NbdUnix => local,
            TransportKind::Rdma => !endpoints.rdma.is_empty(),
            TransportKind::NbdTcp => true,
        };
        let allowed = |kind: &TransportKind| !self.options.forbidden.contains(kind);
        all.into_iter().filter(can_be).filter(allowed).collect()
    }
}

impl State {
    fn note(&mut self, link: LinkState, transport: Option<TransportKind>, reason: Option<String>) {
        if self.given_up.is_some() {
            return;
        }
        if self.last.is_none_or(|(last, _)| last != link) {
            self.last = Some((link, Instant::now()));
        }
        self.transport = transport.or(self.transport);
        self.reason = reason;
    }
}

fn whole_millis(duration: Duration) -> Duration {
    Duration::from_millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// The state of the connector's thread.
struct Work {
    connector: Arc<Connector>,
    /// The mapped memory of the grant, shared by the links of all queues.
    shm: Weak<ShmGrant>,
    generation: u32,
    pause: Duration,
    /// Set while the best transport does not work.
    worse: Option<Worse>,
    names: Names,
    /// Time of the next check of the appliance.
    look_due: Instant,
    random: u64,
}

/// Why the best transport is not used, and when it is tried again; until then no queue tries it, because an
/// attempt may take its whole time limit.
struct Worse {
    reason: String,
    due: Instant,
    pause: Duration,
}

/// The thread's next action.
enum Next {
    /// Make a link for this port.
    Connect(Arc<Port>),
    /// Try a better transport.
    Better,
    /// Check whether the appliance answers.
    Look,
    /// End, because the volume is closed.
    Stop,
}

impl Work {
    fn new(connector: Arc<Connector>) -> Work {
        let random = Arc::as_ptr(&connector) as u64 ^ u64::from(std::process::id());
        let (generation, names) = (connector.options.generation, Names::default());
        Work {
            connector,
            shm: Weak::new(),
            generation,
            pause: PAUSE_MIN,
            worse: None,
            names,
            look_due: Instant::now(),
            random,
        }
    }

    fn run(mut self) {
        loop {
            match self.next() {
                Next::Connect(port) => self.serve(&port),
                Next::Better => self.improve(),
                Next::Look => self.look(),
                Next::Stop => return,
            }
        }
    }

    fn serve(&mut self, port: &Arc<Port>) {
        match self.connect(port.queue) {
            Ok(made) => self.deliver(port, made),
            Err(error) => self.failed(port, &error),
        }
    }

    fn deliver(&mut self, port: &Port, made: Made) {
        let Made { link, transport, reason } = made;
        self.pause = PAUSE_MIN;
        self.tell_change(transport, reason.as_deref());
        let mut state = self.connector.lock();
        if state.given_up.is_some() || state.held.is_some() || state.renewed {
            // A link that was being made in the meantime is discarded.
            return;
        }
        state.trust.connected();
        self.connector.note_suspension(&state);
        (state.failing, state.silent, state.turned_away) = (None, None, false);
        self.look_due = Instant::now() + look_times(self.connector.options.hold).0;
        state.note(LinkState::Up, Some(transport), reason);
        port.deliver(Delivery::Link(link));
    }

    /// Logs the transport when it is another one than before.
    fn tell_change(&self, transport: TransportKind, reason: Option<&str>) {
        let name = &self.connector.grant.appliance_name;
        let before = self.connector.lock().transport;
        match reason {
            _ if before == Some(transport) => {}
            Some(reason) => {
                tracing::warn!(appliance = %name, %transport, %reason, "not by the best transport");
            }
            None => tracing::info!(appliance = %name, %transport, "connected"),
        }
    }

    /// Waits for the next action.
    fn next(&mut self) -> Next {
        let connector = self.connector.clone();
        let mut state = connector.lock();
        loop {
            if state.stopped {
                return Next::Stop;
            }
            state.ports.retain(|port| !port.is_closed());
            if std::mem::take(&mut state.renewed) {
                // The mapping made with the old key may be another client's memory now.
                (self.shm, self.pause, self.worse) = (Weak::new(), PAUSE_MIN, None);
            }
            if state.held.is_some() && state.given_up.is_none() {
                state = connector.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.given_up.is_some() {
                // A channel that had a link requests another one when it drops the link.
                let ports = state.ports.iter();
                ports.filter(|port| port.is_wanted()).for_each(|port| port.deliver(Delivery::Lost));
            } else if let Some(port) = state.ports.iter().find(|port| port.is_wanted()) {
                return Next::Connect(port.clone());
            }
            state.woken = false;
            if state.given_up.is_some() {
                state = connector.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // Without queues no link can be moved to a better transport.
            let better = self.worse.as_ref().map(|worse| worse.due).filter(|_| !state.ports.is_empty());
            let now = Instant::now();
            if better.is_some_and(|due| due <= now) {
                return Next::Better;
            }
            if self.look_due <= now {
                return Next::Look;
            }
            let due = better.map_or(self.look_due, |due| due.min(self.look_due));
            let left = due.saturating_duration_since(now);
            state = connector.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Checks whether the appliance behind the links answers and knows the grant, even if the links are idle.
    /// The check uses a connection of its own, which enters no export, so it affects no I/O.
    fn look(&mut self) {
        let (every, limit) = look_times(self.connector.options.hold);
        let begun = Instant::now();
        let looked = self.ask(limit);
        self.look_due = begun + every;
        let mut state = self.connector.lock();
        if state.given_up.is_some() || state.held.is_some() || state.renewed {
            return;
        }
        let Err(error) = looked else {
            if state.silent.take().is_some() {
                tracing::info!(appliance = %self.connector.grant.appliance_name, "the appliance answers again");
            }
            // A successful check resets the refusals of earlier checks.
            state.trust.connected();
            if state.ports.is_empty() && !state.turned_away {
                // No channel has a link; the status shows the state that a link would have.
                state.failing = None;
                state.note(LinkState::Up, None, None);
            }
            return;
        };
        let refused = matches!(error, ConnectError::UnknownExport);
        let is_new = state.silent.as_ref().is_none_or(|before| refused && !before.refused);
        if is_new {
            tracing::warn!(appliance = %self.connector.grant.appliance_name, %error, "the appliance does not answer");
        }
        let since = state.silent.as_ref().map_or(begun, |before| before.since);
        let reason = match refused {
            true => REFUSED.to_owned(),
            false => format!("the appliance does not answer: {error}"),
        };
        if state.ports.is_empty() {
            state.note(LinkState::Connecting, None, Some(reason.clone()));
        }
        state.silent = Some(Silent { since, reason, refused });
        if refused {
            state.trust.refused(begun);
        }
        let now = Instant::now();
        if !self.connector.tell_if_lost(&mut state, now)
            && self.connector.options.hold.is_some_and(|hold| now.saturating_duration_since(since) >= hold)
        {
            // I/O on these links hangs, and its time limit has passed.
            let with_link = state.ports.iter().filter(|port| port.state() == LinkState::Up);
            with_link.for_each(|port| port.deliver(Delivery::Stalled(since)));
        }
        drop(state);
        if is_new {
            self.connector.options.alarm.notify_one();
        }
    }

    /// Moves all queues to a better transport, if it works by now. A connection that no queue uses tests it
    /// first, so that the links in use are disturbed only when it works.
    fn improve(&mut self) {
        if let Some(worse) = &mut self.worse {
            worse.pause = (worse.pause * 2).min(BETTER_AFTER.1);
            worse.due = Instant::now() + worse.pause;
        }
        let best = self.connector.first_choice();
        if self.by(best, PROBE_QUEUE).is_err() {
            return;
        }
        let ports = self.connector.lock().ports.clone();
        for port in ports.iter().filter(|port| !port.is_closed()) {
            match self.by(best, port.queue) {
                Ok(link) => self.deliver(port, Made { link, transport: best, reason: None }),
                // This queue and the later ones are tried again when the next attempt is due.
                Err(_) => return,
            }
        }
        self.worse = None;
    }

    /// Handles a failed attempt. I/O continues to wait, unless it is proven that the memory is gone.
    fn failed(&mut self, port: &Arc<Port>, error: &ConnectError) {
        let refused = matches!(error, ConnectError::UnknownExport);
        let name = &self.connector.grant.appliance_name;
        let reason = match refused {
            true => REFUSED.to_owned(),
            false => error.to_string(),
        };
        self.put_last(port);
        let now = Instant::now();
        let mut state = self.connector.lock();
        if state.held.is_some() || state.renewed {
            return;
        }
        let is_new = state.failing.is_none() || (refused && !state.trust.is_refused());
        state.failing.get_or_insert(now);
        state.turned_away = matches!(error, ConnectError::Refused(_));
        if refused {
            state.trust.refused(now);
        }
        if !self.connector.tell_if_lost(&mut state, now) {
            if state.reason.as_ref() != Some(&reason) {
                tracing::warn!(appliance = %name, %reason, "no way to the appliance");
            }
            state.note(LinkState::Connecting, None, Some(reason));
        }
        let longest = if refused { state.trust.pause(PAUSE_LOST) } else { self.pause };
        drop(state);
        if is_new {
            self.connector.options.alarm.notify_one();
        }
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.sleep(longest);
    }

    /// Moves the port to the end of the list, so that other ports have their turn before it.
    fn put_last(&self, port: &Arc<Port>) {
        let mut state = self.connector.lock();
        state.ports.retain(|other| !Arc::ptr_eq(other, port));
        state.ports.push(port.clone());
    }

    /// Sleeps for half of `longest` up to all of it, so that the clients of a failed appliance do not
    /// reconnect all at once. Ends early when the volume is closed, or the appliance has other addresses.
    fn sleep(&mut self, longest: Duration) {
        // xorshift: any distribution is good enough.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let pause = longest / 2 + longest.mul_f64((self.random % 1024) as f64 / 2048.0);
        let end = Instant::now() + pause;
        let mut state = self.connector.lock();
        while !state.stopped {
            if std::mem::take(&mut state.moved) {
                drop(state);
                (self.pause, self.worse) = (PAUSE_MIN, None);
                return;
            }
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return;
            };
            state = self.connector.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes the best link that works; the result also says why it is not a better one.
    fn connect(&mut self, queue: u16) -> Result<Made, ConnectError> {
        let mut failure = ConnectError::Unreachable(io::Error::other("every transport to it is forbidden"));
        let choices = self.connector.choices();
        let only = choices.len() == 1;
        for (place, transport) in choices.into_iter().enumerate() {
            if place == 0 && self.worse.as_ref().is_some_and(|worse| Instant::now() < worse.due) {
                continue;
            }
            match self.by(transport, queue) {
                Ok(link) => {
                    let reason = self.worse.as_ref().filter(|_| place > 0).map(|worse| worse.reason.clone());
                    return Ok(Made { link, transport, reason });
                }
                Err(ConnectError::UnknownExport) => return Err(ConnectError::UnknownExport),
                Err(error) => {
                    if place == 0 && !only {
                        let reason = format!("no {transport} to the appliance: {error}");
                        let pause = BETTER_AFTER.0;
                        self.worse = Some(Worse { reason, due: Instant::now() + pause, pause });
                    }
                    failure = error;
                }
            }
        }
        // When the appliance is reachable again, the best transport is tried first.
        self.worse = None;
        Err(failure)
    }
}

/// A link with its transport, and the reason why no better transport is used.
struct Made {
    link: Box<dyn Link>,
    transport: TransportKind,
    reason: Option<String>,
}

#[cfg(test)]
mod tests;
