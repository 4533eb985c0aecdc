//! The threads that work ahead of need: they clear deleted regions, and keep the stock.

use std::io;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use xpm_protocol::RegionId;

use super::shared::Shared;
use super::state::State;
use crate::arena::Memory;

/// Longest sleep: after it, a thread checks whether the table is still used.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// Pause after the host had no memory for the stock.
const STOCK_PAUSE: Duration = Duration::from_secs(10);
/// Pause while a connection still uses a region that is to be cleared.
const CLEAR_PAUSE: Duration = Duration::from_millis(20);
/// How long a thread works on one lent region before it checks for more urgent work.
const FAULT_STEP: Duration = Duration::from_millis(50);

enum Job {
    Leave(Arc<Memory>, u64),
    Clear(RegionId, Arc<Memory>),
    Drop(RegionId, Arc<Memory>),
    FaultIn(Arc<Memory>),
    Stock(u64),
}

/// Starts a thread that ends when the table is gone.
pub(super) fn spawn(number: usize, shared: Weak<Shared>) -> io::Result<()> {
    std::thread::Builder::new()
        .name(format!("arena-{number}"))
        .spawn(move || {
            while let Some(shared) = shared.upgrade() {
                if let Some(job) = shared.next_job() {
                    shared.work(job);
                }
            }
        })
        .map(|_| ())
}

impl Shared {
    /// The next job; none after a sleep.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        let now = Instant::now();
        if state.ledger.expire(now) {
            self.changed.notify_all();
        }
        let job = state.job(now);
        if job.is_none() {
            let expiry = state.ledger.next_expiry();
            let wake = [expiry, state.stock_again, state.clear_again].into_iter().flatten().min();
            let sleep = wake.map_or(SLEEP_MAX, |wake| wake.saturating_duration_since(now).min(SLEEP_MAX));
            drop(self.changed.wait_timeout(state, sleep).unwrap_or_else(PoisonError::into_inner));
        }
        job
    }

    fn work(&self, job: Job) {
        match job {
            Job::Leave(memory, len) => self.leave(memory, len),
            Job::Clear(id, memory) => self.clear(id, memory),
            Job::Drop(id, memory) => match Arc::try_unwrap(memory) {
                Ok(memory) => {
                    drop(memory);
                    self.lock().ledger.dropped(id);
                }
                Err(memory) => self.later(id, memory),
            },
            Job::FaultIn(memory) => self.fault_in(&memory),
            Job::Stock(len) => self.stock(len),
        }
        self.changed.notify_all();
    }

    /// Memory counts as gone when no thread holds it any more, also no thread that is faulting it in.
    fn leave(&self, memory: Arc<Memory>, len: u64) {
        match Arc::try_unwrap(memory) {
            Ok(memory) => {
                drop(memory);
                self.lock().ledger.left(len);
            }
            Err(memory) => {
                std::thread::sleep(CLEAR_PAUSE / 10);
                self.lock().leaving.push_back((memory, len));
            }
        }
    }

    fn fault_in(&self, memory: &Arc<Memory>) {
        match self.arena.fault_in(memory, Some(Instant::now() + FAULT_STEP)) {
            Ok(true) => {}
            Ok(false) => self.lock().to_fault.push_back(Arc::downgrade(memory)),
            Err(error) => {
                tracing::error!(
                    "a region is lent but not wholly in memory: {}",
                    xpm_control::error_line(&error)
                );
            }
        }
    }

    fn later(&self, id: RegionId, memory: Arc<Memory>) {
        let mut state = self.lock();
        state.ledger.not_yet(id, memory);
        state.clear_again = Some(Instant::now() + CLEAR_PAUSE);
    }

    /// Sets the memory to zeros, also for processes that still have it mapped. It is lent again only if no
    /// other process ever had it, and only when no connection holds it any more.
    fn clear(&self, id: RegionId, memory: Arc<Memory>) {
        let memory = match Arc::try_unwrap(memory) {
            Ok(memory) => memory,
            Err(memory) => return self.later(id, memory),
        };
        if memory.is_shared() {
            memory.give_up();
            drop(memory);
            return self.lock().ledger.dropped(id);
        }
        memory.clear();
        if memory.has_bad() && self.arena.file().is_some() {
            // Its place in the file is never used again.
            self.lock().ledger.lose_capacity(memory.len());
        }
        let wanted = !memory.has_bad() && self.lock().ledger.wants(memory.len());
        if !wanted {
            drop(memory);
            return self.lock().ledger.dropped(id);
        }
        let memory = self.fault_in_for_stock(memory);
        let mut state = self.lock();
        match memory {
            Some(memory) => state.ledger.cleared(id, memory),
            None => state.ledger.dropped(id),
        }
    }

    fn stock(&self, len: u64) {
        let made = match self.arena.make(len, 0) {
            Ok(memory) => self.fault_in_for_stock(memory),
            Err(error) => {
                self.pause_stock(&error);
                None
            }
        };
        self.lock().ledger.stocked(made);
    }

    /// The region, faulted in; or, when an order waits for memory, as it is: then the rest is faulted in
    /// after that order. None when the host has no memory for it.
    fn fault_in_for_stock(&self, memory: Memory) -> Option<Arc<Memory>> {
        loop {
            match self.arena.fault_in(&memory, Some(Instant::now() + FAULT_STEP)) {
                Ok(true) => return Some(Arc::new(memory)),
                Ok(false) => {
                    let mut state = self.lock();
                    if state.orders_waiting > 0 {
                        let memory = Arc::new(memory);
                        state.to_fault.push_back(Arc::downgrade(&memory));
                        return Some(memory);
                    }
                }
                Err(error) => {
                    self.pause_stock(&error);
                    return None;
                }
            }
        }
    }

    fn pause_stock(&self, error: &crate::arena::ArenaError) {
        tracing::warn!("cannot make memory ready ahead of need: {}", xpm_control::error_line(error));
        self.lock().stock_again = Some(Instant::now() + STOCK_PAUSE);
    }
}

impl State {
    fn next_to_fault(&mut self) -> Option<Arc<Memory>> {
        while let Some(memory) = self.to_fault.pop_front() {
            if let Some(memory) = memory.upgrade() {
                return Some(memory);
            }
        }
        None
    }

    fn job(&mut self, now: Instant) -> Option<Job> {
        if let Some((memory, len)) = self.leaving.pop_front() {
            return Some(Job::Leave(memory, len));
        }
        if self.clear_again.is_none_or(|again| again <= now) {
            self.clear_again = None;
            if let Some((id, memory)) = self.ledger.take_clearing() {
                return Some(Job::Clear(id, memory));
            }
        }
        if self.ledger.leaving() == 0
            && let Some(memory) = self.next_to_fault()
        {
            return Some(Job::FaultIn(memory));
        }
        if let Some((id, memory)) = self.ledger.take_surplus() {
            return Some(Job::Drop(id, memory));
        }
        if self.stock_again.is_none_or(|again| again <= now) {
            self.stock_again = None;
            return self.ledger.start_stocking().map(Job::Stock);
        }
        None
    }
}
