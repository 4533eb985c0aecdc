//! Connecting to an NBD server and negotiating one export.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::sockopt;
use xpm_protocol::Visitor;
use xpm_protocol::nbd::handshake::client::{Agreed, ClientHandshake, HandshakeError, Wishes};
use xpm_protocol::nbd::{ExportInfo, ExportName};

use crate::connect::{
    ConnectError, Deadline, dial_tcp, dial_unix, race_tcp, receive_some, send_all, unreachable,
};
use crate::nbd::socket::widen_unix;

/// Bytes of one read during the handshake.
const READ_LEN: usize = 4096;
/// A TCP connection on which no data was acknowledged for this long counts as dead (`TCP_USER_TIMEOUT` of
/// tcp(7)): far above any pause of a working network, far below the hours of the system's default.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time after which a connection is probed, so that a dead peer is found without I/O too.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
/// Time between probes.
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// By TCP.
    Tcp(SocketAddr),
    /// On this host, by a unix socket.
    Unix(PathBuf),
}

/// A connection in the transmission phase, with simple replies, and no request in flight.
#[derive(Debug)]
pub struct Connected {
    /// The connection: blocking, closed on exec.
    pub stream: OwnedFd,
    /// The server's description of the export.
    pub info: ExportInfo,
}

/// Connects and negotiates. Blocks, and ends within `limit`, however slowly the server answers.
///
/// A TCP connection has `TCP_NODELAY`, and a dead peer is noticed within ten seconds (`TCP_USER_TIMEOUT`,
/// keepalive). The client does not request structured replies: the kernel's nbd driver does not understand
/// them, and for whole blocks of memory they only add bytes.
///
/// # Errors
/// See [`ConnectError`]; the connection is closed.
pub fn connect(target: &Target, name: &ExportName, limit: Duration) -> Result<Connected, ConnectError> {
    connect_to(target, &name.to_string(), limit)
}

/// As [`connect()`], but also sends which life of a client asks: an appliance admits only one life of a
/// grant's owner.
///
/// # Errors
/// See [`ConnectError`]; [`ConnectError::Refused`] with the reason when the appliance does not admit this
/// life.
pub fn connect_as(
    target: &Target,
    name: &ExportName,
    visitor: Option<&Visitor>,
    limit: Duration,
) -> Result<Connected, ConnectError> {
    enter(target, &name.to_string(), visitor, limit)
}

/// As [`connect()`], to an export of any name, also of a server that is no appliance: at most 4096 bytes
/// without NUL; the empty name selects the server's default export.
///
/// # Errors
/// See [`ConnectError`]; [`ConnectError::Refused`] for a name that the protocol does not allow.
pub fn connect_to(target: &Target, export: &str, limit: Duration) -> Result<Connected, ConnectError> {
    enter(target, export, None, limit)
}

fn enter(
    target: &Target,
    export: &str,
    visitor: Option<&Visitor>,
    limit: Duration,
) -> Result<Connected, ConnectError> {
    let deadline = Deadline::after(limit);
    let stream = match target {
        Target::Tcp(address) => {
            let stream = dial_tcp(*address, deadline)?;
            tune_tcp(stream.as_fd()).map_err(unreachable)?;
            stream
        }
        Target::Unix(path) => {
            let stream = dial_unix(path, deadline)?;
            widen_unix(stream.as_fd()).map_err(unreachable)?;
            stream
        }
    };
    let agreed = negotiate(stream.as_fd(), export, visitor, deadline)?;
    into_connected(stream)(agreed)
}

/// As [`connect()`], to the first of a server's TCP addresses that answers: a dead address costs 250 ms. When
/// one address refuses, the others are tried too. `name` is called for each handshake, because each handshake
/// needs its own generation; for `visitor` see [`connect_as`].
///
/// # Errors
/// See [`ConnectError`]: the first answer that was a refusal, or else the reason why the last address could
/// not be reached.
pub fn connect_first(
    addresses: &[SocketAddr],
    mut name: impl FnMut() -> ExportName,
    visitor: Option<&Visitor>,
    limit: Duration,
) -> Result<Connected, ConnectError> {
    let deadline = Deadline::after(limit);
    let mut left = addresses.to_vec();
    let mut answer: Option<ConnectError> = None;
    loop {
        let (stream, address) = match race_tcp(&left, deadline) {
            Ok(first) => first,
            Err(error) => return Err(answer.unwrap_or(error)),
        };
        left.retain(|other| *other != address);
        tune_tcp(stream.as_fd()).map_err(unreachable)?;
        match negotiate(stream.as_fd(), &name().to_string(), visitor, deadline)
            .and_then(into_connected(stream))
        {
            Ok(connected) => return Ok(connected),
            Err(error) => drop(answer.get_or_insert(error)),
        }
        if left.is_empty() {
            return Err(answer.unwrap_or(ConnectError::TimedOut));
        }
    }
}

