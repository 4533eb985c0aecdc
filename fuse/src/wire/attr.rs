//! Attributes of files.

use super::encode::Out;

/// A time of a file, since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// Nanoseconds on top, below 10^9.
    pub nanoseconds: u32,
}

/// The kinds of files that a directory's listing tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

impl FileKind {
    /// As the bits of a mode, S_IFMT.
    pub const fn mode_bits(self) -> u32 {
        self.dirent_type() << 12
    }

    /// DT_REG and so on, which are the bits of S_IFMT shifted.
    pub(super) const fn dirent_type(self) -> u32 {
        match self {
            FileKind::Regular => 0o10,
            FileKind::Directory => 0o4,
            FileKind::Symlink => 0o12,
        }
    }
}

/// The attributes that stat(2) returns for a file.
///
/// With [`InitFlags::WRITEBACK_CACHE`](super::InitFlags::WRITEBACK_CACHE) the kernel keeps size, mtime and ctime of a
/// regular file that is cached itself, and ignores those of a reply until the file's inode leaves its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Attr {
    /// Number of the inode, as st_ino.
    pub ino: u64,
    /// Size, in bytes.
    pub size: u64,
    /// Memory in use, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Last change of the attributes.
    pub ctime: Timestamp,
    /// Kind and permissions, as st_mode.
    pub mode: u32,
    /// Names of the file.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size of reads and writes that suits the file, in bytes.
    pub blksize: u32,
}

/// sizeof(struct fuse_attr)
pub(super) const ATTR_LEN: usize = 88;

impl Attr {
    pub(super) fn encode(&self, out: &mut Out<'_>) {
        out.u64(self.ino).u64(self.size).u64(self.blocks);
        for time in [self.atime, self.mtime, self.ctime] {
            out.u64(time.seconds.cast_unsigned());
        }
        for time in [self.atime, self.mtime, self.ctime] {
            out.u32(time.nanoseconds);
        }
        out.u32(self.mode).u32(self.nlink).u32(self.uid).u32(self.gid);
        // Device number: there are no device files. Flags: none.
        out.u32(0).u32(self.blksize).u32(0);
    }
}
