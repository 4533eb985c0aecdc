//! The operations that the kernel requests of the file system.

use super::cursor::{Cursor, Fault};
use super::flags::{FallocateMode, RenameFlags, SetattrValid, WriteFlags};
use super::init::Init;
use super::{FILE_LEN_MAX, Name, Timestamp, Unique};

mod opcode;

/// Bytes of the longest target of a symbolic link: PATH_MAX without NUL.
const TARGET_LEN_MAX: usize = 4095;

/// One operation with its arguments. The file or directory is that of the request's header unless a field names
/// another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "fields are named as the protocol names them; those with a unit or a range are explained"
)]
pub enum Operation<'a> {
    /// The first request: to be negotiated.
    Init(Init),
    /// The last one. The kernel does not wait for its reply.
    Destroy,
    /// The file of this name: an entry, or ENOENT. Counts one look-up of the file.
    Lookup { name: Name<'a> },
    /// So many look-ups of the file are forgotten. No reply.
    Forget { nlookup: u64 },
    /// The same for several files. No reply.
    BatchForget(Forgets<'a>),
    /// The attributes, of an open file where there is a handle.
    Getattr { fh: Option<u64> },
    /// Changes of attributes; the new ones are the reply.
    Setattr(Setattr),
    /// The target of a symbolic link.
    Readlink,
    /// A new symbolic link.
    Symlink { name: Name<'a>, target: &'a [u8] },
    /// A new file, regular or special, that is not opened.
    Mknod { name: Name<'a>, mode: u32, rdev: u32, umask: u32 },
    /// A new directory.
    Mkdir { name: Name<'a>, mode: u32, umask: u32 },
    /// The file loses this name.
    Unlink { name: Name<'a> },
    /// The directory goes.
    Rmdir { name: Name<'a> },
    /// RENAME and RENAME2.
    Rename { name: Name<'a>, new_parent: u64, new_name: Name<'a>, flags: RenameFlags },
    /// A further name of the file `nodeid`, in the header's directory.
    Link { nodeid: u64, new_name: Name<'a> },
    /// Opens a file.
    Open(Open),
    /// Makes a file, or opens the one that there is, and counts one look-up.
    Create(Create<'a>),
    /// Makes a file without a name.
    Tmpfile { flags: u32, mode: u32, umask: u32 },
    /// Data of the file; fewer than asked for at its end.
    Read(ReadAt),
    /// Data for the file.
    Write(WriteAt<'a>),
    /// Sizes of the file system.
    Statfs,
    /// An open file was closed by its last holder. Its error is seen by nobody.
    Release(Release),
    /// One of the descriptors of an open file was closed.
    Flush { fh: u64, lock_owner: u64 },
    /// Written data shall become durable.
    Fsync { fh: u64, data_only: bool },
    /// Opens a directory.
    Opendir(Open),
    /// Entries of a directory from a position on, which is 0 or one that an entry was given. At most `size` bytes.
    Readdir(ReadAt),
    /// The same with attributes. Each entry but "." and ".." counts a look-up.
    Readdirplus(ReadAt),
    /// Of a directory.
    Releasedir(Release),
    /// Of a directory.
    Fsyncdir { fh: u64, data_only: bool },
    /// access(2); does not come with `default_permissions`.
    Access { mask: u32 },
    /// Whoever waits for this request wants to go on, which is then answered with EINTR, or as usual. No reply.
    Interrupt { unique: Unique },
    /// fallocate(2).
    Fallocate(Fallocate),
    /// SEEK_DATA or SEEK_HOLE.
    Lseek(Lseek),
    /// ENOSYS has the kernel answer EOPNOTSUPP itself from then on.
    Getxattr { name: &'a [u8], size: u32 },
    /// ENOSYS, likewise.
    Setxattr { name: &'a [u8], value: &'a [u8], flags: u32 },
    /// ENOSYS, likewise.
    Listxattr { size: u32 },
    /// ENOSYS, likewise.
    Removexattr { name: &'a [u8] },
    /// ENOSYS has the kernel take the file for ready at all times.
    Poll { fh: u64, kh: u64, flags: u32, events: u32 },
    /// Cached data that a notification asked for. No reply.
    NotifyReply { offset: u64, data: &'a [u8] },
    /// ENOSYS has the kernel copy by reads and writes.
    CopyFileRange(CopyFileRange),
    /// ENOSYS has the kernel ask GETATTR instead.
    Statx { fh: Option<u64>, flags: u32, mask: u32 },
    /// Any other one, to be answered with ENOSYS.
    Unknown(u32),
}

/// Arguments of OPEN and OPENDIR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// O_ flags of open(2), without O_CREAT, O_EXCL and O_NOCTTY.
    pub flags: u32,
}

/// Arguments of CREATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Create<'a> {
    /// Its name in the header's directory.
    pub name: Name<'a>,
    /// O_ flags of open(2).
    pub flags: u32,
    /// Kind and permissions, the umask applied.
    pub mode: u32,
    /// The umask.
    pub umask: u32,
}

/// Arguments of READ, READDIR and READDIRPLUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadAt {
    /// Handle of the open file.
    pub fh: u64,
    /// The first byte. Together with `size` at most 2^63 - 1; of a directory an opaque position.
    pub offset: u64,
    /// How many bytes.
    pub size: u32,
    /// O_ flags of the open file.
    pub flags: u32,
}

/// Arguments of WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteAt<'a> {
    /// Handle of the open file.
    pub fh: u64,
    /// Where the first byte goes. Together with the data's length at most 2^63 - 1.
    pub offset: u64,
    /// The data, which begin [`WRITE_DATA_OFFSET`](super::WRITE_DATA_OFFSET) bytes into the request.
    pub data: &'a [u8],
    /// Where they come from.
    pub write_flags: WriteFlags,
    /// O_ flags of the open file.
    pub flags: u32,
}

/// Arguments of RELEASE and RELEASEDIR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// Handle of the open file, which ends.
    pub fh: u64,
    /// O_ flags of the open file.
    pub flags: u32,
}

/// Arguments of FALLOCATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fallocate {
    /// Handle of the open file.
    pub fh: u64,
    /// The first byte. Together with `length` at most 2^63 - 1.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
    /// The operation on them.
    pub mode: FallocateMode,
}

/// The target of lseek(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whence {
    /// The next byte that has data.
    Data,
    /// The next byte that has none.
    Hole,
}

/// Arguments of LSEEK, which comes for SEEK_DATA and SEEK_HOLE only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lseek {
    /// Handle of the open file.
    pub fh: u64,
    /// From where on. As the program gave it: what is negative, or not below the file's size, is to be answered ENXIO.
    pub offset: i64,
    /// Data or a hole.
    pub whence: Whence,
}

/// Arguments of COPY_FILE_RANGE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyFileRange {
    /// Handle of the source, which is the header's file.
    pub fh_in: u64,
    /// First byte of the source. Together with `len` at most 2^63 - 1.
    pub offset_in: u64,
    /// The target's file.
    pub nodeid_out: u64,
    /// The target's handle.
    pub fh_out: u64,
    /// First byte of the target. Together with `len` at most 2^63 - 1.
    pub offset_out: u64,
    /// How many bytes.
    pub len: u64,
    /// None are defined.
    pub flags: u64,
}

/// A time that is given, or the server's own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeOrNow {
    /// This one.
    At(Timestamp),
    /// The present.
    Now,
}

/// Changes of attributes; what is None stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Setattr {
    /// Handle of the open file by which it is asked.
    pub fh: Option<u64>,
    /// Permissions (and kind, which stays).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size, in bytes, at most 2^63 - 1.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<TimeOrNow>,
    /// Last change of data.
    pub mtime: Option<TimeOrNow>,
    /// Last change of attributes.
    pub ctime: Option<Timestamp>,
    /// The set-user-ID and set-group-ID bits go.
    pub kill_suidgid: bool,
}

