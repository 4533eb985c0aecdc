//! Bodies of structured reply chunks ("Structured reply types" of the specification).
//!
//! A client calls [`ChunkHeader::body`] to learn the form of a body before it receives it, so that data can be
//! received directly into their final buffer.

use super::constants::STRING_MAX;
use super::errno::Errno;
use super::reply::{ChunkHeader, ChunkType};

/// Length of the offset before a chunk's data, in bytes.
pub const DATA_OFFSET_LEN: usize = 8;
/// Length of a hole's body, in bytes.
pub const HOLE_LEN: usize = 12;
/// Length of one extent in a block status chunk, in bytes.
pub const EXTENT_LEN: usize = 8;
/// Length of the context's id before the extents, in bytes.
pub const CONTEXT_LEN: usize = 4;
/// Most extents that are accepted in one chunk; known servers send no more.
pub const EXTENTS_MAX: u32 = 1 << 20;
/// Longest error body that is accepted, in bytes: a message and possibly other fields.
pub const ERROR_LEN_MAX: u32 = 8 << 10;

/// State of an extent in `base:allocation`: it occupies no storage.
pub const STATE_HOLE: u32 = 1 << 0;
/// State of an extent in `base:allocation`: it reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

const ERROR_FIXED_LEN: usize = 6;

/// The specification does not allow the chunk; the connection has to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent a malformed reply chunk: {0}")]
pub struct BadChunk(&'static str);

/// Form of a chunk's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkBody {
    /// No body.
    None,
    /// [`DATA_OFFSET_LEN`] bytes with the offset of the data as a big-endian number, then `length` bytes of data, at
    /// least one.
    Data {
        /// Length of the data in bytes.
        length: u32,
    },
    /// [`HOLE_LEN`] bytes, for [`Hole::decode`].
    Hole,
    /// [`CONTEXT_LEN`] bytes, then `extents` times [`EXTENT_LEN`] bytes; all together for [`BlockStatus::decode`].
    BlockStatus {
        /// Number of extents; 1 to [`EXTENTS_MAX`].
        extents: u32,
    },
    /// `length` bytes, at most [`ERROR_LEN_MAX`], for [`ErrorChunk::decode`].
    Error {
        /// Length of the body in bytes.
        length: u32,
    },
}

impl ChunkHeader {
    /// The form of the body that follows this header.
    ///
    /// # Errors
    /// [`BadChunk`] when kind, length and flags contradict each other, or when the kind is unknown and not an error.
    #[inline]
    pub const fn body(&self) -> Result<ChunkBody, BadChunk> {
        let length = self.length;
        match self.kind {
            ChunkType::None if length != 0 => Err(BadChunk("an end with a body")),
            ChunkType::None if !self.done => Err(BadChunk("an end that is not the end")),
            ChunkType::None => Ok(ChunkBody::None),
            ChunkType::OffsetData if length <= 8 => Err(BadChunk("data without a byte")),
            ChunkType::OffsetData => Ok(ChunkBody::Data { length: length - 8 }),
            ChunkType::OffsetHole if length != 12 => Err(BadChunk("a hole of wrong length")),
            ChunkType::OffsetHole => Ok(ChunkBody::Hole),
            ChunkType::BlockStatus => self.block_status(),
            ChunkType::Error if length < 6 => Err(BadChunk("an error without a number")),
            ChunkType::ErrorOffset if length < 14 => Err(BadChunk("an error without its offset")),
            ChunkType::Other(_) if !self.kind.is_error() => Err(BadChunk("a kind that nobody knows")),
            ChunkType::Other(_) if length < 6 => Err(BadChunk("an error without a number")),
            _ if length > ERROR_LEN_MAX => Err(BadChunk("an error of unreasonable length")),
            _ => Ok(ChunkBody::Error { length }),
        }
    }

    const fn block_status(&self) -> Result<ChunkBody, BadChunk> {
        match self.length.checked_sub(4) {
            Some(extents) if extents > 0 && extents % 8 == 0 => match extents / 8 {
                extents if extents <= EXTENTS_MAX => Ok(ChunkBody::BlockStatus { extents }),
                _ => Err(BadChunk("more extents than anybody needs")),
            },
            _ => Err(BadChunk("extents of wrong length")),
        }
    }
}

/// A run of bytes that read as zeros and were not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// First byte in the export.
    pub offset: u64,
    /// Length in bytes, at least one.
    pub length: u32,
}

impl Hole {
    /// Reads a hole.
    ///
    /// # Errors
    /// [`BadChunk`] when it is empty.
    #[inline]
    pub fn decode(bytes: &[u8; HOLE_LEN]) -> Result<Hole, BadChunk> {
        let [offset @ .., l0, l1, l2, l3] = bytes;
        let length = u32::from_be_bytes([*l0, *l1, *l2, *l3]);
        if length == 0 {
            return Err(BadChunk("an empty hole"));
        }
        Ok(Hole { offset: u64::from_be_bytes(*offset), length })
    }

