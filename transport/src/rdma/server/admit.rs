//! Admission: checks a client's request, and accepts or rejects its connection.

use std::io;
use std::net::TcpStream;
use std::sync::PoisonError;

use super::super::cm::{Id, Size};
use super::super::exchange::first_packet;
use super::super::plain::{Pair, Port as PlainPort};
use super::super::verbs::{CompletionQueue, Device};
use super::super::wire::{End, Hello, Refusal, Welcome};
use super::Shared;
use super::grant::DeviceGrant;
use super::state::{Connection, Ending, Held, Key, Phase, State};

/// Most connections: each uses one of the device's queue pairs.
const CONNECTIONS_MAX: usize = 1 << 14;
/// The size of a queue pair that only answers requests.
const ANSWERING: Size = Size { requests: 1, inline: 0 };

impl Shared {
    /// Admits or rejects a client. `said` is untrusted input.
    pub(super) fn decide(&self, id: Id, said: &[u8]) {
        let mut id = Some(id);
        let Err(refusal) = self.admit(&mut id, said) else { return };
        tracing::debug!(?refusal, "a client is rejected");
        if let Some(id) = id {
            // The client may have disconnected.
            let _ = id.reject(&refusal.encode());
        }
    }

    /// Takes the identifier out of `id` when the client is admitted.
    fn admit(&self, id: &mut Option<Id>, said: &[u8]) -> Result<(), Refusal> {
        let hello = Hello::decode(said)?;
        let group = self.grants.find(&hello.key).ok_or(Refusal::Unknown)?;
        // Locked until the end of the function, so that a revocation happens entirely before or after the
        // admission.
        let mut state = self.lock();
        check(&state, group, &hello)?;
        let mut own = id.take().ok_or(Refusal::Failed)?;
        let grant = ready(&state, group, |device| device.is_of(&own));
        let made = grant.and_then(|grant| {
            self.with_completions(grant.device(), |completions| {
                own.make_queue_pair(grant.domain(), completions, ANSWERING).map(drop)
            })?;
            Ok(grant.welcome())
        });
        let welcome = match made {
            Ok(welcome) => welcome,
            Err(refusal) => {
                *id = Some(own);
                return Err(refusal);
            }
        };
        // Late requests of the queue's earlier connections must not land any more.
        state.shut_out(group, hello.session, hello.queue, hello.generation);
        if own.accept(&welcome.encode()).is_ok() {
            state.add(connection(Held::Managed(own), group, &hello));
        }
        Ok(())
    }

    /// Admits a client that connected over TCP. The caller sends the answer, and reports when the client
    /// disconnects.
    pub(super) fn admit_plain(
        &self,
        hello: &Hello,
        other: &End,
        stream: &TcpStream,
    ) -> Result<(Key, Welcome, End), Refusal> {
        let group = self.grants.find(&hello.key).ok_or(Refusal::Unknown)?;
        let devices: Vec<_> = self.ports.iter().map(|port| port.device.clone()).collect();
        let ip = stream.local_addr().map_err(|_| Refusal::Failed)?.ip();
        let (device, port) = PlainPort::find(&devices, ip).ok_or(Refusal::Failed)?;
        let control = stream.try_clone().map_err(|_| Refusal::Failed)?;
        // Locked until the end of the function, so that a revocation happens entirely before or after the
        // admission.
        let mut state = self.lock();
        check(&state, group, hello)?;
        let grant = ready(&state, group, |known| std::ptr::eq(known, &raw const *device))?;
        let (pair, end) = self.with_completions(&device, |completions| {
            let (pair, _) = Pair::new(grant.domain(), completions, ANSWERING)?;
            let packet = first_packet()?;
            pair.connect(&device, &port, packet, other)?;
            let end = pair.end(&port, packet);
            Ok((pair, end))
        })?;
        let welcome = grant.welcome();
        // Late requests of the queue's earlier connections must not land any more.
        state.shut_out(group, hello.session, hello.queue, hello.generation);
        let key = state.add(connection(Held::Plain(pair, Ending(control.into())), group, hello));
        Ok((key, welcome, end))
    }

    fn with_completions<T>(
        &self,
        device: &Device,
        make: impl FnOnce(&CompletionQueue) -> io::Result<T>,
    ) -> Result<T, Refusal> {
        let port =
            self.ports.iter().find(|port| std::ptr::eq(&*port.device, device)).ok_or(Refusal::Failed)?;
        let completions = port.completions.lock().unwrap_or_else(PoisonError::into_inner);
        make(&completions).map_err(|error| {
            tracing::warn!("a client cannot be admitted by RDMA: {error}");
            Refusal::Failed
        })
    }
}

/// Checks whether a client may connect.
fn check(state: &State, group: u128, hello: &Hello) -> Result<(), Refusal> {
    match state.phase_in(group, hello.epoch) {
        // The grant is known, so its registration will begin in a moment.
        None if state.phase(group).is_none() => Err(Refusal::NotReady),
        None => Err(Refusal::Unknown),
        Some(Phase::Registering) => Err(Refusal::NotReady),
        Some(Phase::Failed) => Err(Refusal::Failed),
        Some(Phase::Withdrawn) => Err(Refusal::Shared),
        Some(Phase::Ready(_)) => {
            let stale = state.is_stale(group, hello.session, hello.queue, hello.generation);
            let full = state.connections(None) >= CONNECTIONS_MAX;
            match (stale, full) {
                (true, _) => Err(Refusal::Outdated),
                (false, true) => Err(Refusal::Busy),
                (false, false) => Ok(()),
            }
        }
    }
}

/// The registration of a group with a device.
fn ready(state: &State, group: u128, is_device: impl Fn(&Device) -> bool) -> Result<&DeviceGrant, Refusal> {
    let Some(Phase::Ready(grants)) = state.phase(group) else { return Err(Refusal::NotReady) };
    grants.iter().find(|grant| is_device(grant.device())).ok_or(Refusal::Failed)
}

fn connection(held: Held, group: u128, hello: &Hello) -> Connection {
    let Hello { session, queue, generation, .. } = *hello;
    Connection { held, group, session, queue, generation }
}
