//! Connecting to a server within a time limit: the functions that the clients of all transports share.
//!
//! All functions here block, and belong on a thread that may wait; no data path uses them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send, socket_with,
    sockopt,
};

use crate::trusted;

/// Pause before `connect` is tried again on a unix socket whose backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);

/// Delay before the next of several addresses is tried while no earlier address has answered (RFC 8305).
const STAGGER: Duration = Duration::from_millis(250);

/// Why a connection attempt failed; the variant decides the next step.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing accepts connections at the address, or the connection broke: try again later.
    #[error("cannot reach it: {0}")]
    Unreachable(#[source] io::Error),
    /// The server did not answer in time: try again later.
    #[error("it did not answer within the time limit")]
    TimedOut,
    /// The server has no export of this name: it restarted without the memory, or the grant was revoked.
    #[error("it has no such export")]
    UnknownExport,
    /// The server has the export, and a newer connection of the same session and queue: another process uses
    /// the same ownership, or the numbers of this process are too low. Try again later, with a higher number.
    #[error(
        "it has a newer connection of this queue: another process uses the same ownership of the allocation"
    )]
    Outdated,
    /// The server knows the export and does not give it to this client.
    #[error("it refuses the export: {0}")]
    Refused(String),
    /// The server requires a protocol feature that this client lacks.
    #[error("it asks for what this client cannot do: {0}")]
    Unsupported(String),
    /// This host lacks a prerequisite of the transport; the text names it.
    #[error("{0}")]
    Unavailable(String),
    /// The server violates the protocol; another service may listen at this address.
    #[error("it does not follow the protocol: {0}")]
    Protocol(String),
    /// The memory that the server lends cannot be mapped into this process.
    #[error("cannot map its memory: {0}")]
    Memory(#[source] io::Error),
}

/// The time at which a connection attempt ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Deadline {
        Deadline(Instant::now() + limit)
    }

    pub(crate) fn rest(self) -> Result<Duration, ConnectError> {
        let rest = self.0.saturating_duration_since(Instant::now());
        if rest.is_zero() { Err(ConnectError::TimedOut) } else { Ok(rest) }
    }
}

/// Connects a blocking TCP stream to `address`.
pub(crate) fn dial_tcp(address: SocketAddr, deadline: Deadline) -> Result<OwnedFd, ConnectError> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = nonblocking_socket(family)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            wait(socket.as_fd(), PollFlags::OUT, deadline)?;
            sockopt::socket_error(&socket).and_then(|outcome| outcome).map_err(unreachable)?;
        }
        Err(errno) => return Err(unreachable(errno)),
    }
    ioctl_fionbio(&socket, false).map_err(unreachable)?;
    Ok(socket)
}

/// An attempt to connect to one of several addresses.
struct Runner {
    address: SocketAddr,
    socket: OwnedFd,
    is_connected: bool,
}

impl Runner {
    fn start(address: SocketAddr) -> Result<Runner, ConnectError> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = nonblocking_socket(family)?;
        let is_connected = match rustix::net::connect(&socket, &address) {
            Ok(()) => true,
            Err(Errno::INPROGRESS | Errno::INTR) => false,
            Err(errno) => return Err(unreachable(errno)),
        };
        Ok(Runner { address, socket, is_connected })
    }

    const fn awaits(&self) -> PollFlags {
        if self.is_connected { PollFlags::IN } else { PollFlags::OUT }
    }

    /// Continues once the socket is ready. Returns whether the server has sent its first bytes.
    fn go_on(&mut self) -> Result<bool, ConnectError> {
        if !self.is_connected {
            sockopt::socket_error(&self.socket).and_then(|outcome| outcome).map_err(unreachable)?;
            self.is_connected = true;
            return Ok(false);
        }
        match recv(&self.socket, &mut [0_u8; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK) {
            Ok((0, _)) => Err(closed()),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(unreachable(errno)),
        }
    }
}

