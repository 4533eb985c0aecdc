//! The registered grants and their connections.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use xpm_protocol::Epoch;

use super::super::cm::{Id, Tag};
use super::super::plain::Pair;
use super::grant::DeviceGrant;

/// How long the connections of a revoked grant are kept.
const REFUSING: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct State {
    connections: HashMap<Key, Connection>,
    plain: u64,
    /// Connections whose keys are no longer valid, with the time until which they are kept: so a client that
    /// goes on learns of the revocation by a refused access, not by silence.
    refusing: Vec<(Instant, Key, Connection)>,
    grants: HashMap<u128, Grant>,
    tickets: u64,
}

struct Grant {
    epoch: Epoch,
    ticket: u64,
    phase: Phase,
}

/// The phase of a grant.
pub(super) enum Phase {
    /// Its memory is being registered.
    Registering,
    /// Clients are admitted, over any of these devices.
    Ready(Vec<DeviceGrant>),
    /// Its memory could not be registered.
    Failed,
    /// The memory is shared with a process of this host.
    Withdrawn,
}

/// Names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Managed(Tag),
    Plain(u64),
}

/// A connection's queue pair, and the resources that live as long.
pub(super) enum Held {
    Managed(Id),
    Plain(#[expect(dead_code, reason = "only held")] Pair, #[expect(dead_code, reason = "only held")] Ending),
}

/// A TCP connection that is shut down on drop, so that the other end notices even while another thread waits
/// on it.
pub(super) struct Ending(pub(super) OwnedFd);

impl Drop for Ending {
    fn drop(&mut self) {
        // The connection may be closed already.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

/// A client's connection.
pub(super) struct Connection {
    pub(super) held: Held,
    pub(super) group: u128,
    pub(super) session: u64,
    pub(super) queue: u16,
    pub(super) generation: u32,
}

impl State {
    /// Begins a grant; returns the ticket that its registration has to present.
    pub(super) fn begin(&mut self, group: u128, epoch: Epoch) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        self.grants.insert(group, Grant { epoch, ticket, phase: Phase::Registering });
        ticket
    }

    /// Whether a registration is still needed.
    pub(super) fn is_wanted(&self, group: u128, ticket: u64) -> bool {
        self.grants
            .get(&group)
            .is_some_and(|grant| grant.ticket == ticket && matches!(grant.phase, Phase::Registering))
    }

    /// Ends a registration; the result is dropped if it is no longer needed.
    pub(super) fn finish(&mut self, group: u128, ticket: u64, phase: Phase) {
        if self.is_wanted(group, ticket)
            && let Some(grant) = self.grants.get_mut(&group)
        {
            grant.phase = phase;
        }
    }

    pub(super) fn phase(&self, group: u128) -> Option<&Phase> {
        self.grants.get(&group).map(|grant| &grant.phase)
    }

    /// The grant's phase, if the grant has this epoch.
    pub(super) fn phase_in(&self, group: u128, epoch: Epoch) -> Option<&Phase> {
        self.grants.get(&group).filter(|grant| grant.epoch == epoch).map(|grant| &grant.phase)
    }

    pub(super) fn close(&mut self, group: u128) {
        // Dropping the grant deregisters its memory: no access that begins after this lands.
        drop(self.grants.remove(&group));
        self.refuse(group);
    }

    pub(super) fn withdraw(&mut self, group: u128) {
        if let Some(grant) = self.grants.get_mut(&group) {
            grant.phase = Phase::Withdrawn;
        }
        self.refuse(group);
    }

    fn refuse(&mut self, group: u128) {
        let until = Instant::now() + REFUSING;
        let closed = self.connections.extract_if(|_, connection| connection.group == group);
        self.refusing.extend(closed.map(|(key, connection)| (until, key, connection)));
    }

    /// Destroys the connections whose time to refuse is over. Returns the time until the next one expires.
    pub(super) fn tidy(&mut self) -> Option<Duration> {
        let now = Instant::now();
        self.refusing.retain(|(until, ..)| *until > now);
        self.refusing.iter().map(|(until, ..)| *until - now).min()
    }

    pub(super) fn close_all(&mut self) {
        self.grants.clear();
        self.connections.clear();
        self.refusing.clear();
    }

    /// Whether a connection of the same queue exists that is as new as `generation` or newer.
    pub(super) fn is_stale(&self, group: u128, session: u64, queue: u16, generation: u32) -> bool {
        self.connections
            .values()
            .any(|known| known.is_of(group, session, queue) && !is_newer(generation, known.generation))
    }

    pub(super) fn shut_out(&mut self, group: u128, session: u64, queue: u16, generation: u32) {
        self.connections.retain(|_, known| {
            !(known.is_of(group, session, queue) && is_newer(generation, known.generation))
        });
    }

    pub(super) fn shut_all_out(&mut self, group: u128) {
        self.connections.retain(|_, known| known.group != group);
    }

    pub(super) fn add(&mut self, connection: Connection) -> Key {
        let key = match &connection.held {
            Held::Managed(id) => Key::Managed(id.tag()),
            Held::Plain(..) => {
                self.plain += 1;
                Key::Plain(self.plain)
            }
        };
        self.connections.insert(key, connection);
        key
    }

    /// Removes a connection whose client disconnected.
    pub(super) fn left(&mut self, key: Key) {
        self.connections.remove(&key);
        self.refusing.retain(|(_, known, _)| *known != key);
    }

    pub(super) fn connections(&self, group: Option<u128>) -> usize {
        match group {
            None => self.connections.len(),
            Some(group) => self.connections.values().filter(|connection| connection.group == group).count(),
        }
    }
}

impl Connection {
    fn is_of(&self, group: u128, session: u64, queue: u16) -> bool {
        (self.group, self.session, self.queue) == (group, session, queue)
    }
}

/// Whether generation `new` comes after `old`; they count modulo 2^32.
const fn is_newer(new: u32, old: u32) -> bool {
    new.wrapping_sub(old).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_wrap_around() {
        assert!(is_newer(2, 1) && !is_newer(1, 2) && !is_newer(1, 1));
        assert!(is_newer(0, u32::MAX) && !is_newer(u32::MAX, 0));
    }

    #[test]
    fn a_late_registration_of_a_closed_grant_is_dropped() {
        let mut state = State::default();
        let first = state.begin(1, Epoch(1));
        assert!(state.is_wanted(1, first));
        state.close(1);
        assert!(!state.is_wanted(1, first));
        let second = state.begin(1, Epoch(2));
        state.finish(1, first, Phase::Ready(Vec::new()));
        assert!(matches!(state.phase(1), Some(Phase::Registering)), "the old epoch's registration counted");
        state.finish(1, second, Phase::Ready(Vec::new()));
        assert!(matches!(state.phase_in(1, Epoch(2)), Some(Phase::Ready(_))));
        assert!(state.phase_in(1, Epoch(1)).is_none(), "an older epoch is let in");
    }

    #[test]
    fn withdrawn_memory_stays_withdrawn() {
        let mut state = State::default();
        let ticket = state.begin(1, Epoch(1));
        state.withdraw(1);
        state.finish(1, ticket, Phase::Ready(Vec::new()));
        assert!(matches!(state.phase(1), Some(Phase::Withdrawn)));
    }
}
