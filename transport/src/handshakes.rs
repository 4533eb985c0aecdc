//! Handshakes in progress: tasks of the control plane. Each holds a place of a [`Gate`] until its peer has
//! shown a valid key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::task::AbortHandle;
use xpm_protocol::gate::{Entry, Gate, Origin};

/// Longest time until a peer has sent its first message.
pub(crate) const FIRST_MESSAGE: Duration = Duration::from_secs(2);
/// Most unauthenticated peers of one server.
pub(crate) const PLACES_MAX: usize = 1024;
/// The share of the process's descriptor limit that unauthenticated peers of one server may use, as a
/// divisor. A daemon has up to four servers, so that half of the descriptors stay for authenticated peers,
/// and for the files that the daemon itself opens.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// The number of places: `most`, or fewer where the process's descriptor limit is low.
pub(crate) fn places(most: usize) -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
    most.min(descriptors / SHARE_OF_DESCRIPTORS).max(1)
}

/// The handshakes of one server. Clones share the same state.
#[derive(Debug, Clone)]
pub(crate) struct Handshakes(Arc<Mutex<Gate<AbortHandle>>>);

impl Handshakes {
    pub(crate) fn new(most: usize) -> Handshakes {
        Handshakes(Arc::new(Mutex::new(Gate::new(places(most)))))
    }

    /// Every critical section leaves the gate valid, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, Gate<AbortHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a handshake on the current tokio runtime. When all places are taken, the oldest handshake is
    /// aborted. The task has to drop its ticket when the peer has shown a valid key.
    pub(crate) fn begin<F>(&self, origin: Origin, handshake: impl FnOnce(Ticket) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut gate = self.lock();
        let ticket = Ticket { handshakes: self.clone(), entry: gate.next() };
        // A task that ends at once waits for the lock when it drops its ticket.
        let task = tokio::spawn(handshake(ticket));
        let closed = gate.enter(origin, task.abort_handle());
        drop(gate);
        if let Some(closed) = closed {
            tracing::debug!("a handshake is broken off: there are too many");
            closed.abort();
        }
    }
}

/// A place at the gate, held until the ticket is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    handshakes: Handshakes,
    entry: Entry,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.handshakes.lock().leave(self.entry);
    }
}
