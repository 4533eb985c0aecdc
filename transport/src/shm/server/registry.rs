//! The registry of connections: which client has the memory of which group.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use xpm_protocol::{Life, Visitor};

use super::Inner;

struct Entry {
    group: u128,
    visitor: Option<Visitor>,
    stream: Arc<UnixStream>,
}

#[derive(Default)]
struct State {
    last: u64,
    connections: HashMap<u64, Entry>,
}

/// The connections whose memory was passed, or is about to be.
#[derive(Default)]
pub(super) struct Registry {
    state: Mutex<State>,
}

impl Registry {
    /// Every critical section leaves the state valid, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, group: Option<u128>) -> usize {
        let state = self.lock();
        state.connections.values().filter(|entry| group.is_none_or(|group| entry.group == group)).count()
    }

    /// The lives other than `life`, on other seats, that have memory of the group.
    pub(super) fn others(&self, group: u128, life: &Life) -> Vec<Visitor> {
        let state = self.lock();
        let there =
            state.connections.values().filter(|entry| entry.group == group && !has_left(&entry.stream));
        there
            .filter_map(|entry| entry.visitor.clone())
            .filter(|visitor| visitor.life.seat != life.seat)
            .collect()
    }

    /// Asks the clients of a group to leave, and returns how many have not within `limit`.
    pub(super) fn close_group(&self, group: u128, limit: Duration) -> usize {
        let mut there = self.streams(group);
        // A half-closed stream: the client sees the end of the stream, and the server still sees the client
        // disconnect.
        there.iter().for_each(|stream| close(stream, Shutdown::Write));
        let deadline = Instant::now() + limit;
        while !there.is_empty() && Instant::now() < deadline {
            wait_for_one(&there, deadline);
            there.retain(|stream| !has_left(stream));
        }
        there.iter().for_each(|stream| close(stream, Shutdown::Both));
        there.len()
    }

    fn streams(&self, group: u128) -> Vec<Arc<UnixStream>> {
        let state = self.lock();
        let there = state.connections.values().filter(|entry| entry.group == group);
        there.map(|entry| entry.stream.clone()).collect()
    }
}

fn close(stream: &UnixStream, how: Shutdown) {
    // Fails only when the client has already closed its end.
    let _ = shutdown(stream, how);
}

/// Waits until one of the clients closed its end, or the deadline passed.
fn wait_for_one(streams: &[Arc<UnixStream>], deadline: Instant) {
    let rest = deadline.saturating_duration_since(Instant::now());
    let Ok(timeout) = Timespec::try_from(rest) else { return };
    // poll(2) always reports a closed end, so no event is requested.
    let mut watched: Vec<PollFd<'_>> =
        streams.iter().map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())).collect();
    // The only error is an interruption; the caller checks each stream and the time.
    let _ = poll(&mut watched, Some(&timeout));
}

fn has_left(stream: &UnixStream) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut watched = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::HUP)
}

/// A connection's entry in the registry, removed when this is dropped.
pub(super) struct Registered {
    inner: Arc<Inner>,
    number: u64,
}

impl Registered {
    pub(super) fn new(
        inner: Arc<Inner>,
        group: u128,
        visitor: Option<Visitor>,
        stream: Arc<UnixStream>,
    ) -> Registered {
        let mut state = inner.registry.lock();
        state.last += 1;
        let number = state.last;
        state.connections.insert(number, Entry { group, visitor, stream });
        drop(state);
        Registered { inner, number }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.inner.registry.lock().connections.remove(&self.number);
    }
}
