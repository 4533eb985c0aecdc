//! A loop thread: serves all connections that it is given, from the first request to the last reply.
//!
//! The loop waits with epoll(7), level-triggered. After work it polls without sleeping for as long as the
//! next request is likely to come ([`crate::spin`]), and yields the core between two polls, since a wake-up
//! costs more than a request; when requests are rare it sleeps at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::connection::{Closed, Connection};
use super::counters::{LoopCounters, add};
use super::registry::{ConnectionId, Registry};
use crate::spin::Spin;

/// Events fetched at once.
const EVENTS_MAX: usize = 64;
/// The mailbox's token among the events.
const MAILBOX: u64 = u64::MAX;

/// A message from another thread to a loop; never on the path of an I/O.
pub(super) enum Letter {
    /// Serve this connection.
    Adopt(ConnectionId, Box<Connection>),
    /// Close this one.
    Close(ConnectionId),
    /// Answer, to show that the loop makes progress.
    Poke,
    /// Close all and end.
    Stop,
}

/// A loop's mailbox.
pub(super) struct Mailbox {
    letters: Mutex<Vec<Letter>>,
    bell: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Mailbox> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { letters: Mutex::new(Vec::new()), bell })
    }

    pub(super) fn send(&self, letter: Letter) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        // The counter of an eventfd overflows only after 2^64 - 2 letters; before that a write succeeds.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Vec<Letter> {
        let _ = rustix::io::read(&self.bell, &mut [0_u8; 8]);
        std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Served {
    id: ConnectionId,
    connection: Box<Connection>,
    watched: EventFlags,
}

/// A loop thread's state.
pub(super) struct EventLoop {
    epoll: OwnedFd,
    mailbox: Arc<Mailbox>,
    registry: Arc<Registry>,
    counters: Arc<LoopCounters>,
    spin: Duration,
    served: Vec<Option<Served>>,
    stopping: bool,
}

impl EventLoop {
    pub(super) fn new(
        mailbox: Arc<Mailbox>,
        registry: Arc<Registry>,
        counters: Arc<LoopCounters>,
        spin: Duration,
    ) -> io::Result<EventLoop> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &mailbox.bell, EventData::new_u64(MAILBOX), EventFlags::IN)?;
        Ok(EventLoop { epoll, mailbox, registry, counters, spin, served: Vec::new(), stopping: false })
    }

    /// Serves until a [`Letter::Stop`] arrives.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut spin = Spin::new(self.spin);
        while !self.stopping {
            events.clear();
            if let Err(error) = wait(self.epoll.as_fd(), &mut spin, &mut events) {
                // epoll_wait(2) fails only for invalid arguments, and these are valid.
                tracing::error!(%error, "waiting for connections failed");
                return;
            }
            let mut letters = false;
            for event in &events {
                match event.data.u64() {
                    MAILBOX => letters = true,
                    place => self.serve(place as usize),
                }
            }
            if letters {
                self.read_letters();
            }
        }
    }

    /// Serves the connection at a place, which may be empty after an earlier event of the same batch.
    fn serve(&mut self, place: usize) {
        let Some(Some(served)) = self.served.get_mut(place) else { return };
        // A panic in one connection's code ends that connection, not the others of the loop.
        let turn = catch_unwind(AssertUnwindSafe(|| served.connection.serve(&self.counters)));
        let ended = match turn {
            Ok(Ok(())) => watch(self.epoll.as_fd(), served, place).err().map(|_| Closed::Left),
            Ok(Err(closed)) => Some(closed),
            Err(_) => Some(Closed::Left),
        };
        if let Some(closed) = ended {
            if closed == Closed::Protocol {
                add(&self.counters.refused, 1);
            }
            self.drop_at(place);
        }
    }

    fn drop_at(&mut self, place: usize) {
        let Some(served) = self.served[place].take() else { return };
        // Closing the descriptors removes them from the epoll set.
        drop(served.connection);
        self.registry.gone(served.id);
    }

    fn read_letters(&mut self) {
        for letter in self.mailbox.take() {
            match letter {
                Letter::Adopt(id, connection) => self.adopt(id, connection),
                Letter::Close(id) => {
                    let at =
                        self.served.iter().position(|served| served.as_ref().is_some_and(|s| s.id == id));
                    if let Some(place) = at {
                        self.drop_at(place);
                    }
                }
                Letter::Poke => add(&self.counters.answers, 1),
                Letter::Stop => self.stopping = true,
            }
        }
        if self.stopping {
            (0..self.served.len()).for_each(|place| self.drop_at(place));
        }
    }

    fn adopt(&mut self, id: ConnectionId, connection: Box<Connection>) {
        let place = self.served.iter().position(Option::is_none).unwrap_or(self.served.len());
        if place == self.served.len() {
            self.served.push(None);
        }
        let data = EventData::new_u64(place as u64);
        let watched = EventFlags::IN;
        let added = epoll::add(&self.epoll, connection.stream(), data, watched).and_then(|()| {
            connection.store_fd().map_or(Ok(()), |fd| epoll::add(&self.epoll, fd, data, EventFlags::IN))
        });
        self.served[place] = Some(Served { id, connection, watched });
        match added {
            // The handshake may have read requests already.
            Ok(()) => self.serve(place),
            Err(_) => self.drop_at(place),
        }
    }
}

/// Updates the events that epoll reports for the connection, if they changed.
fn watch(epoll: BorrowedFd<'_>, served: &mut Served, place: usize) -> io::Result<()> {
    let mut wanted = EventFlags::empty();
    wanted.set(EventFlags::IN, served.connection.wants_input());
    wanted.set(EventFlags::OUT, served.connection.wants_output());
    if wanted != served.watched {
        epoll::modify(epoll, served.connection.stream(), EventData::new_u64(place as u64), wanted)?;
        served.watched = wanted;
    }
    Ok(())
}

const NOT_AT_ALL: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Waits: polls for a while, then sleeps.
fn wait(epoll: BorrowedFd<'_>, spin: &mut Spin, events: &mut Vec<epoll::Event>) -> io::Result<()> {
    loop {
        if spin.looks() && fetch(epoll, events, Some(&NOT_AT_ALL))? {
            break;
        }
        if !spin.goes_on() {
            fetch(epoll, events, None)?;
            break;
        }
    }
    spin.reset();
    Ok(())
}

/// Fetches events; false when there are none.
fn fetch(
    epoll: BorrowedFd<'_>,
    events: &mut Vec<epoll::Event>,
    limit: Option<&Timespec>,
) -> io::Result<bool> {
    match epoll::wait(epoll, rustix::buffer::spare_capacity(events), limit) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
