//! Carries a machine's state between QEMU's unix socket and a connection or a file. QEMU itself does not listen on
//! the network, so only the authenticated other side can send it a state, and the sent bytes are counted.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;

use crate::Error;

/// How long QEMU may take to connect after it was told to.
const ACCEPT_LIMIT: Duration = Duration::from_secs(20);

/// Listens at the socket that QEMU will connect to.
pub(crate) fn listen(socket: &Path) -> Result<UnixListener, Error> {
    // A socket left by an earlier attempt.
    let _ = std::fs::remove_file(socket);
    UnixListener::bind(socket).map_err(Error::io("listen at", socket))
}

/// Accepts QEMU's connection.
pub(crate) async fn accept(listener: &UnixListener) -> Result<UnixStream, Error> {
    match timeout(ACCEPT_LIMIT, listener.accept()).await {
        Ok(Ok((stream, _))) => Ok(stream),
        Ok(Err(error)) => Err(Error::Machine(format!("cannot accept QEMU's connection: {error}"))),
        Err(_) => Err(Error::Machine(format!("QEMU did not send its state within {ACCEPT_LIMIT:?}"))),
    }
}

/// Carries bytes in both directions until both sides have ended. `early` are bytes that were received from the other
/// side already. Returns the number of bytes from QEMU, and from the other side.
pub(crate) async fn carry(
    mut qemu: UnixStream,
    mut network: TcpStream,
    early: &[u8],
) -> std::io::Result<(u64, u64)> {
    let _ = network.set_nodelay(true);
    qemu.write_all(early).await?;
    let (sent, received) = copy_bidirectional(&mut qemu, &mut network).await?;
    Ok((sent, received + early.len() as u64))
}
