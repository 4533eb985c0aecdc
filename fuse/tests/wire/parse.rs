//! Every request that the kernel sends.

use xpm_fuse::wire::{
    CopyFileRange, Create, Fallocate, FallocateMode, Header, Init, InitFlags, Lseek, Name, Open, Operation,
    ReadAt, Release, RenameFlags, Request, Setattr, TimeOrNow, Timestamp, Unique, WRITE_DATA_OFFSET, Whence,
    WriteAt, WriteFlags,
};

use crate::{UNIQUE, layout};

fn name(text: &str) -> Name<'_> {
    Name::new(text.as_bytes()).unwrap()
}

#[track_caller]
fn check(message: &str, opcode: u32, operation: Operation<'_>) {
    let bytes = layout(message);
    let request = Request::parse(&bytes).unwrap();
    let header = Header { opcode, unique: UNIQUE, nodeid: 7, uid: 1000, gid: 1001, pid: 4242 };
    assert_eq!(request, Request { header, operation }, "{message}");
}

#[test]
fn of_the_connection() {
    let flags = InitFlags::from_bits(0x3ff_7fff_fffb);
    let init = Init { major: 7, minor: 44, max_readahead: 131_072, flags };
    check("FUSE_INIT", 26, Operation::Init(init));
    check("FUSE_INTERRUPT", 36, Operation::Interrupt { unique: Unique::from_raw(0x42) });
    check("FUSE_NOTIFY_REPLY", 41, Operation::NotifyReply { offset: 4096, data: b"abc" });
}

#[test]
fn of_names() {
    check("FUSE_LOOKUP", 1, Operation::Lookup { name: name("ram") });
    check("FUSE_FORGET", 2, Operation::Forget { nlookup: 5 });
    check("FUSE_SYMLINK", 6, Operation::Symlink { name: name("ln"), target: b"../x/y" });
    check("FUSE_MKNOD", 8, Operation::Mknod { name: name("f"), mode: 0o100_600, rdev: 0, umask: 0o22 });
    check("FUSE_MKDIR", 9, Operation::Mkdir { name: name("d"), mode: 0o755, umask: 0o22 });
    let (old, new) = (name("old"), name("new"));
    let rename = |flags| Operation::Rename { name: old, new_parent: 9, new_name: new, flags };
    check("FUSE_RENAME", 12, rename(RenameFlags::NONE));
    check("FUSE_RENAME2", 45, rename(RenameFlags::EXCHANGE));
    check("FUSE_LINK", 13, Operation::Link { nodeid: 10, new_name: name("hard") });
    let create = Create { name: new, flags: 0o102, mode: 0o100_640, umask: 0o27 };
    check("FUSE_CREATE", 35, Operation::Create(create));
    check("FUSE_TMPFILE", 51, Operation::Tmpfile { flags: 0o102, mode: 0o100_640, umask: 0o27 });
}

#[test]
fn several_forgets_at_a_time() {
    let bytes = layout("FUSE_BATCH_FORGET");
    let Operation::BatchForget(forgets) = Request::parse(&bytes).unwrap().operation else { panic!() };
    assert_eq!(forgets.iter().collect::<Vec<_>>(), [(8, 1), (9, 3)]);
}

#[test]
fn of_attributes() {
    check("FUSE_GETATTR", 3, Operation::Getattr { fh: Some(77) });
    check("FUSE_STATX", 52, Operation::Statx { fh: Some(77), flags: 0x100, mask: 0xfff });
    let time = |seconds, nanoseconds| Timestamp { seconds, nanoseconds };
    let setattr = Setattr {
        fh: Some(77),
        mode: Some(0o100_644),
        uid: None,
        gid: Some(12),
        size: Some(1 << 33),
        atime: Some(TimeOrNow::Now),
        mtime: Some(TimeOrNow::At(time(-2, 5))),
        ctime: Some(time(3, 6)),
        kill_suidgid: true,
    };
    check("FUSE_SETATTR", 4, Operation::Setattr(setattr));
    check("FUSE_ACCESS", 34, Operation::Access { mask: 4 });
    check("FUSE_GETXATTR", 22, Operation::Getxattr { name: b"user.a/b", size: 256 });
    check("FUSE_SETXATTR", 21, Operation::Setxattr { name: b"user.a", value: b"xyz", flags: 1 });
    check("FUSE_LISTXATTR", 23, Operation::Listxattr { size: 256 });
}

