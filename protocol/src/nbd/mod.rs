//! The NBD wire codec: the standard protocol (fixed newstyle, with simple and structured replies) as types and pure
//! functions, for servers and clients.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project; comments name its sections where needed.

pub mod constants;
pub mod handshake;

mod chunk;
mod errno;
mod export;
mod export_name;
mod reply;
mod request;

pub use chunk::{
    BadChunk, BlockStatus, CONTEXT_LEN, ChunkBody, DATA_OFFSET_LEN, ERROR_LEN_MAX, EXTENT_LEN, EXTENTS_MAX,
    ErrorChunk, HOLE_LEN, Hole, STATE_HOLE, STATE_ZERO, StatusExtent,
};
pub use errno::Errno;
pub use export::{BlockSizes, ExportInfo, PAYLOAD_MAX, TransmissionFlags};
pub use export_name::{ExportName, ParseExportNameError, SessionTag};
pub use reply::{
    BadReplyMagic, CHUNK_DONE, CHUNK_HEADER_LEN, ChunkHeader, ChunkType, ReplyHeader, SIMPLE_REPLY_LEN,
    SimpleReply,
};
pub use request::{BadRequestMagic, Command, CommandFlags, REQUEST_LEN, Request};
