//! A thread that serves faults that arrive as messages, and fetches pages ahead.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use crate::fault::fetch::Fetcher;
use crate::page::uffd::{Fault, Refused};
use crate::pager::Outcome;
use crate::pager::prefetch::Ahead;
use crate::pager::stats::count;

/// How long the thread polls before it sleeps: about the cost of waking it.
///
/// This time is constant on purpose. Code that learns the time from waits (`xpm_transport::spin`) stopped polling after
/// a few long waits; each fault then waited for a wake-up, so polling never started again (a fault over a unix socket
/// took 83 us instead of 30). A longer time is worse, too: in a virtual machine whose host takes 300 to 500 us to run a
/// processor again, 200 us here hid a part of that (p99 of faults over sockets), but took the processor from scans
/// (284 MiB/s instead of 700 to 1,300 in one run of four).
const SPIN: Duration = Duration::from_micros(50);
/// How long a request to fetch ahead waits for room without any progress.
const REST_MAX: Duration = Duration::from_millis(20);
/// How long an access to a page without room raises SIGBUS.
const CHOKED_FOR: Duration = Duration::from_secs(1);
/// Interval of retrying faults on poisoned pages, on kernels that cannot poison pages.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves until the pager is stopped. `number` is the number of the thread's bell.
pub(crate) fn run(mut fetcher: Fetcher, number: usize) {
    let pager = fetcher.pager.clone();
    let handles = pager.faults.has_handlers();
    let mut faults = [Fault { address: 0, write: false }; 16];
    // Faults that have to be tried again (no room, or too many reads in flight); for each, a thread of the program
    // waits.
    let mut later: VecDeque<(u32, bool)> = VecDeque::new();
    let mut sick = Sick::default();
    // A request to fetch ahead that waits for room, and the time since which it got none.
    let mut rest: Option<(Ahead, Instant)> = None;
    let (mut busy, mut healed) = (Instant::now(), Instant::now());
    while !pager.is_stopped() {
        let mut any = fetcher.poll();
        if pager.fetchers[number].take() {
            any = true;
        }
        for _ in 0..later.len() {
            let Some((page, write)) = later.pop_front() else { break };
            match serve(&mut fetcher, page, write, &mut sick) {
                Outcome::Later => {
                    later.push_front((page, write));
                    break;
                }
                _ => any = true,
            }
        }
        let read = if handles { pager.window.uffd.read(&mut faults) } else { 0 };
        for fault in &faults[..read] {
            any = true;
            let Some(page) = pager.window.page_of(fault.address) else {
                pager.complain_of_own(fault.address);
                pager.window.refuse(fault.address);
                continue;
            };
            if !later.is_empty() || serve(&mut fetcher, page, fault.write, &mut sick) == Outcome::Later {
                later.push_back((page, fault.write));
            }
        }
        // One request at a time, so that other threads take the next ones. Oldest first, because its pages are
        // touched first.
        if let Some((ahead, since)) = rest.take().or_else(|| Some((pager.asked.pop()?, Instant::now()))) {
            let left = fetcher.prefetch(ahead);
            let went_on = left != Some(ahead);
            any |= went_on;
            rest = left.map(|left| (left, if went_on { Instant::now() } else { since }));
            // Pages that find no room for this long are fetched when they are touched.
            if let Some((left, _)) = rest.take_if(|(_, since)| since.elapsed() > REST_MAX) {
                pager.forgo(left);
            }
        }
        sick.choked.retain(|(page, since)| since.elapsed() < CHOKED_FOR || !pager.unchoke(*page));
        if !sick.waiting.is_empty() && healed.elapsed() > AGAIN {
            healed = Instant::now();
            later.extend(sick.waiting.drain(..));
        }
        if any {
            busy = Instant::now();
        } else if busy.elapsed() < SPIN {
            std::thread::yield_now();
        } else {
            let soon = !later.is_empty() || !sick.is_empty() || rest.is_some();
            sleep(&mut fetcher, number, handles, soon);
        }
    }
    // Reads in flight still use the staging memory.
    while !fetcher.is_idle() && Instant::now() < busy + Duration::from_secs(1) {
        fetcher.poll();
        std::thread::yield_now();
    }
}

/// Faults that could not be served.
#[derive(Default)]
struct Sick {
    /// Faults whose content could not be fetched, on kernels that cannot poison pages: the faulting threads wait.
    waiting: Vec<(u32, bool)>,
    /// Pages that were poisoned because there was no room, and the time of that.
    choked: Vec<(u32, Instant)>,
}

impl Sick {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.choked.is_empty()
    }
}

fn serve(fetcher: &mut Fetcher, page: u32, write: bool, sick: &mut Sick) -> Outcome {
    let (outcome, ahead) = fetcher.fault(page, write);
    if let Some(ahead) = ahead {
        // Another thread may fetch the pages for which there is no room now.
        let _ = fetcher.prefetch(ahead).map(|rest| fetcher.pager.asked.push(rest));
    }
    if outcome == Outcome::Choked {
        let pager = &fetcher.pager;
        pager.complain_of_room(page);
        match pager.window.uffd.poison(pager.window.address_of(page), crate::page::window::PAGE) {
            Ok(()) => sick.choked.push((page, Instant::now())),
            Err(_) => sick.waiting.push((page, write)),
        }
    }
    if outcome == Outcome::Poisoned {
        let pager = &fetcher.pager;
        let address = pager.window.address_of(page);
        count(&pager.tallies.errors, 1);
        pager.complain(page);
        let poisoned = pager.window.uffd.poison(address, crate::page::window::PAGE);
        // The page may be poisoned already.
        if !matches!(poisoned, Ok(()) | Err(Refused::Exists)) {
            pager.pages.mark(page, 0, crate::page::word::POISONED);
            sick.waiting.push((page, write));
        }
    }
    outcome
}

fn sleep(fetcher: &mut Fetcher, number: usize, handles: bool, soon: bool) {
    let pager = fetcher.pager.clone();
    fetcher.arm();
    let both = [fetcher.wait_fd(), pager.window.uffd.as_fd()];
    let limit = Duration::from_millis(if soon { 5 } else { 500 });
    pager.fetchers[number].wait(if handles { &both } else { &both[..1] }, limit);
}
