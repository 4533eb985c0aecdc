//! A thread is told of work while it goes to sleep, in every order that the memory model allows.

#![allow(dead_code, reason = "the module is whole")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}
#[path = "../src/wake/signal.rs"]
mod signal;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use signal::Signal;

struct Shared {
    signal: Signal,
    work: AtomicU32,
    /// Stands for the descriptor: readable until it is read.
    readable: Mutex<bool>,
    wake: Condvar,
}

impl Shared {
    fn tell(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
        if self.signal.tell() {
            *self.readable.lock().unwrap() = true;
            self.wake.notify_one();
        }
    }

    /// Works until `much` is done, and sleeps when there is no work. loom fails if it would sleep for ever.
    fn work(&self, much: u32) {
        let mut done = 0;
        while done < much {
            self.signal.take();
            let more = self.work.swap(0, Ordering::Relaxed);
            done += more;
            if more == 0 && self.signal.may_sleep() {
                let mut readable = self.readable.lock().unwrap();
                while !*readable {
                    readable = self.wake.wait(readable).unwrap();
                }
                *readable = false;
                drop(readable);
                self.signal.is_awake();
            }
        }
    }
}

#[test]
fn who_was_told_does_not_sleep() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = Arc::new(Shared {
            signal: Signal::new(),
            work: AtomicU32::new(0),
            readable: Mutex::new(false),
            wake: Condvar::new(),
        });
        let tellers: Vec<_> = (0..2)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || shared.tell())
            })
            .collect();
        shared.work(2);
        tellers.into_iter().for_each(|teller| teller.join().unwrap());
    });
}
