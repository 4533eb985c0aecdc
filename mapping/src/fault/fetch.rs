//! Fetching pages from external memory into the window. One thread at a time uses a fetcher.

use std::io;
use std::os::fd::BorrowedFd;

use xpm_transport::io::{Completion, IoBuf, Kind, Operation};
use xpm_transport::slots::Slots;

use crate::page::window::{BLOCK, Block, PAGE, Staging};
use crate::pager::prefetch::Ahead;
use crate::pager::stats::count;
use crate::pager::{CHUNK, NoRoom, Outcome, Shared, Source};
use xpm_client_core::volume::{Channel, Volume};

/// Consecutive pages that are being fetched.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u32,
    count: u32,
    write: bool,
    mark: Option<u32>,
    prefetch: bool,
}

/// Shortest run that is read into a block: moving one page costs as much as copying it.
const BLOCK_RUN_MIN: u32 = 16;

pub(crate) struct Fetcher {
    pub(crate) pager: Shared,
    channel: Channel,
    staging: Staging,
    /// The blocks that runs are read into, by the number of the run.
    blocks: Box<[Option<Block>]>,
    /// Longest run in pages.
    run: u32,
    open: Slots<Run>,
    ended: Vec<Completion>,
}

impl Fetcher {
    /// A fetcher with at most `depth` runs in flight, each of at most `run` pages.
    pub(crate) fn new(pager: Shared, volume: &Volume, depth: usize, run: u32) -> io::Result<Fetcher> {
        debug_assert!(run <= BLOCK, "a run fits into a block");
        let mut channel = volume.channel()?;
        let staging = Staging::new(depth * run as usize * PAGE)?;
        channel.register(staging.all());
        let ended = Vec::with_capacity(2 * depth);
        let blocks = (0..depth).map(|_| None).collect();
        Ok(Fetcher { pager, channel, staging, blocks, run, open: Slots::new(depth), ended })
    }

    /// Begins to serve a fault; also returns which pages should be fetched ahead.
    pub(crate) fn fault(&mut self, page: u32, write: bool) -> (Outcome, Option<Ahead>) {
        if self.open.is_full() {
            return (Outcome::Later, None);
        }
        let (outcome, ahead) = self.pager.fault(page, write);
        let Outcome::Coming(at) = outcome else { return (outcome, ahead) };
        self.fetch(Run { first: page, count: 1, write, mark: None, prefetch: false }, at);
        (outcome, self.pager.ahead(page))
    }

    /// Fetches pages ahead, up to the limits of room and of runs in flight; returns the rest.
    pub(crate) fn prefetch(&mut self, ahead: Ahead) -> Option<Ahead> {
        let mark = ahead.mark();
        let mut page = i64::from(ahead.first);
        let mut left = ahead.count;
        while left > 0 && (0..i64::from(self.pager.pages.count())).contains(&page) {
            let rest = Ahead { first: page as u32, count: left, marked_at: mark, ..ahead };
            if self.open.is_full() {
                return Some(rest);
            }
            let longest = if ahead.stride == 1 { left.min(self.run) } else { 1 };
            let (run, source) = match self.claim_run(page as u32, longest) {
                Ok(Some(run)) => run,
                Err(NoRoom) => {
                    self.pager.evictor.ring();
                    return Some(rest);
                }
                Ok(None) => {
                    (page, left) = (page + i64::from(ahead.stride), left - 1);
                    continue;
                }
            };
            let first = page as u32;
            match source {
                Source::Zeros => self.pager.put_zeros(first, run, false),
                Source::At(at) => {
                    let mark = mark.filter(|mark| (first..first + run).contains(mark));
                    self.fetch(Run { first, count: run, write: false, mark, prefetch: true }, at);
                    count(&self.pager.tallies.prefetched, u64::from(run));
                }
            }
            (page, left) = (page + i64::from(ahead.stride) * i64::from(run), left - run);
        }
        None
    }

