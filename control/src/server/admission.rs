//! Limits connections that have not shown the token to places of their own, so that a peer without the token cannot
//! keep out a peer that has it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, getrlimit};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use xpm_protocol::gate::{Entry, Gate, Origin};

use super::Limits;

/// Divisor of the process's descriptors that gives the places for connections without the token: a daemon that
/// listens at several ports keeps half of its descriptors for other uses.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// The connections of one server.
#[derive(Debug)]
pub(super) struct Admission {
    strangers: Mutex<Gate<AbortHandle>>,
    known: Arc<Semaphore>,
}

impl Admission {
    pub(super) fn new(limits: &Limits) -> Arc<Admission> {
        let descriptors = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
        let places = limits.strangers_max.min(descriptors / SHARE_OF_DESCRIPTORS).max(1);
        let known = Arc::new(Semaphore::new(limits.connections_max));
        Arc::new(Admission { strangers: Mutex::new(Gate::new(places)), known })
    }

    /// The gate is consistent whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, Gate<AbortHandle>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `spawn` begin to serve a connection. If there is no place for it, the oldest connection without the token
    /// is closed.
    pub(super) fn begin(
        self: &Arc<Self>,
        peer: Option<SocketAddr>,
        spawn: impl FnOnce(Arc<Standing>) -> AbortHandle,
    ) {
        let origin = peer.map_or(Origin::Local, |peer| peer.ip().into());
        let mut gate = self.lock();
        let standing =
            Arc::new(Standing { admission: self.clone(), entry: gate.next(), permit: OnceCell::new() });
        // If the task ends at once, it waits for the lock before it leaves the gate.
        let task = spawn(standing);
        let closed = gate.enter(origin, task);
        drop(gate);
        if let Some(closed) = closed {
            tracing::debug!("a connection without a token is closed: there are too many");
            closed.abort();
        }
    }
}

/// State of one connection at the server, for its lifetime.
#[derive(Debug)]
pub(super) struct Standing {
    admission: Arc<Admission>,
    entry: Entry,
    permit: OnceCell<OwnedSemaphorePermit>,
}

impl Standing {
    /// The connection has shown the token, or none is required: it leaves the gate, and waits for its place among the
    /// proven connections.
    pub(super) async fn prove(&self) {
        let permit = async {
            self.admission.lock().leave(self.entry);
            self.admission.known.clone().acquire_owned().await.expect("the semaphore is never closed")
        };
        self.permit.get_or_init(|| permit).await;
    }

    /// Whether it is in the way of other connections without the token.
    pub(super) fn is_in_the_way(&self) -> bool {
        self.admission.lock().is_in_the_way(self.entry)
    }

    /// Whether it has left the gate.
    pub(super) fn is_proved(&self) -> bool {
        !self.admission.lock().has(self.entry)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.admission.lock().leave(self.entry);
    }
}