/// The files of a BATCH_FORGET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [[u8; 16]]);

impl Forgets<'_> {
    /// Node id, and how many of its look-ups are forgotten.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|one| {
            let [nodeid, nlookup] = [&one[..8], &one[8..]]
                .map(|half| u64::from_ne_bytes(half.try_into().expect("half of 16 bytes")));
            (nodeid, nlookup)
        })
    }
}

impl<'a> Operation<'a> {
    /// Whether the kernel takes a reply to the operation of this number.
    pub fn has_reply(number: u32) -> bool {
        !matches!(number, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY)
    }

    pub(super) fn parse(number: u32, mut body: Cursor<'a>) -> Result<Operation<'a>, Fault> {
        let body = &mut body;
        Ok(match number {
            opcode::INIT => Operation::Init(Init::parse(*body)?),
            opcode::DESTROY => Operation::Destroy,
            opcode::LOOKUP => Operation::Lookup { name: body.last_name()? },
            opcode::FORGET => Operation::Forget { nlookup: body.u64()? },
            opcode::BATCH_FORGET => Operation::BatchForget(forgets(body)?),
            opcode::GETATTR => Operation::Getattr { fh: optional_handle(body)? },
            opcode::SETATTR => Operation::Setattr(setattr(body)?),
            opcode::READLINK => Operation::Readlink,
            opcode::SYMLINK => symlink(body)?,
            opcode::MKNOD => mknod(body)?,
            opcode::MKDIR => mkdir(body)?,
            opcode::UNLINK => Operation::Unlink { name: body.last_name()? },
            opcode::RMDIR => Operation::Rmdir { name: body.last_name()? },
            opcode::RENAME => rename1(body)?,
            opcode::RENAME2 => rename2(body)?,
            opcode::LINK => Operation::Link { nodeid: body.u64()?, new_name: body.last_name()? },
            opcode::OPEN => Operation::Open(Open { flags: body.u32()? }),
            opcode::CREATE => Operation::Create(create(body)?),
            opcode::TMPFILE => tmpfile(body)?,
            opcode::READ => Operation::Read(read(body, within_file)?),
            opcode::WRITE => Operation::Write(write(body)?),
            opcode::STATFS => Operation::Statfs,
            opcode::RELEASE => Operation::Release(release(body)?),
            opcode::FLUSH => flush(body)?,
            opcode::FSYNC => {
                let (fh, data_only) = fsync(body)?;
                Operation::Fsync { fh, data_only }
            }
            opcode::OPENDIR => Operation::Opendir(Open { flags: body.u32()? }),
            opcode::READDIR => Operation::Readdir(read(body, anywhere)?),
            opcode::READDIRPLUS => Operation::Readdirplus(read(body, anywhere)?),
            opcode::RELEASEDIR => Operation::Releasedir(release(body)?),
            opcode::FSYNCDIR => {
                let (fh, data_only) = fsync(body)?;
                Operation::Fsyncdir { fh, data_only }
            }
            opcode::ACCESS => Operation::Access { mask: body.u32()? },
            opcode::INTERRUPT => Operation::Interrupt { unique: Unique::from_raw(body.u64()?) },
            opcode::FALLOCATE => Operation::Fallocate(fallocate(body)?),
            opcode::LSEEK => Operation::Lseek(lseek(body)?),
            opcode::GETXATTR => getxattr(body)?,
            opcode::SETXATTR => setxattr(body)?,
            opcode::LISTXATTR => Operation::Listxattr { size: body.u32()? },
            opcode::REMOVEXATTR => Operation::Removexattr { name: attribute_name(body)? },
            opcode::POLL => {
                Operation::Poll { fh: body.u64()?, kh: body.u64()?, flags: body.u32()?, events: body.u32()? }
            }
            opcode::NOTIFY_REPLY => notify_reply(body)?,
            opcode::COPY_FILE_RANGE => Operation::CopyFileRange(copy_file_range(body)?),
            opcode::STATX => statx(body)?,
            other => Operation::Unknown(other),
        })
    }
}

/// Offset and length lie within what a file can have.
fn within_file(offset: u64, len: u64) -> Result<(), Fault> {
    let end = offset.checked_add(len).ok_or(Fault::Range)?;
    if end <= FILE_LEN_MAX { Ok(()) } else { Err(Fault::Range) }
}

/// The position in a directory is no offset.
fn anywhere(_: u64, _: u64) -> Result<(), Fault> {
    Ok(())
}

fn forgets<'a>(body: &mut Cursor<'a>) -> Result<Forgets<'a>, Fault> {
    let count = body.u32()?;
    body.skip(4)?;
    let (ones, rest) = body.rest().as_chunks();
    if rest.is_empty() && ones.len() == count as usize { Ok(Forgets(ones)) } else { Err(Fault::Trailing) }
}

