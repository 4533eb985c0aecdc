//! Accepting connections, on the control plane.

use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// How long accepting pauses after an error such as "too many open files".
const PAUSE: Duration = Duration::from_millis(100);

/// A listening socket. Dropping it ends accepting; accepted connections stay open.
#[derive(Debug)]
pub struct Listener {
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Spawns a task on the current tokio runtime that calls `accepted` with each connection. `accepted` must
    /// not block.
    pub(crate) fn start<L: Accept>(socket: L, accepted: impl Fn(L::Stream) + Send + 'static) -> Listener {
        let task = tokio::spawn(async move {
            loop {
                match socket.next().await {
                    Ok(stream) => accepted(stream),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
        Listener { task }
    }
}

/// A listening socket that yields accepted streams.
pub(crate) trait Accept: Send + Sync + 'static {
    type Stream: Send;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}
