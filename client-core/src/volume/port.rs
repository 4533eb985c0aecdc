//! Where a channel and the connector of one grant meet: the channel asks for a link, the connector
//! delivers it. Nothing here is touched by an I/O while its link is up.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use xpm_protocol::api::blk::LinkState;
use xpm_transport::link::Link;

/// What the connector brings.
pub(super) enum Delivery {
    /// A link, for use from now on.
    Link(Box<dyn Link>),
    /// The link that there may be is none any more, and no proof of anything: I/O waits for the next one.
    Held,
    /// It is proven that the memory is gone.
    Lost,
    /// Nothing has answered at the other end of the link since then, for as long as I/O is to be held.
    Stalled(Instant),
}

/// A channel's bell: rings when a delivery is there.
///
/// The flag is up whenever the descriptor stays readable: it is raised after the write and lowered
/// before the read. The other way round, a ring between the two leaves the descriptor readable with
/// nothing to take, and a thread that waits for it never sleeps again. What remains possible is a flag
/// that is up for a ring already heard, which costs one look at the ports, and a wake-up just before
/// the flag is up, which repeats until it is: whoever waits must watch the level, not the edge.
pub(crate) struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> std::io::Result<Bell> {
        use rustix::event::{EventfdFlags, eventfd};
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { fd, rung: AtomicBool::new(false) })
    }

    pub(crate) const fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(crate) fn ring(&self) {
        // Only an overflow after 2^64 - 2 rings could fail.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        self.rung.store(true, Ordering::Release);
    }

    /// Whether it rang since the last time this was asked. One load when it did not.
    pub(crate) fn take(&self) -> bool {
        if !self.rung.load(Ordering::Acquire) {
            return false;
        }
        // One thread only lowers it, so it is still up.
        self.rung.swap(false, Ordering::AcqRel);
        let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        true
    }
}

/// The meeting place of one channel and one grant.
pub(super) struct Port {
    /// Queue number of the channel within the volume.
    pub(super) queue: u16,
    /// The channel has no link.
    wanted: AtomicBool,
    /// The channel is gone.
    closed: AtomicBool,
    delivery: Mutex<Option<Delivery>>,
    bell: Arc<Bell>,
    state: AtomicU8,
    /// Nanoseconds from `epoch` to the last change of state.
    since: AtomicU64,
    epoch: Instant,
    links: AtomicU64,
}

impl Port {
    pub(super) fn new(queue: u16, bell: Arc<Bell>) -> Port {
        Port {
            queue,
            wanted: AtomicBool::new(true),
            closed: AtomicBool::new(false),
            delivery: Mutex::new(None),
            bell,
            state: AtomicU8::new(encode(LinkState::Connecting)),
            since: AtomicU64::new(0),
            epoch: Instant::now(),
            links: AtomicU64::new(0),
        }
    }

    /// The channel's side: the link is gone. The connector is woken by its caller.
    pub(super) fn want(&self) {
        self.set_state(LinkState::Connecting);
        self.wanted.store(true, Ordering::Release);
    }

    /// The channel's side: it has a link. It may have asked for one after this one was on its way.
    pub(super) fn satisfied(&self) {
        self.wanted.store(false, Ordering::Release);
    }

    /// The channel's side: what was delivered.
    pub(super) fn take(&self) -> Option<Delivery> {
        // The connector holds the lock for the time of an assignment only.
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The channel's side: it is dropped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether the channel is there and has no link, and none is on its way to it.
    pub(super) fn misses_link(&self) -> bool {
        self.is_wanted() && !self.is_closed()
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// The connector's side. After `Lost` it goes on trying; the channel is told once.
    pub(super) fn deliver(&self, delivery: Delivery) {
        match delivery {
            Delivery::Link(_) => {
                self.wanted.store(false, Ordering::Release);
                self.links.fetch_add(1, Ordering::Relaxed);
                self.set_state(LinkState::Up);
            }
            Delivery::Lost if self.state() == LinkState::Lost => return,
            Delivery::Lost => self.set_state(LinkState::Lost),
            Delivery::Held => self.want(),
            Delivery::Stalled(_) => {}
        }
        *self.delivery.lock().unwrap_or_else(PoisonError::into_inner) = Some(delivery);
        self.bell.ring();
    }

    pub(super) fn state(&self) -> LinkState {
        match self.state.load(Ordering::Acquire) {
            0 => LinkState::Up,
            1 => LinkState::Connecting,
            _ => LinkState::Lost,
        }
    }

    fn set_state(&self, state: LinkState) {
        let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.since.store(now, Ordering::Relaxed);
        self.state.store(encode(state), Ordering::Release);
    }

    /// When the state changed last.
    pub(super) fn since(&self) -> Instant {
        self.epoch + std::time::Duration::from_nanos(self.since.load(Ordering::Relaxed))
    }

    /// Links delivered so far.
    pub(super) fn links(&self) -> u64 {
        self.links.load(Ordering::Relaxed)
    }
}

const fn encode(state: LinkState) -> u8 {
    match state {
        LinkState::Up => 0,
        LinkState::Connecting => 1,
        LinkState::Lost => 2,
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_bell_that_was_taken_is_silent() {
        const ROUNDS: u64 = 20_000;
        let bell = Bell::new().unwrap();
        let (asked, rung) = (AtomicU64::new(0), AtomicU64::new(0));
        let wait_for = |counter: &AtomicU64, value| {
            while counter.load(Ordering::Acquire) < value {
                std::thread::yield_now();
            }
        };
        // Checked after the thread has ended: a failure within the scope would wait for it for ever.
        let mut stuck = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    wait_for(&asked, round);
                    bell.ring();
                    rung.store(round, Ordering::Release);
                }
            });
            for round in 1..=ROUNDS {
                asked.store(round, Ordering::Release);
                while !bell.take() {
                    std::thread::yield_now();
                }
                wait_for(&rung, round);
                // Once more at most, then there is nothing to wake up for.
                bell.take();
                stuck += u64::from(rustix::io::read(&bell.fd, &mut [0_u8; 8]) != Err(Errno::AGAIN));
            }
        });
        assert_eq!(stuck, 0, "the descriptor stayed readable with nothing to take");
    }
}
