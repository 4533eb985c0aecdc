//! Operations in flight on one NBD link, as many as asked, at random places.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use xpm_transport::nbd::client::NbdLink;
use xpm_transport::{Completion, IoBuf, Kind, Link, Operation};

use crate::times::Times;

/// A server that answers nothing for this long is given up.
const SILENCE_MAX: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The measurements.
pub(crate) struct Measured {
    /// Of each operation, from its post to its end.
    pub(crate) times: Times,
    /// Of all together.
    pub(crate) elapsed: Duration,
    /// Processor time of this process meanwhile, the kernel's on its behalf included.
    pub(crate) cpu: Duration,
}

/// A link, and a buffer for each operation in flight.
pub(crate) struct Load {
    link: NbdLink,
    kind: Kind,
    len: usize,
    blocks: u64,
    buffers: Vec<IoBuf>,
    posted_at: Vec<Instant>,
    /// Numbers of the buffers that are not in flight.
    free: Vec<usize>,
    ended: Vec<Completion>,
    random: u64,
}

impl Load {
    /// A load of `depth` operations of `len` bytes at multiples of `len`, which must be above 0.
    pub(crate) fn new(link: NbdLink, kind: Kind, len: usize, depth: usize) -> Result<Load> {
        let blocks = link.info().size / len as u64;
        ensure!(blocks > 0, "the export has {} bytes, less than one operation", link.info().size);
        let mut load = Load {
            link,
            kind,
            len,
            blocks,
            buffers: Vec::with_capacity(depth),
            posted_at: vec![Instant::now(); depth],
            free: (0..depth).collect(),
            ended: Vec::with_capacity(depth),
            random: 0x9e37_79b9_7f4a_7c15,
        };
        for _ in 0..depth {
            let bytes: Vec<u8> = (0..len).map(|_| load.next_random() as u8).collect();
            load.buffers.push(leak(bytes)?);
        }
        Ok(load)
    }

    /// Keeps the operations in flight for `ramp` first, which does not count, then for `length`.
    pub(crate) fn run(mut self, ramp: Duration, length: Duration) -> Result<Measured> {
        self.keep_up(ramp)?;
        let measured = self.keep_up(length)?;
        while self.free.len() < self.buffers.len() {
            self.wait()?;
            self.reap(|_| ())?;
        }
        Ok(measured)
    }

    fn keep_up(&mut self, length: Duration) -> Result<Measured> {
        let mut times = Times::new();
        let (start, cpu_before) = (Instant::now(), cpu_time()?);
        let mut now = start;
        while now - start < length {
            self.post(now)?;
            self.wait()?;
            now = self.reap(|time| times.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))?;
        }
        Ok(Measured { times, elapsed: now - start, cpu: cpu_time()?.saturating_sub(cpu_before) })
    }

    fn post(&mut self, now: Instant) -> Result<()> {
        while let Some(number) = self.free.pop() {
            let offset = self.next_random() % self.blocks * self.len as u64;
            let (kind, len, buf) = (self.kind, self.len as u64, Some(self.buffers[number]));
            self.posted_at[number] = now;
            self.link.post(Operation { kind, offset, len, buf, token: number as u64 })?;
        }
        self.link.submit();
        Ok(())
    }

    /// Sleeps until the link has something to do; returns at once when it has already.
    fn wait(&self) -> Result<()> {
        let fd = self.link.wait_fd().context("the link cannot be waited for")?;
        let ready = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&SILENCE_MAX))?;
        ensure!(ready > 0, "the server answered nothing for {} s", SILENCE_MAX.tv_sec);
        Ok(())
    }

    /// Takes the operations that have ended, and tells `each` the time that one took; the time now.
    fn reap(&mut self, mut each: impl FnMut(Duration)) -> Result<Instant> {
        self.link.poll(&mut self.ended).context("the server left")?;
        let now = Instant::now();
        for completion in self.ended.drain(..) {
            completion.result.context("an operation failed")?;
            let number = completion.token as usize;
            each(now - self.posted_at[number]);
            self.free.push(number);
        }
        Ok(now)
    }

    /// The generator xorshift64.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

fn leak(bytes: Vec<u8>) -> Result<IoBuf> {
    let bytes = Box::leak(bytes.into_boxed_slice());
    let (start, len) = (NonNull::new(bytes.as_mut_ptr()).context("no memory")?, bytes.len());
    // SAFETY: the memory is leaked, so it stays for ever, and no reference to it is kept.
    Ok(unsafe { IoBuf::new(start, len) })
}

/// Processor time of this process, all of its threads, user's and kernel's: what getrusage(2) tells
/// as two sums, here to the nanosecond.
fn cpu_time() -> Result<Duration> {
    Ok(Duration::try_from(clock_gettime(ClockId::ProcessCPUTime))?)
}