/// Connects to all of `addresses` in a race, and returns a blocking TCP stream to the server that sends
/// first. For protocols in which the server speaks first. Each address is tried [`STAGGER`] after the
/// previous one, or at once when all previous attempts have failed (RFC 8305), so that a dead or hanging
/// server delays the connection by that time only.
pub(crate) fn race_tcp(
    addresses: &[SocketAddr],
    deadline: Deadline,
) -> Result<(OwnedFd, SocketAddr), ConnectError> {
    let mut waiting = addresses.iter().copied().peekable();
    let mut running: Vec<Runner> = Vec::new();
    let mut failure = ConnectError::Unreachable(io::Error::other("it has no address"));
    let mut next = Instant::now();
    loop {
        if running.is_empty() || next <= Instant::now() {
            match waiting.next().map(Runner::start) {
                Some(Ok(runner)) => running.push(runner),
                Some(Err(error)) => failure = error,
                None if running.is_empty() => return Err(failure),
                None => {}
            }
            next = Instant::now() + STAGGER;
        }
        let mut limit = deadline.rest()?;
        if waiting.peek().is_some() {
            limit = limit.min(next.saturating_duration_since(Instant::now()));
        }
        let mut place = 0;
        for is_ready in ready(&running, limit)? {
            if !is_ready {
                place += 1;
                continue;
            }
            match running[place].go_on() {
                Ok(true) => {
                    let Runner { address, socket, .. } = running.swap_remove(place);
                    ioctl_fionbio(&socket, false).map_err(unreachable)?;
                    return Ok((socket, address));
                }
                Ok(false) => place += 1,
                Err(error) => {
                    running.remove(place);
                    (failure, next) = (error, Instant::now());
                }
            }
        }
    }
}

/// Returns for each runner whether its socket is ready, after at most `limit`.
fn ready(running: &[Runner], limit: Duration) -> Result<Vec<bool>, ConnectError> {
    let timeout = Timespec::try_from(limit).map_err(|_| ConnectError::TimedOut)?;
    let mut watched: Vec<PollFd<'_>> =
        running.iter().map(|one| PollFd::from_borrowed_fd(one.socket.as_fd(), one.awaits())).collect();
    match poll(&mut watched, Some(&timeout)) {
        Ok(_) => Ok(watched.iter().map(|one| !one.revents().is_empty()).collect()),
        Err(Errno::INTR) => Ok(vec![false; running.len()]),
        Err(errno) => Err(unreachable(errno)),
    }
}

/// Connects a blocking unix stream to the socket at `path`. Fails unless the path is trusted: see
/// [`trusted`].
pub(crate) fn dial_unix(path: &Path, deadline: Deadline) -> Result<OwnedFd, ConnectError> {
    // A missing socket is not an attack: its appliance has ended, or is about to start.
    if let Err(error) = std::fs::symlink_metadata(path) {
        let what = format!("{}: {error}", path.display());
        return Err(ConnectError::Unreachable(io::Error::new(error.kind(), what)));
    }
    let path = trusted::socket(path).map_err(ConnectError::Unavailable)?;
    let address = SocketAddrUnix::new(&path).map_err(unreachable)?;
    let socket = nonblocking_socket(AddressFamily::UNIX)?;
    // `connect` on a unix socket never stays in progress: it succeeds, or fails with EAGAIN when the
    // listener's backlog is full (connect(2)).
    while let Err(errno) = rustix::net::connect(&socket, &address) {
        match errno {
            Errno::AGAIN => std::thread::sleep(BACKLOG_PAUSE.min(deadline.rest()?)),
            Errno::INTR => {}
            errno => return Err(unreachable(errno)),
        }
        deadline.rest()?;
    }
    trusted::peer(socket.as_fd()).map_err(ConnectError::Unavailable)?;
    ioctl_fionbio(&socket, false).map_err(unreachable)?;
    Ok(socket)
}

fn nonblocking_socket(family: AddressFamily) -> Result<OwnedFd, ConnectError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, SocketType::STREAM, flags, None).map_err(unreachable)
}

/// Sends all of `bytes`.
pub(crate) fn send_all(
    socket: BorrowedFd<'_>,
    mut bytes: &[u8],
    deadline: Deadline,
) -> Result<(), ConnectError> {
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(unreachable(errno)),
        }
        deadline.rest()?;
    }
    Ok(())
}

/// Receives at least one byte; 0 at the end of the stream.
pub(crate) fn receive_some(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    deadline: Deadline,
) -> Result<usize, ConnectError> {
    loop {
        deadline.rest()?;
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((received, _)) => return Ok(received),
            Err(Errno::AGAIN) => wait(socket, PollFlags::IN, deadline)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(unreachable(errno)),
        }
    }
}

/// Waits until the socket is ready for one of `events`, or broken.
pub(crate) fn wait(
    socket: BorrowedFd<'_>,
    events: PollFlags,
    deadline: Deadline,
) -> Result<(), ConnectError> {
    loop {
        let rest = deadline.rest()?;
        let timeout = Timespec::try_from(rest).map_err(|_| ConnectError::TimedOut)?;
        match poll(&mut [PollFd::from_borrowed_fd(socket, events)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(unreachable(errno)),
        }
    }
}

/// The error for a connection that the other end closed when an answer was due.
pub(crate) fn closed() -> ConnectError {
    ConnectError::Unreachable(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"))
}

pub(crate) fn unreachable(errno: Errno) -> ConnectError {
    ConnectError::Unreachable(errno.into())
}
