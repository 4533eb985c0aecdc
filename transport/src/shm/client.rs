//! The client's end of shared memory: requesting the memory of a grant, and accessing it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use xpm_protocol::{GrantKey, Visitor};

pub use super::link::ShmLink;
use super::mapping::{AppendError, Mapping};
use super::wire::{ANSWER_LEN, Answer, BATCH_MAX, Hello, LENGTH_LEN, TEXT_LEN_MAX};
pub use crate::connect::ConnectError;
use crate::connect::{Deadline, closed, dial_unix, receive_some, send_all, unreachable, wait};
use crate::io::IoBuf;
use crate::sound::{self, BadMemory};

/// The mapped memory of a grant. When the last owner drops it, the memory is unmapped, and closing the
/// connection notifies the appliance.
#[derive(Debug)]
pub struct ShmGrant {
    // Field order is drop order: the memory is unmapped before the appliance sees the connection close.
    mapping: Mapping,
    connection: OwnedFd,
}

/// Asks the appliance at the unix socket `path` for the memory of a grant and maps it, without
/// touching it. Blocks, and ends within `limit`.
///
/// A process that locks its memory (mlockall(2) with `MCL_FUTURE`) needs a lock limit as large as the grant,
/// though none of the grant's memory becomes locked.
///
/// # Errors
/// See [`ConnectError`]. Memory whose pages the appliance could remove while the client uses them (no memfd,
/// not sealed against shrinking, shorter than announced) is refused as [`ConnectError::Protocol`].
pub fn connect(path: &Path, key: &GrantKey, limit: Duration) -> Result<Arc<ShmGrant>, ConnectError> {
    connect_as(path, key, None, limit)
}

/// As [`connect`], but also sends which life of a client asks. An appliance of a version before lives existed
/// is asked again without it.
///
/// # Errors
/// As [`connect`]; [`ConnectError::Refused`] with the reason when the appliance does not admit this life.
pub fn connect_as(
    path: &Path,
    key: &GrantKey,
    visitor: Option<&Visitor>,
    limit: Duration,
) -> Result<Arc<ShmGrant>, ConnectError> {
    // A page of the appliance's memory can turn out to be bad: that is an error of an operation, and must not
    // end this process.
    sound::survive().map_err(ConnectError::Memory)?;
    let deadline = Deadline::after(limit);
    let connection = dial_unix(path, deadline)?;
    send_all(connection.as_fd(), &Hello::encode(key, visitor), deadline)?;
    let answer = receive_answer(connection.as_fd(), deadline)?;
    let (regions, len) = match answer {
        Answer::Granted { regions, len } => (regions as usize, len),
        Answer::Unknown => return Err(ConnectError::UnknownExport),
        Answer::Version if visitor.is_some() => return connect_as(path, key, None, deadline.rest()?),
        Answer::Refused { text_len } => {
            return Err(ConnectError::Refused(receive_text(connection.as_fd(), text_len, deadline)?));
        }
        Answer::Version => {
            return Err(ConnectError::Unsupported("another version of the shm protocol".into()));
        }
    };
    let mapping = receive_regions(connection.as_fd(), regions, len, deadline)?;
    Ok(Arc::new(ShmGrant { mapping, connection }))
}

fn receive_text(connection: BorrowedFd<'_>, len: u32, deadline: Deadline) -> Result<String, ConnectError> {
    let mut text = vec![0; (len as usize).min(TEXT_LEN_MAX)];
    let mut filled = 0;
    while filled < text.len() {
        match receive_some(connection, &mut text[filled..], deadline)? {
            0 => return Err(closed()),
            received => filled += received,
        }
    }
    Ok(String::from_utf8_lossy(&text).chars().filter(|one| !one.is_control()).collect())
}

fn receive_answer(connection: BorrowedFd<'_>, deadline: Deadline) -> Result<Answer, ConnectError> {
    let mut bytes = [0; ANSWER_LEN];
    let mut filled = 0;
    while filled < ANSWER_LEN {
        match receive_some(connection, &mut bytes[filled..], deadline)? {
            0 => return Err(closed()),
            received => filled += received,
        }
    }
    Answer::decode(&bytes).map_err(|bad| broken(bad.0))
}

