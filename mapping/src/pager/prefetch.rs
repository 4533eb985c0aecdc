//! The choice of pages to fetch ahead of their faults.
//!
//! A few *streams* are followed at a time. A fault where a stream was expected to go on confirms it, and
//! doubles how far it is fetched ahead; so does touching its mark, a page in the middle of what was
//! fetched. Faults that belong to no stream begin one when most of the last ones lie at the same distance from
//! each other. A stream that is not confirmed is forgotten, and makes the next one begin more
//! carefully.
//!
//! Source: Al Maruf and Chowdhury, "Effectively Prefetching Remote Memory with Leap", USENIX ATC 2020 (majority
//! of strides, by Boyer and Moore); the mark as PG_readahead in mm/readahead.c of Linux.

/// Streams that are followed.
const STREAMS: usize = 8;
/// Faults whose distances are looked at.
const HISTORY: usize = 8;
/// Longest distance in pages that is taken for a stride.
const STRIDE_MAX: i64 = 64;
/// Pages that a stream is first fetched ahead.
const WINDOW_MIN: u32 = 4;
/// Most pages that a stream is fetched ahead: 4 MiB. Waking a thread and fetching the first of them takes about as
/// long as touching 300 in a row.
pub(crate) const WINDOW_MAX: u32 = 1024;
/// The share of local memory that may be fetched ahead for a stream: one page of so many.
const WINDOW_PART: usize = 16;

/// Fewest pages that two threads fetch sooner than one.
const HALVED_MIN: u32 = 128;

/// The program's advice about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Habit {
    /// Nothing.
    #[default]
    Normal,
    /// From the start to the end.
    Sequential,
    /// Here and there: nothing is fetched ahead.
    Random,
}

/// Pages to fetch: `count` of them from `first`, each `stride` behind the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) stride: i32,
    /// One page of them asks for more when it is touched.
    pub(crate) marked: bool,
    /// That page, where it was chosen already; it may be fetched, too.
    pub(crate) marked_at: Option<u32>,
}

impl Ahead {
    /// The page that, when it is touched, asks for more: in the first half, so that there is time. Only of
    /// pages that lie one behind the other.
    pub(crate) fn mark(&self) -> Option<u32> {
        if self.marked_at.is_some() {
            return self.marked_at;
        }
        (self.marked && self.stride == 1 && self.count >= WINDOW_MIN * 2)
            .then_some(self.first + self.count / 4)
    }

    /// In two, where two threads have it sooner than one.
    pub(crate) fn halves(self) -> (Ahead, Option<Ahead>) {
        if self.count < HALVED_MIN || self.stride != 1 {
            return (self, None);
        }
        let half = self.count / 2;
        let second = Ahead {
            first: self.first + half,
            count: self.count - half,
            marked: false,
            marked_at: None,
            ..self
        };
        (Ahead { count: half, ..self }, Some(second))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The first page that was not fetched ahead; 0 for no stream.
    next: u32,
    stride: i32,
    window: u32,
    confirmed: bool,
    used: u64,
}

/// Looks at faults and says what will be needed.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    /// Most pages that a stream is fetched ahead now.
    most: u32,
    streams: [Stream; STREAMS],
    history: [u32; HISTORY],
    seen: usize,
    clock: u64,
    /// Streams that were never confirmed, less those that were.
    doubt: u32,
}

impl Default for Prefetcher {
    fn default() -> Prefetcher {
        let (streams, history) = ([Stream::default(); STREAMS], [0; HISTORY]);
        Prefetcher { most: WINDOW_MAX, streams, history, seen: 0, clock: 0, doubt: 0 }
    }
}

impl Prefetcher {
    /// So many pages may be in local memory.
    pub(crate) fn limit(&mut self, budget: usize) {
        self.most = (budget / WINDOW_PART).clamp(WINDOW_MIN as usize * 2, WINDOW_MAX as usize) as u32;
    }

