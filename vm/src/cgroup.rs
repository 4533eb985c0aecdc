//! The memory cgroup of a virtual machine. It limits the machine's local memory, which is the page cache of its RAM
//! file and QEMU's own memory. Works with cgroup v1 and v2. All functions here block.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use xpm_protocol::ByteSize;

use crate::Error;

const ROOT: &str = "/sys/fs/cgroup";
/// How often to try to remove a cgroup whose last process has just ended, and the pause between attempts.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// The version of the hierarchy that has the memory controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The root of the hierarchy, below the common mount point.
    fn root(self, mounted: &Path) -> PathBuf {
        match self {
            Version::V1 => mounted.join("memory"),
            Version::V2 => mounted.to_owned(),
        }
    }

    fn limit_file(self) -> &'static str {
        match self {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        }
    }
}

/// Makes a cgroup of this name with a memory limit.
///
/// # Errors
/// When there is no memory controller, this user cannot use it, or a cgroup of this name has processes.
pub fn make(name: &str, limit: ByteSize) -> Result<PathBuf, Error> {
    make_below(Path::new(ROOT), name, limit).map_err(|why| {
        Error::Machine(format!(
            "cannot bound the local memory to {limit}: {why}; run as root with a memory cgroup mounted below {ROOT}, or leave \
             --local out"
        ))
    })
}

fn make_below(mounted: &Path, name: &str, limit: ByteSize) -> Result<PathBuf, String> {
    let version = find(mounted).ok_or("no memory controller is mounted")?;
    let root = version.root(mounted);
    if version == Version::V2 {
        enable_memory(&root)?;
    }
    let path = root.join(name);
    match fs::create_dir(&path) {
        // Left by an earlier machine; it is replaced only if it is empty.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_dir(&path)
                .and_then(|()| fs::create_dir(&path))
                .map_err(|error| format!("{} is in use: {error}", path.display()))?;
        }
        made => made.map_err(|error| format!("cannot make {}: {error}", path.display()))?,
    }
    let limited = write(&path.join(version.limit_file()), &limit.0.to_string());
    if limited.is_err() {
        let _ = fs::remove_dir(&path);
    }
    limited.map(|()| path)
}

fn find(mounted: &Path) -> Option<Version> {
    let controllers = fs::read_to_string(mounted.join("cgroup.controllers")).unwrap_or_default();
    if controllers.split_ascii_whitespace().any(|controller| controller == "memory") {
        return Some(Version::V2);
    }
    let v1 = Version::V1.root(mounted).join(Version::V1.limit_file());
    v1.exists().then_some(Version::V1)
}

fn enable_memory(root: &Path) -> Result<(), String> {
    let file = root.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).unwrap_or_default();
    match enabled.split_ascii_whitespace().any(|controller| controller == "memory") {
        true => Ok(()),
        false => write(&file, "+memory"),
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {text} to {}: {error}", path.display()))
}

/// Moves this process into a cgroup.
///
/// # Errors
/// When the kernel refuses it.
pub fn enter(cgroup: &Path) -> Result<(), Error> {
    write(&cgroup.join("cgroup.procs"), &std::process::id().to_string())
        .map_err(|why| Error::Machine(format!("cannot enter the memory cgroup: {why}")))
}

/// Removes a cgroup whose processes have ended. A missing cgroup counts as removed.
///
/// # Errors
/// When a process remains in it for longer than a second.
pub fn remove(cgroup: &Path) -> Result<(), Error> {
    let mut tried = 0;
    loop {
        match fs::remove_dir(cgroup) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if tried == REMOVE_TRIES => {
                return Err(Error::Machine(format!(
                    "cannot remove the cgroup {}: {error}",
                    cgroup.display()
                )));
            }
            Err(_) => std::thread::sleep(REMOVE_PAUSE),
        }
        tried += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory tree that looks like the kernel's.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, content) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn either_version_is_found_and_limited() {
        let v1 = tree(&[("memory/memory.limit_in_bytes", "1"), ("unified/cgroup.controllers", "hugetlb")]);
        let made = make_below(v1.path(), "vm", ByteSize(4096)).unwrap();
        assert_eq!(made, v1.path().join("memory/vm"));
        assert_eq!(fs::read_to_string(made.join("memory.limit_in_bytes")).unwrap(), "4096");

        let v2 = tree(&[("cgroup.controllers", "cpu memory\n"), ("cgroup.subtree_control", "cpu\n")]);
        let made = make_below(v2.path(), "vm", ByteSize(4096)).unwrap();
        assert_eq!(fs::read_to_string(made.join("memory.max")).unwrap(), "4096");
        assert_eq!(fs::read_to_string(v2.path().join("cgroup.subtree_control")).unwrap(), "+memory");

        let none = tree(&[("cgroup.controllers", "cpu hugetlb\n")]);
        assert!(make_below(none.path(), "vm", ByteSize(4096)).unwrap_err().contains("no memory controller"));
    }

    #[test]
    fn a_cgroup_in_use_is_not_taken() {
        // A file stands for a process, because it keeps the directory from being removed.
        let v1 = tree(&[("memory/memory.limit_in_bytes", "1"), ("memory/vm/process", "")]);
        assert!(make_below(v1.path(), "vm", ByteSize(4096)).unwrap_err().contains("is in use"));
    }
}
