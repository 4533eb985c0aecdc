//! Accepting connections and negotiating exports, on the control plane.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use xpm_protocol::Visitor;
use xpm_protocol::gate::Origin;
use xpm_protocol::nbd::handshake::server::{NoExport, ServerHandshake, Step};

use super::{Exports, Negotiated, Opened, Place, Server, registry};
use crate::accept::{Accept, Listener};
use crate::handshakes::{FIRST_MESSAGE, Ticket};
use crate::nbd::socket::widen_unix;

/// Bytes of one read during a handshake.
const READ_LEN: usize = 4096;
/// A TCP peer that does not acknowledge sent data for this long counts as dead.
const TCP_USER_TIMEOUT_MS: u32 = 30_000;
/// An idle connection is probed after this time, and then at this interval, so that a dead host is found
/// without I/O too.
pub(super) const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// A stream on which a handshake runs before it is passed to a loop.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sized + 'static {
    fn origin(&self) -> Origin;
    fn tune(&self) -> io::Result<()>;
    fn into_fd(self) -> io::Result<OwnedFd>;
}

impl Stream for TcpStream {
    fn origin(&self) -> Origin {
        // For a peer that has disconnected already the origin does not matter.
        self.peer_addr().map_or(Origin::Local, |address| address.ip().into())
    }

    /// Small replies are sent without delay; a peer that vanished is noticed.
    fn tune(&self) -> io::Result<()> {
        self.set_nodelay(true)?;
        sockopt::set_socket_keepalive(self.as_fd(), true)?;
        sockopt::set_tcp_keepidle(self.as_fd(), TCP_KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(self.as_fd(), TCP_KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_user_timeout(self.as_fd(), TCP_USER_TIMEOUT_MS)?;
        Ok(())
    }

    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

impl Stream for UnixStream {
    fn origin(&self) -> Origin {
        Origin::Local
    }

    fn tune(&self) -> io::Result<()> {
        Ok(widen_unix(self.as_fd())?)
    }

    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

impl Server {
    /// Accepts clients of a TCP socket on the current tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn listen_tcp(
        &self,
        listener: std::net::TcpListener,
        exports: Arc<dyn Exports>,
    ) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        Ok(self.listen(TcpListener::from_std(listener)?, exports))
    }

    /// Accepts clients of a unix socket on the current tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn listen_unix(
        &self,
        listener: std::os::unix::net::UnixListener,
        exports: Arc<dyn Exports>,
    ) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        Ok(self.listen(UnixListener::from_std(listener)?, exports))
    }

    fn listen<L: Accept<Stream: Stream>>(&self, listener: L, exports: Arc<dyn Exports>) -> Listener {
        let server = self.clone();
        Listener::start(listener, move |stream| server.accepted(stream, &exports))
    }

    fn accepted<S: Stream>(&self, stream: S, exports: &Arc<dyn Exports>) {
        // When all places are taken, returning drops the stream, which closes it.
        if self.connections(None) < self.inner.options.connections_max {
            let origin = stream.origin();
            self.inner
                .handshakes
                .begin(origin, |ticket| handshake(self.clone(), stream, exports.clone(), ticket));
        }
    }
}

/// Runs one handshake within the time limit.
async fn handshake<S: Stream>(server: Server, mut stream: S, exports: Arc<dyn Exports>, ticket: Ticket) {
    let limit = server.inner.options.handshake;
    match tokio::time::timeout(limit, negotiate(&server, &mut stream, &exports, ticket)).await {
        Ok(Ok(Some((opened, place, negotiated)))) => {
            let stream = stream.tune().and_then(|()| stream.into_fd());
            let served = stream.and_then(|fd| server.take(fd, opened, place, negotiated));
            if let Err(error) = served {
                tracing::warn!(%error, "cannot serve a connection");
            }
        }
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a handshake broke"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
}

/// Runs until an export was entered; `None` when the connection is to be closed instead. The ticket is
/// dropped when the client has entered an export, because the export's name contains its key.
async fn negotiate<S: Stream>(
    server: &Server,
    stream: &mut S,
    exports: &Arc<dyn Exports>,
    ticket: Ticket,
) -> io::Result<Option<(Opened, Place, Negotiated)>> {
    let mut handshake = ServerHandshake::new();
    let mut opened = Found::Nothing(NoExport::Unknown);
    let mut buffer = vec![0; READ_LEN];
    let mut next: Option<Step> = None;
    let (mut ticket, mut has_spoken) = (Some(ticket), false);
    loop {
        let step = next.take().unwrap_or_else(|| handshake.step());
        stream.write_all(&handshake.take_output()).await?;
        match step {
            Step::Input => {
                let count = match has_spoken {
                    true => stream.read(&mut buffer).await?,
                    false => tokio::time::timeout(FIRST_MESSAGE, stream.read(&mut buffer)).await??,
                };
                has_spoken = true;
                match count {
                    0 => return Ok(None),
                    count => handshake.receive(&buffer[..count]),
                }
            }
            Step::Open(name) => {
                let enters = handshake.enters().then(|| handshake.visitor().cloned());
                opened = open(server.clone(), exports.clone(), name, enters).await;
                if matches!(opened, Found::Export(_, Some(_))) {
                    drop(ticket.take());
                }
                next = match &opened {
                    Found::Outdated => handshake.outdated(),
                    Found::Nothing(why) => handshake.found(Err(why)),
                    Found::Export(opened, _) => handshake.found(Ok(&opened.info)),
                };
            }
            Step::List => handshake.listed(exports.list().as_deref()),
            Step::Ready(negotiated) => {
                let Found::Export(mut opened, Some(place)) = opened else { return Ok(None) };
                opened.info = negotiated.info;
                let agreed = Negotiated {
                    structured: negotiated.structured,
                    base_allocation: negotiated.base_allocation,
                    leftover: negotiated.leftover,
                };
                return Ok(Some((opened, place, agreed)));
            }
            Step::Close(_) => {
                stream.shutdown().await?;
                return Ok(None);
            }
        }
    }
}

/// The result of looking an export's name up.
enum Found {
    /// No export, or none for this client.
    Nothing(NoExport),
    /// An export, with the registered place of the connection if it enters the export.
    Export(Opened, Option<Place>),
    /// An export that has a newer connection of the same session and queue.
    Outdated,
}

/// Opens an export. When the client enters it (as a visitor, if it named one) rather than asks about it,
/// three steps happen before the answer: the client is admitted or refused, the connection gets its place,
/// and the older connection that it replaces is closed.
async fn open(
    server: Server,
    exports: Arc<dyn Exports>,
    name: String,
    enters: Option<Option<Visitor>>,
) -> Found {
    let opening = tokio::task::spawn_blocking(move || {
        let Some(opened) = exports.open(&name) else { return Found::Nothing(NoExport::Unknown) };
        let Some(visitor) = enters else { return Found::Export(opened, None) };
        if let Err(why) = exports.admit(&opened, visitor.as_ref()) {
            return Found::Nothing(NoExport::Refused(why));
        }
        let place = match server.register(opened.group, opened.session, visitor.clone()) {
            Ok(place) => place,
            Err(registry::Outdated) => return Found::Outdated,
        };
        match exports.is_admitted(&opened, visitor.as_ref()) {
            true => Found::Export(opened, Some(place)),
            false => {
                let why = "another life of this client was admitted just now";
                Found::Nothing(NoExport::Refused(why.to_owned()))
            }
        }
    });
    opening.await.unwrap_or(Found::Nothing(NoExport::Unknown))
}
