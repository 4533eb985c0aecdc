//! The choice of pages to evict when local memory runs short.
//!
//! The library does not see accesses to a page in the window; it sees an access only when the page was taken out of the
//! window, to the *shelf* (the inactive list), and is touched there. So this is S3-FIFO with the shelf as its
//! probation: new pages enter a small queue, move from its end to the shelf, and leave local memory from there; a page
//! that is touched on the shelf moves to the main queue instead. Pages at the end of the main queue also move to the
//! shelf. A page that returns soon after it left enters the main queue at once. So a scan passes through the small
//! queue and evicts no page that is in use.
//!
//! Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023; the distance
//! of a returning page as in mm/workingset.c of Linux.

use std::collections::VecDeque;

/// While the small queue has more than one in this number of all queued pages, the next page is taken from it.
const SMALL_PART: usize = 10;
/// The shelf has one in this number of the budget's pages.
const SHELF_PART: usize = 8;

/// The order of eviction. Deals with page numbers only.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    shelf: VecDeque<u32>,
    /// Number of pages that have left local memory since the start; wraps around, and skips 0.
    gone: u32,
}

impl Policy {
    /// Adds a page that is in local memory from now on. `left` is the stamp that [`Policy::goes`] returned when the
    /// page left; 0 if it never left.
    pub(crate) fn comes(&mut self, page: u32, left: u32) {
        let soon = left != 0 && self.gone.wrapping_sub(left) < self.main_len();
        match soon {
            true => self.main.push_back(page),
            false => self.small.push_back(page),
        }
    }

    /// A page that returns counts as in use if fewer than this number of pages left during its absence.
    fn main_len(&self) -> u32 {
        (self.main.len() + self.shelf.len()).max(self.small.len()) as u32
    }

    /// Takes the next page to be moved to the shelf.
    pub(crate) fn next_for_shelf(&mut self) -> Option<u32> {
        let all = self.small.len() + self.main.len();
        let from_small = self.small.len() > all / SMALL_PART || self.main.is_empty();
        match from_small {
            true => self.small.pop_front(),
            false => self.main.pop_front(),
        }
    }

    /// Records that a page was moved to the shelf.
    pub(crate) fn is_shelved(&mut self, page: u32) {
        self.shelf.push_back(page);
    }

    /// Records that a page is in use, and stays.
    pub(crate) fn stays(&mut self, page: u32) {
        self.main.push_back(page);
    }

    /// Takes the page that has been on the shelf for the longest time.
    pub(crate) fn next_of_shelf(&mut self) -> Option<u32> {
        self.shelf.pop_front()
    }

    /// Counts a page that has left local memory. Returns the stamp for [`Policy::comes`], never 0.
    pub(crate) fn goes(&mut self) -> u32 {
        self.gone = self.gone.wrapping_add(1).max(1);
        self.gone
    }

    /// Whether the shelf has its share of a budget in pages.
    pub(crate) fn is_shelf_full(&self, budget: usize) -> bool {
        self.shelf.len() >= (budget / SHELF_PART).max(1)
    }

    pub(crate) fn shelf_len(&self) -> usize {
        self.shelf.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// A cache of `size` pages as the pager drives the policy.
    struct Cache {
        policy: Policy,
        size: usize,
        mapped: BTreeSet<u32>,
        shelved: BTreeSet<u32>,
        touched: BTreeSet<u32>,
        left: BTreeMap<u32, u32>,
        missed: usize,
    }

    impl Cache {
        fn new(size: usize) -> Cache {
            Cache {
                policy: Policy::default(),
                size,
                mapped: BTreeSet::new(),
                shelved: BTreeSet::new(),
                touched: BTreeSet::new(),
                left: BTreeMap::new(),
                missed: 0,
            }
        }

        fn touch(&mut self, page: u32) {
            if self.mapped.contains(&page) {
                return;
            }
            if self.shelved.remove(&page) {
                self.mapped.insert(page);
                self.touched.insert(page);
                return;
            }
            self.missed += 1;
            while self.mapped.len() + self.shelved.len() >= self.size {
                self.make_room();
            }
            self.policy.comes(page, self.left.remove(&page).unwrap_or(0));
            self.mapped.insert(page);
        }

        fn make_room(&mut self) {
            while !self.policy.is_shelf_full(self.size) {
                let Some(page) = self.policy.next_for_shelf() else { break };
                assert!(self.mapped.remove(&page), "page {page} is in a queue, and not there");
                self.shelved.insert(page);
                self.policy.is_shelved(page);
            }
            let page = self.policy.next_of_shelf().expect("there is something to give");
            if self.touched.remove(&page) {
                return self.policy.stays(page);
            }
            assert!(self.shelved.remove(&page), "page {page} goes, and is not on the shelf");
            self.left.insert(page, self.policy.goes());
        }
    }

    proptest! {
        /// Every page that is there is in one queue, once; none is lost, and room can always be made.
        #[test]
        fn every_page_is_in_one_queue(
            size in 1_usize..40,
            pages in prop::collection::vec(0_u32..60, 0..600),
        ) {
            let mut cache = Cache::new(size);
            for page in pages {
                cache.touch(page);
                let there = cache.mapped.len() + cache.shelved.len();
                prop_assert!(there <= size);
                let policy = &cache.policy;
                let queues = [&policy.small, &policy.main, &policy.shelf];
                let queued: BTreeSet<u32> = queues.iter().flat_map(|queue| queue.iter().copied()).collect();
                prop_assert_eq!(queues.iter().map(|queue| queue.len()).sum::<usize>(), there);
                prop_assert_eq!(queued, cache.mapped.union(&cache.shelved).copied().collect());
            }
        }
    }

    /// Random numbers that favour small ones.
    fn skewed(state: &mut u64, range: u32) -> u32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (*state >> 11) as f64 / (1_u64 << 53) as f64;
        (f64::from(range) * unit.powi(3)) as u32
    }

