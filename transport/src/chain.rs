//! [`Chain`]: a signal handler that passes signals on to the handler that was installed before it.
//!
//! Several parts of a process handle SIGBUS: the copies of [`crate::sound`], a mapping whose faults are served in the
//! faulting thread, and the program itself. Each handler serves the faults that belong to it and passes the others on.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::sync::{Mutex, OnceLock, PoisonError};

/// A handler with SA_SIGINFO.
pub type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// One handler of ours for one signal, and the action of the signal before it.
#[derive(Debug, Default)]
pub struct Chain {
    before: OnceLock<libc::sigaction>,
    installing: Mutex<()>,
}

impl Chain {
    /// A handler that is not installed yet.
    pub const fn new() -> Chain {
        Chain { before: OnceLock::new(), installing: Mutex::new(()) }
    }

    /// Installs `handler`, once; later calls do nothing. The handler runs on the stack of the thread. All signals are
    /// blocked meanwhile, except `signal` itself: the handler may make an access whose fault another handler of the
    /// chain serves.
    ///
    /// # Errors
    /// When the kernel refuses the handler.
    pub fn install(&self, signal: c_int, handler: Handler) -> io::Result<()> {
        let _installing = self.installing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.before.get().is_some() {
            return Ok(());
        }
        // SAFETY: all zeros are a valid sigaction: no flags, the default action.
        let (mut ours, mut before): (libc::sigaction, libc::sigaction) =
            unsafe { (MaybeUninit::zeroed().assume_init(), MaybeUninit::zeroed().assume_init()) };
        ours.sa_sigaction = handler as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        // SAFETY: the set is this function's; SIGBUS and the like are valid signals.
        unsafe {
            libc::sigfillset(&raw mut ours.sa_mask);
            libc::sigdelset(&raw mut ours.sa_mask, signal);
        }
        // The previous action is stored before the handler can run, because the handler needs it.
        // SAFETY: only reads the action.
        if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = self.before.set(before);
        // SAFETY: the handler is one for SA_SIGINFO; that it is async-signal-safe is its own contract.
        match unsafe { libc::sigaction(signal, &raw const ours, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Calls the previous handler. Returns false when there was none: the signal has its default action from now on, so
    /// the repeated access ends the process. For use in the handler only.
    ///
    /// # Safety
    /// The arguments must be those that the kernel passed to the handler.
    pub unsafe fn pass_on(&self, signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) -> bool {
        let before = self.before.get();
        match before.map_or(libc::SIG_DFL, |before| before.sa_sigaction) {
            libc::SIG_DFL | libc::SIG_IGN => {
                // SAFETY: signal(2) is async-signal-safe.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
                false
            }
            handler if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) => {
                // SAFETY: the address was installed as such a handler.
                let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
                handler(signal, info, context);
                true
            }
            handler => {
                // SAFETY: the address was installed as a handler without SA_SIGINFO.
                let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
                handler(signal);
                true
            }
        }
    }
}
