//! Errors of pages that could not be fetched or written: counted by cause, remembered, and logged.
//!
//! All functions here may run in a handler of SIGBUS: they take no lock and allocate nothing.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use xpm_transport::IoError;

use crate::page::window::PAGE;
use crate::say::say;

/// Most lines that are written about failed accesses: the first lines show the cause.
const LINES_MAX: u32 = 16;
/// Number of last errors that are remembered, for accesses and for writes each.
const RECENT: usize = 16;
const CAUSES: usize = IoError::ALL.len() + 2;

/// Why a page could not be fetched into local memory, or written to external memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Cause {
    /// The operation on external memory failed.
    #[error("{0}")]
    Io(IoError),
    /// The program discarded the page by a call of its own, such as madvise(2), and with it what it had written.
    #[error("the program threw it away by a call of its own, such as madvise(2)")]
    Discarded,
    /// No local memory is left for the page, and none can be freed.
    #[error(
        "all local memory is pinned by the program (io_uring, RDMA, O_DIRECT), and the machine has no more: choose more local memory"
    )]
    NoRoom,
}

impl Cause {
    /// All causes.
    pub fn all() -> impl Iterator<Item = Cause> {
        IoError::ALL.into_iter().map(Cause::Io).chain([Cause::Discarded, Cause::NoRoom])
    }

    fn index(self) -> usize {
        match self {
            Cause::Io(error) => IoError::ALL.iter().position(|known| *known == error).unwrap_or(CAUSES - 3),
            Cause::Discarded => CAUSES - 2,
            Cause::NoRoom => CAUSES - 1,
        }
    }

    fn of_index(index: usize) -> Option<Cause> {
        match index {
            _ if index < IoError::ALL.len() => Some(Cause::Io(IoError::ALL[index])),
            _ if index == CAUSES - 2 => Some(Cause::Discarded),
            _ if index == CAUSES - 1 => Some(Cause::NoRoom),
            _ => None,
        }
    }
}

/// A page that could not be fetched or written, and the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageError {
    /// Byte of the allocation at which the page begins.
    pub offset: u64,
    /// The cause of the error.
    pub cause: Cause,
}

impl Display for PageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the page at byte {} of the allocation cannot be used: {}", self.offset, self.cause)
    }
}

impl std::error::Error for PageError {}

/// Number of errors by cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorCounts([u64; CAUSES]);

impl ErrorCounts {
    /// Number of errors with this cause.
    pub fn of(&self, cause: Cause) -> u64 {
        self.0[cause.index()]
    }
}

/// Events that are logged only once, because they can concern many pages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Once {
    /// An address that only the library may touch was touched. The kernel touches all of them in mlockall(2).
    OwnAddress,
    /// A changed page could not be written before its memory was lost.
    Unwritten,
}

/// The errors of a pager.
#[derive(Default)]
pub(crate) struct Errors {
    counts: [AtomicU64; CAUSES],
    accesses: Ring,
    /// Errors of writing pages that left local memory, for which no thread waited. In a ring of their own, because many
    /// at once must not displace the errors of accesses.
    writes: Ring,
    lines: AtomicU32,
    /// Which events of [`Once`] were logged.
    logged: [AtomicBool; 2],
}

