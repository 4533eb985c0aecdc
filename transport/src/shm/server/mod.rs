//! The appliance's end: passing the memory of grants to clients of the same host.

mod handshake;
mod registry;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use xpm_protocol::gate::Origin;
use xpm_protocol::{GrantKey, Life, Visitor};

use self::handshake::handshake;
use self::registry::Registry;
pub use crate::accept::Listener;
use crate::handshakes::{Handshakes, Ticket};

/// Clients at once that have memory; one more is closed as soon as it has shown its key.
const CONNECTIONS_MAX: usize = 1024;
/// Clients at once that have not shown a key; for one more, the oldest is closed.
const HANDSHAKES_MAX: usize = 256;
/// Longest time that passing the memory may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long the clients of a revoked grant are given to let go of its memory.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// The grants that clients may ask for.
pub trait ShmExports: Send + Sync + 'static {
    /// The memory of the grant with this key; none if there is no such grant. Keys have to be
    /// compared in constant time, or be looked up by a hash of them. May take a moment, but must
    /// not wait for the network.
    ///
    /// It is asked twice for each connection: again after the connection can be found by
    /// [`ShmServer::close_group`], so that a grant that is revoked meanwhile is not passed.
    fn open(&self, key: &GrantKey) -> Option<ShmExport>;

    /// Lets a client in, which said which life of a client it is, if it did. Asked before [`ShmExports::open`], and again
    /// after the connection can be found by [`ShmServer::living`]. May block for some seconds.
    ///
    /// # Errors
    /// Why it is not let in, in one line for the client.
    fn admit(&self, key: &GrantKey, visitor: Option<&Visitor>) -> Result<(), String> {
        let _ = (key, visitor);
        Ok(())
    }
}

/// The memory of a grant.
#[derive(Debug, Clone)]
pub struct ShmExport {
    /// What [`ShmServer::close_group`] closes together: the grant.
    pub group: u128,
    /// Its regions in order, with their lengths in bytes: memfds of exactly that length, sealed
    /// against shrinking (`F_SEAL_SHRINK`); clients refuse others.
    pub regions: Vec<(Arc<OwnedFd>, u64)>,
}

struct Inner {
    exports: Arc<dyn ShmExports>,
    registry: Registry,
    limit: Arc<Semaphore>,
    handshakes: Handshakes,
}

/// A server of shared memory. Clones are the same server.
#[derive(Clone)]
pub struct ShmServer {
    inner: Arc<Inner>,
}

impl ShmServer {
    /// A server of these grants.
    pub fn new(exports: Arc<dyn ShmExports>) -> ShmServer {
        let limit = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let handshakes = Handshakes::new(HANDSHAKES_MAX);
        ShmServer { inner: Arc::new(Inner { exports, registry: Registry::default(), limit, handshakes }) }
    }

    /// Accepts clients, on the tokio runtime that this is called in. Who may connect is the
    /// business of the socket file's mode; who gets memory is decided by the key.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn listen(&self, listener: UnixListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let inner = self.inner.clone();
        Ok(Listener::start(listener, move |stream| accepted(&inner, stream)))
    }

    /// Tells the clients of a grant to let go of its memory, and waits for it up to a second.
    /// [`ShmExports::open`] must not give the grant out any more when this is called. Blocks: not
    /// for a thread of the runtime.
    ///
    /// Returns the number of clients that did not let go. They may still read and write the memory:
    /// unless it is 0, it must not be lent again.
    pub fn close_group(&self, group: u128) -> usize {
        self.inner.registry.close_group(group, LEAVE_LIMIT)
    }

    /// Clients of the group that are other lives than this one, on other seats. They live: they have their connection
    /// open, on this kernel.
    pub fn living(&self, group: u128, life: &Life) -> Vec<Visitor> {
        self.inner.registry.others(group, life)
    }

    /// Connections now, of one group or of all.
    pub fn connections(&self, group: Option<u128>) -> usize {
        self.inner.registry.count(group)
    }
}

fn accepted(inner: &Arc<Inner>, stream: UnixStream) {
    inner.handshakes.begin(Origin::Local, |ticket| serve(inner.clone(), stream, ticket));
}

/// One connection, from the handshake until the client leaves.
async fn serve(inner: Arc<Inner>, stream: UnixStream, ticket: Ticket) {
    let stream = Arc::new(stream);
    match tokio::time::timeout(HANDSHAKE_LIMIT, handshake(&inner, &stream, ticket)).await {
        Ok(Ok(Some(_inside))) => until_left(&stream).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client of shared memory left during the handshake"),
        Err(_) => tracing::debug!("a handshake for shared memory took too long"),
    }
}

/// The client has nothing to say, so whatever it sends, is the end.
async fn until_left(stream: &UnixStream) {
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
