//! Carries a machine's state between QEMU's unix socket and a connection or a file. QEMU itself listens to no network, so nobody
//! but the authenticated other side can give it a state, and what was sent is counted.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;

use crate::Error;

/// How long QEMU may take to connect after it was told to.
const ACCEPT_LIMIT: Duration = Duration::from_secs(20);

/// Listens where QEMU will connect to.
pub(crate) fn listen(socket: &Path) -> Result<UnixListener, Error> {
    // Of an attempt of before.
    let _ = std::fs::remove_file(socket);
    UnixListener::bind(socket).map_err(Error::io("listen at", socket))
}

/// The connection of QEMU.
pub(crate) async fn accept(listener: &UnixListener) -> Result<UnixStream, Error> {
    match timeout(ACCEPT_LIMIT, listener.accept()).await {
        Ok(Ok((stream, _))) => Ok(stream),
        Ok(Err(error)) => Err(Error::Machine(format!("cannot accept QEMU's connection: {error}"))),
        Err(_) => Err(Error::Machine(format!("QEMU did not send its state within {ACCEPT_LIMIT:?}"))),
    }
}

/// Carries bytes both ways until both sides have ended. Returns how many came from QEMU, and from the other side, where `early`
/// was received already.
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
