//! A thread that fetches: what is touched, where faults come as messages, and what will be.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use crate::fault::fetch::Fetcher;
use crate::page::uffd::{Fault, Refused};
use crate::pager::Outcome;
use crate::pager::prefetch::Ahead;
use crate::pager::stats::count;

/// How long it looks for something to do before it sleeps: about what waking it costs. Always so long: what learns
/// from waits (`xpm_transport::spin`) stopped looking after a few long ones, and as each fault then waited for a
/// wake-up, never began again (a fault over a unix socket took 83 us in place of 30). Nor longer: in a virtual
/// machine whose host takes 300 to 500 us to run a processor again, 200 us here hid some of that (p99 of faults over
/// sockets), and took the processor from scans (284 MiB/s in place of 700 to 1,300 in one run of four).
const SPIN: Duration = Duration::from_micros(50);
/// How long what is fetched ahead waits for room while it gets none.
const REST_MAX: Duration = Duration::from_millis(20);
/// How long a page is a SIGBUS for which there was no room.
const CHOKED_FOR: Duration = Duration::from_secs(1);
/// How often those are tried again whose content could not be had, where the kernel cannot poison pages.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves until the pager is stopped. `number` is that of its bell.
pub(crate) fn run(mut fetcher: Fetcher, number: usize) {
    let pager = fetcher.pager.clone();
    let handles = pager.faults.has_handlers();
    let mut faults = [Fault { address: 0, write: false }; 16];
    // Each is one thread of the program that waits.
    let mut later: VecDeque<(u32, bool)> = VecDeque::new();
    let mut sick = Sick::default();
    // What is to be fetched when there is room, and since when there was none.
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
        // One at a time: others take the next. What was asked for first is touched first.
        if let Some((ahead, since)) = rest.take().or_else(|| Some((pager.asked.pop()?, Instant::now()))) {
            let left = fetcher.prefetch(ahead);
            let went_on = left != Some(ahead);
            any |= went_on;
            rest = left.map(|left| (left, if went_on { Instant::now() } else { since }));
            // What finds no room for long is fetched when it is touched.
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
    // What is on its way has places in the staging memory.
    while !fetcher.is_idle() && Instant::now() < busy + Duration::from_secs(1) {
        fetcher.poll();
        std::thread::yield_now();
    }
}

/// Faults that did not end well.
#[derive(Default)]
struct Sick {
    /// Threads that wait for content that could not be had, in kernels that cannot tell them so.
    waiting: Vec<(u32, bool)>,
    /// Pages for which there was no room, and since when.
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
        // What there is no room for just now, another thread may fetch.
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
        // It may be so already.
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
