//! `/proc/swaps` (proc_swaps(5)) and `/proc/meminfo` (proc_meminfo(5)).

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

/// One line of `/proc/swaps`. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The device or file.
    pub path: String,
    /// Its size, without the header.
    pub size: u64,
    /// What of it is in use.
    pub used: u64,
    /// Its priority.
    pub priority: i32,
}

/// What `/proc/meminfo` says, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`.
    pub available: u64,
}

/// Everything that is swap now.
///
/// # Errors
/// When the table cannot be read.
pub fn swaps() -> io::Result<Vec<Entry>> {
    fs::read_to_string("/proc/swaps").map(|table| parse_swaps(&table))
}

/// Memory as it is now.
///
/// # Errors
/// When it cannot be read.
pub fn memory() -> io::Result<Memory> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse_memory(&text)
        .ok_or_else(|| io::Error::other("/proc/meminfo says neither MemTotal nor MemAvailable"))
}

/// The line of a device or file, which may have other names.
pub fn find<'a>(entries: &'a [Entry], path: &str) -> Option<&'a Entry> {
    let by_name = entries.iter().find(|entry| entry.path == path);
    by_name.or_else(|| {
        let wanted = identity(path)?;
        entries.iter().find(|entry| identity(&entry.path) == Some(wanted))
    })
}

/// What a path leads to: the number of a device, or file system and inode of a file.
fn identity(path: &str) -> Option<(bool, u64, u64)> {
    let found = fs::metadata(Path::new(path)).ok()?;
    match found.file_type().is_block_device() {
        true => Some((true, found.rdev(), 0)),
        false => Some((false, found.dev(), found.ino())),
    }
}

fn parse_swaps(table: &str) -> Vec<Entry> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [path, _, size, used, priority] = fields[..] else { return None };
            Some(Entry {
                path: unescape(path.strip_suffix("\\040(deleted)").unwrap_or(path)),
                size: size.parse::<u64>().ok()?.checked_mul(1024)?,
                used: used.parse::<u64>().ok()?.checked_mul(1024)?,
                priority: priority.parse().ok()?,
            })
        })
        .collect()
}

fn parse_memory(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Memory { total: field("MemTotal:")?, available: field("MemAvailable:")? })
}

/// Undoes the octal escapes (`\040` for a blank) that the kernel writes into paths.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match (byte, digits.and_then(|digits| u8::from_str_radix(digits, 8).ok())) {
            (b'\\', Some(value)) => {
                bytes.push(value);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_table() {
        let table = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/ublkb0                             partition\t1048572\t\t12\t\t-2\n\
                     /swap\\040file                          file\t\t1024\t\t0\t\t5\n\
                     /dev/nbd0\\040(deleted)                 partition\t8\t\t8\t\t-3\n";
        let entries = parse_swaps(table);
        let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["/dev/ublkb0", "/swap file", "/dev/nbd0"]);
        assert_eq!((entries[0].size, entries[0].used, entries[0].priority), (1_048_572 << 10, 12 << 10, -2));
        assert!(find(&entries, "/dev/ublkb0").is_some());
        assert!(find(&entries, "/dev/ublkb1").is_none());
        assert!(parse_swaps("").is_empty());
        assert!(parse_swaps("head\n/dev/x partition a b c\nrubbish\n").is_empty());
    }

    #[test]
    fn memory_of_this_machine() {
        let memory = memory().unwrap();
        assert!(memory.total > memory.available && memory.available > 0);
        assert_eq!(parse_memory("MemTotal: 5 kB\n"), None);
    }
}
