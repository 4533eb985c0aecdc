//! Messages to the kernel that no request asked for. Each is one write(2) or writev(2) to the device, and its effect
//! is there when the call returns; its error is the notification's result.

use super::encode::Out;
use super::reply::raw_header;
use super::{NAME_LEN_MAX, Name, OUT_HEADER_LEN};

/// enum fuse_notify_code
mod code {
    pub(super) const INVAL_INODE: i32 = 2;
    pub(super) const INVAL_ENTRY: i32 = 3;
    pub(super) const STORE: i32 = 4;
    pub(super) const DELETE: i32 = 6;
    pub(super) const RESEND: i32 = 7;
}

/// Bytes that a notification with a name has at most.
pub const NAMED_LEN_MAX: usize = OUT_HEADER_LEN + 24 + NAME_LEN_MAX + 1;

/// All requests that were read from the device and are not answered are delivered again, with bit 63 of their number
/// set.
///
/// This is the first thing that a successor sends, before it reads a request: of what it has read itself it would get
/// a second delivery. No other process may read from the connection or have writes under way for it any more.
pub fn resend() -> [u8; OUT_HEADER_LEN] {
    raw_header(OUT_HEADER_LEN as u32, code::RESEND, 0)
}

/// A file's attributes are no longer right, nor the pages that are cached of a range, in bytes: with a negative
/// `offset` no pages, with a `len` of 0 all pages from `offset` on.
///
/// Dirty pages are written first, by WRITE requests, and pages that are being read are waited for: whoever sends this
/// must not be the one who has to serve them. The kernel does not tell whether pages were left:
/// [`cachestat`](crate::cachestat) does. ENOENT says that the kernel does not know the file.
pub fn inval_inode(nodeid: u64, offset: i64, len: i64) -> [u8; OUT_HEADER_LEN + 24] {
    fixed(code::INVAL_INODE, 0, |out| {
        out.u64(nodeid).u64(offset.cast_unsigned()).u64(len.cast_unsigned());
    })
}

/// A name no longer leads to the file that the kernel remembers.
///
/// Waits for requests in the same directory that are under way, as a rule: not to be sent by who serves them.
pub fn inval_entry<'b>(buffer: &'b mut [u8; NAMED_LEN_MAX], parent: u64, name: Name<'_>) -> &'b [u8] {
    named(buffer, code::INVAL_ENTRY, name, |out, name_len| {
        out.u64(parent).u32(name_len).u32(0);
    })
}

/// A name is gone, which those who watch the directory are told. ENOTEMPTY and EBUSY say that it stays.
pub fn delete<'b>(buffer: &'b mut [u8; NAMED_LEN_MAX], parent: u64, child: u64, name: Name<'_>) -> &'b [u8] {
    named(buffer, code::DELETE, name, |out, name_len| {
        out.u64(parent).u64(child).u32(name_len).u32(0);
    })
}

/// The head that precedes `size` bytes of data (in the same writev(2)) that go into the page cache, from a byte on,
/// as if they had been read. A page that is dirty is overwritten: the caller knows that none is. Memory is taken of
/// the calling process's cgroup.
pub fn store(nodeid: u64, offset: u64, size: u32) -> [u8; OUT_HEADER_LEN + 24] {
    fixed(code::STORE, size, |out| {
        out.u64(nodeid).u64(offset).u32(size).u32(0);
    })
}

fn fixed<const N: usize>(code: i32, data_len: u32, body: impl FnOnce(&mut Out<'_>)) -> [u8; N] {
    let mut bytes = [0; N];
    let mut out = Out::new(&mut bytes);
    out.bytes(&raw_header((N as u32).saturating_add(data_len), code, 0));
    body(&mut out);
    out.done();
    bytes
}

fn named<'b>(
    buffer: &'b mut [u8; NAMED_LEN_MAX],
    code: i32,
    name: Name<'_>,
    body: impl FnOnce(&mut Out<'_>, u32),
) -> &'b [u8] {
    let name = name.as_bytes();
    let mut out = Out::new(buffer);
    out.zeros(OUT_HEADER_LEN);
    body(&mut out, name.len() as u32);
    let len = out.bytes(name).zeros(1).len();
    buffer[..OUT_HEADER_LEN].copy_from_slice(&raw_header(len as u32, code, 0));
    &buffer[..len]
}
