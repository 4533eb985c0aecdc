//! Tables of the kernel that several programs read: `/proc/swaps` (proc_swaps(5)) and `/proc/meminfo`
//! (proc_meminfo(5)), and the escapes of paths in such tables.

use std::fs;
use std::io;

/// Suffix that the kernel adds to the path of a swap whose file was deleted, starting with a blank.
const DELETED: &str = r"\040(deleted)";

/// A line of `/proc/swaps`. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    /// The device or file. A deleted file is still swap, under its old path.
    pub path: String,
    /// Its size, without the header.
    pub size: u64,
    /// Used part.
    pub used: u64,
    /// Its priority.
    pub priority: i32,
}

/// All swap that is on now. Lines that cannot be parsed are left out.
///
/// # Errors
/// When the table cannot be read.
pub fn swaps() -> io::Result<Vec<Swap>> {
    // The kernel does not escape file names that are not UTF-8; such a line must not hide the others.
    fs::read("/proc/swaps").map(|table| parse_swaps(&String::from_utf8_lossy(&table)))
}

/// A number in the text of `/proc/meminfo`: in bytes if the line ends in kB, else the bare count. None if the line is
/// missing or malformed.
pub fn meminfo(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let mut words = value.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    match words.next() {
        Some("kB") => number.checked_mul(1024),
        Some(_) => None,
        None => Some(number),
    }
}

/// Decodes the octal escapes (`\040` for a blank) that the kernel writes into paths, also in proc_pid_mountinfo(5).
/// Other text stays unchanged.
pub fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first line is the table's header.
fn parse_swaps(table: &str) -> Vec<Swap> {
    table.lines().skip(1).filter_map(parse_swap).collect()
}

fn parse_swap(line: &str) -> Option<Swap> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [path, _, size, used, priority] = fields[..] else { return None };
    Some(Swap {
        path: unescape(path.strip_suffix(DELETED).unwrap_or(path)),
        size: size.parse::<u64>().ok()?.checked_mul(1024)?,
        used: used.parse::<u64>().ok()?.checked_mul(1024)?,
        priority: priority.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_real_table_is_parsed() {
        let table = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/ublkb0                             partition\t1048572\t\t12\t\t-2\n\
                     /swap\\040file\\134                      file\t\t1024\t\t0\t\t5\n\
                     /dev/nbd0\\040(deleted)                 partition\t8\t\t8\t\t-3\n";
        let swaps = parse_swaps(table);
        let paths: Vec<&str> = swaps.iter().map(|swap| swap.path.as_str()).collect();
        assert_eq!(paths, ["/dev/ublkb0", "/swap file\\", "/dev/nbd0"]);
        assert_eq!((swaps[0].size, swaps[0].used, swaps[0].priority), (1_048_572 << 10, 12 << 10, -2));
    }

    #[test]
    fn malformed_lines_are_left_out() {
        assert!(parse_swaps("").is_empty());
        let table = "head\n/dev/x partition a b c\nrubbish\n/y partition 99999999999999999999 0 1\n";
        assert!(parse_swaps(table).is_empty());
    }

    #[test]
    fn the_table_of_this_machine_is_parsed() {
        assert!(swaps().is_ok());
    }

    #[test]
    fn numbers_of_meminfo_are_parsed() {
        let text = "MemTotal:       24576000 kB\nHugePages_Total:       8\nHugepagesize:       2048 kB\nBad: x kB\nOdd: 3 MB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(24_576_000 * 1024));
        assert_eq!(meminfo(text, "HugePages_Total"), Some(8));
        for missing in ["Mem", "Bad", "Odd", "Nothing"] {
            assert_eq!(meminfo(text, missing), None, "{missing}");
        }
        assert_eq!(meminfo("A: 18446744073709551615 kB", "A"), None);
    }

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        for none in [r"\04", r"\999", r"\400", r"\+12", r"\"] {
            assert_eq!(unescape(none), none);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_unescaped(text in ".{0,60}") {
            prop_assert!(unescape(&text).len() <= text.len() * 3);
        }
    }
}
