//! The choice of pages to fetch ahead of their faults.
//!
//! A few *streams* of accesses are tracked at a time. A fault at the place where a stream was expected to continue
//! confirms the stream, and doubles its window (the number of pages that are fetched ahead). A touch of the stream's
//! mark, a page in the first half of the fetched pages, has the same effect. Faults that belong to no stream begin a
//! new one when most of the last faults have the same distance from each other. When an unconfirmed stream is
//! replaced, later streams begin with a shorter window.
//!
//! Source: Al Maruf and Chowdhury, "Effectively Prefetching Remote Memory with Leap", USENIX ATC 2020 (majority
//! of strides, by Boyer and Moore); the mark as PG_readahead in mm/readahead.c of Linux.

/// Number of tracked streams.
const STREAMS: usize = 8;
/// Number of last faults whose distances are compared.
const HISTORY: usize = 8;
/// Longest distance in pages that counts as a stride.
const STRIDE_MAX: i64 = 64;
/// Shortest window in pages.
const WINDOW_MIN: u32 = 4;
/// Longest window in pages, 4 MiB. Waking a thread and fetching the first page takes about as long as touching 300
/// pages in a row.
pub(crate) const WINDOW_MAX: u32 = 1024;
/// The window of a stream has at most one in this number of the budget's pages.
const WINDOW_PART: usize = 16;

/// Fewest pages that two threads fetch faster than one thread.
const HALVED_MIN: u32 = 128;

/// The program's advice about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Habit {
    /// No advice.
    #[default]
    Normal,
    /// Accesses run from the start to the end.
    Sequential,
    /// Accesses have no order: no page is fetched ahead.
    Random,
}

/// Pages to fetch ahead: `count` pages from `first`, each `stride` pages behind the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) stride: i32,
    /// Whether one of the pages is to be the mark, whose touch requests more pages.
    pub(crate) marked: bool,
    /// The mark, if it was chosen already; it may be fetched already, too.
    pub(crate) marked_at: Option<u32>,
}

impl Ahead {
    /// The mark: the page whose touch requests more pages. It lies in the first half, so that there is time to fetch
    /// them. Only runs of consecutive pages have a mark.
    pub(crate) fn mark(&self) -> Option<u32> {
        if self.marked_at.is_some() {
            return self.marked_at;
        }
        (self.marked && self.stride == 1 && self.count >= WINDOW_MIN * 2)
            .then_some(self.first + self.count / 4)
    }

    /// Splits a long run in two, for two threads.
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
    /// The first page that was not fetched ahead.
    next: u32,
    stride: i32,
    window: u32,
    confirmed: bool,
    used: u64,
}

/// Predicts from faults which pages will be needed.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    /// Longest window of a stream in pages, for the present budget.
    most: u32,
    streams: [Stream; STREAMS],
    history: [u32; HISTORY],
    seen: usize,
    clock: u64,
    /// Number of replaced streams that were never confirmed, minus the confirmed ones; 0 to 4.
    doubt: u32,
}

impl Default for Prefetcher {
    fn default() -> Prefetcher {
        let (streams, history) = ([Stream::default(); STREAMS], [0; HISTORY]);
        Prefetcher { most: WINDOW_MAX, streams, history, seen: 0, clock: 0, doubt: 0 }
    }
}

impl Prefetcher {
    /// Adjusts the longest window to a budget in pages.
    pub(crate) fn limit(&mut self, budget: usize) {
        self.most = (budget / WINDOW_PART).clamp(WINDOW_MIN as usize * 2, WINDOW_MAX as usize) as u32;
    }

    /// Records a fault on a page. Returns the pages to fetch with it.
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
        // With doubt the first window is shorter, so the stream needs more faults to grow.
        let window = match habit {
            Habit::Sequential => self.most / 4,
            _ => (WINDOW_MIN * 2) >> self.doubt.min(2),
        };
        self.begin(page, stride, window)
    }

    /// Records the touch of a mark. Returns the next pages to fetch.
    pub(crate) fn touched(&mut self, page: u32) -> Option<Ahead> {
        self.clock += 1;
        let behind =
            |stream: &Stream| stream.stride == 1 && page < stream.next && stream.next - page <= stream.window;
        let index = self.streams.iter().position(|stream| stream.window > 0 && behind(stream))?;
        let from = self.streams[index].next.wrapping_sub(1);
        Some(self.go_on(index, from))
    }

    /// Records that these pages will not be fetched ahead: their stream continues at the first of them.
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

    /// The stream that a page continues: at the expected page, or up to one stride behind it.
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
        // With a stride above one, each page is a read of its own, so the window stays short.
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

    /// The distance that most of the last faults, including this one, have from each other.
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

/// The page `steps` strides behind `page`, clamped to 0 and `u32::MAX`. A page behind the end of the window is not
/// fetched.
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
        // The prefetcher follows every scan from then on, because it has seen each one alone first.
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
