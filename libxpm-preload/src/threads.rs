//! Which threads are this library's. Memory that the C library allocates for them, such as lists of exit handlers,
//! must not be in external memory, nor in an allocator of the program whose tables are.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use crate::heap;

thread_local! {
    /// This thread is the library's.
    static OWN: Cell<bool> = const { Cell::new(false) };
    /// Threads that this one starts are.
    static STARTS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is the library's. Allocates nothing.
pub(crate) fn is_own() -> bool {
    OWN.get()
}

/// Acts; threads that are started meanwhile are the library's, and those that they start.
pub(crate) fn starting<T>(act: impl FnOnce() -> T) -> T {
    STARTS_OWN.set(true);
    let done = act();
    STARTS_OWN.set(false);
    done
}

/// Acts; threads that are started meanwhile have all signals blocked but SIGBUS: they run no handler of the program.
pub(crate) fn without_signals<T>(act: impl FnOnce() -> T) -> T {
    let mut sets = [const { MaybeUninit::<libc::sigset_t>::zeroed() }; 2];
    let [all, before] = &mut sets;
    // SAFETY: the sets are this function's; zeros are a set.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        // A copy from memory of an appliance can raise it, and its handler makes an error of that
        // (`xpm_transport::sound`).
        libc::sigdelset(all.as_mut_ptr(), libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let done = act();
    // SAFETY: as it was.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    done
}

type Start = extern "C" fn(*mut c_void) -> *mut c_void;

struct Started {
    start: Start,
    argument: *mut c_void,
}

extern "C" fn own(started: *mut c_void) -> *mut c_void {
    OWN.set(true);
    STARTS_OWN.set(true);
    // SAFETY: made by `pthread_create`, for this thread alone.
    let Started { start, argument } = *unsafe { Box::from_raw(started.cast::<Started>()) };
    start(argument)
}

/// # Safety
/// As of pthread_create(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    if !STARTS_OWN.get() {
        // SAFETY: by the caller's word.
        return unsafe { heap::next_pthread_create()(thread, attributes, start, argument) };
    }
    let started = Box::into_raw(Box::new(Started { start, argument }));
    // SAFETY: by the caller's word; `own` takes what it is given.
    let status = unsafe { heap::next_pthread_create()(thread, attributes, own, started.cast()) };
    if status != 0 {
        // SAFETY: no thread has it.
        drop(unsafe { Box::from_raw(started) });
    }
    status
}
