//! Memory that a standby holds, to give it back to the kernel when it has to go on.
//!
//! While nobody served the swap, those who reclaim memory have used up what the kernel keeps for such times, down to less than a
//! real-time thread may take. Given back at once, this memory would go to whoever asks first, which is a program that
//! wants more than there is. Given back in slices, it is below the reserve, where ordinary programs get nothing, and
//! threads of this process do.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use xpm_safety as safety;

use crate::lifecycle::STACK_LEN;

/// One slice, in bytes; a multiple of any page length.
const SLICE_LEN: usize = 512 << 10;
/// From one slice to the next: a connection is made in less.
const PAUSE: Duration = Duration::from_millis(100);

/// The memory, held by a thread that is there before there is a need. Dropping it gives all back at once.
pub(super) struct Ballast(Sender<()>);

impl Ballast {
    /// So much, in bytes, faulted in. Blocks until it is there.
    pub(super) fn new(len: usize) -> io::Result<Ballast> {
        let (tell, told) = channel();
        if len > 0 {
            // The thread is started after that: it gives memory back when this process serves.
            let held = safety::while_others_serve(|| Held::new(len.next_multiple_of(SLICE_LEN)))?;
            let thread = thread::Builder::new().name("xpm-ballast".to_owned()).stack_size(STACK_LEN);
            thread.spawn(move || held.keep(&told))?;
        }
        Ok(Ballast(tell))
    }

    /// Returns at once.
    pub(super) fn give_back_slowly(self) {
        // Nobody hears it where nothing is held.
        let _ = self.0.send(());
    }
}

struct Held {
    address: *mut c_void,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, whichever thread has that.
unsafe impl Send for Held {}

impl Held {
    fn new(len: usize) -> io::Result<Held> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new anonymous mapping at a place that the kernel chooses; nothing refers to it.
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

    /// The last `len` bytes.
    fn give_back(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        // SAFETY: the end of the mapping that this value owns, to which nothing refers; it is no part of it from here on.
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
    fn nothing_to_hold_is_no_error() {
        Ballast::new(0).unwrap().give_back_slowly();
    }
}
