//! The process that executes swapoff(2).
//!
//! swapoff reads everything back, and blocks for that time; a thread of the daemon in this call could not be
//! cancelled. So a child executes it, which is forked in advance and waits on a socket:
//!
//! * a signal cancels it, and the area stays as it was. The kernel checks for signals between two processes
//!   whose pages it reads back (`try_to_unuse` in mm/swapfile.c), so with one large process it may complete
//!   before it notices;
//! * it ends with the daemon, and swapoff with it;
//! * it has the daemon's OOM score and cgroup. The kernel may still kill it when memory runs out (it prefers
//!   a process in swapoff, `oom_task_origin` in mm/oom_kill.c), which again leaves the area as it was; the
//!   daemon then forks the next one.
//!
//! The child may wait for I/O like ordinary processes, because it is not on the path of any page.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use tokio::sync::oneshot;

/// Longest path.
const PATH_LEN_MAX: usize = 4096;
/// Stack of the thread that communicates with the child; all of it is locked.
const STACK_LEN: usize = 128 << 10;
/// `PR_SET_IO_FLUSHER` of prctl(2).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Executes swapoff. One order at a time; further ones wait.
#[derive(Debug, Clone)]
pub struct Hand {
    orders: Sender<Order>,
    child: Arc<AtomicI32>,
}

/// The result of a swapoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The area is off.
    Off,
    /// It was cancelled, and the area is on as before.
    Stopped,
    /// The kernel killed the child for lack of memory, and the area is on as before.
    Killed,
    /// The kernel refused it with this error number.
    Refused(i32),
}

struct Order {
    path: PathBuf,
    answer: oneshot::Sender<Ended>,
}

impl Hand {
    /// Forks the first child.
    ///
    /// # Errors
    /// When the child or its thread cannot be created.
    pub fn start() -> io::Result<Hand> {
        let (orders, waiting) = channel();
        let child = Arc::new(AtomicI32::new(0));
        let shared = Arc::clone(&child);
        let (told, hears) = channel();
        // A child ends with the thread that forked it (PR_SET_PDEATHSIG), so this thread must stay.
        thread::Builder::new().name("xpm-swapoff".to_owned()).stack_size(STACK_LEN).spawn(move || {
            let first = Child::fork();
            let _ = told.send(first.as_ref().map(|_| ()).map_err(|error| io::Error::from(error.kind())));
            if let Ok(first) = first {
                serve(first, &waiting, &shared);
            }
        })?;
        hears.recv().map_err(io::Error::other)??;
        Ok(Hand { orders, child })
    }

    /// Turns an area off. The area is on as before unless the result is [`Ended::Off`].
    pub async fn turn_off(&self, path: PathBuf) -> Ended {
        let (answer, hears) = oneshot::channel();
        match self.orders.send(Order { path, answer }) {
            Ok(()) => hears.await.unwrap_or(Ended::Killed),
            Err(_) => Ended::Killed,
        }
    }

    /// Cancels the running swapoff. The signal may arrive before the child is in the call, so the caller has
    /// to repeat it until the swapoff has ended.
    pub fn stop(&self) {
        let pid = self.child.load(Ordering::Acquire);
        if pid > 0 {
            // SAFETY: takes numbers only. The pid is removed before the child is waited for, so it is still
            // the child's.
            unsafe { libc::kill(pid, libc::SIGUSR1) };
        }
    }
}

fn serve(first: Child, orders: &Receiver<Order>, shared: &AtomicI32) {
    let mut child = first;
    shared.store(child.pid, Ordering::Release);
    while let Ok(order) = orders.recv() {
        let ended = child.turn_off(&order.path);
        if ended == Ended::Killed {
            shared.store(0, Ordering::Release);
            drop(child);
            match Child::fork() {
                Ok(next) => child = next,
                Err(error) => {
                    tracing::error!("there is no process for swapoff any more ({error}): restart xpm-swapd");
                    return;
                }
            }
            shared.store(child.pid, Ordering::Release);
        }
        let _ = order.answer.send(ended);
    }
}

struct Child {
    pid: libc::pid_t,
    socket: OwnedFd,
}

impl Child {
    fn fork() -> io::Result<Child> {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // SAFETY: getpid has no preconditions.
        let parent = unsafe { libc::getpid() };
        // SAFETY: other threads of this process may hold any lock, so until it ends the child only makes
        // system calls on its own stack.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => be_the_child(theirs.as_raw_fd(), parent),
            pid => Ok(Child { pid, socket }),
        }
    }

    fn turn_off(&self, path: &std::path::Path) -> Ended {
        use std::os::unix::ffi::OsStrExt as _;
        let mut answer = [0; 4];
        let sent = send(&self.socket, path.as_os_str().as_bytes(), SendFlags::NOSIGNAL);
        if sent.is_err() {
            return Ended::Killed;
        }
        loop {
            match recv(&self.socket, &mut answer, RecvFlags::empty()) {
                Ok((_, 4)) => break,
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return Ended::Killed,
            }
        }
        match i32::from_ne_bytes(answer) {
            0 => Ended::Off,
            libc::EINTR => Ended::Stopped,
            number => Ended::Refused(number),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: takes numbers only; the child is ours and was not waited for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// The child's code until it ends: system calls only.
fn be_the_child(socket: RawFd, parent: libc::pid_t) -> ! {
    let mut path = [0_u8; PATH_LEN_MAX + 1];
    // SAFETY: system calls with numbers, and with pointers into this function's own frame, which are long
    // enough for the given lengths; `nothing` is a valid handler function. No other code in this process uses
    // descriptor 3, because its single thread uses no other descriptor.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            libc::_exit(0);
        }
        for signal in [libc::SIGTERM, libc::SIGINT] {
            libc::signal(signal, libc::SIG_DFL);
        }
        // Without SA_RESTART, so that the signal interrupts blocking calls.
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        libc::prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0);
        libc::dup2(socket, 3);
        libc::close_range(4, libc::c_uint::MAX, 0);
        loop {
            let len = libc::recv(3, path.as_mut_ptr().cast(), PATH_LEN_MAX, 0);
            if len < 0 && *libc::__errno_location() == libc::EINTR {
                continue;
            }
            if len <= 0 {
                libc::_exit(0);
            }
            path[len as usize] = 0;
            let number = match libc::swapoff(path.as_ptr().cast()) {
                0 => 0,
                _ => *libc::__errno_location(),
            };
            let answer = number.to_ne_bytes();
            if libc::send(3, answer.as_ptr().cast(), answer.len(), libc::MSG_NOSIGNAL) < 0 {
                libc::_exit(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_without_swap_is_refused_and_a_dead_child_is_replaced() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let hand = Hand::start().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let off = || runtime.block_on(hand.turn_off(file.path().to_owned()));
        let refused = off();
        assert!(matches!(refused, Ended::Refused(libc::EINVAL | libc::EPERM)), "{refused:?}");
        // A stop without a running swapoff has no effect.
        hand.stop();
        assert_eq!(off(), refused);
        let pid = hand.child.load(Ordering::Acquire);
        // SAFETY: takes numbers only; the child belongs to `hand`.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(off(), Ended::Killed);
        assert_ne!(hand.child.load(Ordering::Acquire), pid);
        assert_eq!(off(), refused);
    }
}
