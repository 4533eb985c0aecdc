//! Trims and zero writes that take long: they go to a thread of their own, so that the loop thread
//! keeps serving the other connections. `swapon -d` trims a whole device at once, and freeing the
//! pages of a GiB takes some 50 ms.
//!
//! A job ends with the connection that it came from, and with the lease: nothing of it happens after
//! the store was dropped or the lease revoked, so it cannot land behind what a newer connection or
//! owner writes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use xpm_transport::{Completion, IoError, Kind};

use crate::lease::Lease;

/// Longest operation that a loop thread does by itself, in bytes: a fraction of a millisecond.
pub(crate) const INLINE_LEN_MAX: u64 = 4 << 20;
/// How much is done between two looks at whether it is still wanted, in bytes: about a millisecond.
const STEP_LEN: u64 = 16 << 20;
/// Jobs that wait at most; further ones are done by the loop thread.
const JOBS_MAX: usize = 1024;

/// One operation.
pub(crate) struct Job {
    /// The memory.
    pub(crate) lease: Arc<Lease>,
    /// Trim or zero.
    pub(crate) kind: Kind,
    /// First byte, in the export.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Of the completion.
    pub(crate) token: u64,
    /// Where the completion goes.
    pub(crate) done: Arc<Done>,
}

/// Where the completions of one connection's jobs are collected.
pub(crate) struct Done {
    completions: Mutex<Vec<Completion>>,
    event: OwnedFd,
    /// Whether the connection is gone; locked during each step of its jobs.
    cancelled: Mutex<bool>,
}

/// Takes jobs. Its thread ends with the last clone.
#[derive(Clone)]
pub(crate) struct Sweeper {
    jobs: SyncSender<Job>,
}

impl Sweeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(crate) fn start() -> io::Result<Sweeper> {
        let (jobs, inbox) = sync_channel(JOBS_MAX);
        std::thread::Builder::new().name("sweeper".into()).spawn(move || run(&inbox))?;
        Ok(Sweeper { jobs })
    }

    /// Takes a job, or gives it back when too many wait. Never blocks.
    pub(crate) fn post(&self, job: Job) -> Result<(), Box<Job>> {
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => Box::new(job),
        })
    }
}

fn run(inbox: &Receiver<Job>) {
    while let Ok(job) = inbox.recv() {
        let result = sweep(&job);
        job.done.add(Completion { token: job.token, result });
    }
}

/// Does the operation, unless it is cancelled or the lease ends meanwhile.
pub(crate) fn sweep(job: &Job) -> Result<(), IoError> {
    let (mut offset, end) = (job.offset, job.offset + job.len);
    while offset < end {
        let cancelled = job.done.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
        let step = job.lease.begin_step();
        if *cancelled || step.is_none() {
            return Err(IoError::Fenced);
        }
        let len = STEP_LEN.min(end - offset);
        job.lease.for_each_part(offset, len, |memory, offset, len| match job.kind {
            Kind::Trim => memory.trim(offset, len),
            _ => memory.zero(offset, len),
        });
        offset += len;
    }
    // What could not be made zeros reads as an error, and not as what was there before.
    match job.lease.is_sound(false, job.offset, job.len) {
        true => Ok(()),
        false => Err(IoError::Failed),
    }
}

impl Done {
    /// An empty collection.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub(crate) fn new() -> io::Result<Done> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Done { completions: Mutex::new(Vec::new()), event, cancelled: Mutex::new(false) })
    }

    /// Ends all jobs of the connection; waits for the step that is being done.
    pub(crate) fn cancel(&self) {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Readable when [`Done::take`] has something to give.
    pub(crate) fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Moves what is there to the end of `completions`.
    pub(crate) fn take(&self, completions: &mut Vec<Completion>) {
        let mut done = self.lock();
        // Empty is fine. The event says no more than the list: who has all that is to come does not look again.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        completions.append(&mut done);
    }

    fn add(&self, completion: Completion) {
        let mut done = self.lock();
        done.push(completion);
        // Fails only when the counter is at its end, and then the event is readable.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Completion>> {
        self.completions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