/// Asks a server for an export without entering the export, and closes the connection: this shows whether the
/// server answers and knows the export. The request names no life of a client, so the life that an appliance
/// admitted stays admitted. Blocks, and ends within `limit`.
///
/// # Errors
/// As [`connect()`].
pub fn describe(target: &Target, name: &ExportName, limit: Duration) -> Result<ExportInfo, ConnectError> {
    let deadline = Deadline::after(limit);
    let stream = match target {
        Target::Tcp(address) => dial_tcp(*address, deadline)?,
        Target::Unix(path) => dial_unix(path, deadline)?,
    };
    Ok(negotiate_by(ClientHandshake::describing(wishes(&name.to_string(), None)), stream.as_fd(), deadline)?
        .info)
}

/// As [`describe`], of the first of several TCP addresses that answers.
///
/// # Errors
/// As [`connect_first`].
pub fn describe_first(
    addresses: &[SocketAddr],
    name: &ExportName,
    limit: Duration,
) -> Result<ExportInfo, ConnectError> {
    let deadline = Deadline::after(limit);
    let (stream, _) = race_tcp(addresses, deadline)?;
    Ok(negotiate_by(ClientHandshake::describing(wishes(&name.to_string(), None)), stream.as_fd(), deadline)?
        .info)
}

fn into_connected(stream: OwnedFd) -> impl FnOnce(Agreed) -> Result<Connected, ConnectError> {
    move |agreed| match agreed.leftover.is_empty() {
        true => Ok(Connected { stream, info: agreed.info }),
        false => Err(ConnectError::Protocol("it sent a reply before it had a request".into())),
    }
}

fn tune_tcp(stream: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let user_timeout = u32::try_from(TCP_USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, TCP_KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, TCP_KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_user_timeout(stream, user_timeout)
}

fn wishes(export: &str, visitor: Option<&Visitor>) -> Wishes {
    Wishes { export: export.to_owned(), structured: false, base_allocation: false, visitor: visitor.cloned() }
}

fn negotiate(
    stream: BorrowedFd<'_>,
    export: &str,
    visitor: Option<&Visitor>,
    deadline: Deadline,
) -> Result<Agreed, ConnectError> {
    negotiate_by(ClientHandshake::new(wishes(export, visitor)), stream, deadline)
}

fn negotiate_by(
    mut handshake: ClientHandshake,
    stream: BorrowedFd<'_>,
    deadline: Deadline,
) -> Result<Agreed, ConnectError> {
    let mut buffer = [0; READ_LEN];
    loop {
        let agreed = handshake.step().map_err(refusal)?;
        send_all(stream, &handshake.take_output(), deadline)?;
        if let Some(agreed) = agreed {
            return Ok(agreed);
        }
        match receive_some(stream, &mut buffer, deadline)? {
            0 => return Err(refusal(handshake.closed())),
            received => handshake.receive(&buffer[..received]),
        }
    }
}

fn refusal(error: HandshakeError) -> ConnectError {
    match error {
        HandshakeError::UnknownExport => ConnectError::UnknownExport,
        HandshakeError::Outdated => ConnectError::Outdated,
        HandshakeError::Policy(text) | HandshakeError::Refused(text) => ConnectError::Refused(text),
        HandshakeError::TlsRequired => ConnectError::Unsupported("TLS".into()),
        HandshakeError::BadName => ConnectError::Refused(error.to_string()),
        HandshakeError::ShuttingDown | HandshakeError::Closed => {
            ConnectError::Unreachable(io::Error::new(io::ErrorKind::ConnectionAborted, error))
        }
        HandshakeError::NotNbd | HandshakeError::Protocol(_) => ConnectError::Protocol(error.to_string()),
    }
}
