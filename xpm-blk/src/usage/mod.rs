//! The present users of a block device: swap, file systems, other devices, programs.

pub(crate) mod mounts;
mod openers;

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use xpm_control::proc;

use crate::sysfs;

/// Number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Longest chain of loop devices on loop devices.
const LOOPS_MAX: usize = 8;

/// The users of the disk or of one of its partitions, each as `swap`, `mounted at /mnt`, `held by dm-0` or
/// `held by loop0 (mounted at /mnt)`. Does no I/O on the disk, and so never blocks on it.
pub(crate) fn users(disk: &str) -> Vec<String> {
    users_beneath(disk, LOOPS_MAX)
}

fn users_beneath(disk: &str, loops_max: usize) -> Vec<String> {
    let parts = parts(disk);
    let numbers = numbers_of(&parts);
    let mut users = Vec::new();
    let swaps = proc::swaps().unwrap_or_default();
    if swaps.iter().any(|swap| is_one_of(Path::new(&swap.path), &parts, &numbers)) {
        users.push("swap".to_owned());
    }
    let mounts = mounts::of(&mount_table(), &numbers);
    users.extend(mounts.into_iter().map(|place| format!("mounted at {place}")));
    users.extend(parts.iter().flat_map(|part| holders(part)).map(|holder| format!("held by {holder}")));
    if loops_max > 0 {
        let loops = loops_on(&parts, &numbers).into_iter();
        users.extend(loops.map(|one| held_by_loop(&one, loops_max - 1)));
    }
    users
}

/// Programs that have the disk or one of its partitions open, for writing or for longer than a query, as
/// `opened by qemu (process 7)`. Waits for queries to end, a few seconds at most. Does no I/O on the disk.
pub(crate) fn openers(disk: &str) -> Vec<String> {
    openers::of(&numbers_of(&parts(disk)))
}

/// Loop devices whose backing file is one of these parts: the kernel does not list them as holders.
fn loops_on(parts: &[String], numbers: &[DeviceNumber]) -> Vec<String> {
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = disks.filter_map(|disk| disk.file_name().into_string().ok());
    let is_on = |name: &String| {
        let backing = sysfs::text(name, "loop/backing_file");
        backing.is_some_and(|backing| is_one_of(Path::new(&backing), parts, numbers))
    };
    names.filter(|name| name.starts_with("loop")).filter(is_on).collect()
}

fn held_by_loop(name: &str, loops_max: usize) -> String {
    let mut users = users_beneath(name, loops_max);
    if users.is_empty() {
        users = openers(name);
    }
    match users.is_empty() {
        true => format!("held by {name}"),
        false => format!("held by {name} ({})", users.join(", ")),
    }
}

/// The line about a disk that lost its server and that no record needs; none when the disk has no users and
/// is not `held`, which is only called when no user is known by name.
pub(crate) fn left_in_use(disk: &str, held: fn(&str) -> bool) -> Option<String> {
    let users = users(disk);
    if users.is_empty() && !held(disk) {
        return None;
    }
    let users = if users.is_empty() { "opened by a program".to_owned() } else { users.join(", ") };
    Some(format!(
        "/dev/{disk} was left by an earlier xpm-blk, and no record says what it showed: its I/O waits for ever; it is in use \
         ({users}). Put the record back into the state directory and start xpm-blk again, or give the device up"
    ))
}

/// Whether the disk is opened exclusively, as by mounts of any mount namespace, swap and other devices. Opens
/// the disk, and so can wait for its I/O.
pub(crate) fn is_claimed(disk: &str) -> bool {
    let opened =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(Path::new("/dev").join(disk));
    matches!(opened, Err(error) if error.kind() == io::ErrorKind::ResourceBusy)
}

/// Whether any process has the disk or a part of it open, or sees it mounted. Unlike [`is_claimed`], does no
/// I/O on the disk.
pub(crate) fn is_open(disk: &str) -> bool {
    let numbers = numbers_of(&parts(disk));
    let is_one = |path: &Path| openers::block_number(path).is_some_and(|number| numbers.contains(&number));
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(Path::new("/proc")).any(|process| {
        let table = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        !mounts::of(&table, &numbers).is_empty()
            || mounts::sources(&table).any(|source| is_one(Path::new(&source)))
            || entries(&process.join("fd")).any(|descriptor| is_one(&descriptor))
    })
}