/// Flags of which the first says that there is a handle, padding, handle.
fn optional_handle(body: &mut Cursor<'_>) -> Result<Option<u64>, Fault> {
    let flags = body.u32()?;
    body.skip(4)?;
    let fh = body.u64()?;
    Ok((flags & 1 != 0).then_some(fh))
}

fn setattr(body: &mut Cursor<'_>) -> Result<Setattr, Fault> {
    let valid = SetattrValid::from_bits(body.u32()?);
    body.skip(4)?;
    let (fh, size) = (body.u64()?, body.u64()?);
    // The owner of locks, which the kernel keeps itself.
    body.skip(8)?;
    let seconds = [body.i64()?, body.i64()?, body.i64()?];
    let nanoseconds = [body.u32()?, body.u32()?, body.u32()?];
    let mode = body.u32()?;
    body.skip(4)?;
    let (uid, gid) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let has = |flag| valid.contains(flag);
    if has(SetattrValid::SIZE) {
        within_file(size, 0)?;
    }
    let time = |at: usize| Timestamp { seconds: seconds[at], nanoseconds: nanoseconds[at] };
    let time_or_now = |at, given, now| match (has(given), has(now)) {
        (_, true) => Some(TimeOrNow::Now),
        (true, false) => Some(TimeOrNow::At(time(at))),
        (false, false) => None,
    };
    Ok(Setattr {
        fh: has(SetattrValid::FH).then_some(fh),
        mode: has(SetattrValid::MODE).then_some(mode),
        uid: has(SetattrValid::UID).then_some(uid),
        gid: has(SetattrValid::GID).then_some(gid),
        size: has(SetattrValid::SIZE).then_some(size),
        atime: time_or_now(0, SetattrValid::ATIME, SetattrValid::ATIME_NOW),
        mtime: time_or_now(1, SetattrValid::MTIME, SetattrValid::MTIME_NOW),
        ctime: has(SetattrValid::CTIME).then(|| time(2)),
        kill_suidgid: has(SetattrValid::KILL_SUIDGID),
    })
}

