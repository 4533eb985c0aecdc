//! Programs that have a block device open, as `/proc/PID/fd` and `/proc/PID/fdinfo` show them (proc_pid_fd(5)).
//!
//! These functions do no I/O on the device. Opens by the kernel itself are not visible here: `sysfs` shows
//! other devices on top, and an exclusive open finds the rest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::DeviceNumber;

/// An open for reading only counts as use when it lasts longer than this. Shorter ones are queries: udev and
/// blkid make them whenever a device changes.
const LOOK: Duration = Duration::from_secs(2);
/// A series of queries without a gap counts as use after this time.
const LOOKS: Duration = Duration::from_secs(4);
const AGAIN: Duration = Duration::from_millis(100);

/// A process that has the device open.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Opener {
    name: String,
    writes: bool,
}

/// Process and descriptor.
type Place = (u32, u32);

/// The programs that have one of these devices open: for writing, or for longer than a query. Waits for
/// queries to end.
pub(super) fn of(numbers: &[DeviceNumber]) -> Vec<String> {
    settled(|| now(numbers), Instant::now())
}

fn settled(mut look: impl FnMut() -> BTreeMap<Place, Opener>, start: Instant) -> Vec<String> {
    let mut since: BTreeMap<Place, Instant> = BTreeMap::new();
    loop {
        let open = look();
        since.retain(|place, _| open.contains_key(place));
        let now = Instant::now();
        let uses = |(place, opener): (&Place, &Opener)| {
            let begun = *since.entry(*place).or_insert(now);
            let lasts = now.duration_since(begun) >= LOOK || start.elapsed() >= LOOKS;
            (opener.writes || lasts).then(|| describe(*place, opener))
        };
        let mut found: Vec<String> = open.iter().filter_map(uses).collect();
        if !found.is_empty() || open.is_empty() {
            found.dedup();
            return found;
        }
        thread::sleep(AGAIN);
    }
}

fn describe((pid, _): Place, opener: &Opener) -> String {
    let how = if opener.writes { "" } else { " for reading" };
    format!("opened{how} by {} (process {pid})", opener.name)
}

fn now(numbers: &[DeviceNumber]) -> BTreeMap<Place, Opener> {
    let ours = std::process::id();
    let processes = entries(Path::new("/proc")).into_iter().filter_map(|path| number_of(&path));
    processes.filter(|pid| *pid != ours).flat_map(|pid| of_process(pid, numbers)).collect()
}

fn of_process(pid: u32, numbers: &[DeviceNumber]) -> Vec<(Place, Opener)> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let descriptors = entries(&process.join("fd"));
    let is_one = |path: &PathBuf| block_number(path).is_some_and(|number| numbers.contains(&number));
    let opener = |path: PathBuf| {
        let descriptor = number_of(&path)?;
        let info =
            fs::read_to_string(process.join("fdinfo").join(descriptor.to_string())).unwrap_or_default();
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
        Some(((pid, descriptor), Opener { name, writes: writes(&info) }))
    };
    descriptors.into_iter().filter(is_one).filter_map(opener).collect()
}

/// Whether a descriptor with this `fdinfo` can write.
fn writes(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i64::from_str_radix(flags.trim(), 8).ok()).unwrap_or_default();
    flags & i64::from(libc::O_ACCMODE) != i64::from(libc::O_RDONLY)
}

/// The number of the block device that a path leads to. Sends no request to the server of a network file
/// system.
pub(super) fn block_number(path: &Path) -> Option<DeviceNumber> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_block = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
    is_block.then_some(DeviceNumber { major: found.stx_rdev_major, minor: found.stx_rdev_minor })
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn number_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_can_write() {
        for (flags, writes_to) in [("0100000", false), ("0100002", true), ("02100001", true), ("", false)] {
            assert_eq!(writes(&format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t1\n")), writes_to, "{flags}");
        }
    }

    #[test]
    fn queries_are_waited_for_and_users_are_named() {
        let opener = |writes| Opener { name: "x".to_owned(), writes };
        let all = |list: &[(u32, bool)]| -> BTreeMap<Place, Opener> {
            list.iter().map(|(pid, writes)| ((*pid, 3), opener(*writes))).collect()
        };
        // Two queries, each of which ends.
        let mut looks =
            vec![all(&[]), all(&[(2, false)]), all(&[(1, false), (2, false)]), all(&[(1, false)])];
        let found = settled(|| looks.pop().expect("it looks until nobody has it open"), Instant::now());
        assert!(found.is_empty() && looks.is_empty(), "{found:?}");
        let found = settled(|| all(&[(1, false), (2, true)]), Instant::now());
        assert_eq!(found, ["opened by x (process 2)"], "one that writes is a use at once");
        let found = settled(|| all(&[(1, false)]), Instant::now());
        assert_eq!(found, ["opened for reading by x (process 1)"]);
    }
}
