//! Replies and notifications.

use proptest::prelude::*;
use xpm_fuse::Errno;
use xpm_fuse::wire::reply::{self, Entry, Opened, Statfs, Validity};
use xpm_fuse::wire::{
    Attr, Dirents, FileKind, Full, InitFlags, InitReply, Name, OpenFlags, Timestamp, Unique, notify,
};

use crate::{UNIQUE, layout};

/// A reply: header, then the messages of these names.
fn replied(names: &[&str]) -> Vec<u8> {
    let body = names.iter().flat_map(|name| layout(name)).collect();
    message(0, UNIQUE.raw(), body)
}

/// A notification of this number.
fn notified(code: u32, name: &str) -> Vec<u8> {
    message(code, 0, layout(name))
}

/// struct fuse_out_header, and what follows.
fn message(error: u32, unique: u64, body: Vec<u8>) -> Vec<u8> {
    let mut bytes = (u32::try_from(body.len()).unwrap() + 16).to_le_bytes().to_vec();
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    bytes
}

const ATTR: Attr = Attr {
    ino: 2,
    size: 1 << 33,
    blocks: 3,
    atime: Timestamp { seconds: 4, nanoseconds: 7 },
    mtime: Timestamp { seconds: 5, nanoseconds: 8 },
    ctime: Timestamp { seconds: -6, nanoseconds: 9 },
    mode: 0o100_644,
    nlink: 1,
    uid: 10,
    gid: 11,
    blksize: 4096,
};

const ENTRY: Entry = Entry {
    nodeid: 2,
    generation: 3,
    entry_valid: Validity { seconds: 4, nanoseconds: 6 },
    attr_valid: Validity { seconds: 5, nanoseconds: 7 },
    attr: ATTR,
};

#[test]
fn replies_of_fixed_length() {
    let opened = Opened { fh: 77, flags: OpenFlags::KEEP_CACHE };
    assert_eq!(reply::entry(UNIQUE, &ENTRY)[..], replied(&["entry"]));
    assert_eq!(reply::attr(UNIQUE, &ATTR, ENTRY.attr_valid)[..], replied(&["attr"]));
    assert_eq!(reply::open(UNIQUE, opened)[..], replied(&["open"]));
    assert_eq!(reply::create(UNIQUE, &ENTRY, opened)[..], replied(&["entry", "open"]));
    assert_eq!(reply::written(UNIQUE, 4096)[..], replied(&["write"]));
    assert_eq!(reply::lseek(UNIQUE, 4096)[..], replied(&["lseek"]));
    let (bsize, namelen, frsize) = (6, 255, 4096);
    let sizes = Statfs { blocks: 1, bfree: 2, bavail: 3, files: 4, ffree: 5, bsize, namelen, frsize };
    assert_eq!(reply::statfs(UNIQUE, &sizes)[..], replied(&["statfs"]));
    let init = InitReply {
        minor: 40,
        max_readahead: 1,
        flags: InitFlags::from_bits(0x80_4265_e021),
        max_background: 64,
        congestion_threshold: 48,
        max_write: 1 << 20,
        time_gran: 1,
        max_pages: 256,
    };
    assert_eq!(reply::init(UNIQUE, &init)[..], replied(&["init"]));
}

#[test]
fn headers() {
    assert_eq!(reply::empty(UNIQUE)[..], message(0, UNIQUE.raw(), vec![]));
    assert_eq!(reply::header(UNIQUE, 4096)[..4], 4112_u32.to_le_bytes());
    let resent = Unique::from_raw(1 << 63 | 4);
    // -ENOENT
    assert_eq!(reply::error(resent, Errno::NOENT)[..], message(0xffff_fffe, resent.raw(), vec![]));
    // An error that the kernel keeps to itself (ERESTARTSYS, 512) becomes -EIO.
    let internal = Errno::from_raw_os_error(512);
    assert_eq!(reply::error(UNIQUE, internal)[..], message(0xffff_fffb, UNIQUE.raw(), vec![]));
}

#[test]
fn listings() {
    let (hello, mut buffer) = (Name::new(b"hello").unwrap(), [0xaa; 4096]);
    let mut plain = Dirents::new(&mut buffer, 64);
    plain.push(2, 3, FileKind::Regular, hello).unwrap();
    plain.push(2, 3, FileKind::Regular, hello).unwrap();
    assert_eq!(plain.push(2, 3, FileKind::Regular, Name::DOT), Err(Full));
    assert_eq!(plain.finish(UNIQUE), replied(&["dirent", "dirent"]));

    let mut plus = Dirents::new(&mut buffer, 200);
    plus.push_plus(&ENTRY, 3, FileKind::Regular, hello).unwrap();
    assert_eq!(plus.push_plus(&ENTRY, 3, FileKind::Regular, hello), Err(Full));
    assert_eq!(plus.finish(UNIQUE), replied(&["direntplus"]));

    assert_eq!(Dirents::new(&mut buffer, 4096).finish(UNIQUE), replied(&[]));
    // DT_REG, DT_DIR, DT_LNK as modes
    let modes = [FileKind::Regular, FileKind::Directory, FileKind::Symlink].map(FileKind::mode_bits);
    assert_eq!(modes, [0o100_000, 0o040_000, 0o120_000]);
}

#[test]
fn notifications() {
    let (ram, mut buffer) = (Name::new(b"ram").unwrap(), [0xaa; notify::NAMED_LEN_MAX]);
    assert_eq!(notify::inval_inode(2, 4096, 8192)[..], notified(2, "inval_inode"));
    assert_eq!(notify::inval_entry(&mut buffer, 1, ram), notified(3, "inval_entry"));
    assert_eq!(notify::delete(&mut buffer, 1, 2, ram), notified(6, "delete"));
    assert_eq!(notify::resend()[..], message(7, 0, vec![]));
    // The length counts the data that follow.
    let mut store = notified(4, "store");
    store[0] += 5;
    assert_eq!(notify::store(2, 4096, 5)[..], store);
    let long = [b'x'; 255];
    let long = Name::new(&long).unwrap();
    assert_eq!(notify::delete(&mut buffer, 1, 2, long).len(), notify::NAMED_LEN_MAX);
}

proptest! {
    /// A listing never leaves its buffer, and every entry in it begins at a multiple of 8 bytes.
    #[test]
    fn listings_fit(
        len in 16_usize..600,
        size in 0_u32..600,
        names in proptest::collection::vec("[a-z]{1,255}", 0..12),
    ) {
        let mut buffer = vec![0xaa; len];
        let mut listing = Dirents::new(&mut buffer, size);
        let mut taken = 0;
        for (at, name) in names.iter().enumerate() {
            let name = Name::new(name.as_bytes()).unwrap();
            if listing.push(1, at as u64 + 1, FileKind::Directory, name).is_err() {
                break;
            }
            taken += 1;
        }
        let reply = listing.finish(UNIQUE);
        prop_assert!(reply.len() <= len && reply.len() <= size as usize + 16);
        let mut rest = &reply[16..];
        for name in &names[..taken] {
            let end = (24 + name.len()).next_multiple_of(8);
            prop_assert_eq!(&rest[24..][..name.len()], name.as_bytes());
            rest = &rest[end..];
        }
        prop_assert!(rest.is_empty());
    }
}
