//! Operations on external memory that a call of the program waits for: flush, get and put, and pages that are
//! brought or sent away on demand.

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

/// Pages that are copied and written in one go.
const RUN: usize = 64;
/// Operations on their way.
pub(crate) const DEPTH: usize = 4;

/// Why a call could not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallError {
    /// The operation on external memory failed.
    Io(IoError),
    /// The program threw this page away by a call of its own, and with it what it had changed.
    Gone(u32),
}

impl From<IoError> for CallError {
    fn from(error: IoError) -> CallError {
        CallError::Io(error)
    }
}

/// Copies what pages hold that are the caller's, one behind the other. Gives back those that are gone.
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

/// A part of a buffer, and where it belongs in the window.
enum Piece {
    /// From a page on, whole pages, as many as are carried out in one go at most.
    Pages(u32, IoBuf),
    /// Within a page.
    Bytes(u32, usize, IoBuf),
}

/// What a buffer that belongs to `offset` of the window consists of.
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

/// One call at a time uses it.
pub(crate) struct Calls {
    pager: Shared,
    channel: Channel,
    staging: Staging,
    /// Those that the program gave back; registered, as all that it has.
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

    /// Lets the channel do what it was told.
    pub(crate) fn tend(&mut self) {
        self.channel.poll(&mut self.ended);
    }

    /// One operation, to its end.
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

    /// Writes what was changed of these pages, and makes it durable as far as the appliances are.
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

