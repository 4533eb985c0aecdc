//! The requests in flight, marked in memory that the front end keeps when this process dies (vhost-user,
//! "Inflight I/O tracking"). The next process submits the marked requests again, in the order of their
//! arrival.
//!
//! Each queue has 64 bytes of alignment and, for a ring of n entries, 16 + 16 n bytes:
//!
//! | offset | |
//! |---|---|
//! | 0 | features, 64 bits: 0 |
//! | 8 | version, 16 bits: 1; 0 in a new region |
//! | 10 | entries, 16 bits |
//! | 12 | head of the last chain that was used, 16 bits |
//! | 14 | index of the used ring after it, 16 bits |
//! | 16 + 16 i | chain with head i: in flight (8 bits), 5 unused bytes, next used (16 bits), arrival order (64 bits) |

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::memory::{Region, RegionInfo, Terms, Window};
use super::ring::{Broken, SIZE_MAX};

const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 16;
const ALIGNMENT: usize = 64;

const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST: usize = 12;
const USED: usize = 14;

const fn len_of_queue(entries: u16) -> usize {
    (HEADER_LEN + ENTRY_LEN * entries as usize).next_multiple_of(ALIGNMENT)
}

/// The shared memory of all queues.
#[derive(Debug, Clone)]
pub(super) struct Inflight {
    region: Arc<Region>,
    queues: u16,
    entries: u16,
}

/// The description of the memory, as exchanged with a front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InflightInfo {
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) entries: u16,
}

impl InflightInfo {
    fn check(self) -> io::Result<()> {
        let bad = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()));
        if self.queues == 0 || self.entries == 0 || self.entries > SIZE_MAX {
            return bad("tracking of requests in flight for no queue, or for rings that are too long");
        }
        Ok(())
    }
}