/// The directories of a disk and its partitions under `/sys/block`.
fn parts(disk: &str) -> Vec<String> {
    let mut parts = vec![disk.to_owned()];
    if let Ok(entries) = fs::read_dir(sysfs::path(disk, "")) {
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        parts.extend(names.filter(|name| name.starts_with(disk)).map(|name| format!("{disk}/{name}")));
    }
    parts
}

fn numbers_of(parts: &[String]) -> Vec<DeviceNumber> {
    parts.iter().filter_map(|part| parse_number(&sysfs::text(part, "dev")?)).collect()
}

fn holders(part: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(sysfs::path(part, "holders")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Whether a path of the swap table refers to one of the parts of a disk: by its device number, or, as the
/// path may belong to another mount namespace or root, by the kernel's name at its end.
fn is_one_of(path: &Path, parts: &[String], numbers: &[DeviceNumber]) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let named = parts.iter().any(|part| part.rsplit('/').next() == name);
    named || openers::block_number(path).is_some_and(|number| numbers.contains(&number))
}

/// The mounts of the host, not those of this process: it has a mount namespace of its own.
fn mount_table() -> String {
    fs::read_to_string("/proc/1/mountinfo")
        .or_else(|_| fs::read_to_string("/proc/self/mountinfo"))
        .unwrap_or_default()
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(parse_number("259:3"), Some(DeviceNumber { major: 259, minor: 3 }));
        for text in ["", "259", ":", "a:b", "1:-1"] {
            assert_eq!(parse_number(text), None);
        }
    }

    #[test]
    fn swap_on_a_disk_is_recognized_by_name_when_its_path_does_not_exist() {
        let parts = ["ublkb0".to_owned(), "ublkb0/ublkb0p1".to_owned()];
        for path in ["/dev/ublkb0", "/elsewhere/dev/ublkb0", "/dev/ublkb0p1"] {
            assert!(is_one_of(Path::new(path), &parts, &[]), "{path}");
        }
        for path in ["/dev/ublkb01", "/dev/ublkb0/x", "/"] {
            assert!(!is_one_of(Path::new(path), &parts, &[]), "{path}");
        }
    }

    /// A loop device on a file or on another one.
    struct Loop(String);

    impl Loop {
        fn on(backing: &Path) -> Option<Loop> {
            let made = Command::new("losetup").args(["--find", "--show"]).arg(backing).output().ok()?;
            let node = String::from_utf8(made.stdout).ok()?.trim().to_owned();
            node.starts_with("/dev/").then_some(Loop(node))
        }

        fn disk(&self) -> &str {
            self.0.trim_start_matches("/dev/")
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }

    /// A program that has a device open until it is dropped.
    struct Holder(Child);

    impl Holder {
        fn of(node: &str, how: &str) -> Holder {
            // The script reads a line from the test once it has opened the device.
            let script = format!("exec 7{how}{node}; echo; read -r line");
            let mut command = Command::new("bash");
            let mut child =
                command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let _ = child.stdout.take().unwrap().read(&mut [0]);
            Holder(child)
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_disk_that_is_open_or_under_a_loop_device_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let Some(disk) = Loop::on(&image) else {
            eprintln!("skipped: no loop device can be made here");
            return;
        };
        assert!(users(disk.disk()).is_empty());
        assert!(openers(disk.disk()).is_empty());
        let writer = Holder::of(&disk.0, "<>");
        assert_eq!(openers(disk.disk()), [format!("opened by bash (process {})", writer.0.id())]);
        drop(writer);
        let reader = Holder::of(&disk.0, "<");
        assert_eq!(openers(disk.disk()), [format!("opened for reading by bash (process {})", reader.0.id())]);
        let ends = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(300));
            drop(reader);
        });
        assert!(openers(disk.disk()).is_empty(), "a look is waited for");
        ends.join().unwrap();
        let above = Loop::on(Path::new(&disk.0)).expect("a second one");
        assert_eq!(users(disk.disk()), [format!("held by {}", above.disk())]);
        let writer = Holder::of(&above.0, "<>");
        let held = format!("held by {} (opened by bash (process {}))", above.disk(), writer.0.id());
        assert_eq!(users(disk.disk()), [held]);
    }

    #[test]
    fn a_missing_disk_has_no_users() {
        assert!(users("no-such-disk").is_empty());
        assert!(!is_claimed("no-such-disk"));
    }
}
