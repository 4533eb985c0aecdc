//! The meeting place of a channel and the connector of one grant: the channel requests a link, the connector
//! delivers it. While a link is up, no I/O touches this state.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use xpm_protocol::api::blk::LinkState;
use xpm_transport::link::Link;

/// A delivery of the connector.
pub(super) enum Delivery {
    /// A link, to be used from now on.
    Link(Box<dyn Link>),
    /// The present link may not be used any more, though the memory may be intact: I/O waits for the next
    /// link.
    Held,
    /// The memory is proven to be lost.
    Lost,
    /// The appliance has not answered since this time, which is longer than I/O is to be held.
    Stalled(Instant),
}

/// A channel's bell: it rings when a delivery is available.
///
/// The flag is up whenever the descriptor stays readable: it is raised after the write and lowered before the
/// read. In the opposite order, a ring between the two steps leaves the descriptor readable with nothing to
/// take, and a thread that waits for it never sleeps again. Two harmless cases remain: a flag that is up for
/// a ring already taken, which costs one check of the ports; and a wake-up just before the flag is up, which
/// repeats until the flag is up. So a waiting thread must watch the level, not the edge.
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
        // The write could fail only on an overflow, after 2^64 - 2 rings.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        self.rung.store(true, Ordering::Release);
    }

    /// Whether the bell rang since the last call. A single atomic load when it did not.
    pub(crate) fn take(&self) -> bool {
        if !self.rung.load(Ordering::Acquire) {
            return false;
        }
        // Only this thread lowers the flag, so it is still up.
        self.rung.swap(false, Ordering::AcqRel);
        let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        true
    }
}

/// The meeting place of one channel and one grant.
pub(super) struct Port {
    /// Queue number of the channel within the volume.
    pub(super) queue: u16,
    /// Whether the channel has no link.
    wanted: AtomicBool,
    /// Whether the channel was dropped.
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

    /// Called by the channel: its link is gone. The caller also wakes the connector.
    pub(super) fn want(&self) {
        self.set_state(LinkState::Connecting);
        self.wanted.store(true, Ordering::Release);
    }

    /// Called by the channel: it has a link. The channel may have requested another one while this link was
    /// being delivered.
    pub(super) fn satisfied(&self) {
        self.wanted.store(false, Ordering::Release);
    }

    /// Called by the channel: takes the delivery.
    pub(super) fn take(&self) -> Option<Delivery> {
        // The connector holds the lock only for an assignment.
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Called by the channel when it is dropped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether the channel exists, has no link, and no link is on its way to it.
    pub(super) fn misses_link(&self) -> bool {
        self.is_wanted() && !self.is_closed()
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Called by the connector. After `Lost` the connector keeps trying; it notifies the channel only once.
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

    /// Time of the last change of state.
    pub(super) fn since(&self) -> Instant {
        self.epoch + std::time::Duration::from_nanos(self.since.load(Ordering::Relaxed))
    }

    /// Number of links delivered so far.
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
    fn a_bell_whose_ring_was_taken_is_not_readable() {
        const ROUNDS: u64 = 20_000;
        let bell = Bell::new().unwrap();
        let (asked, rung) = (AtomicU64::new(0), AtomicU64::new(0));
        let wait_for = |counter: &AtomicU64, value| {
            while counter.load(Ordering::Acquire) < value {
                std::thread::yield_now();
            }
        };
        // Checked after the thread has ended: a failing assertion within the scope would wait for the thread
        // for ever.
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
                // A further take may return true once; after that the descriptor must not be readable.
                bell.take();
                stuck += u64::from(rustix::io::read(&bell.fd, &mut [0_u8; 8]) != Err(Errno::AGAIN));
            }
        });
        assert_eq!(stuck, 0, "the descriptor stayed readable with nothing to take");
    }
}
