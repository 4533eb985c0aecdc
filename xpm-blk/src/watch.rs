//! Detects threads of the data plane that hang.
//!
//! A thread that hangs leaves every task that uses its device in an endless wait, and no event ends this: the
//! process is alive. So each thread is poked every second, and answers at the point where it also takes
//! requests, without a lock: queues of devices by a [`Pulse`], the loops that serve NBD by a [`LoopWatch`]. A
//! thread that stays silent for too long ends the process, and the standby, or the next process, takes the
//! device over. Silence is counted in checks and not by the clock: while the whole machine stands still, no
//! check runs either.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};
use xpm_transport::nbd::server::LoopWatch;

/// A thread's means of showing that it makes progress.
#[derive(Debug)]
pub(crate) struct Pulse {
    name: String,
    poke: OwnedFd,
    asked: AtomicBool,
    answers: AtomicU64,
}

/// The pulses of all watched threads.
static PULSES: Mutex<Vec<Weak<Pulse>>> = Mutex::new(Vec::new());

impl Pulse {
    /// A pulse for a thread of this name, watched for as long as it is referenced.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(crate) fn new(name: String) -> io::Result<Arc<Pulse>> {
        let poke = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let pulse = Arc::new(Pulse { name, poke, asked: AtomicBool::new(false), answers: AtomicU64::new(0) });
        PULSES.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&pulse));
        Ok(pulse)
    }

    /// Readable when the thread has to answer.
    pub(crate) fn poked(&self) -> BorrowedFd<'_> {
        self.poke.as_fd()
    }

    /// As [`Pulse::answer`], for a thread that checks at each turn and not only when the descriptor is
    /// readable.
    pub(crate) fn answer_if_asked(&self) {
        if self.asked.load(Ordering::Acquire) {
            self.answer();
        }
    }

    /// The thread's answer, which shows that it makes progress.
    pub(crate) fn answer(&self) {
        self.asked.store(false, Ordering::Relaxed);
        // The descriptor may be unreadable because it was read before; the answer counts all the same.
        let _ = rustix::io::read(&self.poke, &mut [0_u8; 8]);
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    fn poke(&self) {
        // The write fails only when the counter is full, and then the descriptor is readable as well.
        let _ = rustix::io::write(&self.poke, &1_u64.to_ne_bytes());
        // Set after the write. In the opposite order, the thread could answer between the two steps; the descriptor
        // would then stay readable without a request, and would wake the thread again and again.
        self.asked.store(true, Ordering::Release);
    }
}

/// Checks the threads.
pub(crate) struct Watchdog {
    /// Consecutive checks without an answer after which a thread counts as hung.
    looks_max: u32,
    watched: Vec<Watched>,
}

enum Who {
    Queue(Weak<Pulse>),
    Loop(LoopWatch),
}

struct Watched {
    who: Who,
    answers: u64,
    silent: u32,
}

impl Watchdog {
    /// A watchdog for these loops, and for every thread that has a [`Pulse`].
    pub(crate) fn new(looks_max: u32, loops: Vec<LoopWatch>) -> Watchdog {
        Watchdog { looks_max, watched: loops.into_iter().map(Who::Loop).map(Watched::new).collect() }
    }

    /// Checks every thread, and pokes it for the next check. Returns the name of a thread that hangs, if
    /// there is one.
    pub(crate) fn look(&mut self) -> Option<String> {
        self.take_new();
        let mut hanging = None;
        self.watched.retain_mut(|watched| {
            let Some(silent) = watched.look() else { return false };
            if silent > self.looks_max {
                hanging.get_or_insert_with(|| watched.who.name());
            }
            true
        });
        hanging
    }

    fn take_new(&mut self) {
        let new = std::mem::take(&mut *PULSES.lock().unwrap_or_else(PoisonError::into_inner));
        self.watched.extend(new.into_iter().map(Who::Queue).map(Watched::new));
    }
}

impl Watched {
    const fn new(who: Who) -> Watched {
        Watched { who, answers: 0, silent: 0 }
    }

    /// Checks the thread, and pokes it for the next check. Returns the number of silent checks; none when the
    /// thread has ended.
    fn look(&mut self) -> Option<u32> {
        let answers = match &self.who {
            Who::Queue(pulse) => {
                let pulse = pulse.upgrade()?;
                pulse.poke();
                pulse.answers.load(Ordering::Relaxed)
            }
            Who::Loop(watch) => {
                watch.poke();
                watch.answers()
            }
        };
        self.silent = if answers == self.answers { self.silent + 1 } else { 0 };
        self.answers = answers;
        Some(self.silent)
    }
}

impl Who {
    fn name(&self) -> String {
        match self {
            Who::Queue(pulse) => pulse.upgrade().map_or_else(String::new, |pulse| pulse.name.clone()),
            Who::Loop(watch) => watch.name().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_silent_for_too_long_is_found_and_one_that_ended_is_not() {
        let pulse = |name: &str| Pulse::new(name.to_owned()).unwrap();
        let (turns, hangs, ended) = (pulse("turns"), pulse("hangs"), pulse("ended"));
        let mut watchdog = Watchdog::new(3, Vec::new());
        drop(ended);
        for look in 1..=3 {
            assert_eq!(watchdog.look(), None, "look {look}");
            turns.answer();
        }
        assert_eq!(watchdog.look(), Some("hangs".to_owned()));
        hangs.answer();
        assert_eq!(watchdog.look(), None, "it turns again");
        assert_eq!(watchdog.watched.len(), 2, "the one that ended is not looked at any more");
    }
}
