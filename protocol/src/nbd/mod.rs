//! The NBD wire codec: the standard protocol (fixed newstyle, with simple and structured replies) as
//! types and pure functions, server's side and client's side.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project; sections are named where it matters.

pub mod handshake;

mod errno;
mod export;
mod export_name;
mod reply;
mod request;

pub use errno::Errno;
pub use export::{BlockSizes, ExportInfo, PAYLOAD_MAX, TransmissionFlags};
pub use export_name::{ExportName, ParseExportNameError, SessionTag};
pub use reply::{
    BadReplyMagic, CHUNK_DONE, CHUNK_HEADER_LEN, ChunkHeader, ChunkType, EXTENT_LEN, ReplyHeader,
    SIMPLE_REPLY_LEN, STATE_HOLE, STATE_ZERO, SimpleReply,
};
pub use request::{BadRequestMagic, Command, CommandFlags, REQUEST_LEN, Request};