fn symlink<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let name = body.name()?;
    let target = body.text(TARGET_LEN_MAX)?;
    body.end()?;
    if target.is_empty() { Err(Fault::Name) } else { Ok(Operation::Symlink { name, target }) }
}

fn mknod<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let (mode, rdev, umask) = (body.u32()?, body.u32()?, body.u32()?);
    body.skip(4)?;
    Ok(Operation::Mknod { name: body.last_name()?, mode, rdev, umask })
}

fn mkdir<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let (mode, umask) = (body.u32()?, body.u32()?);
    Ok(Operation::Mkdir { name: body.last_name()?, mode, umask })
}

fn rename1<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let new_parent = body.u64()?;
    rename(body, new_parent, RenameFlags::NONE)
}

fn rename2<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let (new_parent, flags) = (body.u64()?, RenameFlags::from_bits(body.u32()?));
    body.skip(4)?;
    rename(body, new_parent, flags)
}

fn rename<'a>(body: &mut Cursor<'a>, new_parent: u64, flags: RenameFlags) -> Result<Operation<'a>, Fault> {
    Ok(Operation::Rename { name: body.name()?, new_parent, new_name: body.last_name()?, flags })
}

fn create<'a>(body: &mut Cursor<'a>) -> Result<Create<'a>, Fault> {
    let (flags, mode, umask) = (body.u32()?, body.u32()?, body.u32()?);
    // Flags of HANDLE_KILLPRIV_V2.
    body.skip(4)?;
    Ok(Create { name: body.last_name()?, flags, mode, umask })
}

fn tmpfile<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let (flags, mode, umask) = (body.u32()?, body.u32()?, body.u32()?);
    // The text after the flags of HANDLE_KILLPRIV_V2 is the kernel's word for "no name", a slash.
    body.skip(4)?;
    Ok(Operation::Tmpfile { flags, mode, umask })
}

