//! Threads that fault, fetch ahead and evict hand a page to one another, in every order that the memory model allows.

#![allow(dead_code, reason = "the module is whole")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}
#[path = "../src/page/word.rs"]
mod pages;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use pages::{Claim, DIRTY, Pages, QUEUED, Residency};

/// A page, its content, and whether a waiting thread was woken.
struct Page {
    pages: Pages,
    content: UnsafeCell<u64>,
    woken: Mutex<bool>,
    wake: Condvar,
}

// SAFETY is what this test checks: loom fails if two threads access the content at once.
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn new() -> Arc<Page> {
        let states = vec![AtomicU32::new(0)].into_boxed_slice();
        let stamps = vec![AtomicU64::new(0)].into_boxed_slice();
        let pages = Pages::new(states, stamps);
        Arc::new(Page { pages, content: UnsafeCell::new(0), woken: Mutex::new(false), wake: Condvar::new() })
    }

    fn release(&self, residency: Residency, set: u32) {
        if self.pages.release(0, residency, |state| state.with(set)) {
            *self.woken.lock().unwrap() = true;
            self.wake.notify_all();
        }
    }

    /// Adds one to the content. The caller has claimed the page.
    fn count(&self) {
        // SAFETY: the caller has claimed the page; loom checks that no other thread accesses it.
        #[allow(unsafe_code)]
        self.content.with_mut(|content| unsafe { *content += 1 });
        self.pages.set_stamp(0, self.pages.stamp(0) + 1);
    }

    /// A fault: waits for a page that is busy. Returns how often it changed the page: once, or 0 times if the page was
    /// already present.
    fn fault(&self) -> u64 {
        loop {
            match self.pages.claim(0, |state| state.residency() == Residency::Absent, true) {
                Claim::Yours(_) => {
                    self.count();
                    self.release(Residency::Mapped, 0);
                    return 1;
                }
                Claim::Not(_) => return 0,
                // The thread that has the page sees the mark of this one, and wakes it. If it did not, all threads
                // would wait, and loom would fail.
                Claim::Busy => {
                    let mut woken = self.woken.lock().unwrap();
                    while !std::mem::take(&mut *woken) {
                        woken = self.wake.wait(woken).unwrap();
                    }
                }
            }
        }
    }

    /// Fetches ahead: does not wait for a page that is busy. Returns how often it changed the page.
    fn fetch_ahead(&self) -> u64 {
        match self.pages.claim(0, |state| state.residency() == Residency::Absent, false) {
            Claim::Yours(_) => {
                self.count();
                self.release(Residency::Shelved, 0);
                1
            }
            Claim::Not(_) | Claim::Busy => 0,
        }
    }

    /// Evicts the page if it is present and not busy. Returns how often it changed the page.
    fn evict(&self) -> u64 {
        match self.pages.claim(0, |state| state.residency() != Residency::Absent, false) {
            Claim::Yours(_) => {
                self.count();
                self.release(Residency::Absent, DIRTY);
                1
            }
            Claim::Not(_) | Claim::Busy => 0,
        }
    }
}

fn check(page: &Page, changes: u64) {
    // SAFETY: the other threads have ended.
    #[allow(unsafe_code)]
    let content = page.content.with(|content| unsafe { *content });
    assert_eq!(content, changes, "nobody's change is lost");
    assert_eq!(page.pages.stamp(0), changes);
    assert_ne!(page.pages.state(0).residency(), Residency::Busy);
}

#[test]
fn a_fault_and_an_eviction() {
    loom::model(|| {
        let page = Page::new();
        let evictor = thread::spawn({
            let page = page.clone();
            move || page.evict() + page.evict()
        });
        let faulted = page.fault();
        let changes = faulted + evictor.join().unwrap();
        check(&page, changes);
    });
}

#[test]
fn a_fault_while_the_page_is_fetched_ahead_and_taken_away() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let page = Page::new();
        let run = |act: fn(&Page) -> u64| {
            let page = page.clone();
            thread::spawn(move || act(&page))
        };
        let others = [run(Page::fetch_ahead), run(Page::evict)];
        let faulted = page.fault();
        let changes = faulted + others.into_iter().map(|other| other.join().unwrap()).sum::<u64>();
        check(&page, changes);
    });
}

#[test]
fn bits_that_others_set_stay() {
    loom::model(|| {
        let page = Page::new();
        let marker = thread::spawn({
            let page = page.clone();
            move || page.pages.mark(0, QUEUED, 0).has(QUEUED)
        });
        page.fault();
        assert!(!marker.join().unwrap());
        assert!(page.pages.state(0).has(QUEUED));
        assert_eq!(page.pages.state(0).residency(), Residency::Mapped);
    });
}
