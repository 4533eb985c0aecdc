//! A cgroup with a limit of memory, of version 1 or 2, whichever this machine has for memory.

use std::path::{Path, PathBuf};

/// A cgroup of a test's own.
pub struct Group {
    dir: PathBuf,
    limit: &'static str,
}

impl Group {
    /// None where a test may not make one, which it prints.
    pub fn make(name: &str) -> Option<Group> {
        let table = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = |line: &str| line.splitn(3, ':').nth(2).map(|path| path.trim_start_matches('/').to_owned());
        let of_v1 = table.lines().find(|line| line.split(':').nth(1) == Some("memory")).and_then(own);
        let of_v2 = table.lines().find(|line| line.starts_with("0::")).and_then(own);
        let (root, limit) = match (of_v1, of_v2) {
            (Some(path), _) => (Path::new("/sys/fs/cgroup/memory").join(path), "memory.limit_in_bytes"),
            (None, Some(path)) => (Path::new("/sys/fs/cgroup").join(path), "memory.max"),
            (None, None) => return None,
        };
        let dir = root.join(format!("xpm-{name}-{}", std::process::id()));
        let made = std::fs::create_dir(&dir);
        if made.is_err() || !dir.join(limit).exists() {
            println!("left out: cannot make a cgroup with a limit in {}", root.display());
            let _ = std::fs::remove_dir(&dir);
            return None;
        }
        Some(Group { dir, limit })
    }

    /// Sets the limit, in bytes.
    pub fn set_limit(&self, bytes: u64) {
        std::fs::write(self.dir.join(self.limit), bytes.to_string()).unwrap();
    }

    /// The name of the file that sets the limit.
    pub fn limit_file(&self) -> &'static str {
        self.limit
    }

    /// Memory that its processes use, in bytes.
    pub fn used(&self) -> u64 {
        let file = if self.limit == "memory.max" { "memory.current" } else { "memory.usage_in_bytes" };
        let text = std::fs::read_to_string(self.dir.join(file)).unwrap();
        text.trim().parse().unwrap()
    }

    /// Takes a process into it. Memory that this process uses already still counts for its old cgroup.
    pub fn take(&self, process: u32) {
        std::fs::write(self.procs(), process.to_string()).unwrap();
    }

    /// The file that lists its processes.
    pub fn procs(&self) -> String {
        self.dir.join("cgroup.procs").display().to_string()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have ended, or are just about to.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
