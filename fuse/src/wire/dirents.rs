//! Listings of directories.

use super::attr::FileKind;
use super::encode::Out;
use super::reply::{self, ENTRY_LEN, Entry};
use super::{Name, OUT_HEADER_LEN, Unique};

/// offsetof(struct fuse_dirent, name)
const DIRENT_HEAD_LEN: usize = 24;

/// The entry does not fit any more; it is the first one of the next reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the buffer of a directory's listing is full")]
pub struct Full;

/// The reply to a READDIR or a READDIRPLUS, made in the caller's buffer.
///
/// A reply without entries is the end of the directory.
pub struct Dirents<'b> {
    buffer: &'b mut [u8],
    len: usize,
}

impl<'b> Dirents<'b> {
    /// No entries yet. The reply is no longer than `size` bytes, as the request says, plus [`OUT_HEADER_LEN`], and than
    /// the buffer.
    ///
    /// # Panics
    /// Where the buffer is shorter than a header.
    pub fn new(buffer: &'b mut [u8], size: u32) -> Dirents<'b> {
        assert!(buffer.len() >= OUT_HEADER_LEN, "the buffer has room for a header");
        let len = buffer.len().min(OUT_HEADER_LEN.saturating_add(size as usize));
        Dirents { buffer: &mut buffer[..len], len: OUT_HEADER_LEN }
    }

    /// An entry of READDIR. `next` is the position that a later request names to have what follows this entry; it is
    /// not 0.
    ///
    /// # Errors
    /// [`Full`]; the reply is as before.
    pub fn push(&mut self, ino: u64, next: u64, kind: FileKind, name: Name<'_>) -> Result<(), Full> {
        let mut out = self.room(DIRENT_HEAD_LEN + name.as_bytes().len())?;
        dirent(&mut out, ino, next, kind, name);
        self.len += out.len();
        Ok(())
    }

    /// An entry of READDIRPLUS. Unless its node id is 0 ("." and ".."), it counts as a look-up of the file.
    ///
    /// # Errors
    /// [`Full`]; the reply is as before, and nothing was looked up.
    pub fn push_plus(
        &mut self,
        entry: &Entry,
        next: u64,
        kind: FileKind,
        name: Name<'_>,
    ) -> Result<(), Full> {
        let mut out = self.room(ENTRY_LEN + DIRENT_HEAD_LEN + name.as_bytes().len())?;
        entry.encode(&mut out);
        dirent(&mut out, entry.attr.ino, next, kind, name);
        self.len += out.len();
        Ok(())
    }

    /// The reply, to be sent.
    pub fn finish(self, unique: Unique) -> &'b [u8] {
        let header = reply::header(unique, self.len - OUT_HEADER_LEN);
        self.buffer[..OUT_HEADER_LEN].copy_from_slice(&header);
        &self.buffer[..self.len]
    }

    /// Where an entry of so many bytes goes, padded to 8 bytes.
    fn room(&mut self, len: usize) -> Result<Out<'_>, Full> {
        let room = &mut self.buffer[self.len..];
        room.get_mut(..len.next_multiple_of(8)).map(Out::new).ok_or(Full)
    }
}

fn dirent(out: &mut Out<'_>, ino: u64, next: u64, kind: FileKind, name: Name<'_>) {
    let name = name.as_bytes();
    out.u64(ino).u64(next).u32(name.len() as u32).u32(kind.dirent_type()).bytes(name);
    let padding = out.len().next_multiple_of(8) - out.len();
    out.zeros(padding).done();
}
