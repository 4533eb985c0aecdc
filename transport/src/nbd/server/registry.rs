//! Which connections there are, so that those of a grant can be closed, and a client's old one
//! before its new one is let in.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use xpm_protocol::nbd::SessionTag;

use super::event_loop::{Letter, Mailbox};

/// Number of a connection; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnectionId(u64);

struct Entry {
    group: u128,
    session: Option<SessionTag>,
    /// Which loop serves it.
    home: usize,
}

#[derive(Default)]
struct State {
    last: u64,
    entries: HashMap<ConnectionId, Entry>,
    /// Connections of each loop.
    load: Vec<usize>,
}

/// All connections of a server. Locked on the control path only: when one comes or goes.
pub(super) struct Registry {
    state: Mutex<State>,
    left: Condvar,
}

/// A connection of the same session and queue with the same or a newer generation is there.
#[derive(Debug)]
pub(super) struct Outdated;

impl Registry {
    pub(super) fn new(loops: usize) -> Registry {
        let state = State { load: vec![0; loops], ..State::default() };
        Registry { state: Mutex::new(state), left: Condvar::new() }
    }

    /// The state is whole whenever the lock is free, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection and chooses the loop with the fewest.
    pub(super) fn register(&self, group: u128, session: Option<SessionTag>) -> (ConnectionId, usize) {
        let mut state = self.lock();
        let home = (0..state.load.len()).min_by_key(|home| state.load[*home]).unwrap_or(0);
        state.load[home] += 1;
        state.last += 1;
        let id = ConnectionId(state.last);
        state.entries.insert(id, Entry { group, session, home });
        (id, home)
    }

    /// The loop dropped it: nothing touches its store any more.
    pub(super) fn gone(&self, id: ConnectionId) {
        let mut state = self.lock();
        if let Some(entry) = state.entries.remove(&id) {
            state.load[entry.home] -= 1;
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

    /// Closes the connections of a group and waits until nothing touches their stores.
    pub(super) fn close_group(&self, group: u128, mailboxes: &[std::sync::Arc<Mailbox>]) {
        self.close(mailboxes, |entry| entry.group == group);
    }

    /// Closes older connections of the same session and queue, and waits until they are gone: a
    /// request that one of them still had in its socket cannot land behind those of the new one.
    pub(super) fn shut_out(
        &self,
        group: u128,
        tag: SessionTag,
        mailboxes: &[std::sync::Arc<Mailbox>],
    ) -> Result<(), Outdated> {
        let same = move |entry: &Entry| {
            entry.group == group && entry.session.is_some_and(|s| s.id == tag.id && s.queue == tag.queue)
        };
        let newer =
            |entry: &Entry| same(entry) && entry.session.is_some_and(|s| s.generation >= tag.generation);
        if self.lock().entries.values().any(newer) {
            return Err(Outdated);
        }
        self.close(mailboxes, same);
        Ok(())
    }

    fn close(&self, mailboxes: &[std::sync::Arc<Mailbox>], which: impl Fn(&Entry) -> bool) {
        let mut state = self.lock();
        let mut waiting: Vec<ConnectionId> = Vec::new();
        for (id, entry) in state.entries.iter().filter(|(_, entry)| which(entry)) {
            mailboxes[entry.home].send(Letter::Close(*id));
            waiting.push(*id);
        }
        while waiting.iter().any(|id| state.entries.contains_key(id)) {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
