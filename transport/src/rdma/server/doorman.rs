//! The thread that accepts clients over TCP, where the connection manager cannot be used.
//!
//! Any host may connect, so a client has little time to send its request, the number of clients that have not
//! sent one is limited, and no client delays another.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use xpm_protocol::gate::{Entry, Gate};

use super::super::exchange::read_ask;
use super::super::wire::{ASK_LEN, encode_answer};
use super::Shared;
use super::state::Key;
use crate::handshakes::places;

/// Time that a client has to send its request.
const ASKING_MAX: Duration = Duration::from_secs(2);
/// Pause after a client could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Most clients that have not sent their request; for one more, the oldest is closed.
const PENDING_MAX: usize = 256;

pub(super) struct Doorman {
    listeners: Vec<TcpListener>,
    pending: Vec<Pending>,
    /// The places of the pending clients.
    gate: Gate<Entry>,
    /// Admitted connections, watched for their end.
    inside: Vec<(Key, OwnedFd)>,
    /// Readable when the thread has to end.
    over: Arc<OwnedFd>,
}

struct Pending {
    entry: Entry,
    stream: TcpStream,
    asked: Vec<u8>,
    until: Instant,
}

impl Doorman {
    pub(super) fn new(listeners: Vec<TcpListener>, over: Arc<OwnedFd>) -> Doorman {
        Doorman {
            listeners,
            pending: Vec::new(),
            gate: Gate::new(places(PENDING_MAX)),
            inside: Vec::new(),
            over,
        }
    }

    /// Works until the server ends.
    pub(super) fn run(mut self, shared: &Shared) {
        while let Some(ready) = self.wait() {
            let (listeners, rest) = ready.split_at(self.listeners.len());
            let (pending, inside) = rest.split_at(self.pending.len());
            let mut heard = inside.iter();
            self.inside.retain(|(key, _)| {
                let is_over = heard.next().is_some_and(|heard| *heard);
                if is_over {
                    shared.lock().left(*key);
                }
                !is_over
            });
            self.hear(pending, shared);
            for (place, ready) in listeners.iter().enumerate() {
                if *ready {
                    self.greet(place);
                }
            }
        }
    }

    /// Waits; returns which of listeners, pending and admitted connections are ready, in this order. None
    /// when the server ends.
    fn wait(&self) -> Option<Vec<bool>> {
        let now = Instant::now();
        let next = self.pending.iter().map(|pending| pending.until.saturating_duration_since(now)).min();
        let limit = next.and_then(|limit| Timespec::try_from(limit).ok());
        let streams = self.listeners.iter().map(AsFd::as_fd);
        let streams = streams.chain(self.pending.iter().map(|pending| pending.stream.as_fd()));
        let streams = streams.chain(self.inside.iter().map(|(_, stream)| stream.as_fd()));
        let mut watched: Vec<PollFd<'_>> =
            streams.map(|stream| PollFd::from_borrowed_fd(stream, PollFlags::IN)).collect();
        watched.push(PollFd::from_borrowed_fd(self.over.as_fd(), PollFlags::IN));
        // An error is an interruption; in that case no stream is marked ready.
        let _ = poll(&mut watched, limit.as_ref());
        let over = watched.pop().is_none_or(|over| !over.revents().is_empty());
        (!over).then(|| watched.iter().map(|stream| !stream.revents().is_empty()).collect())
    }

    fn greet(&mut self, listener: usize) {
        let Ok((stream, address)) = self.listeners[listener].accept() else {
            // Usually the process is out of descriptors; an immediate retry would fail too.
            return std::thread::sleep(ACCEPT_PAUSE);
        };
        if stream.set_nodelay(true).is_err() {
            return;
        }
        let entry = self.gate.next();
        if let Some(closed) = self.gate.enter(address.ip().into(), entry) {
            self.pending.retain(|pending| pending.entry != closed);
        }
        let until = Instant::now() + ASKING_MAX;
        self.pending.push(Pending { entry, stream, asked: Vec::with_capacity(ASK_LEN), until });
    }

    fn hear(&mut self, ready: &[bool], shared: &Shared) {
        let now = Instant::now();
        for (pending, ready) in std::mem::take(&mut self.pending).into_iter().zip(ready) {
            let waits = pending.until > now;
            match (*ready, waits) {
                (true, _) => self.listen_to(pending, shared),
                (false, true) => self.pending.push(pending),
                (false, false) => self.leave(&pending),
            }
        }
    }

    fn leave(&mut self, pending: &Pending) {
        self.gate.leave(pending.entry);
    }

    fn listen_to(&mut self, mut pending: Pending, shared: &Shared) {
        let mut room = [0; ASK_LEN];
        let wanted = ASK_LEN - pending.asked.len();
        match recv(&pending.stream, &mut room[..wanted], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return self.leave(&pending),
            Ok((received, _)) => pending.asked.extend_from_slice(&room[..received]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return self.leave(&pending),
        }
        let Ok(asked) = <[u8; ASK_LEN]>::try_from(pending.asked.as_slice()) else {
            return self.pending.push(pending);
        };
        self.leave(&pending);
        self.answer(pending.stream, &asked, shared);
    }

    fn answer(&mut self, stream: TcpStream, asked: &[u8; ASK_LEN], shared: &Shared) {
        let admitted = read_ask(asked).and_then(|(hello, end)| shared.admit_plain(&hello, &end, &stream));
        let answer = admitted.as_ref().map(|(_, welcome, end)| (*welcome, *end)).map_err(|refusal| *refusal);
        // The answer is shorter than any socket buffer, so it is sent at once or not at all.
        let sent = send(&stream, &encode_answer(answer), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if let Ok((key, _, _)) = admitted {
            match sent {
                Ok(_) => self.inside.push((key, stream.into())),
                Err(_) => shared.lock().left(key),
            }
        }
    }
}
