//! Replaces the dead sockets of a kernel nbd device.
//!
//! The kernel reports a dead link by multicast. The watcher then asks the source for dead sockets; it also
//! does so once a second, so that a lost message costs no connection. The kernel fills only slots that it
//! knows to be dead, and silently drops other sockets: such a socket appears as dead at the source again, and
//! is replaced once more.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Wiring;
use super::netlink::{DeadLinks, NbdControl};
use super::source::Source;
use crate::error::{DeviceError, Step};
use crate::lifecycle;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Interval of checking the appliance behind working sockets.
const ASK_EVERY: Duration = Duration::from_secs(3);
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(3);

/// A running watcher.
pub(super) struct Watcher {
    stop: OwnedFd,
    thread: JoinHandle<()>,
}

impl Watcher {
    pub(super) fn start(
        wiring: Wiring,
        source: Arc<dyn Source>,
        ended: Arc<Mutex<bool>>,
    ) -> Result<Watcher, DeviceError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).at("make an eventfd")?;
        let links = NbdControl::open()?.listen().at("listen to the nbd driver")?;
        let work = Work {
            stop: stop.try_clone().at("duplicate an eventfd")?,
            links,
            wiring,
            source,
            ended,
            worry: None,
        };
        let thread = thread::Builder::new()
            .name(format!("xpm-nbd{}", work.wiring.index))
            .stack_size(lifecycle::STACK_LEN)
            .spawn(move || work.run())
            .at("start a thread")?;
        Ok(Watcher { stop, thread })
    }

    /// Ends the watcher and waits for it.
    pub(super) fn stop(self) {
        // The write succeeds: the eventfd is never read and its counter does not overflow.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        let _ = self.thread.join();
    }
}

struct Work {
    stop: OwnedFd,
    links: DeadLinks,
    wiring: Wiring,
    source: Arc<dyn Source>,
    /// Whether the device was told to end, so that it gets no more sockets.
    ended: Arc<Mutex<bool>>,
    /// The last logged error, so that a lasting error is logged once.
    worry: Option<String>,
}

impl Work {
    fn run(mut self) {
        let mut pause = LOOK_EVERY;
        let mut asked = Instant::now();
        while !self.stopped_within(pause) {
            pause = match self.replace_dead() {
                Ok(()) => {
                    self.worry = None;
                    if asked.elapsed() >= ASK_EVERY {
                        self.source.look();
                        asked = Instant::now();
                    }
                    LOOK_EVERY
                }
                Err(error) => {
                    self.log(&error);
                    if pause == LOOK_EVERY { PAUSE_FIRST } else { (pause * 2).min(PAUSE_LONGEST) }
                }
            };
        }
    }

    fn stopped_within(&mut self, pause: Duration) -> bool {
        let limit = Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: i64::from(pause.subsec_nanos()) };
        let stop = PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN);
        let mut fds = [stop, PollFd::from_borrowed_fd(self.links.as_fd(), PollFlags::IN)];
        let woken = poll(&mut fds, Some(&limit));
        let stopped = woken.is_ok() && fds[0].revents().contains(PollFlags::IN);
        self.links.take();
        stopped
    }

    fn replace_dead(&self) -> Result<(), DeviceError> {
        let dead = self.source.dead();
        if dead.is_empty() {
            return Ok(());
        }
        let mut control = NbdControl::open()?;
        for queue in dead {
            let socket = self.source.socket(queue)?;
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            if *ended {
                return Ok(());
            }
            self.wiring.reconfigure(&mut control, &[socket.as_fd()])?;
            tracing::info!(
                device = self.wiring.index,
                queue,
                "gave the kernel's nbd device a new connection"
            );
        }
        Ok(())
    }

    fn log(&mut self, error: &DeviceError) {
        let line = error.to_string();
        if self.worry.as_deref() != Some(line.as_str()) {
            tracing::warn!(device = self.wiring.index, "cannot replace a connection yet: {line}");
            self.worry = Some(line);
        }
    }
}
