//! Connections that have not shown the token have places of their own, so that whoever only reaches the port keeps nobody
//! out who has it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, getrlimit};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use xpm_protocol::gate::{Entry, Gate, Origin};

use super::Limits;

/// Which part of the descriptors that the process may have is for strangers: a daemon that listens at several ports keeps
/// half of them for all else.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// Who is at one server.
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

    /// The gate is whole whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, Gate<AbortHandle>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `spawn` begin to serve a connection. Where there is no place for it, the oldest stranger is closed.
    pub(super) fn begin(
        self: &Arc<Self>,
        peer: Option<SocketAddr>,
        spawn: impl FnOnce(Arc<Standing>) -> AbortHandle,
    ) {
        let origin = peer.map_or(Origin::Local, |peer| peer.ip().into());
        let mut gate = self.lock();
        let standing =
            Arc::new(Standing { admission: self.clone(), entry: gate.next(), permit: OnceCell::new() });
        // If it ends at once, it waits for the lock before it leaves.
        let task = spawn(standing);
        let closed = gate.enter(origin, task);
        drop(gate);
        if let Some(closed) = closed {
            tracing::debug!("a connection without a token is closed: there are too many");
            closed.abort();
        }
    }
}

/// What one connection is to the server, for as long as it lives.
#[derive(Debug)]
pub(super) struct Standing {
    admission: Arc<Admission>,
    entry: Entry,
    permit: OnceCell<OwnedSemaphorePermit>,
}

impl Standing {
    /// It has shown the token, or none is wanted: it leaves the strangers, and waits for its place among the others.
    pub(super) async fn prove(&self) {
        let permit = async {
            self.admission.lock().leave(self.entry);
            self.admission.known.clone().acquire_owned().await.expect("the semaphore is never closed")
        };
        self.permit.get_or_init(|| permit).await;
    }

    /// Whether it is in the way of other strangers.
    pub(super) fn is_in_the_way(&self) -> bool {
        self.admission.lock().is_in_the_way(self.entry)
    }

    /// Whether it is none of the strangers any more.
    pub(super) fn is_proved(&self) -> bool {
        !self.admission.lock().has(self.entry)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.admission.lock().leave(self.entry);
    }
}
