//! The thread that makes room: it moves pages from the window to the shelf, and removes them from there, after changed
//! pages were written to external memory.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use xpm_control::spare::Spare;
use xpm_transport::io::{Completion, Kind, Operation};
use xpm_transport::slots::Slots;

use crate::evict::budget::Governor;
use crate::evict::s3fifo::Policy;
use crate::page::window::PAGE;
use crate::page::word::runs;
use crate::page::word::{Claim, DIRTY, MARK, PINNED, POISONED, QUEUED, Residency, TOUCHED, WRITTEN};
use crate::pager::Shared;
use crate::pager::errors::{Cause, Once};
use crate::pager::stats::count;
use crate::say::say;
use xpm_client_core::volume::Channel;

/// How long the evictor sleeps when there is nothing to do.
const TICK: Duration = Duration::from_millis(500);
/// Most pages of one batch: moving many pages costs little more than moving one.
const BATCH: usize = 256;
/// A batch has at most one in this number of the budget's pages.
const BATCH_PART: usize = 16;
/// Longest write in pages.
const WRITE_MAX: u32 = 64;
/// Most writes in flight.
pub(crate) const DEPTH: usize = 16;
/// Interval of halving the reserve; it doubles when it was not enough.
const RELAX: Duration = Duration::from_millis(50);
/// Pause of all writes after a write failed.
const BACK_OFF: Duration = Duration::from_millis(200);
/// How long pages are written one by one after a write failed because memory is lost: a run can lie on several
/// appliances, and the pages on working appliances must not be given up.
const ONE_BY_ONE: Duration = Duration::from_secs(1);
/// If a fault waits for room, and no page can be taken out of the window for this time, pages beyond the budget are
/// used.
const STUCK: Duration = Duration::from_millis(100);
/// Available memory in bytes that is left to other programs when pages beyond the budget are used.
const LEFT: u64 = 64 << 20;
/// Interval of checking whether the program has unpinned pages, while no fault waits for room.
const PINNED_LOOK: Duration = Duration::from_millis(100);

pub(crate) struct Evictor {
    pager: Shared,
    channel: Channel,
    policy: Policy,
    governor: Governor,
    writes: Slots<(u32, u32)>,
    ended: Vec<Completion>,
    failed: Option<Instant>,
    /// Time of the last write that failed with a final error.
    lost: Option<Instant>,
    ticked: Instant,
    /// Start of the time in which no page could be taken out of the window, because all of them are pinned.
    stuck: Option<Instant>,
    /// Pages that could not be taken out of the window in the last attempt to make room.
    held: usize,
    /// Whether it was logged that the budget is exceeded.
    warned: bool,
    /// Number of pages fetched ahead until the last tick.
    fetched: u64,
}

impl Evictor {
    pub(crate) fn new(pager: Shared, channel: Channel, governor: Governor) -> Evictor {
        let ended = Vec::with_capacity(2 * DEPTH);
        Evictor {
            pager,
            channel,
            policy: Policy::default(),
            governor,
            writes: Slots::new(DEPTH),
            ended,
            failed: None,
            lost: None,
            ticked: Instant::now(),
            stuck: None,
            held: 0,
            warned: false,
            fetched: 0,
        }
    }

    /// Makes room until the pager is stopped.
    pub(crate) fn run(mut self) {
        let mut relaxed = Instant::now();
        while !self.pager.is_stopped() {
            self.pager.evictor.take();
            self.take_arrivals();
            while relaxed.elapsed() >= RELAX {
                relaxed += RELAX;
                self.pager.room.relax();
            }
            if self.is_tick() {
                self.tick();
            }
            self.end_writes();
            if !self.pager.room.is_short() {
                self.stuck = None;
                self.pager.room.set_excess(0);
                self.sleep(TICK);
            } else if self.make_room() {
                self.stuck = None;
            } else {
                let pause = self.is_stuck();
                self.sleep(pause);
            }
        }
        // Writes in flight still read the pages.
        let since = Instant::now();
        while self.writes.used() > 0 && since.elapsed() < Duration::from_secs(2) {
            self.end_writes();
            self.sleep(Duration::from_millis(1));
        }
    }

