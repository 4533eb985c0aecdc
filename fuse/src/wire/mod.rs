//! Requests, replies and notifications as bytes: no I/O, no allocation, no unsafe code.
//!
//! Source: `include/uapi/linux/fuse.h`, version 7.40 of the protocol (Linux 6.9). All numbers are in the byte order of
//! the machine. The kernel is trusted more than a peer on the network, and still every length and name is checked: the
//! user of a decoded request need not check anything again but what it means for its files.

mod attr;
mod cursor;
mod dirents;
mod encode;
mod flags;
mod init;
mod name;
pub mod notify;
mod operation;
pub mod reply;
mod request;

pub use attr::{Attr, FileKind, Timestamp};
pub use cursor::Fault;
pub use dirents::{Dirents, Full};
pub use flags::{FallocateMode, InitFlags, OpenFlags, RenameFlags, SetattrValid, WriteFlags};
pub use init::{Init, InitReply};
pub use name::{NAME_LEN_MAX, Name};
pub use operation::Operation;
pub use operation::{
    CopyFileRange, Create, Fallocate, Forgets, Lseek, Open, ReadAt, Release, Setattr, TimeOrNow, Whence,
    WriteAt,
};
pub use request::{Header, Malformed, Request, Unique};

/// Node id of the mount's root.
pub const ROOT_ID: u64 = 1;
/// Length of a request's header, in bytes.
pub const IN_HEADER_LEN: usize = 40;
/// Length of a reply's or a notification's header, in bytes.
pub const OUT_HEADER_LEN: usize = 16;
/// Where the data of a WRITE begin in the buffer that was read, in bytes. A buffer that begins so much before a page
/// has the data at a page's begin.
pub const WRITE_DATA_OFFSET: usize = IN_HEADER_LEN + 40;
/// The highest minor version of protocol 7 that this crate knows.
pub const MINOR: u32 = 40;
/// The largest offset of a byte in a file, plus one: the kernel's loff_t is signed.
pub const FILE_LEN_MAX: u64 = i64::MAX as u64;

/// Bytes that a buffer must have into which a request is read: the kernel refuses (EINVAL) to fill a smaller one, even
/// where the request would fit.
pub const fn read_buffer_len(max_write: u32) -> usize {
    // FUSE_MIN_READ_BUFFER
    const MIN: usize = 8192;
    let len = WRITE_DATA_OFFSET + max_write as usize;
    if len > MIN { len } else { MIN }
}