fn read(body: &mut Cursor<'_>, check: fn(u64, u64) -> Result<(), Fault>) -> Result<ReadAt, Fault> {
    let (fh, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
    check(offset, u64::from(size))?;
    // Flags and the owner of locks.
    body.skip(4 + 8)?;
    let flags = body.u32()?;
    body.skip(4)?;
    Ok(ReadAt { fh, offset, size, flags })
}

fn write<'a>(body: &mut Cursor<'a>) -> Result<WriteAt<'a>, Fault> {
    let (fh, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
    within_file(offset, u64::from(size))?;
    let write_flags = WriteFlags::from_bits(body.u32()?);
    // The owner of locks.
    body.skip(8)?;
    let flags = body.u32()?;
    body.skip(4)?;
    Ok(WriteAt { fh, offset, data: body.exactly(size as usize)?, write_flags, flags })
}

fn release(body: &mut Cursor<'_>) -> Result<Release, Fault> {
    let (fh, flags) = (body.u64()?, body.u32()?);
    // Flags and the owner of locks.
    body.skip(4 + 8)?;
    Ok(Release { fh, flags })
}

fn flush<'a>(body: &mut Cursor<'_>) -> Result<Operation<'a>, Fault> {
    let fh = body.u64()?;
    body.skip(8)?;
    Ok(Operation::Flush { fh, lock_owner: body.u64()? })
}

fn fsync(body: &mut Cursor<'_>) -> Result<(u64, bool), Fault> {
    let (fh, flags) = (body.u64()?, body.u32()?);
    body.skip(4)?;
    Ok((fh, flags & 1 != 0))
}

fn fallocate(body: &mut Cursor<'_>) -> Result<Fallocate, Fault> {
    let (fh, offset, length) = (body.u64()?, body.u64()?, body.u64()?);
    within_file(offset, length)?;
    let mode = FallocateMode::from_bits(body.u32()?);
    body.skip(4)?;
    Ok(Fallocate { fh, offset, length, mode })
}

fn lseek(body: &mut Cursor<'_>) -> Result<Lseek, Fault> {
    let (fh, offset) = (body.u64()?, body.i64()?);
    let whence = match body.u32()? {
        3 => Whence::Data,
        4 => Whence::Hole,
        _ => return Err(Fault::Value),
    };
    body.skip(4)?;
    Ok(Lseek { fh, offset, whence })
}

/// The name of an extended attribute, which may contain slashes.
fn attribute_name<'a>(body: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let name = body.text(super::NAME_LEN_MAX)?;
    if name.is_empty() { Err(Fault::Name) } else { Ok(name) }
}

fn getxattr<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let size = body.u32()?;
    body.skip(4)?;
    Ok(Operation::Getxattr { name: attribute_name(body)?, size })
}

/// As it is without SETXATTR_EXT, which is never asked for.
fn setxattr<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    let (size, flags) = (body.u32()?, body.u32()?);
    let name = attribute_name(body)?;
    Ok(Operation::Setxattr { name, value: body.exactly(size as usize)?, flags })
}

fn notify_reply<'a>(body: &mut Cursor<'a>) -> Result<Operation<'a>, Fault> {
    body.skip(8)?;
    let (offset, size) = (body.u64()?, body.u32()?);
    within_file(offset, u64::from(size))?;
    body.skip(4 + 8 + 8)?;
    Ok(Operation::NotifyReply { offset, data: body.exactly(size as usize)? })
}

fn copy_file_range(body: &mut Cursor<'_>) -> Result<CopyFileRange, Fault> {
    let copy = CopyFileRange {
        fh_in: body.u64()?,
        offset_in: body.u64()?,
        nodeid_out: body.u64()?,
        fh_out: body.u64()?,
        offset_out: body.u64()?,
        len: body.u64()?,
        flags: body.u64()?,
    };
    within_file(copy.offset_in, copy.len)?;
    within_file(copy.offset_out, copy.len)?;
    Ok(copy)
}

fn statx<'a>(body: &mut Cursor<'_>) -> Result<Operation<'a>, Fault> {
    let fh = optional_handle(body)?;
    Ok(Operation::Statx { fh, flags: body.u32()?, mask: body.u32()? })
}
