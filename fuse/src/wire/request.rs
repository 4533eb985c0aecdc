//! A request as a whole.

use super::cursor::Cursor;
use super::{Fault, IN_HEADER_LEN, Operation};

/// The common parts of a request and its reply.
///
/// A request that is delivered again after [`notify::resend`](super::notify::resend) has bit 63 set, and otherwise the
/// same number. The reply has the number as it came, bit 63 included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unique(u64);

impl Unique {
    const RESEND: u64 = 1 << 63;

    /// This number as it is on the wire.
    pub const fn from_raw(raw: u64) -> Unique {
        Unique(raw)
    }

    /// As it is on the wire.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Whether the request was delivered before, perhaps to a process that is dead: its effect may be there already.
    pub const fn is_resent(self) -> bool {
        self.0 & Self::RESEND != 0
    }

    /// The number of the first delivery, by which INTERRUPT names a request.
    pub const fn first(self) -> Unique {
        Unique(self.0 & !Self::RESEND)
    }
}

/// The head of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The number of the operation.
    pub opcode: u32,
    /// The number that the reply has to repeat.
    pub unique: Unique,
    /// The file or directory in question; 0 where there is none.
    pub nodeid: u64,
    /// The user that sends the request. Of a WRITE out of the page cache it is not the user that wrote.
    pub uid: u32,
    /// The group of the sender.
    pub gid: u32,
    /// The thread that asks; 0 where it is the kernel itself, or is in another namespace of processes.
    pub pid: u32,
}

/// A request of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// The process and the file.
    pub header: Header,
    /// The operation.
    pub operation: Operation<'a>,
}

/// Bytes that are not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request of /dev/fuse (operation {opcode:?}) is malformed: {fault}")]
pub struct Malformed {
    /// To be answered with an error, where the header could be read and the operation has a reply.
    pub unique: Option<Unique>,
    /// The operation's number, where it could be read.
    pub opcode: Option<u32>,
    /// The fault.
    pub fault: Fault,
}

impl<'a> Request<'a> {
    /// The request that was read in one read(2).
    ///
    /// Fields that a newer kernel appends to an operation of fixed length are ignored.
    ///
    /// # Errors
    /// [`Malformed`]; whoever waits in the kernel is to be answered with EINVAL where `unique` is there.
    pub fn parse(bytes: &'a [u8]) -> Result<Request<'a>, Malformed> {
        let (header, body) =
            parse_header(bytes).map_err(|fault| Malformed { unique: None, opcode: None, fault })?;
        let operation = body.and_then(|body| Operation::parse(header.opcode, body)).map_err(|fault| {
            let answered = Operation::has_reply(header.opcode);
            Malformed { unique: answered.then_some(header.unique), opcode: Some(header.opcode), fault }
        })?;
        Ok(Request { header, operation })
    }
}

/// The header, and the operation's bytes without extensions.
fn parse_header(bytes: &[u8]) -> Result<(Header, Result<Cursor<'_>, Fault>), Fault> {
    let (head, body) = bytes.split_at_checked(IN_HEADER_LEN).ok_or(Fault::TooShort)?;
    let mut head = Cursor::new(head);
    let said = head.u32()?;
    let opcode = head.u32()?;
    let unique = Unique(head.u64()?);
    let header =
        Header { opcode, unique, nodeid: head.u64()?, uid: head.u32()?, gid: head.u32()?, pid: head.u32()? };
    // Of extensions (in units of 8 bytes) there are none that this crate asks for.
    let extensions = usize::from(head.u16()?) * 8;
    if said as usize != bytes.len() {
        return Ok((header, Err(Fault::Length { said, read: bytes.len() })));
    }
    let body = body.len().checked_sub(extensions).map(|len| Cursor::new(&body[..len]));
    Ok((header, body.ok_or(Fault::Extensions)))
}
