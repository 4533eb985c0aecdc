//! Who is let in.

use std::sync::PoisonError;

use super::super::cm::{Id, Size};
use super::super::wire::{Hello, Refusal};
use super::Shared;
use super::state::{Connection, Phase};

/// Most connections: each costs the device a queue pair.
const CONNECTIONS_MAX: usize = 1 << 14;

impl Shared {
    /// Lets a client in or rejects it. `said` comes from anyone.
    pub(super) fn decide(&self, id: Id, said: &[u8]) {
        let mut id = Some(id);
        let Err(refusal) = self.admit(&mut id, said) else { return };
        tracing::debug!(?refusal, "a client is rejected");
        if let Some(id) = id {
            // It may be gone.
            let _ = id.reject(&refusal.encode());
        }
    }

    /// Takes the identifier when the client is let in.
    fn admit(&self, id: &mut Option<Id>, said: &[u8]) -> Result<(), Refusal> {
        let hello = Hello::decode(said)?;
        let group = self.grants.find(&hello.key).ok_or(Refusal::Unknown)?;
        // Held to the end: a revocation comes before all of this or after.
        let mut state = self.lock();
        let ready = match state.phase_in(group, hello.epoch) {
            // The grant is known, so it is only a moment until its registration begins.
            None if state.phase(group).is_none() => return Err(Refusal::NotReady),
            None => return Err(Refusal::Unknown),
            Some(Phase::Registering) => return Err(Refusal::NotReady),
            Some(Phase::Failed) => return Err(Refusal::Failed),
            Some(Phase::Withdrawn) => return Err(Refusal::Shared),
            Some(Phase::Ready(ready)) => ready,
        };
        let mut own = id.take().ok_or(Refusal::Failed)?;
        let prepared =
            ready.iter().find(|grant| grant.device().is_of(&own)).ok_or(Refusal::Failed).and_then(|grant| {
                self.make_queue_pair(&mut own, grant.domain())?;
                Ok(grant.welcome())
            });
        let stale = state.is_stale(group, hello.session, hello.queue, hello.generation)
            || state.connections(None) >= CONNECTIONS_MAX;
        let welcome = match prepared {
            Ok(welcome) if !stale => welcome,
            refused => {
                own.destroy_queue_pair();
                *id = Some(own);
                return Err(refused.err().unwrap_or(Refusal::Busy));
            }
        };
        // What the queue's earlier connections left behind must not land any more.
        state.shut_out(group, hello.session, hello.queue, hello.generation);
        if own.accept(&welcome.encode()).is_err() {
            return Ok(());
        }
        let Hello { session, queue, generation, .. } = hello;
        state.add(Connection { id: own, group, session, queue, generation });
        Ok(())
    }

    fn make_queue_pair(
        &self,
        id: &mut Id,
        domain: &std::sync::Arc<super::super::verbs::Domain>,
    ) -> Result<(), Refusal> {
        let port = self.ports.iter().find(|port| port.device.is_of(id)).ok_or(Refusal::Failed)?;
        let completions = port.completions.lock().unwrap_or_else(PoisonError::into_inner);
        let made = id.make_queue_pair(domain, &completions, Size { requests: 1, inline: 0 });
        made.map(drop).map_err(|error| {
            tracing::warn!("a client cannot be let in by RDMA: {error}");
            Refusal::Failed
        })
    }
}
