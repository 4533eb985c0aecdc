//! Trims and zero writes that take long run on a thread of their own, so that the loop thread continues to
//! serve the other connections. `swapon -d` trims a whole device at once, and freeing the pages of a GiB
//! takes some 50 ms.
//!
//! A job ends with its connection, and with its lease: it changes nothing after the store was dropped or the
//! lease revoked, so it cannot overwrite data of a newer connection or owner.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use xpm_transport::{Completion, IoError, Kind};

use crate::lease::Lease;

/// Longest operation that a loop thread executes itself, in bytes: a fraction of a millisecond.
pub(crate) const INLINE_LEN_MAX: u64 = 4 << 20;
/// Length of a step in bytes: about a millisecond. Between steps, the job checks whether it is cancelled.
const STEP_LEN: u64 = 16 << 20;
/// Most waiting jobs; the loop thread executes further ones.
const JOBS_MAX: usize = 1024;

/// A trim or zero write.
pub(crate) struct Job {
    /// The memory.
    pub(crate) lease: Arc<Lease>,
    /// Trim or zero.
    pub(crate) kind: Kind,
    /// First byte, in the export.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// The token of the completion.
    pub(crate) token: u64,
    /// The receiver of the completion.
    pub(crate) done: Arc<Done>,
}

/// Collects the completions of one connection's jobs.
pub(crate) struct Done {
    completions: Mutex<Vec<Completion>>,
    event: OwnedFd,
    /// Whether the connection is closed; locked during each step of its jobs.
    cancelled: Mutex<bool>,
}

/// The queue of jobs. Its thread ends when the last clone is dropped.
#[derive(Clone)]
pub(crate) struct Sweeper {
    jobs: SyncSender<Job>,
}

impl Sweeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel provides no thread.
    pub(crate) fn start() -> io::Result<Sweeper> {
        let (jobs, inbox) = sync_channel(JOBS_MAX);
        std::thread::Builder::new().name("sweeper".into()).spawn(move || run(&inbox))?;
        Ok(Sweeper { jobs })
    }

    /// Takes a job, or returns it when too many wait. Never blocks.
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

/// Executes the operation, unless it is cancelled or the lease is revoked meanwhile.
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
    // Bytes that could not be set to zeros read as an error, and not as their old content.
    match job.lease.is_sound(false, job.offset, job.len) {
        true => Ok(()),
        false => Err(IoError::Failed),
    }
}

impl Done {
    /// An empty collection.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(crate) fn new() -> io::Result<Done> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Done { completions: Mutex::new(Vec::new()), event, cancelled: Mutex::new(false) })
    }

    /// Cancels all jobs of the connection, and waits for the step in progress.
    pub(crate) fn cancel(&self) {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Readable when [`Done::take`] has completions.
    pub(crate) fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Moves the collected completions to the end of `completions`.
    pub(crate) fn take(&self, completions: &mut Vec<Completion>) {
        let mut done = self.lock();
        // The event may be unset. It carries no more information than the list, so resetting it before the
        // list is taken loses none.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        completions.append(&mut done);
    }

    fn add(&self, completion: Completion) {
        let mut done = self.lock();
        done.push(completion);
        // Fails only when the counter is at its maximum, and then the event is readable.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Completion>> {
        self.completions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