#[test]
fn of_open_files() {
    check("FUSE_OPEN", 14, Operation::Open(Open { flags: 2 }));
    let read = ReadAt { fh: 77, offset: 4096, size: 131_072, flags: 2 };
    check("FUSE_READ", 15, Operation::Read(read));
    check("FUSE_READDIRPLUS", 44, Operation::Readdirplus(read));
    let write = WriteAt { fh: 77, offset: 8192, data: b"hello", write_flags: WriteFlags::CACHE, flags: 2 };
    check("FUSE_WRITE", 16, Operation::Write(write));
    assert_eq!(&layout("FUSE_WRITE")[WRITE_DATA_OFFSET..], b"hello");
    check("FUSE_RELEASE", 18, Operation::Release(Release { fh: 77, flags: 2 }));
    check("FUSE_FLUSH", 25, Operation::Flush { fh: 77, lock_owner: 99 });
    check("FUSE_FSYNC", 20, Operation::Fsync { fh: 77, data_only: true });
    let mode = FallocateMode::KEEP_SIZE.with(FallocateMode::PUNCH_HOLE);
    check(
        "FUSE_FALLOCATE",
        43,
        Operation::Fallocate(Fallocate { fh: 77, offset: 4096, length: 65_536, mode }),
    );
    check("FUSE_LSEEK", 46, Operation::Lseek(Lseek { fh: 77, offset: 4096, whence: Whence::Hole }));
    check("FUSE_POLL", 40, Operation::Poll { fh: 77, kh: 88, flags: 1, events: 5 });
    let (fh_in, fh_out) = (77, 78);
    let copy = CopyFileRange { fh_in, offset_in: 1, nodeid_out: 8, fh_out, offset_out: 2, len: 3, flags: 0 };
    check("FUSE_COPY_FILE_RANGE", 47, Operation::CopyFileRange(copy));
}

/// Operations of one layout with another number, and operations without arguments.
#[test]
fn relatives() {
    let parse = |message: &str, opcode: u8, check: fn(Operation<'_>) -> bool| {
        let mut bytes = layout(message);
        bytes[4] = opcode;
        let operation = Request::parse(&bytes).unwrap().operation;
        assert!(check(operation), "{opcode}: {operation:?}");
    };
    parse("FUSE_LOOKUP", 10, |operation| operation == Operation::Unlink { name: name("ram") });
    parse("FUSE_LOOKUP", 11, |operation| operation == Operation::Rmdir { name: name("ram") });
    parse("FUSE_LOOKUP", 24, |operation| operation == Operation::Removexattr { name: b"ram" });
    parse("FUSE_OPEN", 27, |operation| operation == Operation::Opendir(Open { flags: 2 }));
    parse("FUSE_READ", 28, |operation| matches!(operation, Operation::Readdir(ReadAt { offset: 4096, .. })));
    parse("FUSE_RELEASE", 29, |operation| matches!(operation, Operation::Releasedir(_)));
    parse("FUSE_FSYNC", 30, |operation| operation == Operation::Fsyncdir { fh: 77, data_only: true });
    parse("FUSE_OPEN", 5, |operation| operation == Operation::Readlink);
    parse("FUSE_OPEN", 17, |operation| operation == Operation::Statfs);
    parse("FUSE_OPEN", 38, |operation| operation == Operation::Destroy);
    parse("FUSE_OPEN", 39, |operation| operation == Operation::Unknown(39));
}

#[test]
fn a_resent_request_is_told_apart_and_keeps_its_number() {
    let mut bytes = layout("FUSE_READ");
    assert!(!Request::parse(&bytes).unwrap().header.unique.is_resent());
    // The top byte of `unique`, which is little-endian.
    bytes[15] |= 0x80;
    let unique = Request::parse(&bytes).unwrap().header.unique;
    assert!(unique.is_resent());
    assert_eq!(unique.first(), UNIQUE);
    assert_eq!(unique.raw(), UNIQUE.raw() | 1 << 63);
}

#[test]
fn extensions_are_left_out() {
    let mut bytes = layout("FUSE_LOOKUP");
    bytes.extend([1; 16]);
    bytes[0] += 16;
    // total_extlen, in units of 8 bytes
    bytes[36] = 2;
    let request = Request::parse(&bytes).unwrap();
    assert_eq!(request.operation, Operation::Lookup { name: name("ram") });
}

#[test]
fn fields_of_a_newer_kernel_are_ignored() {
    let mut bytes = layout("FUSE_FALLOCATE");
    bytes.extend([1; 8]);
    bytes[0] += 8;
    assert!(matches!(Request::parse(&bytes).unwrap().operation, Operation::Fallocate(_)));
}