    /// A page was missing and is being fetched: what should be fetched with it.
    pub(crate) fn fault(&mut self, page: u32, habit: Habit) -> Option<Ahead> {
        if habit == Habit::Random {
            return None;
        }
        self.clock += 1;
        if let Some(index) = self.stream_of(page) {
            return Some(self.go_on(index, page));
        }
        let stride = match habit {
            Habit::Sequential => Some(1),
            _ => self.majority(page),
        };
        self.history[self.seen % HISTORY] = page;
        self.seen += 1;
        let stride = stride?;
        // Doubt asks for a longer row of faults, by way of a shorter window.
        let window = match habit {
            Habit::Sequential => self.most / 4,
            _ => (WINDOW_MIN * 2) >> self.doubt.min(2),
        };
        self.begin(page, stride, window)
    }

    /// A mark was touched.
    pub(crate) fn touched(&mut self, page: u32) -> Option<Ahead> {
        self.clock += 1;
        let behind =
            |stream: &Stream| stream.stride == 1 && page < stream.next && stream.next - page <= stream.window;
        let index = self.streams.iter().position(|stream| stream.window > 0 && behind(stream))?;
        let from = self.streams[index].next.wrapping_sub(1);
        Some(self.go_on(index, from))
    }

    /// Pages that were to be fetched will not be: their stream goes on where they begin.
    pub(crate) fn forgo(&mut self, ahead: Ahead) {
        let first = i64::from(ahead.first);
        let stream = self.streams.iter_mut().find(|stream| {
            let behind = (i64::from(stream.next) - first) * i64::from(ahead.stride.signum());
            let length = i64::from(stream.window) * i64::from(ahead.stride.unsigned_abs());
            stream.window > 0 && stream.stride == ahead.stride && (1..=2 * length).contains(&behind)
        });
        if let Some(stream) = stream {
            stream.next = ahead.first;
        }
    }

    /// The stream in whose way a page lies: where it goes on, or a little further.
    fn stream_of(&self, page: u32) -> Option<usize> {
        let page = i64::from(page);
        self.streams.iter().position(|stream| {
            let distance = (page - i64::from(stream.next)) * i64::from(stream.stride.signum());
            stream.window > 0 && (0..=i64::from(stream.stride.unsigned_abs())).contains(&distance)
        })
    }

    fn go_on(&mut self, index: usize, page: u32) -> Ahead {
        let stream = &mut self.streams[index];
        if !std::mem::replace(&mut stream.confirmed, true) {
            self.doubt = self.doubt.saturating_sub(1);
        }
        stream.window = (stream.window * 2).min(self.most);
        // Far strides are single pages each.
        let window = if stream.stride == 1 { stream.window } else { stream.window.min(WINDOW_MIN * 2) };
        stream.used = self.clock;
        let first = offset(page, stream.stride, 1);
        stream.next = offset(page, stream.stride, window + 1);
        Ahead { first, count: window, stride: stream.stride, marked: true, marked_at: None }
    }

    fn begin(&mut self, page: u32, stride: i32, window: u32) -> Option<Ahead> {
        let window = window.max(1);
        let oldest = (0..STREAMS).min_by_key(|index| self.streams[*index].used)?;
        if self.streams[oldest].window > 0 && !self.streams[oldest].confirmed {
            self.doubt = (self.doubt + 1).min(4);
        }
        let next = offset(page, stride, window + 1);
        self.streams[oldest] = Stream { next, stride, window, confirmed: false, used: self.clock };
        Some(Ahead { first: offset(page, stride, 1), count: window, stride, marked: true, marked_at: None })
    }