    /// Claims absent pages that are consecutive in the window and in external memory. Returns their number, and the
    /// source of the first page.
    fn claim_run(&self, first: u32, longest: u32) -> Result<Option<(u32, Source)>, NoRoom> {
        let pager = &self.pager;
        let end = pager.pages.count().min(first + longest).min((first / CHUNK + 1) * CHUNK);
        let (mut run, mut kind) = (0, None::<Source>);
        for page in first..end {
            match pager.claim_early(page) {
                Ok(Some(source)) if kind.is_none_or(|kind| kind.goes_on(source, run)) => {
                    kind.get_or_insert(source);
                    run += 1;
                }
                Ok(Some(_)) => {
                    pager.give_back(page);
                    break;
                }
                Err(NoRoom) if run == 0 => return Err(NoRoom),
                Ok(None) | Err(NoRoom) => break,
            }
        }
        Ok(kind.map(|kind| (run, kind)))
    }

    /// Starts to fetch a run; the caller has checked that there is a free place.
    fn fetch(&mut self, run: Run, at: u32) {
        let len = run.count as usize * PAGE;
        let id = self.open.insert(run);
        let block = (BLOCK_RUN_MIN..=BLOCK).contains(&run.count).then(|| self.pager.window.take_block());
        self.blocks[id as usize] = block.flatten();
        let operation = Operation {
            kind: Kind::Read,
            offset: u64::from(at) * PAGE as u64,
            len: len as u64,
            buf: Some(self.place(id, run.count)),
            token: u64::from(id),
        };
        // The channel was made for as many as there are places.
        let posted = self.channel.post(operation);
        debug_assert!(posted.is_ok(), "{posted:?}");
        self.channel.submit();
    }

    fn place(&self, id: u32, pages: u32) -> IoBuf {
        match &self.blocks[id as usize] {
            Some(block) => block.buffer(pages),
            None => {
                let start = id as usize * self.run as usize * PAGE;
                self.staging.all().part(start, pages as usize * PAGE)
            }
        }
    }

    /// Puts the arrived pages into the window. Returns true when there were any.
    pub(crate) fn poll(&mut self) -> bool {
        self.channel.poll(&mut self.ended);
        let any = !self.ended.is_empty();
        while let Some(ended) = self.ended.pop() {
            let id = ended.token as u32;
            let Some(run) = self.open.remove(id) else { continue };
            let content = self.place(id, run.count);
            let block = self.blocks[id as usize].take();
            match ended.result {
                Ok(()) => self.arrived(run, content, block),
                Err(error) => {
                    block.into_iter().for_each(|block| self.pager.window.give_block(block));
                    self.pager.fail(run.first, run.count, error, run.prefetch);
                }
            }
        }
        any
    }

    fn arrived(&self, run: Run, content: IoBuf, block: Option<Block>) {
        let pager = &self.pager;
        count(&pager.tallies.fetched, u64::from(run.count));
        let mut left = [0; BLOCK as usize];
        for (index, left) in left.iter_mut().enumerate().take(run.count as usize) {
            let page = content.part(index * PAGE, PAGE);
            *left = pager.comes(run.first + index as u32, page, run.write);
        }
        match block {
            Some(block) => pager.window.fill_from(run.first, run.count, run.mark, block),
            None => self.show(run, content),
        }
        for index in 0..run.count {
            let page = run.first + index;
            pager.is_here(page, run.write, run.mark == Some(page), left[index as usize]);
        }
    }

    fn show(&self, run: Run, content: IoBuf) {
        let window = &self.pager.window;
        let mark = run.mark.map_or(run.count, |mark| mark - run.first);
        window.fill(run.first, content.part(0, mark as usize * PAGE));
        if mark < run.count {
            window.keep(run.first + mark, content.part(mark as usize * PAGE, PAGE));
            let behind = (mark as usize + 1) * PAGE;
            window.fill(run.first + mark + 1, content.part(behind, content.len() - behind));
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.open.used() == 0
    }

    /// To be called before waiting for [`Fetcher::wait_fd`].
    pub(crate) fn arm(&mut self) {
        self.channel.arm();
    }

    pub(crate) fn wait_fd(&self) -> BorrowedFd<'_> {
        self.channel.wait_fd()
    }
}
