//! Bytes that are not a request.

use proptest::prelude::*;
use xpm_fuse::wire::{Fault, Header, Malformed, Name, Operation, Request};

use crate::{UNIQUE, layout};

fn fault(bytes: &[u8]) -> Fault {
    Request::parse(bytes).unwrap_err().fault
}

/// A request of this name with other bytes behind its header, and a header that says so.
fn with_body(message: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = layout(message);
    bytes.truncate(40);
    bytes.extend(body);
    let len = u32::try_from(bytes.len()).unwrap();
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// The same request with a number at this offset into its body.
fn with_u64(message: &str, at: usize, value: u64) -> Vec<u8> {
    let mut bytes = layout(message);
    bytes[40 + at..][..8].copy_from_slice(&value.to_le_bytes());
    bytes
}

#[test]
fn every_request_that_is_cut_short() {
    let messages = include_str!("layout.txt").lines().filter_map(|line| line.split_once(' '));
    let names = messages.map(|(name, _)| name).filter(|name| name.starts_with("FUSE_"));
    for name in names {
        let whole = layout(name);
        for len in 40..whole.len() {
            let cut = with_body(name, &whole[40..len]);
            // The only fields that nobody reads are at the end of these.
            let may_end = (name == "FUSE_INIT" && len >= 60)
                || (matches!(name, "FUSE_OPEN" | "FUSE_ACCESS" | "FUSE_LISTXATTR") && len >= 44)
                || (name == "FUSE_TMPFILE" && len >= 56);
            assert_eq!(Request::parse(&cut).is_ok(), may_end, "{name} of {len} bytes");
        }
        for len in 0..40 {
            assert_eq!(fault(&whole[..len]), Fault::TooShort, "{name} of {len} bytes");
        }
    }
}

#[test]
fn the_header_must_say_the_length() {
    let mut bytes = layout("FUSE_READ");
    bytes.pop();
    let malformed = Request::parse(&bytes).unwrap_err();
    let fault = Fault::Length { said: 80, read: 79 };
    assert_eq!(malformed, Malformed { unique: Some(UNIQUE), opcode: Some(15), fault });
    let text = malformed.to_string();
    assert!(text.contains("80 bytes") && text.contains("15"), "{text}");
}

#[test]
fn names() {
    for (name, fault_of_it) in [
        (&b"\0"[..], Fault::Name),
        (b".\0", Fault::Name),
        (b"..\0", Fault::Name),
        (b"a/b\0", Fault::Name),
        (b"ram", Fault::Unterminated),
        (b"", Fault::Unterminated),
        (b"ram\0x", Fault::Trailing),
        (&[b'a'; 256], Fault::Unterminated),
    ] {
        assert_eq!(fault(&with_body("FUSE_LOOKUP", name)), fault_of_it, "{name:?}");
    }
    let mut long = vec![b'a'; 255];
    long.push(0);
    assert!(Request::parse(&with_body("FUSE_LOOKUP", &long)).is_ok());
    long.insert(0, b'a');
    assert_eq!(fault(&with_body("FUSE_LOOKUP", &long)), Fault::NameTooLong);
    assert_eq!(Name::new(b"a\0"), Err(Fault::Name));
    assert_eq!(fault(&with_body("FUSE_SYMLINK", b"ln\0\0")), Fault::Name);
    assert_eq!(fault(&with_body("FUSE_RENAME", b"12345678old\0")), Fault::Unterminated);
}

#[test]
fn offsets_and_lengths() {
    const TOP: u64 = i64::MAX as u64;
    assert!(Request::parse(&with_u64("FUSE_READ", 8, TOP - 131_072)).is_ok());
    assert_eq!(fault(&with_u64("FUSE_READ", 8, TOP - 131_071)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_READ", 8, u64::MAX)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_WRITE", 8, TOP - 4)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_FALLOCATE", 16, u64::MAX)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_FALLOCATE", 16, TOP)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_COPY_FILE_RANGE", 40, TOP)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_COPY_FILE_RANGE", 32, TOP)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_SETATTR", 16, TOP + 1)), Fault::Range);
    assert_eq!(fault(&with_u64("FUSE_NOTIFY_REPLY", 8, TOP)), Fault::Range);
    // A position in a directory is no offset, and lseek(2) may be called with anything.
    assert!(Request::parse(&with_u64("FUSE_READDIRPLUS", 8, u64::MAX)).is_ok());
    assert!(Request::parse(&with_u64("FUSE_LSEEK", 8, u64::MAX)).is_ok());
    assert_eq!(fault(&with_u64("FUSE_LSEEK", 16, 0)), Fault::Value);
}

#[test]
fn data_of_another_length() {
    for message in ["FUSE_WRITE", "FUSE_NOTIFY_REPLY", "FUSE_SETXATTR", "FUSE_BATCH_FORGET"] {
        let mut body = layout(message).split_off(40);
        body.push(0);
        assert_eq!(fault(&with_body(message, &body)), Fault::Trailing, "{message}");
    }
    let mut count = layout("FUSE_BATCH_FORGET").split_off(40);
    count[..4].fill(0xff);
    assert_eq!(fault(&with_body("FUSE_BATCH_FORGET", &count)), Fault::Trailing);
}

#[test]
fn extensions_longer_than_the_request() {
    let mut bytes = layout("FUSE_LOOKUP");
    bytes[36] = 1;
    assert_eq!(fault(&bytes), Fault::Extensions);
    bytes[36..38].fill(0xff);
    assert_eq!(fault(&bytes), Fault::Extensions);
}

#[test]
fn what_has_no_reply_is_not_to_be_answered() {
    let whom = |message: &str| Request::parse(&with_body(message, b"")).unwrap_err().unique;
    assert_eq!(whom("FUSE_FORGET"), None);
    assert_eq!(whom("FUSE_BATCH_FORGET"), None);
    assert_eq!(whom("FUSE_INTERRUPT"), None);
    assert_eq!(whom("FUSE_NOTIFY_REPLY"), None);
    assert_eq!(whom("FUSE_READ"), Some(UNIQUE));
}

proptest! {
    #[test]
    fn anything_is_read_or_refused(
        opcode in 0_u32..60,
        flags in any::<u16>(),
        body in proptest::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..200),
    ) {
        let mut bytes = with_body("FUSE_LOOKUP", &body);
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[36] = u8::from(flags == 0);
        match Request::parse(&bytes) {
            Ok(Request { header: Header { opcode: found, .. }, operation }) => {
                prop_assert_eq!(found, opcode);
                if let Operation::Write(write) = operation {
                    prop_assert_eq!(write.data, &bytes[80..]);
                }
            }
            Err(malformed) => prop_assert_eq!(malformed.opcode, Some(opcode)),
        }
    }
}
