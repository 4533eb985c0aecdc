//! Handshakes that go on: tasks of the control plane, each at a place of a [`Gate`] until its peer has proved itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::task::AbortHandle;
use xpm_protocol::gate::{Entry, Gate, Origin};

/// Longest time until a peer has said something.
pub(crate) const FIRST_MESSAGE: Duration = Duration::from_secs(2);
/// Most peers without proof at one server.
pub(crate) const PLACES_MAX: usize = 1024;
/// Which part of the descriptors that the process may have is for such peers of one server. A daemon has up to four
/// servers, so that half of them stay for those with proof, and for what the daemon itself opens.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// As many places as `most`, or fewer where the process may have few descriptors.
pub(crate) fn places(most: usize) -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
    most.min(descriptors / SHARE_OF_DESCRIPTORS).max(1)
}

/// The handshakes of one server. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Handshakes(Arc<Mutex<Gate<AbortHandle>>>);

impl Handshakes {
    pub(crate) fn new(most: usize) -> Handshakes {
        Handshakes(Arc::new(Mutex::new(Gate::new(places(most)))))
    }

    /// The gate is whole whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, Gate<AbortHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a handshake on the tokio runtime that this is called in; where there is no place for it, the oldest one is
    /// broken off. The task is to drop its ticket when the peer has proved itself.
    pub(crate) fn begin<F>(&self, origin: Origin, handshake: impl FnOnce(Ticket) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut gate = self.lock();
        let ticket = Ticket { handshakes: self.clone(), entry: gate.next() };
        // If it ends at once, its ticket waits for the lock.
        let task = tokio::spawn(handshake(ticket));
        let closed = gate.enter(origin, task.abort_handle());
        drop(gate);
        if let Some(closed) = closed {
            tracing::debug!("a handshake is broken off: there are too many");
            closed.abort();
        }
    }
}

/// A place at the gate, for as long as it lives.
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
