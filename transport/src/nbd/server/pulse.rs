//! Detects whether the host at the other end of a connection is alive: its kernel answers a TCP probe.
//!
//! A process that ended has closed its connections, so an open connection belongs to a live process, or to a
//! host that is suspended, cut off, or gone. The kernel of a running host acknowledges a keepalive probe
//! within a round trip, and the kernel of a rebooted host answers with a reset.

#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use xpm_protocol::Visitor;

use super::listen::TCP_KEEPALIVE_IDLE;

/// Time to wait for a host; a probe is sent at the latest after a second without traffic.
const LIMIT: Duration = Duration::from_secs(3);
/// The shortest idle time after which the kernel sends a probe.
const PROBE_AFTER: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Returns the clients that answer: when the first one does, and at the latest after [`LIMIT`]. Blocks.
pub(super) fn answering(clients: &[(Visitor, Weak<OwnedFd>)]) -> Vec<Visitor> {
    let start = Instant::now();
    let probe = |stream: &OwnedFd, idle| {
        // A connection that cannot be probed is one of a unix socket, or is being closed.
        let _ = sockopt::set_tcp_keepidle(stream, idle);
    };
    let each =
        |idle| clients.iter().filter_map(|(_, seen)| seen.upgrade()).for_each(|stream| probe(&stream, idle));
    each(PROBE_AFTER);
    let found = loop {
        let looks: Vec<(&Visitor, Pulse)> = clients
            .iter()
            .map(|(visitor, seen)| {
                let pulse = seen.upgrade().map_or(Pulse::Ended, |stream| pulse(stream.as_fd(), start));
                (visitor, pulse)
            })
            .collect();
        let alive: Vec<Visitor> = looks
            .iter()
            .filter(|(_, pulse)| *pulse == Pulse::Answers)
            .map(|(visitor, _)| (*visitor).clone())
            .collect();
        let over = looks.iter().all(|(_, pulse)| *pulse == Pulse::Ended);
        if !alive.is_empty() || over || start.elapsed() >= LIMIT {
            break alive;
        }
        thread::sleep(LOOK_AGAIN);
    };
    each(TCP_KEEPALIVE_IDLE);
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pulse {
    Answers,
    /// No traffic arrived since the probe.
    Silent,
    /// Closed by the other end.
    Ended,
}

/// Evaluates the traffic that arrived since `start`.
fn pulse(stream: BorrowedFd<'_>, start: Instant) -> Pulse {
    if has_ended(stream) {
        return Pulse::Ended;
    }
    match since_last_acknowledgement(stream) {
        Ok(since) if since < start.elapsed() => Pulse::Answers,
        Ok(_) => Pulse::Silent,
        // A unix socket: the process at the other end has it open, on this kernel.
        Err(_) => Pulse::Answers,
    }
}

fn has_ended(stream: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(ended)
}

/// Time since the last acknowledgement, by `TCP_INFO` of tcp(7).
fn since_last_acknowledgement(stream: BorrowedFd<'_>) -> io::Result<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is as long; the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the struct consists of numbers, all of them zero where the kernel wrote nothing.
    let info = unsafe { info.assume_init() };
    Ok(Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use xpm_protocol::Life;

    use super::*;

    fn client(stream: OwnedFd) -> (Arc<OwnedFd>, [(Visitor, Weak<OwnedFd>); 1]) {
        let zeros = "0".repeat(32);
        let life: Life = format!("{zeros}.{zeros}.{zeros}.1").parse().unwrap();
        let stream = Arc::new(stream);
        let seen = Arc::downgrade(&stream);
        (stream, [(Visitor::new(life, "a"), seen)])
    }

    #[test]
    fn an_idle_peer_answers_and_a_closed_connection_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        sockopt::set_socket_keepalive(&here, true).unwrap();
        let (_here, clients) = client(here.into());
        assert_eq!(answering(&clients).len(), 1, "its kernel acknowledges");
        drop(there);
        while !has_ended(clients[0].1.upgrade().unwrap().as_fd()) {
            thread::sleep(LOOK_AGAIN);
        }
        assert!(answering(&clients).is_empty());
    }

    #[test]
    fn a_local_peer_is_alive_while_its_end_is_open() {
        let (here, there) = UnixStream::pair().unwrap();
        let (here, clients) = client(here.into());
        assert_eq!(answering(&clients).len(), 1);
        drop(there);
        assert!(answering(&clients).is_empty());
        drop(here);
        assert!(answering(&clients).is_empty());
    }
}
