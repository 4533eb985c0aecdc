//! The handshake of one client: reads its key, checks its life, and passes the memory.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use xpm_protocol::{GrantKey, Visitor};

use super::registry::Registered;
use super::{Inner, ShmExport};
use crate::handshakes::{FIRST_MESSAGE, Ticket};
use crate::shm::wire::{Answer, BATCH_MAX, BadHello, HELLO_LEN, Hello, LENGTH_LEN, TEXT_LEN_MAX};

/// Pause before the next try when the limit of descriptors in transit is reached.
const PASS_PAUSE: Duration = Duration::from_millis(5);

/// The resources of an admitted client, held until it disconnects.
pub(super) struct Inside {
    _registered: Registered,
    _permit: OwnedSemaphorePermit,
}

/// Runs until the memory was passed; `None` when the client was refused and the connection is to be closed.
/// The ticket is dropped once the client has shown a valid key.
pub(super) async fn handshake(
    inner: &Arc<Inner>,
    stream: &Arc<UnixStream>,
    ticket: Ticket,
) -> io::Result<Option<Inside>> {
    let mut hello = [0; HELLO_LEN];
    tokio::time::timeout(FIRST_MESSAGE, read_all(stream, &mut hello)).await??;
    let hello = match Hello::decode(&hello) {
        Ok(hello) => hello,
        Err(BadHello::Version) => return refuse(stream, Answer::Version).await,
        Err(BadHello::Magic) => return Ok(None),
    };
    let visitor = match read_visitor(stream, hello.visitor_len).await? {
        Ok(visitor) => visitor,
        Err(NoVisitor) => return Ok(None),
    };
    if let Err(why) = admit(inner, &hello.key, visitor.clone()).await {
        return refuse_because(stream, &why).await;
    }
    let Some(export) = open(inner, &hello.key).await else { return refuse(stream, Answer::Unknown).await };
    let Ok(permit) = inner.limit.clone().try_acquire_owned() else { return Ok(None) };
    drop(ticket);
    let registered = Registered::new(inner.clone(), export.group, visitor.clone(), stream.clone());
    // A revocation that happened meanwhile is seen here, unless `close_group` already saw the connection.
    match open(inner, &hello.key).await {
        Some(again) if again.group == export.group => {}
        _ => return refuse(stream, Answer::Unknown).await,
    }
    // Another life that was admitted meanwhile is seen here, unless its admission already saw the connection.
    if let Err(why) = admit(inner, &hello.key, visitor).await {
        return refuse_because(stream, &why).await;
    }
    pass(stream, &export).await?;
    Ok(Some(Inside { _registered: registered, _permit: permit }))
}

async fn open(inner: &Arc<Inner>, key: &GrantKey) -> Option<ShmExport> {
    let (inner, key) = (inner.clone(), key.clone());
    tokio::task::spawn_blocking(move || inner.exports.open(&key)).await.ok().flatten()
}

/// The bytes in the visitor's place are no visitor.
struct NoVisitor;

async fn read_visitor(stream: &UnixStream, len: u32) -> io::Result<Result<Option<Visitor>, NoVisitor>> {
    if len == 0 {
        return Ok(Ok(None));
    }
    let mut text = vec![0; len as usize];
    read_all(stream, &mut text).await?;
    let visitor = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
    Ok(visitor.map(Some).ok_or(NoVisitor))
}

async fn admit(inner: &Arc<Inner>, key: &GrantKey, visitor: Option<Visitor>) -> Result<(), String> {
    let (inner, key) = (inner.clone(), key.clone());
    let admitted = tokio::task::spawn_blocking(move || inner.exports.admit(&key, visitor.as_ref()));
    admitted.await.unwrap_or_else(|_| Err("the appliance failed".to_owned()))
}

async fn refuse_because(stream: &UnixStream, why: &str) -> io::Result<Option<Inside>> {
    let text = &why.as_bytes()[..why.len().min(TEXT_LEN_MAX)];
    write_all(stream, &Answer::Refused { text_len: text.len() as u32 }.encode()).await?;
    write_all(stream, text).await?;
    Ok(None)
}

async fn refuse(stream: &UnixStream, answer: Answer) -> io::Result<Option<Inside>> {
    write_all(stream, &answer.encode()).await?;
    Ok(None)
}

async fn pass(stream: &UnixStream, export: &ShmExport) -> io::Result<()> {
    let len = export.regions.iter().try_fold(0_u64, |sum, (_, len)| sum.checked_add(*len));
    let regions = u32::try_from(export.regions.len()).ok();
    let (Some(len), Some(regions)) = (len, regions) else { return Err(io::ErrorKind::InvalidInput.into()) };
    write_all(stream, &Answer::Granted { regions, len }.encode()).await?;
    for batch in export.regions.chunks(BATCH_MAX) {
        pass_batch(stream, batch).await?;
    }
    Ok(())
}

async fn pass_batch(stream: &UnixStream, batch: &[(Arc<OwnedFd>, u64)]) -> io::Result<()> {
    let mut lengths = Vec::with_capacity(batch.len() * LENGTH_LEN);
    batch.iter().for_each(|(_, len)| lengths.extend(len.to_be_bytes()));
    let sent = loop {
        match stream.async_io(Interest::WRITABLE, || send_batch(stream.as_fd(), &lengths, batch)).await {
            Ok(sent) => break sent,
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                tokio::time::sleep(PASS_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    };
    // The kernel passed the descriptors with the first byte.
    write_all(stream, &lengths[sent..]).await
}

fn send_batch(stream: BorrowedFd<'_>, lengths: &[u8], batch: &[(Arc<OwnedFd>, u64)]) -> io::Result<usize> {
    let descriptors: Vec<BorrowedFd<'_>> = batch.iter().map(|(memory, _)| memory.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH_MAX))];
    let mut passed = SendAncillaryBuffer::new(&mut space);
    if !passed.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream, &[IoSlice::new(lengths)], &mut passed, flags)?)
}

async fn read_all(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        stream.readable().await?;
        match stream.try_read(&mut buffer[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => filled += received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
