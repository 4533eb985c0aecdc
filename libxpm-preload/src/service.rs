//! Requests of the program's threads are performed by threads of this library: only these threads can use the
//! library's descriptors ([`crate::table`]). Callers wait by futexes, which need none.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that are waiting, in the order in which they came.
#[derive(Default)]
pub(crate) struct Service {
    jobs: Mutex<VecDeque<Job>>,
    work: Condvar,
}

/// The result of a job.
struct Slot<T> {
    done: Mutex<Option<T>>,
    told: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Has a job done later.
    pub(crate) fn post(&self, job: impl FnOnce() + Send + 'static) {
        lock(&self.jobs).push_back(Box::new(job));
        self.work.notify_one();
    }

    /// Has a job done, and waits for it.
    pub(crate) fn call<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let slot = Arc::new(Slot { done: Mutex::new(None), told: Condvar::new() });
        let theirs = slot.clone();
        self.post(move || {
            let done = job();
            *lock(&theirs.done) = Some(done);
            theirs.told.notify_one();
        });
        let mut done = lock(&slot.done);
        loop {
            match done.take() {
                Some(done) => return done,
                None => done = slot.told.wait(done).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Does jobs for ever. `between` is called after each one, and when there was none for `pause`.
    pub(crate) fn run(&self, pause: Duration, mut between: impl FnMut()) -> ! {
        loop {
            let mut jobs = lock(&self.jobs);
            if jobs.is_empty() {
                jobs = self.work.wait_timeout(jobs, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
            let job = jobs.pop_front();
            drop(jobs);
            if let Some(job) = job {
                job();
            }
            between();
        }
    }
}
