//! Memory that a standby holds, and returns to the kernel when it takes over.
//!
//! While the swap had no server, threads that reclaim memory have used up the kernel's reserve for such
//! times, to less than a real-time thread may take. If this memory were returned at once, it would go to the
//! first that asks, which is a program that wants more memory than there is. Returned in slices, it stays
//! below the reserve, where ordinary programs get none, and threads of this process do.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use xpm_safety as safety;

use crate::lifecycle::STACK_LEN;

/// Length of a slice in bytes; a multiple of any page length.
const SLICE_LEN: usize = 512 << 10;
/// Time between two slices; making a connection takes less.
const PAUSE: Duration = Duration::from_millis(100);

/// The memory, held by a thread that exists before it is needed. Dropping it returns all memory at once.
pub(super) struct Ballast(Sender<()>);

impl Ballast {
    /// Holds `len` bytes, faulted in. Blocks until they are.
    pub(super) fn new(len: usize) -> io::Result<Ballast> {
        let (tell, told) = channel();
        if len > 0 {
            // The thread is started after that, because it runs when this process serves.
            let held = safety::while_others_serve(|| Held::new(len.next_multiple_of(SLICE_LEN)))?;
            let thread = thread::Builder::new().name("xpm-ballast".to_owned()).stack_size(STACK_LEN);
            thread.spawn(move || held.keep(&told))?;
        }
        Ok(Ballast(tell))
    }

    /// Starts returning the memory in slices. Does not block.
    pub(super) fn give_back_slowly(self) {
        // Fails only when no memory is held, so that there is no thread.
        let _ = self.0.send(());
    }
}

struct Held {
    address: *mut c_void,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, whichever thread owns it.
unsafe impl Send for Held {}

impl Held {
    fn new(len: usize) -> io::Result<Held> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new anonymous mapping at a place that the kernel chooses; no reference to it exists.
        let address =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(Held { address, len })
    }

    fn keep(mut self, told: &Receiver<()>) {
        let slowly = told.recv().is_ok();
        while slowly && self.len > 0 {
            self.give_back(SLICE_LEN);
            thread::sleep(PAUSE);
        }
    }

    /// Unmaps the last `len` bytes.
    fn give_back(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        // SAFETY: the end of the mapping that this value owns, to which no reference exists; from here on it
        // is no part of the value.
        let _ = unsafe { munmap(self.address.byte_add(self.len), len) };
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.len > 0 {
            self.give_back(self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_come_from_the_end_until_nothing_is_held() {
        let mut held = Held::new(3 * SLICE_LEN).unwrap();
        // SAFETY: the first slice is mapped and writable until it is given back.
        let touch = |held: &Held| unsafe { held.address.cast::<u8>().write_volatile(1) };
        for left in [2, 1] {
            held.give_back(SLICE_LEN);
            assert_eq!(held.len, left * SLICE_LEN);
            touch(&held);
        }
        held.give_back(2 * SLICE_LEN);
        assert_eq!(held.len, 0);
    }

    #[test]
    fn a_length_of_zero_is_no_error() {
        Ballast::new(0).unwrap().give_back_slowly();
    }
}