    /// Handles an attempt that made no room. If all pages are pinned, waiting faults get pages beyond the budget, as
    /// long as the machine has memory. Returns how long to sleep.
    fn is_stuck(&mut self) -> Duration {
        let held = self.held > 0 && self.writes.used() == 0 && self.failed.is_none();
        let room = &self.pager.room;
        if !held {
            self.stuck = None;
            return Duration::from_millis(1);
        }
        let since = *self.stuck.get_or_insert_with(Instant::now);
        if !room.is_starving() {
            return if room.excess() > 0 { PINNED_LOOK } else { Duration::from_millis(1) };
        }
        if since.elapsed() >= STUCK {
            let step = (room.budget() / 8).max(16);
            let spare = Spare::open().ok().and_then(|mut spare| spare.look());
            if spare.is_none_or(|spare| spare.available > LEFT + 2 * (step * PAGE) as u64) {
                room.set_excess(room.excess() + step);
                self.warn();
            } else {
                room.set_exhausted();
            }
            self.pager.wake_starving();
        }
        Duration::from_millis(1)
    }

    fn warn(&mut self) {
        if !std::mem::replace(&mut self.warned, true) {
            let (name, budget) = (&self.pager.name, (self.pager.room.budget() * PAGE) >> 20);
            say(format_args!(
                "xpm: warning: allocation `{name}`: the program has pinned its {budget} MiB of local memory (io_uring, RDMA, O_DIRECT); \
                 more is used until it unpins some"
            ));
        }
    }

    fn is_tick(&self) -> bool {
        self.ticked.elapsed() >= TICK
    }

