//! Threads of the library run no signal handler of the program: one that touched a window there would wait for the very
//! thread that it runs on.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Acts; threads that are started meanwhile have all signals blocked but SIGBUS.
pub fn blocked<T>(act: impl FnOnce() -> T) -> T {
    let (mut all, mut before) =
        (MaybeUninit::<libc::sigset_t>::zeroed(), MaybeUninit::<libc::sigset_t>::zeroed());
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