/// Creates memory for `queues` queues.
///
/// # Errors
/// When it cannot be created, or the numbers are invalid.
pub(super) fn create(queues: u16, entries: u16) -> io::Result<(InflightInfo, OwnedFd)> {
    let len = (len_of_queue(entries) * usize::from(queues)) as u64;
    let info = InflightInfo { len, offset: 0, queues, entries };
    info.check()?;
    let file = memfd_create("xpm-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, len)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok((info, file))
}

impl Inflight {
    /// Maps the memory that a front end passes.
    ///
    /// # Errors
    /// When the memory does not match its description.
    pub(super) fn map(info: InflightInfo, file: &OwnedFd, terms: &Terms) -> io::Result<Inflight> {
        info.check()?;
        let needed = (len_of_queue(info.entries) * usize::from(info.queues)) as u64;
        if info.len < needed || !info.offset.is_multiple_of(ALIGNMENT as u64) {
            let what = format!("{} bytes for tracking requests in flight, and {needed} are needed", info.len);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let place = RegionInfo { guest: 0, len: needed, user: 0, offset: info.offset };
        let region = Arc::new(Region::map(place, file, terms)?);
        Ok(Inflight { region, queues: info.queues, entries: info.entries })
    }

    /// The tracking of a queue whose ring has `size` entries.
    ///
    /// # Errors
    /// When the memory has no room for it.
    pub(super) fn queue(&self, index: u16, size: u16) -> Result<Tracker, Broken> {
        let len = len_of_queue(self.entries);
        let start = len as u64 * u64::from(index);
        let window = match index < self.queues && size <= self.entries {
            true => Window::new(&self.region, start, len),
            false => None,
        };
        let window = window.ok_or(Broken("the memory for requests in flight is too small for the ring"))?;
        Ok(Tracker { window, size, counter: 0 })
    }
}

/// The marks of one queue.
#[derive(Debug)]
pub(super) struct Tracker {
    window: Window,
    size: u16,
    counter: u64,
}

/// The state that an earlier life left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recovered {
    /// Heads of the chains to be submitted again, in this order.
    pub(super) heads: Vec<u16>,
    /// Index of the next available entry; none in new memory.
    pub(super) next_available: Option<u16>,
}

impl Tracker {
    /// Takes over the present marks; `used` is the index of the used ring.
    pub(super) fn recover(&mut self, used: u16) -> Result<Recovered, Broken> {
        if self.window.load16(VERSION, Ordering::Acquire) == 0 {
            self.window.store16(ENTRIES, self.size, Ordering::Relaxed);
            self.window.store16(LAST, 0, Ordering::Relaxed);
            self.window.store16(USED, used, Ordering::Relaxed);
            self.window.store16(VERSION, 1, Ordering::Release);
            return Ok(Recovered { heads: Vec::new(), next_available: None });
        }
        self.finish_last(used)?;
        let marked = (0..self.size).filter(|head| self.is_marked(*head));
        let mut heads: Vec<(u64, u16)> =
            marked.map(|head| (self.window.load64(entry(head) + 8), head)).collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads: Vec<u16> = heads.into_iter().map(|(_, head)| head).collect();
        let next_available = Some(used.wrapping_add(heads.len() as u16));
        Ok(Recovered { heads, next_available })
    }

    /// Completes the work of a process that died between using chains and removing their marks.
    fn finish_last(&self, used: u16) -> Result<(), Broken> {
        let mut head = self.window.load16(LAST, Ordering::Acquire);
        let count = used.wrapping_sub(self.window.load16(USED, Ordering::Acquire));
        if count > self.size {
            return Err(Broken("the memory for requests in flight is of another ring"));
        }
        for _ in 0..count {
            if head >= self.size {
                return Err(Broken("the memory for requests in flight names a chain that cannot be"));
            }
            self.mark(head, false);
            head = self.window.load16(entry(head) + 6, Ordering::Relaxed);
        }
        self.window.store16(USED, used, Ordering::Release);
        Ok(())
    }

    fn is_marked(&self, head: u16) -> bool {
        let mut byte = [0];
        self.window.read(entry(head), &mut byte);
        byte[0] != 0
    }

    fn mark(&self, head: u16, marked: bool) {
        // One store, ordered among the surrounding ones, writes the byte and the one behind it.
        self.window.store16(entry(head), u16::from(marked), Ordering::Release);
    }

    /// Marks a chain that was taken from the available ring.
    pub(super) fn begin(&mut self, head: u16) {
        self.window.store64(entry(head) + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.mark(head, true);
    }

    /// Records that a chain is about to be put into the used ring.
    pub(super) fn ending(&mut self, head: u16) {
        let last = self.window.load16(LAST, Ordering::Relaxed);
        self.window.store16(entry(head) + 6, last, Ordering::Relaxed);
        self.window.store16(LAST, head, Ordering::Release);
    }

    /// Records that the chain is in the used ring, whose index is now `used`.
    pub(super) fn ended(&mut self, head: u16, used: u16) {
        self.mark(head, false);
        self.window.store16(USED, used, Ordering::Release);
    }
}

const fn entry(head: u16) -> usize {
    HEADER_LEN + ENTRY_LEN * head as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::memory::tests::{memfd, terms};
    use super::*;

    fn inflight() -> Inflight {
        let (info, file) = create(2, 8).unwrap();
        Inflight::map(info, &file, &terms()).unwrap()
    }

    fn recover(inflight: &Inflight, used: u16) -> Recovered {
        inflight.queue(1, 8).unwrap().recover(used).unwrap()
    }

    #[test]
    fn requests_in_flight_are_recovered_in_order() {
        let inflight = inflight();
        let mut queue = inflight.queue(1, 8).unwrap();
        assert_eq!(queue.recover(0).unwrap(), Recovered { heads: vec![], next_available: None });
        for head in [5, 2, 7, 0] {
            queue.begin(head);
        }
        queue.ending(2);
        queue.ended(2, 1);
        assert_eq!(recover(&inflight, 1), Recovered { heads: vec![5, 7, 0], next_available: Some(4) });
        let mut next = inflight.queue(1, 8).unwrap();
        next.recover(1).unwrap();
        next.begin(2);
        assert_eq!(recover(&inflight, 1).heads, [5, 7, 0, 2], "what comes later is later");
        assert_eq!(inflight.queue(0, 8).unwrap().recover(0).unwrap().next_available, None, "another queue");
    }

    #[test]
    fn a_death_at_any_step_of_a_completion_is_recovered() {
        let inflight = inflight();
        let mut queue = inflight.queue(1, 8).unwrap();
        queue.recover(9).unwrap();
        for head in [4, 1] {
            queue.begin(head);
        }
        queue.ending(4);
        assert_eq!(recover(&inflight, 9).heads, [4, 1], "it was not used yet");
        assert_eq!(recover(&inflight, 10).heads, [1], "it was, and its mark was still there");
        assert_eq!(recover(&inflight, 10).next_available, Some(11));
    }

    #[test]
    fn invalid_memory_is_refused() {
        let (info, file) = create(2, 8).unwrap();
        for bad in [
            InflightInfo { len: info.len - 1, ..info },
            InflightInfo { entries: 0, ..info },
            InflightInfo { entries: u16::MAX, ..info },
            InflightInfo { queues: 3, ..info },
            InflightInfo { offset: 1, ..info },
            InflightInfo { offset: 64, ..info },
        ] {
            assert!(Inflight::map(bad, &file, &terms()).is_err(), "{bad:?}");
        }
        assert!(Inflight::map(InflightInfo { len: 1 << 40, ..info }, &memfd(64), &terms()).is_err());
        let inflight = Inflight::map(info, &file, &terms()).unwrap();
        assert!(inflight.queue(2, 8).is_err() && inflight.queue(0, 16).is_err());
        assert!(create(0, 8).is_err() && create(1, 2048).is_err());
    }

    proptest! {
        #[test]
        fn any_content_yields_only_heads_of_the_ring(bytes in prop::collection::vec(any::<u8>(), 144), used: u16) {
            let inflight = inflight();
            let window = Window::new(&inflight.region, len_of_queue(8) as u64, 144).unwrap();
            window.write(0, &bytes);
            if let Ok(recovered) = inflight.queue(1, 8).unwrap().recover(used) {
                prop_assert!(recovered.heads.iter().all(|head| *head < 8));
                let mut once = recovered.heads.clone();
                once.sort_unstable();
                once.dedup();
                prop_assert_eq!(once.len(), recovered.heads.len());
            }
        }
    }
}
