//! Serving a fault in the faulting thread, in a handler of SIGBUS.
//!
//! The handler does nothing that the interrupted code could be in the middle of: it allocates nothing, and the
//! locks that it takes are held by this library only, which never touches a window. A SIGBUS of another origin, and
//! pages whose content is lost, go to the handler that was installed before.
//!
//! The handler runs on the stack of the thread, not on an alternate stack, which may be too short: the handler uses
//! about 4 KiB besides the registers that the kernel saves.
//!
//! Sources: signal-safety(7), sigaction(2), UFFD_FEATURE_SIGBUS in ioctl_userfaultfd(2).

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use xpm_transport::chain::Chain;

use crate::fault::fetch::Fetcher;
use crate::page::word::Residency;
use crate::pager::{Outcome, Shared};
use crate::say::say;

/// The address has no memory; see sigaction(2).
const BUS_ADRERR: i32 = 2;
/// Most windows of one process.
const WINDOWS: usize = 64;
/// How long a thread polls for its page before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// The fetchers of a window, for all threads that fault. One thread at a time uses a fetcher.
pub(crate) struct Seats {
    pager: Shared,
    seats: Box<[Seat]>,
    /// Number of threads that use these seats now.
    inside: AtomicU32,
}

struct Seat {
    taken: AtomicBool,
    fetcher: UnsafeCell<Fetcher>,
}

// SAFETY: only the thread that set `taken` to true uses the fetcher.
unsafe impl Sync for Seat {}

static TABLE: [AtomicPtr<Seats>; WINDOWS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; WINDOWS];
static CHAIN: Chain = Chain::new();

/// The registration of a window with the handler. Dropping it ends the serving of its faults.
pub(crate) struct Registered {
    seats: *mut Seats,
    place: usize,
}

// SAFETY: the value owns the seats, which can be shared and sent.
unsafe impl Send for Registered {}
// SAFETY: a shared reference gives no access to the seats, except by `Seat::take`, which excludes other threads.
unsafe impl Sync for Registered {}

impl Registered {
    pub(crate) fn new(pager: Shared, fetchers: Vec<Fetcher>) -> io::Result<Registered> {
        CHAIN.install(libc::SIGBUS, on_sigbus)?;
        let seat = |fetcher| Seat { taken: AtomicBool::new(false), fetcher: UnsafeCell::new(fetcher) };
        let seats = fetchers.into_iter().map(seat).collect();
        let seats = Box::into_raw(Box::new(Seats { pager, seats, inside: AtomicU32::new(0) }));
        for (place, entry) in TABLE.iter().enumerate() {
            let empty = std::ptr::null_mut();
            if entry.compare_exchange(empty, seats, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                return Ok(Registered { seats, place });
            }
        }
        // SAFETY: made above, and in no table.
        drop(unsafe { Box::from_raw(seats) });
        Err(io::Error::other(format!("this process has {WINDOWS} windows with faults in line already")))
    }

    /// Polls the channels of the free seats, so that they execute their orders.
    pub(crate) fn tend(&self) {
        // SAFETY: made by `new`, and freed when this is dropped.
        let seats = unsafe { &*self.seats };
        for seat in &seats.seats {
            seat.take(|fetcher| _ = fetcher.poll());
        }
    }
}

impl Seat {
    /// Calls `act` with the fetcher, unless another thread uses it.
    fn take<T>(&self, act: impl FnOnce(&mut Fetcher) -> T) -> Option<T> {
        if self.taken.load(Ordering::Relaxed) || self.taken.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: this thread set `taken` to true, so no other thread uses the fetcher.
        let done = act(unsafe { &mut *self.fetcher.get() });
        self.taken.store(false, Ordering::Release);
        Some(done)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        TABLE[self.place].store(std::ptr::null_mut(), Ordering::SeqCst);
        // SAFETY: made by `new`, and freed below.
        let seats = unsafe { &*self.seats };
        // The counters are read in this order, because a thread is counted in the seats before it is no longer counted
        // in `INSIDE`.
        while INSIDE.load(Ordering::SeqCst) > 0 || seats.inside.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: the seats are in no table, and no thread uses them.
        drop(unsafe { Box::from_raw(self.seats) });
    }
}

