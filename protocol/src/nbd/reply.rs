//! Replies of the transmission phase, simple and structured.

use super::errno::Errno;

/// Bytes of a simple reply, without the data that follows that of a read.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a structured reply chunk's header.
pub const CHUNK_HEADER_LEN: usize = 20;
/// Bytes of one extent in a block status chunk.
pub const EXTENT_LEN: usize = 8;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Flag of a chunk: no other follows for its request.
pub const CHUNK_DONE: u16 = 1;

/// State of an extent in `base:allocation`: it holds nothing.
pub const STATE_HOLE: u32 = 1;
/// State of an extent in `base:allocation`: it reads as zeros.
pub const STATE_ZERO: u32 = 2;

/// A simple reply; the data of a successful read follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// None: it went well.
    pub error: Option<Errno>,
    /// The request's mark.
    pub cookie: u64,
}

impl SimpleReply {
    /// Writes it.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; SIMPLE_REPLY_LEN]) {
        bytes[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.map_or(0, Errno::to_wire).to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
    }
}

/// Kinds of chunks (`NBD_REPLY_TYPE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkType {
    /// No more than the request's end.
    None,
    /// Data at an offset.
    OffsetData,
    /// Zeros at an offset.
    OffsetHole,
    /// Extents.
    BlockStatus,
    /// The request failed.
    Error,
    /// The request failed at an offset.
    ErrorOffset,
    /// A kind that this library does not know; an error if `is_error`.
    Other(u16),
}

impl ChunkType {
    const fn from_wire(number: u16) -> ChunkType {
        match number {
            0 => ChunkType::None,
            1 => ChunkType::OffsetData,
            2 => ChunkType::OffsetHole,
            5 => ChunkType::BlockStatus,
            0x8001 => ChunkType::Error,
            0x8002 => ChunkType::ErrorOffset,
            other => ChunkType::Other(other),
        }
    }

    const fn to_wire(self) -> u16 {
        match self {
            ChunkType::None => 0,
            ChunkType::OffsetData => 1,
            ChunkType::OffsetHole => 2,
            ChunkType::BlockStatus => 5,
            ChunkType::Error => 0x8001,
            ChunkType::ErrorOffset => 0x8002,
            ChunkType::Other(number) => number,
        }
    }

    /// Whether it says that the request failed.
    pub const fn is_error(self) -> bool {
        self.to_wire() & 0x8000 != 0
    }
}

/// The header of a chunk; `length` bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// No other chunk follows for the request.
    pub done: bool,
    /// What follows.
    pub kind: ChunkType,
    /// The request's mark.
    pub cookie: u64,
    /// Bytes that follow.
    pub length: u32,
}

impl ChunkHeader {
    /// Writes it.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; CHUNK_HEADER_LEN]) {
        bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
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

/// The bytes are no reply: whatever follows cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a reply: its magic number is wrong")]
pub struct BadReplyMagic;

impl ReplyHeader {
    /// Reads a header from the start of `bytes`, and says how long it is; none when more bytes are
    /// needed.
    ///
    /// # Errors
    /// [`BadReplyMagic`]: the connection has to be closed.
    #[inline]
    pub fn decode(bytes: &[u8]) -> Result<Option<(ReplyHeader, usize)>, BadReplyMagic> {
        let Some(magic) = bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic)) else {
            return Ok(None);
        };
        match magic {
            SIMPLE_MAGIC => Ok(bytes.first_chunk().map(|bytes| (decode_simple(bytes), SIMPLE_REPLY_LEN))),
            CHUNK_MAGIC => Ok(bytes.first_chunk().map(|bytes| (decode_chunk(bytes), CHUNK_HEADER_LEN))),
            _ => Err(BadReplyMagic),
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
