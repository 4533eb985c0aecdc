//! Handles the loss of guest memory: its device fails, and no other.
//!
//! An access behind the end of a file, to a huge page that the pool does not have, or to memory with an
//! uncorrectable error raises SIGBUS, which would end the process with every device of the host. This handler
//! checks whether the address is guest memory. If so, it maps zeros over the page and marks the memory as
//! failed, which the device's queues notice before they take the next request. Any other SIGBUS has the same
//! effect as without the handler.
//!
//! The handler uses async-signal-safe operations only: atomics, and the system calls mmap(2), munlock(2),
//! mprotect(2), sigaction(2) and raise(3).

#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Most mappings of guest memory in this process.
const ENTRIES: usize = 4096;

/// A guarded mapping. The entry is free while `address` is [`FREE`], and being filled while it is [`TAKEN`].
/// A reader that sees another address also sees the other fields.
struct Entry {
    address: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    failed: AtomicPtr<AtomicBool>,
}

const FREE: usize = 0;
const TAKEN: usize = 1;

static TABLE: [Entry; ENTRIES] = [const {
    Entry {
        address: AtomicUsize::new(FREE),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        failed: AtomicPtr::new(ptr::null_mut()),
    }
}; ENTRIES];

/// The previous action of SIGBUS.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapping: a SIGBUS in it fails only its device. Has to be dropped before the mapping is unmapped.
#[derive(Debug)]
pub(super) struct Guarded {
    place: usize,
    /// Kept alive for the handler.
    _failed: Arc<AtomicBool>,
}

impl Guarded {
    /// Guards a mapping of pages of `page` bytes. `failed` is set when one of its pages is lost.
    ///
    /// # Errors
    /// When there are too many mappings, or the handler cannot be installed.
    pub(super) fn new(
        address: usize,
        len: usize,
        page: usize,
        failed: &Arc<AtomicBool>,
    ) -> io::Result<Guarded> {
        install()?;
        let take = |entry: &Entry| {
            entry.address.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let Some(place) = TABLE.iter().position(take) else {
            let what = format!("more than {ENTRIES} regions of guest memory");
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, what));
        };
        let entry = &TABLE[place];
        entry.len.store(len, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.failed.store(Arc::as_ptr(failed).cast_mut(), Ordering::Relaxed);
        entry.address.store(address, Ordering::Release);
        Ok(Guarded { place, _failed: failed.clone() })
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // The mapping is no longer accessed, so no handler is running for it.
        TABLE[self.place].address.store(FREE, Ordering::Release);
    }
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: `sigaction` is a plain C struct, for which all zeros is a valid value.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: reads the present action of SIGBUS into a struct of this function.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Set before the handler needs it. If two threads get here, the second one installs the same handler
    // again.
    let _ = BEFORE.set(before);
    // SAFETY: the handler is async-signal-safe (see the module's documentation) and stays for the process's life.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO; the location of errno is this thread's.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // Positive codes come from the kernel and have an address.
    let is_handled = code > 0 && TABLE.iter().any(|entry| entry.replace(address));
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if is_handled {
        // The access is repeated after the return.
        return;
    }
    let Some(before) = BEFORE.get() else { return };
    // SAFETY: restores the previous action, which was valid. The access is repeated and has its effect; a
    // signal that was sent by a process has to be raised again.
    unsafe {
        libc::sigaction(libc::SIGBUS, before, ptr::null_mut());
        if code <= 0 {
            libc::raise(libc::SIGBUS);
        }
    }
}

impl Entry {
    /// Maps zeros over the page at an address, if the address is in this mapping.
    fn replace(&self, address: usize) -> bool {
        let start = self.address.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Relaxed);
        if start <= TAKEN || address < start || address - start >= len {
            return false;
        }
        let page = self.page.load(Ordering::Relaxed);
        let failed = self.failed.load(Ordering::Relaxed);
        // SAFETY: `Guarded` keeps the flag alive for as long as the entry has an address, and it is not
        // dropped while its mapping is accessed, which is the case now.
        unsafe { (*failed).store(true, Ordering::Release) };
        let first = (address - start) / page * page + start;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: replaces pages of a mapping of guest memory, which is accessed by address only. It becomes
        // accessible only after it was unlocked, because this process locks its mappings, and a page can have
        // 1 GiB.
        unsafe {
            let place = first as *mut libc::c_void;
            let mapped = libc::mmap(place, page, libc::PROT_NONE, flags, -1, 0);
            mapped == place
                && libc::munlock(place, page) == 0
                && libc::mprotect(place, page, libc::PROT_READ | libc::PROT_WRITE) == 0
        }
    }
}
