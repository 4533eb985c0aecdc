//! A server of the NBD protocol, used for an appliance's grants and for volumes that any NBD client may use.
//!
//! A connection is accepted and negotiated on the control plane (tokio, with limits on time and number), then
//! passed once to a loop thread, which serves it to its end: no request changes threads. There is one loop
//! for each core.

mod buffers;
mod connection;
mod counters;
mod deferred;
mod event_loop;
mod incoming;
mod input;
mod listen;
mod output;
mod pulse;
mod registry;
mod reply;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::nbd::{ExportInfo, SessionTag};
use xpm_protocol::{Life, Visitor};

use self::connection::{Connection, Ready};
use self::counters::LoopCounters;
use self::event_loop::{EventLoop, Letter, Mailbox};
use self::registry::{ConnectionId, Registry};
pub use crate::accept::Listener;
use crate::handshakes::{Handshakes, PLACES_MAX};
use crate::store::Store;

/// Stack of a loop thread, in bytes; xpm-blk locks all of it. A debug build uses at most 92 KiB (measured).
const STACK_LEN: usize = 256 << 10;

/// The configuration of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Prefix of its threads' names, at most 12 bytes; process tools show it.
    pub name: &'static str,
    /// Loop threads; at least 1.
    pub loops: usize,
    /// Longest busy poll after work, before a loop sleeps. Zero: sleep at once.
    pub spin: Duration,
    /// Time limit of a handshake; the client has to send its first message within the first two seconds.
    pub handshake: Duration,
    /// Most clients at once that have not entered an export. When all places are taken, the oldest such
    /// client is closed: the oldest of the new client's address if that address has a quarter of the places.
    /// Fewer where the process's descriptor limit is low.
    pub handshakes_max: usize,
    /// Most clients at once that have entered an export; beyond that, a new client is closed as soon as it is
    /// accepted.
    pub connections_max: usize,
    /// Bytes of buffers for each connection whose store is not direct, locked if the process locks its
    /// memory; 0 when all stores are direct. Half of this length is the upper limit of a request's part.
    pub buffers_len: usize,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            name: "nbd",
            loops: std::thread::available_parallelism().map_or(1, usize::from),
            spin: Duration::from_micros(50),
            handshake: Duration::from_secs(10),
            handshakes_max: PLACES_MAX,
            connections_max: 4096,
            buffers_len: 0,
        }
    }
}

/// The exports that clients may ask for; used on the control plane.
pub trait Exports: Send + Sync + 'static {
    /// Opens the export of this name for one connection; none if there is no such export. May block briefly,
    /// but must not wait for the network.
    fn open(&self, name: &str) -> Option<Opened>;

    /// Admits a client; `visitor` is the life of a client that it names, if it names one. Called after
    /// [`Exports::open`] for clients that enter the export, before any of their requests is served. May block
    /// for some seconds.
    ///
    /// # Errors
    /// The reason of the refusal, as one line for the client.
    fn admit(&self, opened: &Opened, visitor: Option<&Visitor>) -> Result<(), String> {
        let _ = (opened, visitor);
        Ok(())
    }

    /// Whether an admitted client still is admitted. Called when its connection can be found by
    /// [`Server::close_others`], so that a client that was replaced meanwhile is not served.
    fn is_admitted(&self, opened: &Opened, visitor: Option<&Visitor>) -> bool {
        let _ = (opened, visitor);
        true
    }

    /// The names of all exports for a client that asks for a list; none to refuse the request.
    fn list(&self) -> Option<Vec<String>> {
        None
    }
}

/// An export opened for one connection.
pub struct Opened {
    /// The description that the client receives.
    pub info: ExportInfo,
    /// The export's bytes.
    pub store: Box<dyn Store>,
    /// The grant or device, as the unit that [`Server::close_group`] closes.
    pub group: u128,
    /// The session of the client, if it sent one: a newer generation of a session replaces the older one.
    pub session: Option<SessionTag>,
}

struct Inner {
    options: ServerOptions,
    mailboxes: Vec<Arc<Mailbox>>,
    counters: Vec<Arc<LoopCounters>>,
    registry: Arc<Registry>,
    handshakes: Handshakes,
}

/// A handle of a loop thread for a watchdog: a loop that makes progress answers each [`LoopWatch::poke`]. The
/// handle keeps no server alive.
pub struct LoopWatch {
    name: String,
    mailbox: Arc<Mailbox>,
    counters: Arc<LoopCounters>,
}

impl LoopWatch {
    /// The name of the thread.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Requests one more answer. Returns at once.
    pub fn poke(&self) {
        self.mailbox.send(Letter::Poke);
    }

    /// Number of answers since the start. The loop answers at the point where it also takes events of its
    /// connections.
    pub fn answers(&self) -> u64 {
        self.counters.answers.load(Ordering::Relaxed)
    }
}

/// A running server. Clones share the same server; dropping the last clone ends the threads and the
/// connections.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

