//! Operations on external memory that a call of the program waits for: flush, get, put, and advice that brings pages
//! into local memory or removes them.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};
use xpm_transport::io::{Completion, IoBuf, IoError, Kind, Operation};

use crate::page::window::{PAGE, Staging, Window};
use crate::page::word::runs;
use crate::page::word::{Claim, DIRTY, MARK, PINNED, POISONED, Residency, State, TOUCHED, WRITTEN};
use crate::pager::prefetch::Ahead;
use crate::pager::stats::count;
use crate::pager::{Shared, Source};
use xpm_client_core::volume::{Channel, Volume};

/// Most pages of one operation.
const RUN: usize = 64;
/// Most operations in flight.
pub(crate) const DEPTH: usize = 4;

/// Why a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallError {
    /// The operation on external memory failed.
    Io(IoError),
    /// The program discarded this page by a call of its own, and with it the changes in the page.
    Gone(u32),
}

impl From<IoError> for CallError {
    fn from(error: IoError) -> CallError {
        CallError::Io(error)
    }
}

/// Copies the content of consecutive pages that the caller owns. Returns the pages that the program has discarded.
fn read(window: &Window, pages: &[(u32, State)], to: IoBuf) -> Vec<u32> {
    let (mut at, mut gone) = (0, Vec::new());
    for run in pages.chunk_by(|(_, one), (_, other)| one.residency() == other.residency()) {
        let (first, state) = run[0];
        let part = to.part(at, run.len() * PAGE);
        match state.residency() {
            Residency::Mapped => {
                let known = run.iter().any(|(_, state)| state.has(POISONED));
                if known || !window.read(first, part) {
                    let is_gone = |(index, (page, state)): (usize, &(u32, State))| {
                        let gone = state.has(POISONED) || !window.read(*page, part.part(index * PAGE, PAGE));
                        gone.then_some(*page)
                    };
                    gone.extend(run.iter().enumerate().filter_map(is_gone));
                }
            }
            _ => window.shelved(first, run.len() as u32).copy_to(part),
        }
        at += part.len();
    }
    gone
}

/// A part of a buffer, and its place in the window.
enum Piece {
    /// Whole pages, starting at this page; at most [`RUN`].
    Pages(u32, IoBuf),
    /// Bytes within a page: page, offset in the page.
    Bytes(u32, usize, IoBuf),
}

/// Splits a buffer that belongs to `offset` of the window at page borders.
fn pieces(offset: usize, buf: IoBuf) -> impl Iterator<Item = Piece> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (left, within) = (buf.len() - at, (offset + at) % PAGE);
        let page = ((offset + at) / PAGE) as u32;
        let whole = if within == 0 { left / PAGE } else { 0 };
        let len = if whole > 0 { whole.min(RUN) * PAGE } else { left.min(PAGE - within) };
        let part = (len > 0).then(|| buf.part(at, len))?;
        at += len;
        Some(if whole > 0 { Piece::Pages(page, part) } else { Piece::Bytes(page, within, part) })
    })
}

/// The resources of calls. A lock around it lets one call at a time use it.
pub(crate) struct Calls {
    pager: Shared,
    channel: Channel,
    staging: Staging,
    /// Buffers that the program has returned. They stay registered, like those in use.
    buffers: Vec<Staging>,
    ended: Vec<Completion>,
}

impl Calls {
    pub(crate) fn new(pager: Shared, volume: &Volume) -> io::Result<Calls> {
        let mut channel = volume.channel()?;
        let staging = Staging::new(RUN * PAGE)?;
        channel.register(staging.all());
        Ok(Calls { pager, channel, staging, buffers: Vec::new(), ended: Vec::with_capacity(2 * DEPTH) })
    }

    /// Lets the channel execute its orders.
    pub(crate) fn tend(&mut self) {
        self.channel.poll(&mut self.ended);
    }

