//! Reaching the other end, within a limit of time: what the transports' clients have in common.
//!
//! Everything here blocks, and belongs on a thread that may wait; no data path uses it.

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

/// How long to wait before a unix socket whose queue of connections is full is tried again.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);

/// Time after which the next of several addresses is tried, while none before has answered.
const STAGGER: Duration = Duration::from_millis(250);

/// Why there is no connection, and so what to do next.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing accepts connections there, or the connection broke: try again later.
    #[error("cannot reach it: {0}")]
    Unreachable(#[source] io::Error),
    /// It did not answer in time: try again later.
    #[error("it did not answer within the time limit")]
    TimedOut,
    /// It has no export of this name: it restarted without the memory, or the grant was revoked.
    #[error("it has no such export")]
    UnknownExport,
    /// It has the export, and a newer connection of the same session and queue: another process uses the same
    /// ownership, or the numbers of this process are too low. Try again later, with a higher number.
    #[error(
        "it has a newer connection of this queue: another process uses the same ownership of the allocation"
    )]
    Outdated,
    /// It knows the export and does not give it to this client.
    #[error("it refuses the export: {0}")]
    Refused(String),
    /// It asks for something that this client does not speak.
    #[error("it asks for what this client cannot do: {0}")]
    Unsupported(String),
    /// This host lacks what it takes; the text says what.
    #[error("{0}")]
    Unavailable(String),
    /// It does not follow the protocol; something else may listen there.
    #[error("it does not follow the protocol: {0}")]
    Protocol(String),
    /// The memory that it lends cannot be mapped into this process.
    #[error("cannot map its memory: {0}")]
    Memory(#[source] io::Error),
}

/// When a connection attempt has to be over.
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

/// A blocking TCP stream to `address`.
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

/// An attempt to reach one of several addresses.
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

    /// Its socket is ready. Whether its server said something.
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

/// A blocking TCP stream to that of the addresses whose server speaks first, in a protocol where servers do. Each is tried
/// [`STAGGER`] after the one before it, or at once when those before have failed (RFC 8305), so that one that is dead, or
/// whose server stands still, costs that time.
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

/// Which of these have something to go on with, after at most `limit`.
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

/// A blocking unix stream to the socket at `path`, which has to be one that can be trusted: see [`trusted`].
pub(crate) fn dial_unix(path: &Path, deadline: Deadline) -> Result<OwnedFd, ConnectError> {
    // One that is not there is no trap: its appliance has ended, or starts.
    if let Err(error) = std::fs::symlink_metadata(path) {
        let what = format!("{}: {error}", path.display());
        return Err(ConnectError::Unreachable(io::Error::new(error.kind(), what)));
    }
    let path = trusted::socket(path).map_err(ConnectError::Unavailable)?;
    let address = SocketAddrUnix::new(&path).map_err(unreachable)?;
    let socket = nonblocking_socket(AddressFamily::UNIX)?;
    // A unix socket connects at once or, when the listener's queue is full, not at all (connect(2)).
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

/// The other end closed the connection when an answer was due.
pub(crate) fn closed() -> ConnectError {
    ConnectError::Unreachable(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"))
}

pub(crate) fn unreachable(errno: Errno) -> ConnectError {
    ConnectError::Unreachable(errno.into())
}
