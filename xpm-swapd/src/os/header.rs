//! The header of a swap area, and recognizing other content of a device.
//!
//! The header is version 1 of `union swap_header` in include/linux/swap.h, as mkswap(8) writes it: after 1024
//! bytes for boot blocks follow version, last page, number of bad pages, UUID and label; the last ten bytes
//! of the page are the magic.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::param::page_size;

/// The label of every area of this daemon.
pub const LABEL: &str = "xpm-swap";

const MAGIC: &[u8; 10] = b"SWAPSPACE2";
const INFO: usize = 1024;
const UUID: usize = INFO + 12;
const LABEL_AT: usize = UUID + 16;
const LABEL_LEN: usize = 16;
/// Bytes at both ends of a device in which signatures are searched.
const LOOKED_AT: u64 = 256 << 10;

/// UUID of an area.
pub type Uuid = [u8; 16];

/// The content of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Only zeros at both ends.
    Blank,
    /// A swap area of this daemon.
    Ours(Uuid),
    /// Swap that another program made.
    Swap,
    /// Other content, with its common name.
    Foreign(&'static str),
}

/// Determines the content of a device or file. Blocks for its I/O.
///
/// # Errors
/// When it cannot be read.
pub fn look(path: &Path) -> io::Result<Content> {
    let file = File::open(path)?;
    let len = length(&file)?;
    let mut head = vec![0; LOOKED_AT.min(len) as usize];
    file.read_exact_at(&mut head, 0)?;
    let mut tail = vec![0; LOOKED_AT.min(len - head.len() as u64) as usize];
    let behind = len - tail.len() as u64;
    file.read_exact_at(&mut tail, behind)?;
    Ok(recognize(&head, &tail, page_size()))
}

/// Writes and syncs the header of an area as long as the device or file. The caller has checked that no data
/// of others are there. Blocks for its I/O.
///
/// # Errors
/// When the header cannot be written, or the device is too short for swap.
/// When it cannot be written, or is too short for swap.
pub fn write(path: &Path, uuid: &Uuid) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let len = length(&file)?;
    let header = make(len, uuid, page_size())
        .ok_or_else(|| io::Error::other(format!("{} has {len} bytes, too few for swap", path.display())))?;
    file.write_all_at(&header, 0)?;
    file.sync_all()
}

/// Length of a device or file in bytes, found by seeking to its end.
fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
}

/// The header of an area of `len` bytes; none if that is less than the kernel's minimum of ten pages.
fn make(len: u64, uuid: &Uuid, page: usize) -> Option<Vec<u8>> {
    let pages = len / page as u64;
    let last = u32::try_from(pages.checked_sub(1)?).unwrap_or(u32::MAX);
    if pages < 10 {
        return None;
    }
    let mut header = vec![0; page];
    header[INFO..][..4].copy_from_slice(&1_u32.to_ne_bytes());
    header[INFO + 4..][..4].copy_from_slice(&last.to_ne_bytes());
    header[UUID..][..16].copy_from_slice(uuid);
    header[LABEL_AT..][..LABEL.len()].copy_from_slice(LABEL.as_bytes());
    header[page - MAGIC.len()..].copy_from_slice(MAGIC);
    Some(header)
}

/// Signatures of common content of disks, by offset and bytes (as libblkid knows them).
const SIGNATURES: [(usize, &[u8], &str); 11] = [
    (1024 + 56, &[0x53, 0xEF], "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (65_536 + 64, b"_BHRfS_M", "a btrfs file system"),
    (1024, &[0x10, 0x20, 0xF5, 0xF2], "an F2FS file system"),
    (0, b"LUKS\xba\xbe", "LUKS encryption"),
    (512 + 24, b"LVM2 001", "a physical volume of LVM"),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a software RAID"),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a software RAID"),
    (512, b"EFI PART", "a partition table (GPT)"),
    (510, &[0x55, 0xAA], "a boot sector or partition table"),
    (3, b"NTFS    ", "an NTFS file system"),
];

fn recognize(head: &[u8], tail: &[u8], page: usize) -> Content {
    let at = |place: usize, bytes: &[u8]| head.get(place..place + bytes.len()) == Some(bytes);
    if at(page - MAGIC.len(), MAGIC) {
        let label = head.get(LABEL_AT..LABEL_AT + LABEL_LEN).unwrap_or_default();
        let uuid = head.get(UUID..UUID + 16).and_then(|uuid| Uuid::try_from(uuid).ok());
        return match uuid {
            Some(uuid) if label.starts_with(LABEL.as_bytes()) && label[LABEL.len()] == 0 => {
                Content::Ours(uuid)
            }
            _ => Content::Swap,
        };
    }
    if let Some((_, _, what)) = SIGNATURES.into_iter().find(|(place, bytes, _)| at(*place, bytes)) {
        return Content::Foreign(what);
    }
    match head.iter().chain(tail).all(|byte| *byte == 0) {
        true => Content::Blank,
        false => Content::Foreign("data that is not zero"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    const ID: Uuid = *b"0123456789abcdef";

    fn device(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_written_header_is_recognized() {
        let file = device(1 << 20);
        assert_eq!(look(file.path()).unwrap(), Content::Blank);
        write(file.path(), &ID).unwrap();
        assert_eq!(look(file.path()).unwrap(), Content::Ours(ID));
        assert!(write(device(8192).path(), &ID).unwrap_err().to_string().contains("too few"));
        assert_eq!(look(device(0).path()).unwrap(), Content::Blank);
    }

    /// Compares with the bytes that mkswap(8) writes.
    #[test]
    fn the_header_equals_that_of_mkswap() {
        if Command::new("mkswap").arg("--version").output().is_err() {
            eprintln!("skipped: mkswap is not installed");
            return;
        }
        let (mine, theirs) = (device(64 << 20), device(64 << 20));
        write(mine.path(), &ID).unwrap();
        let hex: Vec<String> = ID.iter().map(|byte| format!("{byte:02x}")).collect();
        let hex = hex.concat();
        let uuid = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
        let made =
            Command::new("mkswap").args(["-L", LABEL, "-U", &uuid]).arg(theirs.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        assert!(std::fs::read(mine.path()).unwrap() == std::fs::read(theirs.path()).unwrap());
    }

    #[test]
    fn content_of_others_is_recognized() {
        for (place, bytes, what) in SIGNATURES {
            let file = device(1 << 20);
            file.as_file().write_all_at(bytes, place as u64).unwrap();
            assert_eq!(look(file.path()).unwrap(), Content::Foreign(what));
        }
        let file = device(1 << 20);
        file.as_file().write_all_at(b"x", (1 << 20) - 1).unwrap();
        assert_eq!(look(file.path()).unwrap(), Content::Foreign("data that is not zero"));
        write(file.path(), &ID).unwrap();
        file.as_file().write_all_at(b"other\0", LABEL_AT as u64).unwrap();
        assert_eq!(look(file.path()).unwrap(), Content::Swap);
        file.as_file().write_all_at(b"xpm-swap2", LABEL_AT as u64).unwrap();
        assert_eq!(look(file.path()).unwrap(), Content::Swap);
    }

    proptest! {
        #[test]
        fn any_bytes_are_classified(head in prop::collection::vec(any::<u8>(), 0..5000)) {
            let _ = recognize(&head, &[], 4096);
        }
    }
}
