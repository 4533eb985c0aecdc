//! The messages between a serving process and one that stands by, over a unix socket: JSON, each message
//! after its length, and with one of them the lock of the state directory.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xpm_protocol::{ClientId, Life, Name};

/// Time limit for the other end to receive a message, or to send the rest of one.
const LIMIT: Duration = Duration::from_secs(5);
/// Longest message, in bytes: the map of 16384 regions is a few megabytes.
const LEN_MAX: usize = 64 << 20;

/// A message of the serving process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToStandby {
    /// The first message: the serving process, the version of its records, the client's id for the allocator,
    /// and the client's life, which continues in the process that takes over.
    Hello {
        pid: u32,
        records: u32,
        client: ClientId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        life: Option<Life>,
    },
    /// A record, as it is on disk from now on.
    Record(String),
    /// Sent with the descriptor that serves the device of this name.
    Descriptor(Name),
    /// The record of this name was removed.
    Removed(Name),
    /// All present records have been sent.
    Told,
    /// Sent with the lock: the receiver takes over when the serving process is dead.
    Lock,
    /// The serving process is about to end, so that the receiver takes over; with `ends`, until no device is
    /// in use.
    Go { ends: bool },
    /// The serving process is alive.
    Beat,
    /// The receiver is not needed as a standby, for this reason.
    Refused(String),
}

/// A message of a process that stands by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromStandby {
    /// The first message: its process, whether it wants to serve as soon as possible, and the newest version
    /// of records that it reads.
    Hello { pid: u32, successor: bool, records: u32 },
    /// It can take over from now on, with this memory locked, in bytes. From a successor, this is the request
    /// to serve.
    Ready { locked: u64 },
    /// It is alive.
    Beat,
}

/// The sending half, shared by all senders.
#[derive(Debug, Clone)]
pub(super) struct Sender(Arc<Mutex<UnixStream>>);

/// The receiving half.
#[derive(Debug)]
pub(super) struct Receiver(UnixStream);

/// Both halves of a socket.
pub(super) fn split(socket: UnixStream) -> io::Result<(Sender, Receiver)> {
    socket.set_write_timeout(Some(LIMIT))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let receiver = Receiver(socket.try_clone()?);
    Ok((Sender(Arc::new(Mutex::new(socket))), receiver))
}

impl Sender {
    /// Sends a message, with a descriptor if one is given. Blocks until there is room for it, up to a time
    /// limit; after an error no more messages can be sent.
    pub(super) fn send(&self, message: &impl Serialize, passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let len = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?.to_le_bytes();
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let passed = passed.as_slice();
        if !passed.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(passed)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = loop {
            match sendmsg(&*socket, &[IoSlice::new(&len)], &mut rights, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result?,
            }
        };
        socket.write_all(&len[sent..])?;
        socket.write_all(&text)
    }

    /// Closes the connection for all holders of the sending half.
    pub(super) fn close(&self) {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Receiver {
    /// The socket, to be polled.
    pub(super) const fn socket(&self) -> &UnixStream {
        &self.0
    }

    /// The next message, and the descriptor that was passed with it. `UnexpectedEof` when the other end is
    /// closed.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<(T, Option<OwnedFd>)> {
        let mut len = [0; 4];
        let (mut read, mut passed) = (0, None);
        while read < len.len() {
            let (count, descriptor) = self.receive_some(&mut len[read..])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            read += count;
            passed = descriptor.or(passed);
        }
        let len = u32::from_le_bytes(len) as usize;
        if len > LEN_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; len];
        self.0.read_exact(&mut text)?;
        Ok((serde_json::from_slice(&text)?, passed))
    }

    fn receive_some(&self, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(bytes)];
            match recvmsg(&self.0, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result?,
            }
        };
        let passed = rights.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok((received.bytes, passed))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn messages_arrive_in_order_and_the_lock_with_its_message() {
        let (here, there) = UnixStream::pair().unwrap();
        let (sender, _) = split(here).unwrap();
        let (_, mut receiver) = split(there).unwrap();
        let file = tempfile::tempfile().unwrap();
        let long = "x".repeat(100_000);
        let said = [ToStandby::Record(long), ToStandby::Lock, ToStandby::Go { ends: true }];
        let saying = said.clone();
        let speaker = std::thread::spawn(move || {
            for message in &saying {
                let lock = (*message == ToStandby::Lock).then(|| file.as_fd());
                sender.send(message, lock).unwrap();
            }
        });
        for message in said {
            let (heard, passed) = receiver.receive::<ToStandby>().unwrap();
            assert_eq!(passed.is_some(), heard == ToStandby::Lock);
            assert_eq!(heard, message);
        }
        speaker.join().unwrap();
        assert_eq!(receiver.receive::<ToStandby>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn invalid_messages_are_refused() {
        for bytes in [&[255; 8][..], &[2, 0, 0, 0, b'{', b'x']] {
            let (mut here, there) = UnixStream::pair().unwrap();
            let (_, mut receiver) = split(there).unwrap();
            here.write_all(bytes).unwrap();
            assert!(receiver.receive::<FromStandby>().is_err());
        }
    }
}
