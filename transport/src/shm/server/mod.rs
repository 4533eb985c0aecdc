//! The appliance's end of shared memory: passing the memory of grants to clients of the same host.

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

/// Most clients with memory at once; a further client is closed as soon as it has shown its key.
const CONNECTIONS_MAX: usize = 1024;
/// Most clients at once that have not shown a key; for a further client the oldest is closed.
const HANDSHAKES_MAX: usize = 256;
/// Time limit for passing the memory.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Time that the clients of a revoked grant have to unmap its memory.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// The grants that clients may ask for.
pub trait ShmExports: Send + Sync + 'static {
    /// The memory of the grant with this key; none if there is no such grant. Keys have to be compared in
    /// constant time, or be looked up by a hash of them. May block briefly, but must not wait for the
    /// network.
    ///
    /// It is called twice for each connection: the second time after the connection can be found by
    /// [`ShmServer::close_group`], so that the memory of a grant that is revoked meanwhile is not passed.
    fn open(&self, key: &GrantKey) -> Option<ShmExport>;

    /// Admits a client; `visitor` is the life of a client that it names, if it names one. Called before
    /// [`ShmExports::open`], and again after the connection can be found by [`ShmServer::living`]. May block
    /// for some seconds.
    ///
    /// # Errors
    /// The reason of the refusal, as one line for the client.
    fn admit(&self, key: &GrantKey, visitor: Option<&Visitor>) -> Result<(), String> {
        let _ = (key, visitor);
        Ok(())
    }
}

/// The memory of a grant.
#[derive(Debug, Clone)]
pub struct ShmExport {
    /// The grant, as the unit that [`ShmServer::close_group`] closes.
    pub group: u128,
    /// Its regions in order, with their lengths in bytes: memfds of exactly that length, sealed against
    /// shrinking (`F_SEAL_SHRINK`); clients refuse others.
    pub regions: Vec<(Arc<OwnedFd>, u64)>,
}

struct Inner {
    exports: Arc<dyn ShmExports>,
    registry: Registry,
    limit: Arc<Semaphore>,
    handshakes: Handshakes,
}

/// A server of shared memory. Clones share the same server.
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

    /// Accepts clients on the current tokio runtime. The socket file's mode limits which users may connect;
    /// the key decides which client gets memory.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn listen(&self, listener: UnixListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let inner = self.inner.clone();
        Ok(Listener::start(listener, move |stream| accepted(&inner, stream)))
    }

    /// Asks the clients of a grant to unmap its memory, and waits up to a second for them. Before this is
    /// called, [`ShmExports::open`] must already refuse the grant. Blocks, so never call it on a thread of
    /// the runtime.
    ///
    /// Returns the number of clients that did not unmap the memory. They may still read and write it: unless
    /// the number is 0, the memory must not be lent again.
    pub fn close_group(&self, group: u128) -> usize {
        self.inner.registry.close_group(group, LEAVE_LIMIT)
    }

    /// Clients of the group that are other lives than `life`, on other seats. Their connections are open, and
    /// both ends share a kernel, so these clients are alive.
    pub fn living(&self, group: u128, life: &Life) -> Vec<Visitor> {
        self.inner.registry.others(group, life)
    }

    /// Current number of connections, of one group or of all.
    pub fn connections(&self, group: Option<u128>) -> usize {
        self.inner.registry.count(group)
    }
}

fn accepted(inner: &Arc<Inner>, stream: UnixStream) {
    inner.handshakes.begin(Origin::Local, |ticket| serve(inner.clone(), stream, ticket));
}

/// Serves one connection, from the handshake until the client disconnects.
async fn serve(inner: Arc<Inner>, stream: UnixStream, ticket: Ticket) {
    let stream = Arc::new(stream);
    match tokio::time::timeout(HANDSHAKE_LIMIT, handshake(&inner, &stream, ticket)).await {
        Ok(Ok(Some(_inside))) => until_left(&stream).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client of shared memory left during the handshake"),
        Err(_) => tracing::debug!("a handshake for shared memory took too long"),
    }
}

/// Waits until the client disconnects. It has nothing to send, so any received byte ends the connection too.
async fn until_left(stream: &UnixStream) {
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