impl Errors {
    /// Counts an error on which no access or call of the program depends: a failed fetch ahead is tried again when the
    /// page is touched.
    pub(crate) fn count(&self, cause: Cause) {
        self.counts[cause.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the error, and remembers it for the page.
    pub(crate) fn record(&self, page: u32, cause: Cause) {
        self.count(cause);
        self.remember(page, cause);
    }

    /// Remembers an error for the page that was counted before.
    pub(crate) fn remember(&self, page: u32, cause: Cause) {
        self.accesses.push(page, cause);
    }

    /// Counts the error, and remembers it for a page that could not be written when it left local memory.
    pub(crate) fn record_write(&self, page: u32, cause: Cause) {
        self.count(cause);
        self.writes.push(page, cause);
    }

    /// The last cause for this page; if it is not remembered any more, the last cause for any page.
    pub(crate) fn cause_of(&self, page: u32) -> Option<Cause> {
        let of_page = |ring: &Ring| ring.latest(|known| known == page);
        let found = of_page(&self.accesses).or_else(|| of_page(&self.writes)).or_else(|| self.latest());
        found.map(|(_, cause)| cause)
    }

    /// The last error of an access or a call; if there was none, the last error of a write.
    pub(crate) fn last(&self) -> Option<PageError> {
        let (page, cause) = self.latest()?;
        Some(PageError { offset: u64::from(page) * PAGE as u64, cause })
    }

    fn latest(&self) -> Option<(u32, Cause)> {
        self.accesses.latest(|_| true).or_else(|| self.writes.latest(|_| true))
    }

    pub(crate) fn counts(&self) -> ErrorCounts {
        ErrorCounts(std::array::from_fn(|index| self.counts[index].load(Ordering::Relaxed)))
    }

    /// Writes a line to standard error, unless [`LINES_MAX`] lines were written already.
    pub(crate) fn log(&self, line: fmt::Arguments<'_>) {
        if self.lines.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
            say(line);
        }
    }

    /// Writes a line to standard error, unless this event was logged already.
    pub(crate) fn log_once(&self, what: Once, line: fmt::Arguments<'_>) {
        if !self.logged[what as usize].swap(true, Ordering::Relaxed) {
            say(line);
        }
    }
}

/// The last errors. A word has the page's number, and in its low 8 bits one more than the index of the cause; 0 is an
/// empty word.
#[derive(Default)]
struct Ring {
    words: [AtomicU64; RECENT],
    /// Number of errors that were remembered since the start.
    seen: AtomicUsize,
}

impl Ring {
    fn push(&self, page: u32, cause: Cause) {
        let place = self.seen.load(Ordering::Relaxed) % RECENT;
        self.words[place].store(u64::from(page) << 8 | (cause.index() as u64 + 1), Ordering::Relaxed);
        self.seen.fetch_add(1, Ordering::Release);
    }

    fn latest(&self, wanted: impl Fn(u32) -> bool) -> Option<(u32, Cause)> {
        let seen = self.seen.load(Ordering::Acquire);
        let places = (0..seen.min(RECENT)).map(|back| (seen - 1 - back) % RECENT);
        places.map(|place| self.words[place].load(Ordering::Relaxed)).find_map(|word| {
            let page = (word >> 8) as u32;
            let cause = Cause::of_index(((word & 0xff) as usize).checked_sub(1)?)?;
            wanted(page).then_some((page, cause))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_its_own_cause() {
        let errors = Errors::default();
        assert_eq!((errors.last(), errors.cause_of(3)), (None, None));
        errors.record(3, Cause::Io(IoError::Fenced));
        errors.record(7, Cause::Discarded);
        assert_eq!(errors.cause_of(3), Some(Cause::Io(IoError::Fenced)));
        assert_eq!(errors.last(), Some(PageError { offset: 7 * PAGE as u64, cause: Cause::Discarded }));
        errors.record(3, Cause::Io(IoError::Lost));
        assert_eq!(errors.cause_of(3), Some(Cause::Io(IoError::Lost)), "the last one counts");
        (100..100 + RECENT as u32).for_each(|page| errors.record(page, Cause::NoRoom));
        assert_eq!(errors.cause_of(3), Some(Cause::NoRoom), "the last of another page");
        errors.record_write(3, Cause::Io(IoError::Failed));
        assert_eq!(errors.cause_of(3), Some(Cause::Io(IoError::Failed)));
        assert_eq!(
            errors.last().map(|last| last.cause),
            Some(Cause::NoRoom),
            "writes do not push accesses out"
        );
    }

    #[test]
    fn causes_are_counted_apart() {
        let errors = Errors::default();
        for cause in Cause::all() {
            assert_eq!(Cause::of_index(cause.index()), Some(cause));
            (0..=cause.index()).for_each(|_| errors.count(cause));
        }
        for cause in Cause::all() {
            assert_eq!(errors.counts().of(cause), cause.index() as u64 + 1);
        }
        assert_eq!(errors.last(), None, "only counted");
    }
}
