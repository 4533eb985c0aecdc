//! Says why a child of fork(2) ends that touches external memory of its parent. The child has no connection and no
//! descriptor of this library's; its standard error may be anything. So the handler of SIGSEGV tells `xpm run`, which
//! says it.

use std::ffi::c_void;
use std::fmt::Write as _;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use xpm_protocol::api::run::FELL;

use crate::{process, start};

static SAID: AtomicBool = AtomicBool::new(false);
/// The previous action, which only the one thread of a new child writes.
static mut BEFORE: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

/// In a new child, while it has one thread.
pub(crate) fn watch() {
    // SAFETY: zeros are a sigaction; the handler is one for SA_SIGINFO, and uses what a handler may.
    unsafe {
        let mut ours: libc::sigaction = MaybeUninit::zeroed().assume_init();
        ours.sa_sigaction = on_fault as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let before = (&raw mut BEFORE).cast::<libc::sigaction>();
        libc::sigaction(libc::SIGSEGV, &ours, before);
    }
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a siginfo_t, with an address for SIGSEGV.
    let address = unsafe { (*info).si_addr() as usize };
    if process::is_dead(address) && !SAID.swap(true, Ordering::Relaxed) {
        tell(address);
    }
    // SAFETY: written before this handler was there.
    let before = unsafe { (&raw const BEFORE).cast::<libc::sigaction>().read() };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The access is made again, and ends the process by its own fault.
            // SAFETY: the default action, for a signal of this thread's own making.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);
            // SAFETY: it was installed as such a handler.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: it was installed as such a handler.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(i32)>(handler) };
            handler(signal);
        }
    }
}

/// A line that is made without memory of the heap.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let place = self.bytes.get_mut(self.len..self.len + text.len()).ok_or(std::fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

fn tell(address: usize) {
    let Some(place) = start::place() else { return };
    let mut line = Line { bytes: [0; 256], len: 0 };
    if writeln!(line, "{} {FELL} {address:x}", place.secret).is_err() {
        return;
    }
    // SAFETY: zeros are an address.
    let mut to: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    to.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (byte, from) in to.sun_path[1..].iter_mut().zip(place.socket.as_bytes()) {
        *byte = *from as libc::c_char;
    }
    let len = size_of::<libc::sa_family_t>() + 1 + place.socket.len();
    // SAFETY: the address and the line are this function's; the descriptor is new, and closed here.
    unsafe {
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if socket >= 0 {
            if libc::connect(socket, (&raw const to).cast(), len as libc::socklen_t) == 0 {
                libc::send(socket, line.bytes.as_ptr().cast(), line.len, libc::MSG_NOSIGNAL);
            }
            libc::close(socket);
        }
    }
}