/// Number of threads that search the table now.
static INSIDE: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a siginfo_t, with an address for SIGBUS, and errno is this thread's.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    // SAFETY: the kernel gives a ucontext_t of this thread.
    let write = unsafe { is_write(context) };
    // Other codes, such as broken memory, are no fault that this handler could serve.
    // SAFETY: as above.
    let ended = unsafe { (*info).si_code } == BUS_ADRERR && end_fault(address, write);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !ended {
        pass_on(signal, info, context);
    }
}

/// Whether the access was a write.
///
/// # Safety
/// `context` must point to the ucontext_t of a page fault.
#[cfg(target_arch = "x86_64")]
unsafe fn is_write(context: *mut c_void) -> bool {
    // SAFETY: by the caller's word. Bit 1 of the error code of a page fault: Intel SDM, volume 3, section 4.7.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    registers[libc::REG_ERR as usize] & 2 != 0
}

/// Unknown on this processor: a later comparison of the content finds a write.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn is_write(_context: *mut c_void) -> bool {
    false
}

fn end_fault(address: usize, write: bool) -> bool {
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let mut ended = false;
    for entry in &TABLE {
        let seats = entry.load(Ordering::SeqCst);
        // SAFETY: `Registered::drop` removes the seats from the table, and frees them only when no thread is inside.
        let Some(seats) = (unsafe { seats.as_ref() }) else { continue };
        if let Some(page) = seats.pager.window.page_of(address) {
            seats.inside.fetch_add(1, Ordering::SeqCst);
            INSIDE.fetch_sub(1, Ordering::SeqCst);
            ended = seats.end(page, write);
            seats.inside.fetch_sub(1, Ordering::SeqCst);
            return ended;
        }
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    ended
}

/// Passes the signal to the handler that was installed before.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a siginfo_t, and the arguments are the kernel's.
    let (address, code, passed) =
        unsafe { ((*info).si_addr() as usize, (*info).si_code, CHAIN.pass_on(signal, info, context)) };
    if !passed {
        say(format_args!("xpm: SIGBUS at 0x{address:x} (code {code}), which is no page of a window in line"));
    }
}

impl Seats {
    /// Serves a fault. Returns false if the content of the page is lost, or there is no room for it.
    fn end(&self, page: u32, write: bool) -> bool {
        loop {
            let outcome = self.seated(|fetcher| {
                let (outcome, ahead) = fetcher.fault(page, write);
                if let Some(ahead) = ahead {
                    self.pager.ask(ahead);
                }
                if matches!(outcome, Outcome::Coming(_)) {
                    wait(fetcher);
                }
                outcome
            });
            match outcome {
                Outcome::Done => return true,
                // The fetch has ended. If the page did not arrive, the repeated access faults again.
                Outcome::Coming(_) => match self.pager.pages.state(page) {
                    state
                        if state.residency() == Residency::Absent
                            && state.has(crate::page::word::POISONED) =>
                    {
                        self.pager.complain(page);
                        return false;
                    }
                    _ => return true,
                },
                Outcome::Poisoned => {
                    self.pager.complain(page);
                    return false;
                }
                Outcome::Choked => {
                    self.pager.complain_of_room(page);
                    return false;
                }
                Outcome::Busy => self.pager.wait_for(page),
                Outcome::Later => self.pager.room.wait(),
            }
        }
    }

    fn seated<T>(&self, mut act: impl FnMut(&mut Fetcher) -> T) -> T {
        // SAFETY: the call takes no argument and changes no state.
        let start = unsafe { libc::sched_getcpu() }.max(0) as usize;
        loop {
            for step in 0..self.seats.len() {
                let seat = &self.seats[(start + step) % self.seats.len()];
                if let Some(done) = seat.take(&mut act) {
                    return done;
                }
            }
            std::thread::yield_now();
        }
    }
}

/// Waits until all fetches in flight have ended.
fn wait(fetcher: &mut Fetcher) {
    let since = Instant::now();
    let mut looks = 0_u32;
    loop {
        fetcher.poll();
        if fetcher.is_idle() {
            return;
        }
        looks += 1;
        if looks.is_multiple_of(16) {
            if since.elapsed() < SPIN {
                std::thread::yield_now();
            } else {
                fetcher.arm();
                let channel = fetcher.wait_fd();
                let mut fds = [PollFd::new(&channel, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 }));
            }
        }
    }
}
