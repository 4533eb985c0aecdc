//! Replies of the transmission phase, simple and structured.

use super::constants::*;
use super::errno::Errno;

/// Length of a simple reply in bytes, without the data after the reply to a read.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a structured reply chunk's header in bytes.
pub const CHUNK_HEADER_LEN: usize = 20;

/// Flag of a chunk: it is the last one of its reply.
pub const CHUNK_DONE: u16 = REPLY_FLAG_DONE;

/// A simple reply; after the reply to a successful read, the data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// The error; none on success.
    pub error: Option<Errno>,
    /// The cookie of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Writes the reply.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; SIMPLE_REPLY_LEN]) {
        bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.map_or(0, Errno::to_wire).to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
    }
}

/// Kinds of chunks (`NBD_REPLY_TYPE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkType {
    /// Only the end of the reply.
    None,
    /// Data at an offset.
    OffsetData,
    /// Zeros at an offset.
    OffsetHole,
    /// States of extents.
    BlockStatus,
    /// The request failed.
    Error,
    /// The request failed at an offset.
    ErrorOffset,
    /// A kind that this library does not know; it is an error if `is_error` returns true.
    Other(u16),
}

impl ChunkType {
    #[inline]
    const fn from_wire(number: u16) -> ChunkType {
        match number {
            REPLY_TYPE_NONE => ChunkType::None,
            REPLY_TYPE_OFFSET_DATA => ChunkType::OffsetData,
            REPLY_TYPE_OFFSET_HOLE => ChunkType::OffsetHole,
            REPLY_TYPE_BLOCK_STATUS => ChunkType::BlockStatus,
            REPLY_TYPE_ERROR => ChunkType::Error,
            REPLY_TYPE_ERROR_OFFSET => ChunkType::ErrorOffset,
            other => ChunkType::Other(other),
        }
    }

    #[inline]
    const fn to_wire(self) -> u16 {
        match self {
            ChunkType::None => REPLY_TYPE_NONE,
            ChunkType::OffsetData => REPLY_TYPE_OFFSET_DATA,
            ChunkType::OffsetHole => REPLY_TYPE_OFFSET_HOLE,
            ChunkType::BlockStatus => REPLY_TYPE_BLOCK_STATUS,
            ChunkType::Error => REPLY_TYPE_ERROR,
            ChunkType::ErrorOffset => REPLY_TYPE_ERROR_OFFSET,
            ChunkType::Other(number) => number,
        }
    }

    /// Whether the chunk reports that the request failed.
    pub const fn is_error(self) -> bool {
        self.to_wire() & REPLY_TYPE_ERR != 0
    }
}

/// The header of a chunk; a body of `length` bytes follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether this is the last chunk of the reply.
    pub done: bool,
    /// Kind of the chunk.
    pub kind: ChunkType,
    /// The cookie of the request.
    pub cookie: u64,
    /// Length of the body in bytes.
    pub length: u32,
}

impl ChunkHeader {
    /// Writes the header.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; CHUNK_HEADER_LEN]) {
        bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&u16::from(self.done).to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
    }
}

/// The header of a reply of either kind, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply, of [`SIMPLE_REPLY_LEN`] bytes.
    Simple(SimpleReply),
    /// A chunk, whose header is [`CHUNK_HEADER_LEN`] bytes.
    Chunk(ChunkHeader),
}

/// The bytes are no reply: the rest of the stream cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a reply: its magic number is wrong")]
pub struct BadReplyMagic;

impl ReplyHeader {
    /// Reads a header from the start of `bytes`, and returns it with its length; none if more bytes are needed.
    ///
    /// # Errors
    /// [`BadReplyMagic`]: the connection has to be closed.
    #[inline]
    pub fn decode(bytes: &[u8]) -> Result<Option<(ReplyHeader, usize)>, BadReplyMagic> {
        let Some(magic) = bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic)) else {
            return Ok(None);
        };
        match magic {
            SIMPLE_REPLY_MAGIC => {
                Ok(bytes.first_chunk().map(|bytes| (decode_simple(bytes), SIMPLE_REPLY_LEN)))
            }
            STRUCTURED_REPLY_MAGIC => {
                Ok(bytes.first_chunk().map(|bytes| (decode_chunk(bytes), CHUNK_HEADER_LEN)))
            }
            _ => Err(BadReplyMagic),
        }
    }

    /// The cookie of the answered request.
    #[inline]
    pub const fn cookie(&self) -> u64 {
        match self {
            ReplyHeader::Simple(reply) => reply.cookie,
            ReplyHeader::Chunk(header) => header.cookie,
        }
    }

    /// Number of bytes that follow the header. `read_len` is the length of the answered read, and 0 for any other
    /// command: a simple reply does not contain that length. For a chunk, [`ChunkHeader::body`] tells the form of
    /// these bytes.
    #[inline]
    pub const fn payload_len(&self, read_len: u32) -> u32 {
        match self {
            ReplyHeader::Simple(SimpleReply { error: None, .. }) => read_len,
            ReplyHeader::Simple(_) => 0,
            ReplyHeader::Chunk(header) => header.length,
        }
    }
}

#[inline]
fn decode_simple(bytes: &[u8; SIMPLE_REPLY_LEN]) -> ReplyHeader {
    let [_, _, _, _, e0, e1, e2, e3, cookie @ ..] = bytes;
    ReplyHeader::Simple(SimpleReply {
        error: Errno::from_wire(u32::from_be_bytes([*e0, *e1, *e2, *e3])),
        cookie: u64::from_be_bytes(*cookie),
    })
}

#[inline]
fn decode_chunk(bytes: &[u8; CHUNK_HEADER_LEN]) -> ReplyHeader {
    let [_, _, _, _, f0, f1, t0, t1, c0, c1, c2, c3, c4, c5, c6, c7, length @ ..] = bytes;
    ReplyHeader::Chunk(ChunkHeader {
        done: u16::from_be_bytes([*f0, *f1]) & CHUNK_DONE != 0,
        kind: ChunkType::from_wire(u16::from_be_bytes([*t0, *t1])),
        cookie: u64::from_be_bytes([*c0, *c1, *c2, *c3, *c4, *c5, *c6, *c7]),
        length: u32::from_be_bytes(*length),
    })
}