impl Server {
    /// Starts the loop threads.
    ///
    /// # Errors
    /// When the kernel provides no descriptor or thread.
    pub fn start(options: ServerOptions) -> io::Result<Server> {
        let loops = options.loops.max(1);
        let registry = Arc::new(Registry::new(loops));
        let handshakes = Handshakes::new(options.handshakes_max);
        let mut inner = Inner {
            options,
            mailboxes: Vec::new(),
            counters: Vec::new(),
            registry: registry.clone(),
            handshakes,
        };
        for number in 0..loops {
            let mailbox = Arc::new(Mailbox::new()?);
            let counters = Arc::new(LoopCounters::default());
            let event_loop =
                EventLoop::new(mailbox.clone(), registry.clone(), counters.clone(), inner.options.spin)?;
            std::thread::Builder::new()
                .name(loop_name(&inner.options, number))
                .stack_size(STACK_LEN)
                .spawn(move || event_loop.run())?;
            inner.mailboxes.push(mailbox);
            inner.counters.push(counters);
        }
        Ok(Server { inner: Arc::new(inner) })
    }

    /// Serves a stream that is in the transmission phase already, without structured replies: one end of a
    /// socket pair whose other end the kernel's nbd driver has.
    ///
    /// # Errors
    /// When there is no memory for the buffers, or the descriptor is not a stream socket.
    pub fn adopt(&self, stream: OwnedFd, opened: Opened) -> io::Result<()> {
        let outdated = |_| io::Error::other("a newer connection of the same session is there");
        let place = self.register(opened.group, opened.session, None).map_err(outdated)?;
        self.take(stream, opened, place, Negotiated::default())
    }

    /// Closes all connections of the group. Blocks until no loop thread accesses their stores any more, which
    /// takes up to one turn of a loop. To keep new connections out, let [`Store::alive`] of the group's
    /// stores turn false before.
    pub fn close_group(&self, group: u128) {
        self.inner.registry.close_group(group, &self.inner.mailboxes);
    }

    /// Current number of connections, of one group or of all.
    pub fn connections(&self, group: Option<u128>) -> usize {
        self.inner.registry.count(group)
    }

    /// Clients of the group that are other lives than `life`, on other seats, and whose hosts answer now.
    /// Blocks for up to three seconds, the time limit for a host that does not answer.
    pub fn living(&self, group: u128, life: &Life) -> Vec<Visitor> {
        pulse::answering(&self.inner.registry.others(group, life))
    }

    /// Closes the connections of all lives other than `life`. Blocks like [`Server::close_group`].
    /// Connections that did not name a life stay open.
    pub fn close_others(&self, group: u128, life: &Life) {
        self.inner.registry.close_others(group, life, &self.inner.mailboxes);
    }

    /// Handles of all loops, for a watchdog.
    pub fn loops(&self) -> Vec<LoopWatch> {
        let Inner { options, mailboxes, counters, .. } = &*self.inner;
        let both = mailboxes.iter().cloned().zip(counters.iter().cloned()).enumerate();
        both.map(|(number, (mailbox, counters))| LoopWatch {
            name: loop_name(options, number),
            mailbox,
            counters,
        })
        .collect()
    }

    /// Sums of the requests that were handled since the start.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.inner.counters.iter().for_each(|counters| counters.add_to(&mut sum));
        sum
    }

    /// Registers a connection, and closes the older connection that it replaces. Blocks like
    /// [`Server::close_group`].
    fn register(
        &self,
        group: u128,
        session: Option<SessionTag>,
        visitor: Option<Visitor>,
    ) -> Result<Place, registry::Outdated> {
        let id = self.inner.registry.register(group, session, visitor, &self.inner.mailboxes)?;
        Ok(Place { server: self.clone(), id, settled: false })
    }

    /// Passes a connection to its loop. A connection that was closed during its handshake is dropped.
    fn take(
        &self,
        stream: OwnedFd,
        opened: Opened,
        mut place: Place,
        negotiated: Negotiated,
    ) -> io::Result<()> {
        fcntl_setfl(&stream, fcntl_getfl(&stream)? | OFlags::NONBLOCK)?;
        let stream = Arc::new(stream);
        let seen = Arc::downgrade(&stream);
        let connection = Connection::new(Ready {
            stream,
            store: opened.store,
            info: opened.info,
            structured: negotiated.structured,
            base_allocation: negotiated.base_allocation,
            leftover: negotiated.leftover,
            buffers_len: self.inner.options.buffers_len,
        })?;
        if let Some(home) = self.inner.registry.settle(place.id, seen) {
            place.settled = true;
            self.inner.mailboxes[home].send(Letter::Adopt(place.id, Box::new(connection)));
        }
        Ok(())
    }
}

fn loop_name(options: &ServerOptions, number: usize) -> String {
    format!("{}-{number}", options.name)
}

/// A registered connection that has no loop yet; dropping it removes the registration.
struct Place {
    server: Server,
    id: ConnectionId,
    settled: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.settled {
            self.server.inner.registry.gone(self.id);
        }
    }
}

/// The results of a handshake beside the export.
#[derive(Default)]
struct Negotiated {
    structured: bool,
    base_allocation: Option<u32>,
    leftover: Vec<u8>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.send(Letter::Stop));
    }
}