    /// Writes pages that are the caller's, one behind the other, and gives them back.
    fn write_back(&mut self, batch: &mut Vec<(u32, State)>) -> Result<(), CallError> {
        let Some((first, _)) = batch.first().copied() else { return Ok(()) };
        let pager = self.pager.clone();
        // Those that can be seen may change meanwhile: what is written is what the digest is of.
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

    /// Asks for pages, without waiting for them.
    pub(crate) fn will_need(&mut self, first: u32, pages: u32) -> Result<(), CallError> {
        let mut first = first;
        let end = first + pages;
        while first < end {
            let count = (end - first).min(crate::pager::prefetch::WINDOW_MAX);
            // What does not fit is brought when it is touched.
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

    /// Takes pages out of local memory, what was changed written first.
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

    /// Pages that are the caller's, all in the window or all on the shelf, leave local memory, but for those that
    /// were written to.
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

    /// Makes pages that nobody has in local memory zeros in external memory.
    pub(crate) fn trim(&mut self, first: u32, pages: u32) -> Result<(), IoError> {
        let (offset, len) = (u64::from(first) * PAGE as u64, u64::from(pages) * PAGE as u64);
        self.carry_out(Kind::Trim, offset, len, None)
    }

    /// Makes pages of a slab zeros that somebody may use meanwhile.
    pub(crate) fn clear(&mut self, first: u32, pages: u32) {
        if !self.forget(first, pages) {
            return;
        }
        // What was written again before external memory was made zeros may have been taken there, and back, before
        // that.
        let pager = self.pager.clone();
        for page in first..first + pages {
            if pager.pages.state(page).residency() != Residency::Absent {
                let residency = self.claim(page).residency();
                pager.release(page, residency, if residency == Residency::Absent { 0 } else { DIRTY }, 0);
            }
        }
    }

    /// Forgets pages of a slab that nobody uses any more. Whether external memory had any of them.
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
            // Also what was being written just now.
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
            // What cannot be given back now is given back with the allocation.
            let _ = self.trim(first, pages);
        }
        written
    }

    /// Copies what pages of a slab hold to those of another one, by way of the staging memory: what is not in local
    /// memory takes no room there. Nobody uses either meanwhile, and the other one has held nothing but zeros so far.
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

    /// Calls `act` with pages that lie one behind the other, and are the caller's meanwhile: as many at a time as are
    /// in one place, in external memory or, where none is said, in local memory.
    fn with_run(
        &mut self,
        first: u32,
        count: u32,
        mut act: impl FnMut(&mut Calls, &[(u32, State)], Option<Source>) -> Result<(), CallError>,
    ) -> Result<(), CallError> {
        let pager = self.pager.clone();
        let claimed: Vec<(u32, State)> =
            (first..first + count).map(|page| (page, self.claim(page))).collect();
        // Of a private copy it may change meanwhile: it is asked once.
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

    /// Makes a page the caller's, however long that takes: what another channel needs to let it go, this one lets
    /// happen.
    fn claim(&mut self, page: u32) -> State {
        loop {
            match self.pager.pages.claim(page, |_| true, true) {
                Claim::Yours(state) => return state,
                Claim::Not(_) | Claim::Busy => self.pager.wait_for(page),
            }
            self.tend();
        }
    }

    /// Remembers pages that are gone, which are the caller's.
    fn gone(&self, pages: &[u32]) -> Result<(), CallError> {
        pages.iter().for_each(|page| _ = self.pager.pages.mark(*page, POISONED, 0));
        pages.first().map_or(Ok(()), |page| Err(CallError::Gone(*page)))
    }

    /// Writes what pages hold that are the caller's, and all of which are in one place, to others that nobody uses.
    fn copy_out(&mut self, from: &[(u32, State)], place: Option<Source>, to: u32) -> Result<(), CallError> {
        let len = from.len() * PAGE;
        let buf = self.staging.all().part(0, len);
        match place {
            // As it is there, too.
            Some(Source::Zeros) => return Ok(()),
            Some(Source::At(at)) => {
                self.carry_out(Kind::Read, u64::from(at) * PAGE as u64, len as u64, Some(buf))?;
            }
            None => self.gone(&read(&self.pager.window, from, buf))?,
        }
        self.carry_out(Kind::Write, u64::from(to) * PAGE as u64, len as u64, Some(buf))?;
        let pager = self.pager.clone();
        for page in to..to + from.len() as u32 {
            // Zeros that were brought ahead of need.
            if self.claim(page).residency() != Residency::Absent {
                pager.window.discard(page, 1);
                pager.room.give(1);
            }
            pager.pages.set_stamp(page, 0);
            pager.release(page, Residency::Absent, WRITTEN, TOUCHED | DIRTY | MARK);
        }
        Ok(())
    }

    /// Pages that are the caller's, one behind the other, are in local memory no more.
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

    /// Looks once more, when they are used next, for pages whose content could not be had.
    pub(crate) fn heal(&mut self, first: u32, pages: u32) {
        for page in first..first + pages {
            if self.pager.pages.state(page).has(POISONED) {
                let state = self.claim(page);
                // What the program threw away stays so: there would be old bytes.
                let clear = if state.residency() == Residency::Absent { POISONED } else { 0 };
                if clear != 0 {
                    self.pager.window.heal(page);
                }
                self.pager.release(page, state.residency(), 0, clear);
            }
        }
    }

    /// Brings pages, and keeps them. They are pinned one by one: each is there when it is.
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
                    // System calls may use it, also where they must not find it missing.
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
                    // Looks once more.
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

    /// Memory of the program's that transports use as it is. There are few lengths, so that what was given back is
    /// used again.
    pub(crate) fn take_buffer(&mut self, len: usize) -> io::Result<Staging> {
        if let Some(index) = self.buffers.iter().position(|buffer| buffer.all().len() == len) {
            return Ok(self.buffers.swap_remove(index));
        }
        let buffer = Staging::new(len)?;
        self.channel.register(buffer.all());
        Ok(buffer)
    }

    /// What was taken: it stays registered, and so mapped, for as long as there is the channel.
    pub(crate) fn give_buffer(&mut self, buffer: Staging) {
        self.buffers.push(buffer);
    }

    /// Copies bytes from `offset` of the window to a buffer that nobody else uses: of absent pages by reading into it.
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

    /// What absent pages hold, the first of which has this source.
    fn bring(&mut self, source: Source, to: IoBuf) -> Result<(), CallError> {
        match source {
            Source::Zeros => to.zero(),
            Source::At(at) => {
                self.carry_out(Kind::Read, u64::from(at) * PAGE as u64, to.len() as u64, Some(to))?;
            }
        }
        Ok(())
    }

    /// Copies bytes that nobody changes to `offset` of the window: to absent pages by writing them from where they are.
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

    /// Writes to a page in local memory that is the caller's.
    fn put_local(&self, page: u32, state: State, within: usize, from: IoBuf) -> Result<(), CallError> {
        if state.residency() != Residency::Mapped {
            from.copy_to(self.pager.window.shelved(page, 1).part(within, from.len()));
        } else if state.has(POISONED) || !self.pager.window.write(page, within, from) {
            return self.gone(&[page]);
        }
        Ok(())
    }

    /// Writes whole pages to external memory that are the caller's, one behind the other, and not in local memory.
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
