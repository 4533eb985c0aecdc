//! A cgroup without swap: pages that are not locked are never swapped out to the device that this process serves. These
//! are pages of this process, and all pages of processes that it starts, which do not inherit the lock (mlockall(2)).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use xpm_protocol::api::blk::SafetyItem;

const ROOT: &str = "/sys/fs/cgroup";
const LIMIT: &str = "memory.swap.max";

/// Keeps the process out of swap. It stays in its own cgroup if that has the limit already, as the cgroup of a standby
/// has. It also stays, and sets the limit, if it has the cgroup to itself, as under a service manager. Otherwise it
/// moves to a new cgroup of this name below the root.
pub(super) fn enter(name: &str) {
    if let Err(error) = try_enter(name) {
        tracing::warn!("cgroup without swap: {error}");
    }
}

fn try_enter(name: &str) -> Result<(), String> {
    let own = own_cgroup()?;
    let is_set = || fs::read_to_string(own.join(LIMIT)).is_ok_and(|limit| limit.trim() == "0");
    if own != Path::new(ROOT) && (is_set() || is_alone(&own) && set(&own).is_ok()) {
        return Ok(());
    }
    let root = Path::new(ROOT);
    let new = root.join(name);
    enable_memory(root)?;
    fs::create_dir(&new)
        .or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
        .map_err(|error| format!("make {}: {error}", new.display()))?;
    set(&new)?;
    write(&new.join("cgroup.procs"), &std::process::id().to_string())
}

fn enable_memory(root: &Path) -> Result<(), String> {
    let enabled = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
    if enabled.split_ascii_whitespace().any(|controller| controller == "memory") {
        return Ok(());
    }
    write(&root.join("cgroup.subtree_control"), "+memory")
}

fn set(cgroup: &Path) -> Result<(), String> {
    write(&cgroup.join(LIMIT), "0")
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("write {text} to {}: {error}", path.display()))
}

fn is_alone(cgroup: &Path) -> bool {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    processes.split_ascii_whitespace().eq([std::process::id().to_string().as_str()])
}

/// The directory of the process's cgroup v2.
fn own_cgroup() -> Result<PathBuf, String> {
    let table = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let path = parse_own(&table).ok_or("this process is in no cgroup v2")?;
    let directory = Path::new(ROOT).join(path);
    match directory.join("cgroup.procs").exists() {
        true => Ok(directory),
        false => Err(format!("no cgroup v2 is mounted at {ROOT}")),
    }
}

/// The path of the cgroup v2 (`0::/a/b`), without the slash at its start.
fn parse_own(table: &str) -> Option<&str> {
    let path = table.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.trim_end_matches(" (deleted)"))
}

pub(super) fn swap_max() -> SafetyItem {
    let found = own_cgroup().and_then(|cgroup| {
        let file = cgroup.join(LIMIT);
        let limit = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        Ok((limit.trim() == "0", format!("{} in {}", limit.trim(), cgroup.display())))
    });
    super::item(
        "cgroup-swap-max",
        found,
        "mount cgroup v2 at /sys/fs/cgroup with the memory controller (mount -t cgroup2 none /sys/fs/cgroup) and run \
         as root, or set MemorySwapMax=0 in the unit",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cgroup_of_pure_and_hybrid_tables() {
        assert_eq!(parse_own("0::/system.slice/xpm-blk.service\n"), Some("system.slice/xpm-blk.service"));
        assert_eq!(parse_own("4:memory:/x\n0::/\n"), Some(""));
        assert_eq!(parse_own("4:memory:/x\n"), None);
    }
}