    /// The distance at which most of the last faults lie, this one included.
    fn majority(&self, page: u32) -> Option<i32> {
        let known = self.seen.min(HISTORY);
        let at = |back: usize| match back {
            0 => i64::from(page),
            _ => i64::from(self.history[(self.seen - back) % HISTORY]),
        };
        let distances = || (0..known).map(|back| at(back) - at(back + 1));
        let (mut candidate, mut votes) = (0, 0_usize);
        for distance in distances() {
            match votes {
                0 => (candidate, votes) = (distance, 1),
                _ if distance == candidate => votes += 1,
                _ => votes -= 1,
            }
        }
        let count = distances().filter(|distance| *distance == candidate).count();
        let fits = candidate != 0 && candidate.abs() <= STRIDE_MAX && known >= 2 && count * 2 > known;
        fits.then_some(candidate as i32)
    }
}

/// Beyond either end it stays there, which is outside of every window or refused by it.
fn offset(page: u32, stride: i32, steps: u32) -> u32 {
    let target = i64::from(page) + i64::from(stride) * i64::from(steps);
    u32::try_from(target.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(ahead: Ahead) -> Vec<u32> {
        (0..ahead.count).map(|step| offset(ahead.first, ahead.stride, step)).collect()
    }

    /// Touches pages in order, and says how many were missing.
    fn faults(prefetcher: &mut Prefetcher, order: impl Iterator<Item = u32>) -> usize {
        let (mut there, mut marks) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        let mut faults = 0;
        for page in order {
            let ahead = if marks.remove(&page) {
                prefetcher.touched(page)
            } else if there.contains(&page) {
                None
            } else {
                faults += 1;
                there.insert(page);
                prefetcher.fault(page, Habit::Normal)
            };
            if let Some(ahead) = ahead {
                there.extend(pages(ahead));
                marks.extend(ahead.mark());
            }
        }
        faults
    }

    #[test]
    fn a_scan_faults_at_its_start_only() {
        assert!(faults(&mut Prefetcher::default(), 0..10_000) < 8);
        let backwards = faults(&mut Prefetcher::default(), (0..10_000).rev());
        assert!(backwards < 10_000 / 7, "{backwards} faults backwards");
        let strided = faults(&mut Prefetcher::default(), (0..10_000).map(|step| step * 7));
        assert!(strided < 10_000 / 7, "{strided} faults at a stride of 7");
    }

    #[test]
    fn a_stream_goes_on_where_it_was_left() {
        for stride in [1, -1, 3] {
            let mut prefetcher = Prefetcher::default();
            let mut at = 100_000;
            let mut last = None;
            while last.is_none_or(|ahead: Ahead| ahead.count < 8) {
                at = offset(at, stride, 1);
                last = prefetcher.fault(at, Habit::Normal);
            }
            let ahead = last.unwrap();
            // Of two halves, the second may be given up first.
            let rest =
                |step| Ahead { first: offset(ahead.first, stride, step), count: ahead.count - step, ..ahead };
            prefetcher.forgo(rest(6));
            prefetcher.forgo(rest(3));
            let next = prefetcher.fault(rest(3).first, Habit::Normal).unwrap();
            assert_eq!((next.first, next.stride), (offset(rest(3).first, stride, 1), stride));
            assert!(next.count >= 8, "{next:?}");
        }
    }

    #[test]
    fn several_scans_at_a_time() {
        let starts = [0, 1_000_000, 2_000_000_u32];
        let mixed =
            |steps: std::ops::Range<u32>| steps.flat_map(move |step| starts.map(|start| start + step));
        // Each is followed once it has been seen by itself.
        let alone = starts.into_iter().flat_map(|start| start..start + 10);
        let count = faults(&mut Prefetcher::default(), alone.chain(mixed(10..4_000)));
        assert!(count < 9, "{count} faults");
    }

    #[test]
    fn random_pages_fetch_little() {
        let mut prefetcher = Prefetcher::default();
        let (mut state, mut fetched) = (1_u64, 0);
        for _ in 0..10_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (state >> 40) as u32;
            fetched += prefetcher.fault(page, Habit::Normal).map_or(0, |ahead| ahead.count);
        }
        assert!(fetched < 100, "{fetched} pages for 10,000 random faults");
        assert_eq!(prefetcher.fault(5, Habit::Random), None);
    }
}