fn receive_regions(
    connection: BorrowedFd<'_>,
    regions: usize,
    len: u64,
    deadline: Deadline,
) -> Result<Mapping, ConnectError> {
    let mut mapping = Mapping::reserve(len).map_err(ConnectError::Memory)?;
    let mut batch = Batch::default();
    let mut left = regions;
    while left > 0 {
        batch.receive(connection, left, deadline)?;
        // Each descriptor is closed as soon as its region is mapped, so that a grant of thousands of regions
        // does not need thousands of descriptors.
        for (memory, len) in batch.complete() {
            mapping.append(memory.as_fd(), len).map_err(append_error)?;
            left -= 1;
        }
    }
    if mapping.len() != len || !batch.is_empty() {
        return Err(broken("regions shorter than their grant"));
    }
    Ok(mapping)
}

/// Lengths and descriptors that were received and are not mapped yet.
#[derive(Default)]
struct Batch {
    lengths: Vec<u8>,
    memory: Vec<OwnedFd>,
}

impl Batch {
    /// Receives a part of the next regions. `left` counts the regions that are not mapped yet, including
    /// those in the batch.
    fn receive(
        &mut self,
        connection: BorrowedFd<'_>,
        left: usize,
        deadline: Deadline,
    ) -> Result<(), ConnectError> {
        let mut bytes = [0; BATCH_MAX * LENGTH_LEN];
        let room = bytes.len().min(left * LENGTH_LEN - self.lengths.len());
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH_MAX))];
        let mut passed = RecvAncillaryBuffer::new(&mut space);
        wait(connection, PollFlags::IN, deadline)?;
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(connection, &mut [IoSliceMut::new(&mut bytes[..room])], &mut passed, flags);
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(errno) => return Err(unreachable(errno)),
        };
        for message in passed.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.memory.extend(descriptors);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.memory.len() > left.min(2 * BATCH_MAX) {
            return Err(broken("more descriptors than regions"));
        }
        if received.bytes == 0 {
            return Err(closed());
        }
        self.lengths.extend_from_slice(&bytes[..received.bytes]);
        Ok(())
    }

    /// Takes the regions whose length and descriptor have both arrived.
    fn complete(&mut self) -> Vec<(OwnedFd, u64)> {
        let count = self.memory.len().min(self.lengths.len() / LENGTH_LEN);
        let lengths: Vec<u8> = self.lengths.drain(..count * LENGTH_LEN).collect();
        let lengths = lengths.as_chunks::<LENGTH_LEN>().0.iter().map(|length| u64::from_be_bytes(*length));
        self.memory.drain(..count).zip(lengths).collect()
    }

    fn is_empty(&self) -> bool {
        self.memory.is_empty() && self.lengths.is_empty()
    }
}

fn append_error(error: AppendError) -> ConnectError {
    match error {
        AppendError::Bad(what) => broken(what),
        AppendError::System(error) => ConnectError::Memory(error),
    }
}

fn broken(what: &str) -> ConnectError {
    ConnectError::Protocol(what.into())
}

impl ShmGrant {
    /// Length of the grant's export (its regions in order), in bytes.
    pub const fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// The address of `len` bytes at `offset`, valid for as long as the grant lives; none unless all of them
    /// lie within the export. The regions follow each other without gaps.
    pub fn direct(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        NonNull::new(self.part(offset, len as u64)?.as_ptr())
    }

    /// Whether the appliance closed the connection. One system call.
    pub fn is_revoked(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let watched = PollFd::from_borrowed_fd(self.connection.as_fd(), PollFlags::IN | PollFlags::RDHUP);
        // The appliance sends nothing after the handshake, so any event means that it closed the connection.
        matches!(poll(&mut [watched], Some(&now)), Ok(1..))
    }

    /// Readable when the grant was revoked.
    pub fn wait_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    pub(super) fn part(&self, offset: u64, len: u64) -> Option<IoBuf> {
        self.mapping.part(offset, len)
    }

    pub(super) fn trim(&self, part: IoBuf) -> Result<(), BadMemory> {
        self.mapping.trim(part)
    }
}