    /// Writes the hole.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; HOLE_LEN]) {
        bytes[..8].copy_from_slice(&self.offset.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
    }
}

/// A run of bytes in the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, at least one.
    pub length: u32,
    /// State; in `base:allocation`, [`STATE_HOLE`] and [`STATE_ZERO`].
    pub state: u32,
}

impl StatusExtent {
    #[inline]
    const fn decode(bytes: &[u8; EXTENT_LEN]) -> StatusExtent {
        let [l0, l1, l2, l3, state @ ..] = bytes;
        StatusExtent { length: u32::from_be_bytes([*l0, *l1, *l2, *l3]), state: u32::from_be_bytes(*state) }
    }

    /// Writes the extent.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; EXTENT_LEN]) {
        bytes[..4].copy_from_slice(&self.length.to_be_bytes());
        bytes[4..].copy_from_slice(&self.state.to_be_bytes());
    }
}

/// States of the bytes from a request's offset on, in one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus<'a> {
    /// The context's id.
    pub context: u32,
    extents: &'a [[u8; EXTENT_LEN]],
}

impl<'a> BlockStatus<'a> {
    /// Reads the whole body of a block status chunk.
    ///
    /// # Errors
    /// [`BadChunk`] when there is no extent, an empty extent, or an incomplete extent.
    pub fn decode(bytes: &'a [u8]) -> Result<BlockStatus<'a>, BadChunk> {
        let (context, extents) =
            bytes.split_first_chunk::<CONTEXT_LEN>().ok_or(BadChunk("extents without their context"))?;
        let (extents, rest) = extents.as_chunks::<EXTENT_LEN>();
        if extents.is_empty() || !rest.is_empty() {
            return Err(BadChunk("extents of wrong length"));
        }
        if extents.iter().any(|extent| StatusExtent::decode(extent).length == 0) {
            return Err(BadChunk("an empty extent"));
        }
        Ok(BlockStatus { context: u32::from_be_bytes(*context), extents })
    }

    /// The extents in order; together they may be shorter or longer than the requested range.
    pub fn extents(&self) -> impl ExactSizeIterator<Item = StatusExtent> + use<'a> {
        self.extents.iter().map(StatusExtent::decode)
    }
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// The error.
    pub error: Errno,
    /// A text for people; empty if there is none.
    pub message: &'a str,
    /// Offset in the export at which it failed.
    pub offset: Option<u64>,
}

impl<'a> ErrorChunk<'a> {
    /// Reads the whole body of an error chunk of this kind. In a chunk of unknown kind, bytes after the message are
    /// ignored; a message that is not UTF-8 counts as empty.
    ///
    /// # Errors
    /// [`BadChunk`] when the message does not fit into the body.
    pub fn decode(kind: ChunkType, bytes: &'a [u8]) -> Result<ErrorChunk<'a>, BadChunk> {
        let fixed = bytes.split_first_chunk::<ERROR_FIXED_LEN>();
        let ([e0, e1, e2, e3, l0, l1], rest) = fixed.ok_or(BadChunk("an error without a number"))?;
        let length = usize::from(u16::from_be_bytes([*l0, *l1]));
        let (message, rest) = rest
            .split_at_checked(length)
            .filter(|_| length <= STRING_MAX)
            .ok_or(BadChunk("an error whose message is too long"))?;
        let offset = match kind {
            ChunkType::ErrorOffset => {
                Some(*rest.first_chunk().ok_or(BadChunk("an error without its offset"))?)
            }
            _ => None,
        };
        Ok(ErrorChunk {
            // 0 would mean success, which an error chunk cannot report.
            error: Errno::from_wire(u32::from_be_bytes([*e0, *e1, *e2, *e3])).unwrap_or(Errno::Invalid),
            message: std::str::from_utf8(message).unwrap_or(""),
            offset: offset.map(u64::from_be_bytes),
        })
    }

    /// The kind of chunk for this error.
    pub const fn kind(&self) -> ChunkType {
        if self.offset.is_some() { ChunkType::ErrorOffset } else { ChunkType::Error }
    }

    /// Writes the body and returns its length, which the chunk's header needs. None if there is no room, or if the
    /// message is longer than the protocol allows.
    pub fn encode(&self, bytes: &mut [u8]) -> Option<usize> {
        let message_end = ERROR_FIXED_LEN + self.message.len();
        let end = message_end + self.offset.map_or(0, |_| 8);
        let message_len =
            u16::try_from(self.message.len()).ok().filter(|len| usize::from(*len) <= STRING_MAX)?;
        let bytes = bytes.get_mut(..end)?;
        bytes[..4].copy_from_slice(&self.error.to_wire().to_be_bytes());
        bytes[4..6].copy_from_slice(&message_len.to_be_bytes());
        bytes[6..message_end].copy_from_slice(self.message.as_bytes());
        if let Some(offset) = self.offset {
            bytes[message_end..].copy_from_slice(&offset.to_be_bytes());
        }
        Some(end)
    }
}
