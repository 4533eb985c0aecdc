//! Replies. Each is one write(2) or writev(2) to the device: a header, and what the operation has.
//!
//! Replies of fixed length are arrays, to be sent from where they are or copied to where the caller likes. The data
//! of a READ follow a [`header`] of theirs.

use rustix::io::Errno;

use super::attr::{ATTR_LEN, Attr};
use super::encode::Out;
use super::flags::OpenFlags;
use super::init::{INIT_OUT_LEN, InitReply};
use super::{OUT_HEADER_LEN, Unique};

/// sizeof(struct fuse_entry_out)
pub(super) const ENTRY_LEN: usize = 40 + ATTR_LEN;
const OPEN_LEN: usize = 16;

/// How long the kernel may rely on what it was told, in nanoseconds. [`Validity::FOREVER`] suits a file system that
/// only changes by the kernel's own requests, or notifies it of other changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Whole seconds.
    pub seconds: u64,
    /// Nanoseconds on top, below 10^9.
    pub nanoseconds: u32,
}

impl Validity {
    /// Not at all: the kernel asks each time.
    pub const NONE: Validity = Validity { seconds: 0, nanoseconds: 0 };
    /// Until a notification says otherwise: 136 years.
    pub const FOREVER: Validity = Validity { seconds: u32::MAX as u64, nanoseconds: 0 };
}

/// A file that was looked up or made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// By which the kernel names the file in requests. 0 in the reply to LOOKUP: there is no such name, which the
    /// kernel remembers as long as `entry_valid`. 0 in a listing: this is no look-up.
    pub nodeid: u64,
    /// Tells files apart that have the same node id one after the other.
    pub generation: u64,
    /// How long the name leads to this file.
    pub entry_valid: Validity,
    /// How long the attributes are right.
    pub attr_valid: Validity,
    /// Its attributes.
    pub attr: Attr,
}

/// A file that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// By which the kernel names the open file.
    pub fh: u64,
    /// How it is treated.
    pub flags: OpenFlags,
}

/// Sizes of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statfs {
    /// All blocks, of `frsize` bytes.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Blocks that are free to users.
    pub bavail: u64,
    /// Inodes, of which `ffree` are free.
    pub files: u64,
    /// Inodes that are free.
    pub ffree: u64,
    /// Size of reads and writes that suits, in bytes.
    pub bsize: u32,
    /// Bytes of the longest name.
    pub namelen: u32,
    /// Bytes of a block.
    pub frsize: u32,
}

/// The header of a reply whose data, of this length in bytes, follow.
///
/// # Panics
/// Where the whole reply has more than 2^32 - 1 bytes, which no request asks for.
pub fn header(unique: Unique, data_len: usize) -> [u8; OUT_HEADER_LEN] {
    let len = u32::try_from(OUT_HEADER_LEN + data_len).expect("a reply is shorter than 4 GiB");
    raw_header(len, 0, unique.raw())
}

pub(super) fn raw_header(len: u32, error: i32, unique: u64) -> [u8; OUT_HEADER_LEN] {
    let mut bytes = [0; OUT_HEADER_LEN];
    Out::new(&mut bytes).u32(len).u32(error.cast_unsigned()).u64(unique).done();
    bytes
}

/// It is done, and there is nothing to tell.
pub fn empty(unique: Unique) -> [u8; OUT_HEADER_LEN] {
    header(unique, 0)
}

/// It failed. Errors that only the kernel has among itself (512 and up), which it would not take, become EIO.
pub fn error(unique: Unique, errno: Errno) -> [u8; OUT_HEADER_LEN] {
    let number = errno.raw_os_error();
    let number = if (1..512).contains(&number) { number } else { Errno::IO.raw_os_error() };
    raw_header(OUT_HEADER_LEN as u32, -number, unique.raw())
}

/// Answers LOOKUP, MKNOD, MKDIR, SYMLINK and LINK.
pub fn entry(unique: Unique, entry: &Entry) -> [u8; OUT_HEADER_LEN + ENTRY_LEN] {
    fixed(unique, |out| entry.encode(out))
}

/// Answers GETATTR and SETATTR.
pub fn attr(unique: Unique, attr: &Attr, valid: Validity) -> [u8; OUT_HEADER_LEN + 16 + ATTR_LEN] {
    fixed(unique, |out| {
        out.u64(valid.seconds).u32(valid.nanoseconds).u32(0);
        attr.encode(out);
    })
}

/// Answers OPEN and OPENDIR.
pub fn open(unique: Unique, opened: Opened) -> [u8; OUT_HEADER_LEN + OPEN_LEN] {
    fixed(unique, |out| opened.encode(out))
}

/// Answers CREATE and TMPFILE.
pub fn create(unique: Unique, entry: &Entry, opened: Opened) -> [u8; OUT_HEADER_LEN + ENTRY_LEN + OPEN_LEN] {
    fixed(unique, |out| {
        entry.encode(out);
        opened.encode(out);
    })
}

/// Answers WRITE and COPY_FILE_RANGE: so many bytes are written. The kernel takes fewer than it asked for as an error
/// of those pages that are left.
pub fn written(unique: Unique, size: u32) -> [u8; OUT_HEADER_LEN + 8] {
    fixed(unique, |out| {
        out.u32(size).u32(0);
    })
}

/// Answers STATFS.
pub fn statfs(unique: Unique, sizes: &Statfs) -> [u8; OUT_HEADER_LEN + 80] {
    fixed(unique, |out| {
        out.u64(sizes.blocks).u64(sizes.bfree).u64(sizes.bavail).u64(sizes.files).u64(sizes.ffree);
        out.u32(sizes.bsize).u32(sizes.namelen).u32(sizes.frsize).zeros(7 * 4);
    })
}

/// Answers LSEEK.
pub fn lseek(unique: Unique, offset: u64) -> [u8; OUT_HEADER_LEN + 8] {
    fixed(unique, |out| {
        out.u64(offset);
    })
}

/// Answers INIT.
pub fn init(unique: Unique, reply: &InitReply) -> [u8; OUT_HEADER_LEN + INIT_OUT_LEN] {
    fixed(unique, |out| reply.encode(out))
}

/// A reply of known length, whose body is written by `body`.
fn fixed<const N: usize>(unique: Unique, body: impl FnOnce(&mut Out<'_>)) -> [u8; N] {
    let mut bytes = [0; N];
    let mut out = Out::new(&mut bytes);
    out.bytes(&header(unique, N - OUT_HEADER_LEN));
    body(&mut out);
    out.done();
    bytes
}

impl Entry {
    pub(super) fn encode(&self, out: &mut Out<'_>) {
        out.u64(self.nodeid).u64(self.generation);
        out.u64(self.entry_valid.seconds).u64(self.attr_valid.seconds);
        out.u32(self.entry_valid.nanoseconds).u32(self.attr_valid.nanoseconds);
        self.attr.encode(out);
    }
}

impl Opened {
    fn encode(self, out: &mut Out<'_>) {
        // backing_id is of passthrough only.
        out.u64(self.fh).u32(self.flags.bits()).u32(0);
    }
}
