//! A request of /dev/fuse: whatever passes lies within its bytes, and within the range of a file's offsets.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_fuse::wire::{FILE_LEN_MAX, IN_HEADER_LEN, NAME_LEN_MAX, Operation, Request, WRITE_DATA_OFFSET};
use xpm_fuse::{Negotiated, Wanted};

fuzz_target!(|input: &[u8]| {
    // The length is written, else hardly any input gets past it.
    let mut bytes = input.to_vec();
    let len = (bytes.len() as u32).to_ne_bytes();
    if input.first().is_some_and(|first| *first != 0xff) {
        bytes.iter_mut().zip(len).take(4).for_each(|(byte, value)| *byte = value);
    }
    match Request::parse(&bytes) {
        Ok(request) => passed(&bytes, &request),
        Err(malformed) => {
            assert!(malformed.opcode.is_some() || malformed.unique.is_none());
            assert!(malformed.to_string().len() < 300);
        }
    }
});

fn passed(bytes: &[u8], request: &Request<'_>) {
    let within =
        |offset: u64, len: u64| assert!(offset.checked_add(len).is_some_and(|end| end <= FILE_LEN_MAX));
    match request.operation {
        Operation::Read(read) => within(read.offset, u64::from(read.size)),
        Operation::Write(write) => {
            within(write.offset, write.data.len() as u64);
            assert!(bytes[WRITE_DATA_OFFSET..].starts_with(write.data));
        }
        Operation::Fallocate(range) => within(range.offset, range.length),
        Operation::CopyFileRange(copy) => {
            within(copy.offset_in, copy.len);
            within(copy.offset_out, copy.len);
        }
        Operation::Setattr(setattr) => within(setattr.size.unwrap_or(0), 0),
        Operation::Lookup { name }
        | Operation::Unlink { name }
        | Operation::Rmdir { name }
        | Operation::Mkdir { name, .. }
        | Operation::Mknod { name, .. }
        | Operation::Rename { name, .. }
        | Operation::Symlink { name, .. } => {
            let name = name.as_bytes();
            assert!((1..=NAME_LEN_MAX).contains(&name.len()) && name != b"." && name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
        }
        Operation::BatchForget(forgets) => assert!(forgets.iter().count() * 16 < bytes.len() - IN_HEADER_LEN),
        Operation::Init(init) => {
            let limit = 1 << 20;
            let wanted = Wanted {
                max_write: limit,
                max_pages: 256,
                max_readahead: limit,
                max_background: 64,
                congestion_threshold: 48,
            };
            if let Ok(agreed) = Negotiated::new(&init, &wanted) {
                assert!(init.flags.contains(agreed.flags) && agreed.minor <= init.minor);
                assert!(agreed.max_readahead <= init.max_readahead);
            }
        }
        _ => {}
    }
}
