//! Reading the kernel's tables of swap (proc_swaps(5)) and of memory (proc_meminfo(5)).

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use xpm_control::proc::{Swap, meminfo};

/// Values of `/proc/meminfo`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`.
    pub available: u64,
}

/// The present state of memory.
///
/// # Errors
/// When it cannot be read.
pub fn memory() -> io::Result<Memory> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse_memory(&text)
        .ok_or_else(|| io::Error::other("/proc/meminfo says neither MemTotal nor MemAvailable"))
}

/// The entry of a device or file, which may have other names.
pub fn find<'a>(swaps: &'a [Swap], path: &str) -> Option<&'a Swap> {
    let by_name = swaps.iter().find(|swap| swap.path == path);
    by_name.or_else(|| {
        let wanted = identity(path)?;
        swaps.iter().find(|swap| identity(&swap.path) == Some(wanted))
    })
}

/// The identity of a path's target: the number of a device, or file system and inode of a file.
fn identity(path: &str) -> Option<(bool, u64, u64)> {
    let found = fs::metadata(Path::new(path)).ok()?;
    match found.file_type().is_block_device() {
        true => Some((true, found.rdev(), 0)),
        false => Some((false, found.dev(), found.ino())),
    }
}

fn parse_memory(text: &str) -> Option<Memory> {
    Some(Memory { total: meminfo(text, "MemTotal")?, available: meminfo(text, "MemAvailable")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_is_found_by_any_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let [file, other] = ["a", "b"].map(|name| directory.path().join(name).display().to_string());
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &other).unwrap();
        let swaps =
            ["/dev/ublkb0", &file].map(|path| Swap { path: path.to_owned(), size: 0, used: 0, priority: 0 });
        assert_eq!(find(&swaps, "/dev/ublkb0"), Some(&swaps[0]));
        assert_eq!(find(&swaps, &other), Some(&swaps[1]));
        assert_eq!(find(&swaps, "/dev/ublkb1"), None);
    }

    #[test]
    fn memory_of_this_machine() {
        let memory = memory().unwrap();
        assert!(memory.total > memory.available && memory.available > 0);
        assert_eq!(parse_memory("MemTotal: 5 kB\n"), None);
    }
}
