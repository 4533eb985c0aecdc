//! Whether the threads of the data plane turn.
//!
//! A thread that hangs leaves every task that uses its device in an endless wait, and nothing ends it: the process lives.
//! So each of them has a [`Pulse`]: it is poked every second, and answers where it also takes requests, without a lock.
//! One that stays silent for too long ends the process, and the standby, or the next process, goes on with the
//! device. Silence is counted in looks and not by the clock: while the whole machine stands still nobody looks either.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

/// What a thread shows that it turns by.
#[derive(Debug)]
pub(crate) struct Pulse {
    name: String,
    poke: OwnedFd,
    answers: AtomicU64,
}

/// Those of all threads that are watched.
static PULSES: Mutex<Vec<Weak<Pulse>>> = Mutex::new(Vec::new());

impl Pulse {
    /// One for a thread of this name, watched for as long as somebody has it.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub(crate) fn new(name: String) -> io::Result<Arc<Pulse>> {
        let poke = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let pulse = Arc::new(Pulse { name, poke, answers: AtomicU64::new(0) });
        PULSES.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&pulse));
        Ok(pulse)
    }

    /// Readable when the thread is to answer.
    pub(crate) fn poked(&self) -> BorrowedFd<'_> {
        self.poke.as_fd()
    }

    /// The thread's answer: it turns.
    pub(crate) fn answer(&self) {
        // Nothing to read means that it was read before; the answer counts all the same.
        let _ = rustix::io::read(&self.poke, &mut [0_u8; 8]);
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    fn poke(&self) {
        // A counter that is full is readable as well.
        let _ = rustix::io::write(&self.poke, &1_u64.to_ne_bytes());
    }
}

/// Who looks.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// Looks without an answer after which a thread hangs.
    looks_max: u32,
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    pulse: Weak<Pulse>,
    answers: u64,
    silent: u32,
}

impl Watchdog {
    pub(crate) const fn new(looks_max: u32) -> Watchdog {
        Watchdog { looks_max, watched: Vec::new() }
    }

    /// Looks at every thread, and pokes it for the next look. The name of one that hangs, if any does.
    pub(crate) fn look(&mut self) -> Option<String> {
        self.take_new();
        let mut hanging = None;
        self.watched.retain_mut(|watched| {
            let Some(pulse) = watched.pulse.upgrade() else { return false };
            let answers = pulse.answers.load(Ordering::Relaxed);
            watched.silent = if answers == watched.answers { watched.silent + 1 } else { 0 };
            watched.answers = answers;
            if watched.silent > self.looks_max {
                hanging.get_or_insert_with(|| pulse.name.clone());
            }
            pulse.poke();
            true
        });
        hanging
    }

    fn take_new(&mut self) {
        let new = std::mem::take(&mut *PULSES.lock().unwrap_or_else(PoisonError::into_inner));
        self.watched.extend(new.into_iter().map(|pulse| Watched { pulse, answers: 0, silent: 0 }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_silent_for_too_long_is_found_and_one_that_ended_is_not() {
        let pulse = |name: &str| {
            let pulse = Pulse::new(name.to_owned()).unwrap();
            let watched = Watched { pulse: Arc::downgrade(&pulse), answers: 0, silent: 0 };
            (pulse, watched)
        };
        let ((turns, first), (hangs, second), (ended, third)) =
            (pulse("turns"), pulse("hangs"), pulse("ended"));
        let mut watchdog = Watchdog { looks_max: 3, watched: vec![first, second, third] };
        drop(ended);
        for look in 1..=3 {
            assert_eq!(watchdog.look(), None, "look {look}");
            turns.answer();
        }
        assert_eq!(watchdog.look(), Some("hangs".to_owned()));
        hangs.answer();
        assert_eq!(watchdog.look(), None, "it turns again");
        assert!(watchdog.watched.iter().all(|watched| watched.pulse.strong_count() > 0));
    }
}
