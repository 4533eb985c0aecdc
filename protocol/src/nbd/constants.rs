//! The numbers of the wire, under the names that the specification gives them ("Values", and the magic numbers of
//! "Protocol phases"). They are for tools and tests that work on bytes; other code uses the types of this codec.

/// First number of a server's greeting, ASCII `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second number of a newstyle greeting, and the start of each option, ASCII `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of each structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can omit the zeroes after the answer to `OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Option: enter an export; the answer is the export itself, or a closed connection.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the handshake.
pub const OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPT_LIST: u32 = 3;
/// Option: go on with TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const OPT_INFO: u32 = 6;
/// Option: describe an export and enter it.
pub const OPT_GO: u32 = 7;
/// Option: use structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Option: use headers with 64-bit lengths.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// xpm's own option: sends the client's [`Visitor`](crate::Visitor) as text, before it enters an export. Servers that
/// do not know the option answer [`REP_ERR_UNSUP`], and the client goes on without it.
pub const OPT_XPM_LIFE: u32 = 0x7870_6d01;

/// Reply to an option: accepted, or complete.
pub const REP_ACK: u32 = 1;
/// Reply to an option: an export's name.
pub const REP_SERVER: u32 = 2;
/// Reply to an option: information on an export.
pub const REP_INFO: u32 = 3;
/// Reply to an option: a metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Bit of all replies that are errors.
pub const REP_ERR: u32 = 1 << 31;
/// Reply to an option: unknown to this server.
pub const REP_ERR_UNSUP: u32 = REP_ERR + 1;
/// Reply to an option: forbidden by policy.
pub const REP_ERR_POLICY: u32 = REP_ERR + 2;
/// Reply to an option: malformed, or out of place.
pub const REP_ERR_INVALID: u32 = REP_ERR + 3;
/// Reply to an option: not available on this platform.
pub const REP_ERR_PLATFORM: u32 = REP_ERR + 4;
/// Reply to an option: TLS is required.
pub const REP_ERR_TLS_REQD: u32 = REP_ERR + 5;
/// Reply to an option: no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_ERR + 6;
/// Reply to an option: the server is going down.
pub const REP_ERR_SHUTDOWN: u32 = REP_ERR + 7;
/// Reply to an option: the client must ask for the block sizes.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_ERR + 8;
/// Reply to an option: too long.
pub const REP_ERR_TOO_BIG: u32 = REP_ERR + 9;

/// Information: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the export's name.
pub const INFO_NAME: u16 = 1;
/// Information: a text for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Command: read bytes.
pub const CMD_READ: u16 = 0;
/// Command: write bytes.
pub const CMD_WRITE: u16 = 1;
/// Command: close the connection.
pub const CMD_DISC: u16 = 2;
/// Command: make answered writes stable.
pub const CMD_FLUSH: u16 = 3;
/// Command: discard bytes.
pub const CMD_TRIM: u16 = 4;
/// Command: make bytes ready for reading.
pub const CMD_CACHE: u16 = 5;
/// Command: write zeroes.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: report the states of bytes.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Flag of a chunk: the last one of its reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: only the end of the reply.
pub const REPLY_TYPE_NONE: u16 = 0;
/// Chunk: data at an offset.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: zeroes at an offset.
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: extents of a context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Bit of all chunks that are errors.
pub const REPLY_TYPE_ERR: u16 = 1 << 15;
/// Chunk: the request failed.
pub const REPLY_TYPE_ERROR: u16 = REPLY_TYPE_ERR + 1;
/// Chunk: the request failed at an offset.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = REPLY_TYPE_ERR + 2;

/// Longest string, in bytes ("Conventions").
pub const STRING_MAX: usize = 4096;
/// Text of the reply `REP_ERR_POLICY` to a connection whose session and queue have a newer one. The client compares
/// the part before the colon.
pub const OUTDATED: &str = "outdated: a newer connection of this session and queue is there";
/// Number of zeroes after the answer to `OPT_EXPORT_NAME`, unless both sides omit them.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// The metadata context that reports which bytes are allocated and which read as zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