    #[test]
    fn a_scan_pushes_nothing_out_that_is_used() {
        let missed = |scans: bool| {
            let (mut cache, mut state) = (Cache::new(200), 1);
            let mut scan = 10_000;
            for _ in 0..20_000 {
                cache.touch(skewed(&mut state, 400));
                if scans {
                    cache.touch(scan);
                    scan += 1;
                }
            }
            cache.missed - if scans { 20_000 } else { 0 }
        };
        let (alone, with) = (missed(false), missed(true));
        assert!(with < alone * 2, "{alone} misses alone, {with} beside a scan");
    }

    #[test]
    fn what_is_used_most_is_there_most() {
        let (mut cache, mut state, mut fifo) = (Cache::new(200), 7, (VecDeque::new(), 0));
        for _ in 0..40_000 {
            let page = skewed(&mut state, 1000);
            cache.touch(page);
            if !fifo.0.contains(&page) {
                fifo.1 += 1;
                fifo.0.push_back(page);
                if fifo.0.len() > 200 {
                    fifo.0.pop_front();
                }
            }
        }
        assert!(cache.missed < fifo.1, "{} misses, and {} of a plain queue", cache.missed, fifo.1);
    }

    /// Second chance, by what the hardware knows of each touch, and no policy here is told.
    struct Clock {
        ring: Vec<(u32, bool)>,
        size: usize,
        hand: usize,
        missed: usize,
    }

    impl Clock {
        fn touch(&mut self, page: u32) {
            if let Some(place) = self.ring.iter_mut().find(|place| place.0 == page) {
                place.1 = true;
                return;
            }
            self.missed += 1;
            if self.ring.len() < self.size {
                return self.ring.push((page, false));
            }
            while std::mem::take(&mut self.ring[self.hand].1) {
                self.hand = (self.hand + 1) % self.size;
            }
            self.ring[self.hand] = (page, false);
            self.hand = (self.hand + 1) % self.size;
        }
    }

    /// Misses of this policy and of CLOCK on the same touches.
    fn beside_clock(touches: impl Iterator<Item = u32>) -> (usize, usize) {
        let mut cache = Cache::new(200);
        let mut clock = Clock { ring: Vec::new(), size: 200, hand: 0, missed: 0 };
        touches.for_each(|page| {
            cache.touch(page);
            clock.touch(page);
        });
        (cache.missed, clock.missed)
    }

    #[test]
    fn fewer_misses_than_clock() {
        let mut state = 3;
        let used: Vec<u32> = (0..40_000).map(|_| skewed(&mut state, 1000)).collect();
        let (ours, clock) = beside_clock(used.iter().copied());
        println!("skewed touches: {ours} misses, CLOCK {clock}");
        assert!(ours < clock, "{ours} misses, and {clock} of CLOCK");
        // Each page of the scan is a miss of both.
        let scan = (10_000..).take(used.len());
        let (ours, clock) =
            beside_clock(used.iter().copied().zip(scan).flat_map(|(page, scan)| [page, scan]));
        let (ours, clock) = (ours - used.len(), clock - used.len());
        println!("the same beside a scan: {ours} misses, CLOCK {clock}");
        assert!(ours * 5 < clock * 4, "{ours} misses, and {clock} of CLOCK, beside a scan");
        let (ours, clock) = beside_clock((0..40_000).map(|step| step % 210));
        println!("in circles of a few pages too many: {ours} misses, CLOCK {clock}");
        assert!(ours < clock, "{ours} misses, and {clock} of CLOCK, in circles");
    }
}
