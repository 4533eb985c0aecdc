//! The registry of a server's connections. With it, all connections of a grant can be closed, and a client's
//! old connection is closed before its new one is admitted.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use xpm_protocol::nbd::SessionTag;
use xpm_protocol::{Life, Visitor};

use super::event_loop::{Letter, Mailbox};

/// Number of a connection; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnectionId(u64);

struct Entry {
    group: u128,
    session: Option<SessionTag>,
    visitor: Option<Visitor>,
    /// Its socket, once a loop serves it.
    stream: Weak<OwnedFd>,
    /// The loop that serves it; none while its handshake is in progress.
    home: Option<usize>,
}

impl Entry {
    fn is_of_other(&self, group: u128, life: &Life) -> bool {
        self.group == group && self.visitor.as_ref().is_some_and(|visitor| visitor.life.seat != life.seat)
    }
}

#[derive(Default)]
struct State {
    last: u64,
    entries: HashMap<ConnectionId, Entry>,
    /// Number of connections of each loop.
    load: Vec<usize>,
}

/// All connections of a server. Locked on the control path only: when a connection is added or removed.
pub(super) struct Registry {
    state: Mutex<State>,
    left: Condvar,
}

/// A connection of the same session and queue with the same or a newer generation exists.
#[derive(Debug)]
pub(super) struct Outdated;

impl Registry {
    pub(super) fn new(loops: usize) -> Registry {
        let state = State { load: vec![0; loops], ..State::default() };
        Registry { state: Mutex::new(state), left: Condvar::new() }
    }

    /// Every critical section leaves the state valid, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection whose handshake is in progress. Before the handshake is answered, older
    /// connections of the same session and queue are closed, and this function waits until they are gone: a
    /// request that an old connection still had in its socket cannot land behind those of the new one.
    pub(super) fn register(
        &self,
        group: u128,
        session: Option<SessionTag>,
        visitor: Option<Visitor>,
        mailboxes: &[Arc<Mailbox>],
    ) -> Result<ConnectionId, Outdated> {
        let mut state = self.lock();
        let same = |entry: &Entry, tag: SessionTag| {
            entry.group == group && entry.session.is_some_and(|s| s.id == tag.id && s.queue == tag.queue)
        };
        if let Some(tag) = session {
            let newer = |entry: &Entry| entry.session.is_some_and(|s| s.generation >= tag.generation);
            if state.entries.values().any(|entry| same(entry, tag) && newer(entry)) {
                return Err(Outdated);
            }
        }
        state.last += 1;
        let own = ConnectionId(state.last);
        state.entries.insert(own, Entry { group, session, visitor, stream: Weak::new(), home: None });
        if let Some(tag) = session {
            self.close(state, mailboxes, |id, entry| id != own && same(entry, tag));
        }
        Ok(own)
    }

    /// Called when the handshake is over: assigns the loop with the fewest connections. None when the
    /// connection was closed meanwhile.
    pub(super) fn settle(&self, id: ConnectionId, stream: Weak<OwnedFd>) -> Option<usize> {
        let mut state = self.lock();
        let home = (0..state.load.len()).min_by_key(|home| state.load[*home])?;
        let entry = state.entries.get_mut(&id)?;
        (entry.home, entry.stream) = (Some(home), stream);
        state.load[home] += 1;
        Some(home)
    }

    /// Removes a connection that was dropped, by its loop or before it had one: no thread accesses its store
    /// any more.
    pub(super) fn gone(&self, id: ConnectionId) {
        let mut state = self.lock();
        if let Some(home) = state.entries.remove(&id).and_then(|entry| entry.home) {
            state.load[home] -= 1;
        }
        drop(state);
        self.left.notify_all();
    }

    pub(super) fn count(&self, group: Option<u128>) -> usize {
        let state = self.lock();
        match group {
            None => state.entries.len(),
            Some(group) => state.entries.values().filter(|entry| entry.group == group).count(),
        }
    }

    /// The connections of a group that belong to other lives, on other seats.
    pub(super) fn others(&self, group: u128, life: &Life) -> Vec<(Visitor, Weak<OwnedFd>)> {
        let state = self.lock();
        let others = state.entries.values().filter(|entry| entry.is_of_other(group, life));
        others.filter_map(|entry| Some((entry.visitor.clone()?, entry.stream.clone()))).collect()
    }

    /// Closes the connections that [`Registry::others`] returns, and waits until no thread accesses their
    /// stores.
    pub(super) fn close_others(&self, group: u128, life: &Life, mailboxes: &[Arc<Mailbox>]) {
        self.close(self.lock(), mailboxes, |_, entry| entry.is_of_other(group, life));
    }

    /// Closes the connections of a group, and waits until no thread accesses their stores.
    pub(super) fn close_group(&self, group: u128, mailboxes: &[Arc<Mailbox>]) {
        self.close(self.lock(), mailboxes, |_, entry| entry.group == group);
    }

    /// Closes connections. A connection without a loop has not accessed its store, and will not: its entry is
    /// removed, so that the connection is refused at the end of its handshake.
    fn close(
        &self,
        mut state: MutexGuard<'_, State>,
        mailboxes: &[Arc<Mailbox>],
        which: impl Fn(ConnectionId, &Entry) -> bool,
    ) {
        state.entries.retain(|id, entry| entry.home.is_some() || !which(*id, entry));
        let mut waiting: Vec<ConnectionId> = Vec::new();
        for (id, entry) in &state.entries {
            if let Some(home) = entry.home.filter(|_| which(*id, entry)) {
                mailboxes[home].send(Letter::Close(*id));
                waiting.push(*id);
            }
        }
        while waiting.iter().any(|id| state.entries.contains_key(id)) {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