    /// Executes one operation, and waits for its end.
    fn carry_out(&mut self, kind: Kind, offset: u64, len: u64, buf: Option<IoBuf>) -> Result<(), IoError> {
        let operation = Operation { kind, offset, len, buf, token: 0 };
        let posted = self.channel.post(operation);
        debug_assert!(posted.is_ok(), "nothing else is on its way");
        self.channel.submit();
        loop {
            self.channel.poll(&mut self.ended);
            if let Some(ended) = self.ended.pop() {
                if let Err(error) = ended.result {
                    count(&self.pager.tallies.errors, 1);
                    self.pager.failed((offset / PAGE as u64) as u32, error);
                }
                return ended.result;
            }
            self.channel.arm();
            let fd = self.channel.wait_fd();
            let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], None);
        }
    }

    /// Writes the changed pages of the range to external memory, and flushes them there.
    pub(crate) fn flush(&mut self, first: u32, pages: u32) -> Result<(), CallError> {
        let pager = self.pager.clone();
        let mut batch: Vec<(u32, State)> = Vec::with_capacity(RUN);
        let mut failed = Ok(());
        for page in first..first + pages {
            let local = |state: State| matches!(state.residency(), Residency::Mapped | Residency::Shelved);
            if pager.pages.state(page).residency() != Residency::Absent {
                let claimed = loop {
                    match pager.pages.claim(page, local, true) {
                        Claim::Yours(state) => break Some(state),
                        Claim::Not(_) => break None,
                        Claim::Busy => pager.wait_for(page),
                    }
                    self.tend();
                };
                match claimed {
                    Some(state) if pager.may_be_dirty(page, state) => batch.push((page, state)),
                    Some(state) => pager.release(page, state.residency(), 0, 0),
                    None => {}
                }
            }
            let apart = batch.last().is_some_and(|(last, _)| *last != page);
            if batch.len() == RUN || apart {
                failed = failed.and(self.write_back(&mut batch));
            }
        }
        failed = failed.and(self.write_back(&mut batch));
        failed?;
        Ok(self.carry_out(Kind::Flush, 0, 0, None)?)
    }

    /// Writes the changed ones of consecutive pages that the caller owns, and releases all of them.
    fn write_back(&mut self, batch: &mut Vec<(u32, State)>) -> Result<(), CallError> {
        let Some((first, _)) = batch.first().copied() else { return Ok(()) };
        let pager = self.pager.clone();
        // The program may change pages in the window meanwhile. So a copy is written, and the digest is of that copy.
        let copy = self.staging.all().part(0, batch.len() * PAGE);
        let gone = read(&pager.window, batch, copy);
        let digests: Vec<u64> =
            (0..batch.len()).map(|index| pager.digest_of(copy.part(index * PAGE, PAGE))).collect();
        let changed = |(index, (page, state)): (usize, &(u32, State))| {
            !gone.contains(page) && (state.has(DIRTY) || digests[index] != pager.pages.stamp(*page))
        };
        let changed: Vec<u32> = batch
            .iter()
            .enumerate()
            .filter(|one| changed((one.0, one.1)))
            .map(|(_, (page, _))| *page)
            .collect();
        let mut result = gone.first().map_or(Ok(()), |page| Err(CallError::Gone(*page)));
        for (start, run) in runs(&changed, RUN as u32) {
            let buf = copy.part((start - first) as usize * PAGE, run as usize * PAGE);
            let done =
                self.carry_out(Kind::Write, u64::from(start) * PAGE as u64, buf.len() as u64, Some(buf));
            count(&pager.tallies.written, u64::from(run));
            for page in start..start + run {
                let index = (page - first) as usize;
                let (_, state) = batch[index];
                match done {
                    Ok(()) => {
                        pager.pages.set_stamp(page, digests[index]);
                        pager.release(page, state.residency(), WRITTEN, DIRTY);
                    }
                    Err(_) => pager.release(page, state.residency(), DIRTY, 0),
                }
            }
            result = result.and(done.map_err(CallError::from));
        }
        for (page, state) in batch.drain(..) {
            if changed.binary_search(&page).is_err() {
                pager.release(page, state.residency(), if gone.contains(&page) { POISONED } else { 0 }, 0);
            }
        }
        result
    }

    /// Requests pages, without waiting for them.
    pub(crate) fn will_need(&mut self, first: u32, pages: u32) -> Result<(), CallError> {
        let mut first = first;
        let end = first + pages;
        while first < end {
            let count = (end - first).min(crate::pager::prefetch::WINDOW_MAX);
            // Pages for which the queue has no place are fetched when they are touched.
            if self
                .pager
                .asked
                .push(Ahead { first, count, stride: 1, marked: true, marked_at: None })
                .is_err()
            {
                break;
            }
            first += count;
        }
        self.pager.fetchers[0].ring();
        Ok(())
    }

    /// Removes pages from local memory, after changed pages were written.
    pub(crate) fn dont_need(&mut self, first: u32, pages: u32) -> Result<(), CallError> {
        self.flush(first, pages)?;
        let pager = self.pager.clone();
        let idle = |state: State| {
            matches!(state.residency(), Residency::Mapped | Residency::Shelved) && !state.has(PINNED)
        };
        let mut page = first;
        while page < first + pages {
            let end = (page + RUN as u32).min(first + pages);
            let kind = |page| pager.pages.state(page).residency();
            let alike = kind(page);
            let mut run = Vec::with_capacity(RUN);
            while page < end && kind(page) == alike {
                match pager.pages.claim(page, |state| idle(state) && state.residency() == alike, false) {
                    Claim::Yours(state) => run.push(state),
                    _ if run.is_empty() => {}
                    _ => break,
                }
                page += 1;
                if run.is_empty() {
                    break;
                }
            }
            if !run.is_empty() {
                self.send_away(page - run.len() as u32, &run);
            }
        }
        pager.wake_starving();
        Ok(())
    }

    /// Removes pages that the caller owns from local memory, except pages that have changed. All of the pages are in
    /// the window, or all on the shelf.
    fn send_away(&self, first: u32, states: &[State]) {
        let pager = &self.pager;
        let count = states.len() as u32;
        let hidden = match states[0].residency() {
            Residency::Mapped => pager.window.hide(first, count),
            _ => count,
        };
        let mut clean = Vec::with_capacity(states.len());
        for (page, state) in (first..first + count).zip(states) {
            if page >= first + hidden {
                pager.release(page, state.residency(), 0, 0);
            } else if pager.is_dirty(page, *state) {
                pager.release(page, Residency::Shelved, 0, 0);
            } else {
                clean.push(page);
            }
        }
        for (start, run) in runs(&clean, u32::MAX) {
            pager.window.discard(start, run);
            for page in start..start + run {
                pager.pages.set_stamp(page, 0);
                pager.release(page, Residency::Absent, 0, TOUCHED | DIRTY | MARK);
            }
            pager.room.give(run as usize);
        }
    }

    /// Sets pages to zeros in external memory; none of them may be in local memory.
    pub(crate) fn trim(&mut self, first: u32, pages: u32) -> Result<(), IoError> {
        let (offset, len) = (u64::from(first) * PAGE as u64, u64::from(pages) * PAGE as u64);
        self.carry_out(Kind::Trim, offset, len, None)
    }

    /// Sets pages of a slab to zeros, while the program may use them.
    pub(crate) fn clear(&mut self, first: u32, pages: u32) {
        if !self.forget(first, pages) {
            return;
        }
        // The program may have written to a page again, and the page may have been written to external memory and
        // fetched back, all before external memory was set to zeros. Its digest is then that of lost content: so all
        // local pages count as dirty.
        let pager = self.pager.clone();
        for page in first..first + pages {
            if pager.pages.state(page).residency() != Residency::Absent {
                let residency = self.claim(page).residency();
                pager.release(page, residency, if residency == Residency::Absent { 0 } else { DIRTY }, 0);
            }
        }
    }

    /// Discards pages of a slab that is not used any more. Returns whether external memory had any of them.
    pub(crate) fn forget(&mut self, first: u32, pages: u32) -> bool {
        let pager = self.pager.clone();
        let mut written = false;
        let mut local: Vec<u32> = Vec::with_capacity(RUN);
        for page in first..first + pages {
            let known = pager.pages.state(page);
            if known.residency() == Residency::Absent && !known.has(WRITTEN | POISONED) {
                continue;
            }
            let state = self.claim(page);
            // Read after the claim, so that a write-back that was in flight counts too.
            written |= state.has(WRITTEN);
            if state.residency() == Residency::Absent {
                if state.has(POISONED) {
                    pager.window.heal(page);
                }
                self.forgotten(page, 1);
                continue;
            }
            if local.len() == RUN || local.last().is_some_and(|last| last + 1 != page) {
                self.discard(&mut local);
            }
            local.push(page);
        }
        self.discard(&mut local);
        pager.wake_starving();
        if written {
            // External memory that cannot be freed now is freed with the allocation.
            let _ = self.trim(first, pages);
        }
        written
    }

    /// Copies pages of a slab to pages of another one, through the staging memory: absent pages take no room in local
    /// memory. The program uses neither slab meanwhile, and the other slab has held only zeros so far.
    pub(crate) fn transfer(&mut self, from: u32, to: u32, pages: u32) -> Result<(), CallError> {
        let pager = self.pager.clone();
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(RUN as u32);
            self.with_run(from + at, count, |calls, alike, place| {
                calls.copy_out(alike, place, to + (alike[0].0 - from))
            })?;
            at += count;
        }
        pager.wake_starving();
        Ok(())
    }

    /// Claims consecutive pages, and calls `act` with each run of them whose content lies in one place: in external
    /// memory at the passed source, or, with `None`, in local memory. Releases the pages at the end.
    fn with_run(
        &mut self,
        first: u32,
        count: u32,
        mut act: impl FnMut(&mut Calls, &[(u32, State)], Option<Source>) -> Result<(), CallError>,
    ) -> Result<(), CallError> {
        let pager = self.pager.clone();
        let claimed: Vec<(u32, State)> =
            (first..first + count).map(|page| (page, self.claim(page))).collect();
        // The source of a private copy's page may change meanwhile, so it is read only once.
        let places: Vec<Option<Source>> = claimed
            .iter()
            .map(|(page, state)| {
                (state.residency() == Residency::Absent).then(|| pager.source(*page, *state))
            })
            .collect();
        let mut result = Ok(());
        let mut at = 0;
        while at < claimed.len() && result.is_ok() {
            let goes_on = |(index, place): (u32, &Option<Source>)| match (places[at], *place) {
                (Some(first), Some(place)) => first.goes_on(place, index),
                (first, place) => first == place,
            };
            let len = (0..).zip(&places[at..]).take_while(|one| goes_on(*one)).count();
            result = act(self, &claimed[at..at + len], places[at]);
            at += len;
        }
        claimed.iter().for_each(|(page, state)| pager.release(*page, state.residency(), 0, 0));
        result
    }

    /// Claims a page, however long that takes. Polls the channel meanwhile: a change of the volume waits for every
    /// channel, so the page's owner might otherwise never release it.
    fn claim(&mut self, page: u32) -> State {
        loop {
            match self.pager.pages.claim(page, |_| true, true) {
                Claim::Yours(state) => return state,
                Claim::Not(_) | Claim::Busy => self.pager.wait_for(page),
            }
            self.tend();
        }
    }

    /// Marks discarded pages, which the caller owns, as poisoned.
    fn gone(&self, pages: &[u32]) -> Result<(), CallError> {
        pages.iter().for_each(|page| _ = self.pager.pages.mark(*page, POISONED, 0));
        pages.first().map_or(Ok(()), |page| Err(CallError::Gone(*page)))
    }

    /// Writes the content of pages that the caller owns, all from one place, to unused pages.
    fn copy_out(&mut self, from: &[(u32, State)], place: Option<Source>, to: u32) -> Result<(), CallError> {
        let len = from.len() * PAGE;
        let buf = self.staging.all().part(0, len);
        match place {
            // The target pages are zeros, too.
            Some(Source::Zeros) => return Ok(()),
            Some(Source::At(at)) => {
                self.carry_out(Kind::Read, u64::from(at) * PAGE as u64, len as u64, Some(buf))?;
            }
            None => self.gone(&read(&self.pager.window, from, buf))?,
        }
        self.carry_out(Kind::Write, u64::from(to) * PAGE as u64, len as u64, Some(buf))?;
        let pager = self.pager.clone();
        for page in to..to + from.len() as u32 {
            // Only zeros that were fetched ahead can be there.
            if self.claim(page).residency() != Residency::Absent {
                pager.window.discard(page, 1);
                pager.room.give(1);
            }
            pager.pages.set_stamp(page, 0);
            pager.release(page, Residency::Absent, WRITTEN, TOUCHED | DIRTY | MARK);
        }
        Ok(())
    }

    /// Removes consecutive pages that the caller owns from local memory.
    fn discard(&self, pages: &mut Vec<u32>) {
        let Some(first) = pages.first().copied() else { return };
        self.pager.window.discard(first, pages.len() as u32);
        self.pager.room.give(pages.len());
        self.forgotten(first, pages.len() as u32);
        pages.clear();
    }

    fn forgotten(&self, first: u32, pages: u32) {
        for page in first..first + pages {
            self.pager.pages.set_stamp(page, 0);
            self.pager.release(
                page,
                Residency::Absent,
                0,
                TOUCHED | DIRTY | MARK | WRITTEN | POISONED | PINNED,
            );
        }
    }

    /// Removes the poison from absent pages, so that the next access tries to fetch them again.
    pub(crate) fn heal(&mut self, first: u32, pages: u32) {
        for page in first..first + pages {
            if self.pager.pages.state(page).has(POISONED) {
                let state = self.claim(page);
                // A page that the program discarded stays poisoned: external memory has only its old content.
                let clear = if state.residency() == Residency::Absent { POISONED } else { 0 };
                if clear != 0 {
                    self.pager.window.heal(page);
                }
                self.pager.release(page, state.residency(), 0, clear);
            }
        }
    }

    /// Brings pages into local memory and pins them, one by one.
    pub(crate) fn pin(&mut self, first: u32, pages: u32) -> Result<(), CallError> {
        let pager = self.pager.clone();
        let mut marked = Vec::new();
        for page in first..first + pages {
            if !pager.pages.mark(page, PINNED, 0).has(PINNED) {
                marked.push(page);
            }
            loop {
                let state = self.claim(page);
                if state.residency() != Residency::Absent {
                    // The page has to be in the window: system calls may use pinned pages, even where a system call
                    // on an absent page fails.
                    if state.residency() == Residency::Shelved {
                        pager.window.show(page, 1);
                    } else if state.has(POISONED) || !pager.window.settle(page) {
                        pager.release(page, Residency::Mapped, POISONED, 0);
                        marked.iter().for_each(|page| _ = pager.pages.mark(*page, 0, PINNED));
                        return Err(CallError::Gone(page));
                    }
                    pager.release(page, Residency::Mapped, 0, 0);
                    break;
                }
                if !pager.room.take() {
                    pager.release(page, Residency::Absent, 0, 0);
                    pager.evictor.ring();
                    pager.room.wait();
                    continue;
                }
                if state.has(POISONED) {
                    // Tries once more to fetch it.
                    pager.window.heal(page);
                }
                match pager.source(page, state) {
                    Source::Zeros => pager.put_zeros(page, 1, false),
                    Source::At(at) => {
                        let buf = self.staging.all().part(0, PAGE);
                        let read =
                            self.carry_out(Kind::Read, u64::from(at) * PAGE as u64, PAGE as u64, Some(buf));
                        if let Err(error) = read {
                            pager.release(page, Residency::Absent, 0, 0);
                            pager.room.give(1);
                            marked.iter().for_each(|page| _ = pager.pages.mark(*page, 0, PINNED));
                            return Err(error.into());
                        }
                        let left = pager.comes(page, buf, false);
                        pager.window.fill(page, buf);
                        pager.pages.mark(page, 0, POISONED);
                        pager.is_here(page, false, false, left);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes a buffer for the program that is registered with the transports. There are few lengths, so that returned
    /// buffers can be reused.
    pub(crate) fn take_buffer(&mut self, len: usize) -> io::Result<Staging> {
        if let Some(index) = self.buffers.iter().position(|buffer| buffer.all().len() == len) {
            return Ok(self.buffers.swap_remove(index));
        }
        let buffer = Staging::new(len)?;
        self.channel.register(buffer.all());
        Ok(buffer)
    }

    /// Returns a buffer. It stays registered, and so mapped, for as long as the channel exists.
    pub(crate) fn give_buffer(&mut self, buffer: Staging) {
        self.buffers.push(buffer);
    }

    /// Copies bytes from `offset` of the window to a buffer that only the caller uses; absent pages are read into the
    /// buffer directly.
    pub(crate) fn get(&mut self, offset: usize, buf: IoBuf) -> Result<(), CallError> {
        for piece in pieces(offset, buf) {
            match piece {
                Piece::Pages(first, part) => self.get_pages(first, part)?,
                Piece::Bytes(page, within, part) => {
                    let whole = self.staging.all().part(0, PAGE);
                    self.get_pages(page, whole)?;
                    whole.part(within, part.len()).copy_to(part);
                }
            }
        }
        Ok(())
    }

    fn get_pages(&mut self, first: u32, to: IoBuf) -> Result<(), CallError> {
        self.with_run(first, (to.len() / PAGE) as u32, |calls, run, place| {
            let part = to.part((run[0].0 - first) as usize * PAGE, run.len() * PAGE);
            match place {
                Some(source) => calls.bring(source, part),
                None => calls.gone(&read(&calls.pager.window, run, part)),
            }
        })
    }

    /// Reads the content of absent pages, the first of which has this source, into `to`.
    fn bring(&mut self, source: Source, to: IoBuf) -> Result<(), CallError> {
        match source {
            Source::Zeros => to.zero(),
            Source::At(at) => {
                self.carry_out(Kind::Read, u64::from(at) * PAGE as u64, to.len() as u64, Some(to))?;
            }
        }
        Ok(())
    }

    /// Copies bytes, which must not change meanwhile, to `offset` of the window; for absent pages they are written to
    /// external memory directly.
    pub(crate) fn put(&mut self, offset: usize, bytes: IoBuf) -> Result<(), CallError> {
        for piece in pieces(offset, bytes) {
            match piece {
                Piece::Pages(first, part) => self.put_pages(first, part)?,
                Piece::Bytes(page, within, part) => self.with_run(page, 1, |calls, run, place| {
                    let Some(source) = place else { return calls.put_local(page, run[0].1, within, part) };
                    let whole = calls.staging.all().part(0, PAGE);
                    calls.bring(source, whole)?;
                    part.copy_to(whole.part(within, part.len()));
                    calls.put_absent(run, whole)
                })?,
            }
        }
        Ok(())
    }

    fn put_pages(&mut self, first: u32, from: IoBuf) -> Result<(), CallError> {
        self.with_run(first, (from.len() / PAGE) as u32, |calls, run, place| {
            let part = from.part((run[0].0 - first) as usize * PAGE, run.len() * PAGE);
            if place.is_some() {
                return calls.put_absent(run, part);
            }
            let mut pages = run.iter().enumerate();
            pages.try_for_each(|(index, (page, state))| {
                calls.put_local(*page, *state, 0, part.part(index * PAGE, PAGE))
            })
        })
    }

    /// Writes to a local page that the caller owns.
    fn put_local(&self, page: u32, state: State, within: usize, from: IoBuf) -> Result<(), CallError> {
        if state.residency() != Residency::Mapped {
            from.copy_to(self.pager.window.shelved(page, 1).part(within, from.len()));
        } else if state.has(POISONED) || !self.pager.window.write(page, within, from) {
            return self.gone(&[page]);
        }
        Ok(())
    }

    /// Writes whole consecutive pages, which are absent and which the caller owns, to external memory.
    fn put_absent(&mut self, run: &[(u32, State)], from: IoBuf) -> Result<(), CallError> {
        self.carry_out(Kind::Write, u64::from(run[0].0) * PAGE as u64, from.len() as u64, Some(from))?;
        for (page, state) in run {
            if state.has(POISONED) {
                self.pager.window.heal(*page);
            }
            self.pager.pages.mark(*page, WRITTEN, POISONED);
        }
        Ok(())
    }
}