    /// The work of every [`TICK`]: frees blocks that are kept for reuse if no page was fetched ahead, and adjusts the
    /// budget.
    fn tick(&mut self) {
        self.ticked = Instant::now();
        let fetched = self.pager.tallies.prefetched.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.fetched, fetched) == fetched {
            self.pager.window.trim();
        }
        let room = &self.pager.room;
        if let Some(budget) = self.governor.next(room.budget(), room.resident()) {
            // Pinned pages stay, and the other pages need room, too.
            room.set_budget(budget.max(2 * room.pinned()));
            self.pager.wake_starving();
        }
    }

    fn take_arrivals(&mut self) {
        while let Some(arrival) = self.pager.arrivals.pop() {
            self.policy.comes(arrival as u32, (arrival >> 32) as u32);
        }
    }

    /// Makes room until there is enough, or the next tick is due. Returns false when it made none.
    fn make_room(&mut self) -> bool {
        let mut any = false;
        self.held = 0;
        // Ends at the tick even if room is taken as fast as it is made, because the budget has to be adjusted.
        while !self.pager.room.is_ample() && !self.is_tick() && !self.pager.is_stopped() {
            self.take_arrivals();
            let shelved = self.shelve();
            let dropped = self.empty_shelf();
            self.end_writes();
            if !shelved && !dropped {
                break;
            }
            any = true;
        }
        any
    }

    /// Moves pages from the window to the shelf. Returns true when it moved any.
    fn shelve(&mut self) -> bool {
        let budget = self.pager.room.budget();
        let most = BATCH.min(budget / BATCH_PART);
        let (mut batch, mut looked, mut any) = (Vec::with_capacity(BATCH), 0, false);
        while batch.len() < most && looked < 4 * most && !self.policy.is_shelf_full(budget) {
            let Some(page) = self.policy.next_for_shelf() else { break };
            looked += 1;
            let pages = &self.pager.pages;
            match pages.claim(page, |state| !state.has(PINNED), false) {
                Claim::Yours(state) => match state.residency() {
                    Residency::Mapped => batch.push(page),
                    Residency::Shelved => {
                        // An untouched mark, which was put onto the shelf when it arrived.
                        self.pager.release(page, Residency::Shelved, 0, 0);
                        self.policy.is_shelved(page);
                        any = true;
                    }
                    // The page left local memory meanwhile.
                    _ => {
                        self.pager.release(page, Residency::Absent, 0, QUEUED);
                        any = true;
                    }
                },
                Claim::Not(_) | Claim::Busy => self.policy.stays(page),
            }
        }
        batch.sort_unstable();
        for (first, run) in runs(&batch, u32::MAX) {
            any |= self.hide(first, first + run);
        }
        any
    }

    /// Moves pages that this thread owns from the window to the shelf. Returns true when any could be moved.
    fn hide(&mut self, first: u32, end: u32) -> bool {
        let (mut at, mut any) = (first, false);
        while at < end {
            let hidden = self.pager.window.hide(at, end - at);
            for page in at..at + hidden {
                self.pager.release(page, Residency::Shelved, 0, TOUCHED);
                self.policy.is_shelved(page);
            }
            any |= hidden > 0;
            at += hidden;
            if at < end {
                self.held += 1;
                self.pager.release(at, Residency::Mapped, 0, 0);
                self.policy.stays(at);
                at += 1;
            }
        }
        any
    }

    /// Removes pages from the shelf that were not touched there: drops clean ones, and starts writing dirty ones.
    /// Returns true when it made progress.
    fn empty_shelf(&mut self) -> bool {
        let may_write = self.failed.is_none_or(|since| since.elapsed() > BACK_OFF);
        let (mut clean, mut dirty, mut looked) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH), 0);
        let most = BATCH.min(self.policy.shelf_len());
        while clean.len() + dirty.len() < most && looked < most {
            let Some(page) = self.policy.next_of_shelf() else { break };
            looked += 1;
            let pages = &self.pager.pages;
            match pages.claim(
                page,
                |state| state.residency() != Residency::Mapped && !state.has(PINNED),
                false,
            ) {
                Claim::Yours(state) if state.residency() == Residency::Absent => {
                    self.pager.release(page, Residency::Absent, 0, QUEUED);
                }
                Claim::Yours(state) => match self.pager.is_dirty(page, state) {
                    true => dirty.push(page),
                    false => clean.push(page),
                },
                Claim::Not(_) | Claim::Busy => self.policy.stays(page),
            }
        }
        let any = !clean.is_empty() || looked > clean.len() + dirty.len();
        clean.sort_unstable();
        count(&self.pager.tallies.dropped, clean.len() as u64);
        for (first, run) in runs(&clean, u32::MAX) {
            self.let_go(first, run, 0);
        }
        dirty.sort_unstable();
        let mut written = false;
        let one_by_one = self.lost.is_some_and(|since| since.elapsed() < ONE_BY_ONE);
        for (first, run) in runs(&dirty, if one_by_one { 1 } else { WRITE_MAX }) {
            if may_write && !self.writes.is_full() {
                self.write(first, run);
                written = true;
            } else {
                for page in first..first + run {
                    self.pager.release(page, Residency::Shelved, 0, 0);
                    self.policy.is_shelved(page);
                }
            }
        }
        self.channel.submit();
        any || written
    }

    fn write(&mut self, first: u32, run: u32) {
        let id = self.writes.insert((first, run));
        let operation = Operation {
            kind: Kind::Write,
            offset: u64::from(first) * PAGE as u64,
            len: u64::from(run) * PAGE as u64,
            buf: Some(self.pager.window.shelved(first, run)),
            token: u64::from(id),
        };
        let posted = self.channel.post(operation);
        debug_assert!(posted.is_ok(), "the channel was made for as many as there are places");
    }

    fn end_writes(&mut self) {
        self.channel.poll(&mut self.ended);
        while let Some(ended) = self.ended.pop() {
            let Some((first, run)) = self.writes.remove(ended.token as u32) else { continue };
            match ended.result {
                Ok(()) => {
                    self.failed = None;
                    count(&self.pager.tallies.written, u64::from(run));
                    self.let_go(first, run, WRITTEN);
                }
                Err(error) => {
                    count(&self.pager.tallies.errors, 1);
                    self.pager.errors.record_write(first, Cause::Io(error));
                    let now = Some(Instant::now());
                    if error.is_final() {
                        self.lost = now;
                        // The page cannot be saved, and keeping it would take the room of other pages.
                        if run == 1 {
                            let name = &self.pager.name;
                            self.pager.errors.log_once(Once::Unwritten, format_args!(
                                "xpm: page {first} of allocation `{name}` was changed and cannot be written, so accesses to it are a \
                                 SIGBUS from now on (others like it are not listed): {error}"
                            ));
                            // Marked as written, although external memory never had this content: otherwise an
                            // unwritten page of a slab would count as zeros.
                            self.let_go(first, run, POISONED | WRITTEN);
                            continue;
                        }
                    } else {
                        self.failed = now;
                    }
                    for page in first..first + run {
                        self.pager.release(page, Residency::Shelved, DIRTY, 0);
                        self.policy.is_shelved(page);
                    }
                }
            }
        }
    }

    /// Removes pages that this thread owns from local memory.
    fn let_go(&mut self, first: u32, run: u32, set: u32) {
        self.pager.window.recycle(first, run);
        for page in first..first + run {
            self.pager.pages.set_stamp(page, u64::from(self.policy.goes()));
            self.pager.release(page, Residency::Absent, set, QUEUED | TOUCHED | DIRTY | MARK);
        }
        self.pager.room.give(run as usize);
        self.pager.wake_starving();
    }

    fn sleep(&mut self, limit: Duration) {
        self.channel.arm();
        self.pager.evictor.wait(&[self.channel.wait_fd()], limit);
    }
}
