//! Memory that this process could still get, and how long programs wait for memory: of the machine, and of the
//! cgroups (both versions) that the process is in, if they have limits.
//!
//! Sources: proc_meminfo(5), cgroups(7); Documentation/accounting/psi.rst, Documentation/admin-guide/cgroup-v2.rst and
//! Documentation/admin-guide/cgroup-v1/memory.rst of Linux.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Directory of the cgroups: those of version 2, or a directory for each controller of version 1.
const GROUPS: &str = "sys/fs/cgroup";
const MEMORY_V1: &str = "sys/fs/cgroup/memory";
/// Longer than each of the files read here, in bytes.
const TEXT_MAX: usize = 16 << 10;
/// A version 1 limit of this size or more means no limit: the kernel shows the largest possible number of pages.
const LIMIT_V1_MAX: u64 = 1 << 62;

/// Reads the figures from files that stay open.
pub struct Spare {
    root: PathBuf,
    meminfo: File,
    /// None in kernels without PSI; then only available memory counts.
    pressure: Option<File>,
    /// The file that names the cgroups of this process, and its last content.
    place: Option<File>,
    told: String,
    groups: Vec<Group>,
    text: Vec<u8>,
}

/// Present figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Bytes that are free or can easily be freed.
    pub available: u64,
    /// Percentage of the last ten seconds in which some program waited for memory.
    pub pressure: f64,
}

impl Seen {
    fn and(self, other: Seen) -> Seen {
        Seen { available: self.available.min(other.available), pressure: self.pressure.max(other.pressure) }
    }
}

/// The memory limit of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The file that sets it.
    pub file: PathBuf,
    /// The limit in bytes.
    pub limit: u64,
    /// Bytes left of it; memory that only caches files counts as left.
    pub available: u64,
}

impl Spare {
    /// Opens the files for this process.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn open() -> io::Result<Spare> {
        Spare::at(Path::new("/"))
    }

    /// The same, with `proc` and `sys` under `root`.
    ///
    /// # Errors
    /// When there is no `proc/meminfo`.
    pub fn at(root: &Path) -> io::Result<Spare> {
        Ok(Spare {
            root: root.to_owned(),
            meminfo: File::open(root.join("proc/meminfo"))?,
            pressure: File::open(root.join("proc/pressure/memory")).ok(),
            place: File::open(root.join("proc/self/cgroup")).ok(),
            told: String::new(),
            groups: Vec::new(),
            text: vec![0; TEXT_MAX],
        })
    }

    /// The present figures. None if the machine does not report them.
    pub fn look(&mut self) -> Option<Seen> {
        self.follow();
        let text = &mut self.text;
        let available = available(read(&self.meminfo, text)?)?;
        let machine = Seen { available, pressure: waiting_of(self.pressure.as_ref(), text) };
        Some(self.groups.iter().filter_map(|group| group.look(text)).fold(machine, Seen::and))
    }

    /// Of the limits on this process's cgroups and their parents, the limit with the least memory left. None if there
    /// is no limit.
    pub fn tightest(&mut self) -> Option<Limit> {
        self.follow();
        let text = &mut self.text;
        self.groups.iter().filter_map(|group| group.limit(text)).min_by_key(|limit| limit.available)
    }

    /// Follows the process into another cgroup, to which it may have been moved.
    fn follow(&mut self) {
        let told = self.place.as_ref().and_then(|place| read(place, &mut self.text)).unwrap_or_default();
        if told == self.told && !self.groups.is_empty() {
            return;
        }
        told.clone_into(&mut self.told);
        let and_above = |path: Option<&str>| -> Vec<PathBuf> {
            path.into_iter().flat_map(|path| Path::new(path).ancestors()).map(Path::to_owned).collect()
        };
        let (v2, v1) = (self.root.join(GROUPS), self.root.join(MEMORY_V1));
        let of_v2 = and_above(own(&self.told)).into_iter().filter_map(|path| Group::open(&v2.join(path)));
        let of_v1 =
            and_above(own_v1(&self.told)).into_iter().filter_map(|path| Group::open_v1(&v1.join(path)));
        self.groups = of_v2.chain(of_v1).collect();
    }
}

/// A cgroup that may have a limit.
struct Group {
    limits: Vec<(PathBuf, File)>,
    current: File,
    stat: Option<File>,
    pressure: Option<File>,
    /// Names of caches in its statistics.
    caches: &'static [&'static str],
}

impl Group {
    /// None without the memory controller.
    fn open(dir: &Path) -> Option<Group> {
        let file = |name: &str| File::open(dir.join(name)).ok();
        let limit = |name: &str| Some((dir.join(name), file(name)?));
        Some(Group {
            limits: [limit("memory.max"), limit("memory.high")].into_iter().flatten().collect(),
            current: file("memory.current")?,
            stat: file("memory.stat"),
            pressure: file("memory.pressure"),
            caches: &["active_file", "inactive_file", "slab_reclaimable"],
        })
    }

    /// The same for version 1.
    fn open_v1(dir: &Path) -> Option<Group> {
        let file = |name: &str| File::open(dir.join(name)).ok();
        Some(Group {
            limits: vec![(dir.join("memory.limit_in_bytes"), file("memory.limit_in_bytes")?)],
            current: file("memory.usage_in_bytes")?,
            stat: file("memory.stat"),
            pressure: None,
            caches: &["total_active_file", "total_inactive_file"],
        })
    }

    /// None if there is no limit.
    fn look(&self, text: &mut [u8]) -> Option<Seen> {
        let Limit { available, .. } = self.limit(text)?;
        Some(Seen { available, pressure: waiting_of(self.pressure.as_ref(), text) })
    }

    fn limit(&self, text: &mut [u8]) -> Option<Limit> {
        let mut number = |file: &File| read(file, text)?.trim().parse::<u64>().ok();
        let limits = self.limits.iter().filter_map(|(path, file)| Some((number(file)?, path)));
        let (limit, file) = limits.filter(|(limit, _)| *limit < LIMIT_V1_MAX).min()?;
        let used = number(&self.current)?;
        // As for the whole machine, memory that only caches files counts as available.
        let stat = self.stat.as_ref().and_then(|stat| read(stat, text));
        let caches = stat.map_or(0, |stat| caches(stat, self.caches));
        Some(Limit {
            file: file.clone(),
            limit,
            available: limit.saturating_sub(used.saturating_sub(caches)),
        })
    }
}

/// Present content of a file, from its start.
fn read<'a>(file: &File, text: &'a mut [u8]) -> Option<&'a str> {
    let len = file.read_at(text, 0).ok()?;
    std::str::from_utf8(&text[..len]).ok()
}

/// The path of the cgroup of version 2 (`0::/a/b`), without the slash at its start.
fn own(table: &str) -> Option<&str> {
    let path = table.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.trim_end_matches(" (deleted)"))
}

/// The path of the version 1 cgroup that limits memory (`4:memory:/a/b`).
fn own_v1(table: &str) -> Option<&str> {
    let of_memory = |line: &&str| {
        line.split(':').nth(1).is_some_and(|controllers| controllers.split(',').any(|one| one == "memory"))
    };
    let path = table.lines().find(of_memory)?.splitn(3, ':').nth(2)?.strip_prefix('/')?;
    Some(path.trim_end_matches(" (deleted)"))
}

/// MemAvailable in bytes.
fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Bytes in a memory.stat that the kernel frees when memory is short.
fn caches(text: &str, names: &[&str]) -> u64 {
    let cached = |line: &str| {
        let (name, bytes) = line.split_once(' ')?;
        bytes.parse::<u64>().ok().filter(|_| names.contains(&name))
    };
    text.lines().filter_map(cached).sum()
}

fn waiting_of(file: Option<&File>, text: &mut [u8]) -> f64 {
    file.and_then(|file| read(file, text)).and_then(waiting).unwrap_or(0.0)
}

/// Percentage of the last ten seconds in which some program waited for memory.
fn waiting(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Files of a machine with 8 GiB to spare, with this process in the cgroup a/b.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n");
        write("proc/pressure/memory", "some avg10=2.50 avg60=1.00 avg300=0.10 total=9\n");
        write("proc/self/cgroup", "4:cpu:/x\n0::/a/b\n");
        for group in ["a", "a/b", "c"] {
            for (name, text) in [
                ("max", "max\n"),
                ("high", "max\n"),
                ("current", "1073741824\n"),
                ("stat", "anon 1\nactive_file 0\n"),
            ] {
                write(&format!("sys/fs/cgroup/{group}/memory.{name}"), text);
            }
        }
        dir
    }

    fn set(dir: &tempfile::TempDir, path: &str, text: &str) {
        fs::write(dir.path().join(path), text).unwrap();
    }

    #[test]
    fn without_a_limit_the_machine_counts() {
        let dir = machine();
        let mut spare = Spare::at(dir.path()).unwrap();
        assert_eq!(spare.look(), Some(Seen { available: 8 << 30, pressure: 2.5 }));
        fs::remove_file(dir.path().join("proc/pressure/memory")).unwrap();
        fs::remove_dir_all(dir.path().join("sys")).unwrap();
        let mut spare = Spare::at(dir.path()).unwrap();
        assert_eq!(spare.look(), Some(Seen { available: 8 << 30, pressure: 0.0 }));
        set(&dir, "proc/meminfo", "");
        assert_eq!(spare.look(), None);
    }

    #[test]
    fn the_tightest_limit_counts() {
        let dir = machine();
        let mut spare = Spare::at(dir.path()).unwrap();
        let mut after = |path: &str, text: &str| {
            set(&dir, &format!("sys/fs/cgroup/{path}"), text);
            spare.look().unwrap().available >> 20
        };
        assert_eq!(after("a/memory.max", "4294967296\n"), 3 << 10, "the limit of the one above");
        assert_eq!(after("a/b/memory.max", "2147483648\n"), 1 << 10);
        assert_eq!(after("a/b/memory.high", "1610612736\n"), 512, "what is held at counts, too");
        assert_eq!(after("a/b/memory.stat", "active_file 1048576\ninactive_file 2097152\nfile 9\n"), 515);
        assert_eq!(after("a/b/memory.current", "4294967296\n"), 0, "more than may be");
        assert_eq!(after("a/b/memory.max", "max\n"), 0);
        assert_eq!(after("a/b/memory.high", "max\n"), 3 << 10);
        assert_eq!(after("a/memory.max", "1099511627776\n"), 8 << 10, "more than the machine has");
    }

    #[test]
    fn limits_of_version_1_count() {
        let dir = machine();
        let group = dir.path().join("sys/fs/cgroup/memory/x");
        fs::create_dir_all(&group).unwrap();
        for (path, limit) in [("x/", 3_u64 << 30), ("", 9_223_372_036_854_771_712)] {
            let place = format!("sys/fs/cgroup/memory/{path}memory");
            set(&dir, &format!("{place}.limit_in_bytes"), &format!("{limit}\n"));
            set(&dir, &format!("{place}.usage_in_bytes"), "1073741824\n");
            set(&dir, &format!("{place}.stat"), "cache 9\ntotal_inactive_file 1048576\n");
        }
        set(&dir, "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/x/y\n0::/\n");
        let mut spare = Spare::at(dir.path()).unwrap();
        let Limit { file, limit, available } = spare.tightest().unwrap();
        assert_eq!((limit, available), (3 << 30, (2 << 30) + (1 << 20)));
        assert_eq!(file, group.join("memory.limit_in_bytes"));
        assert_eq!(spare.look().unwrap().available, available);
        set(&dir, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n");
        assert_eq!(spare.tightest().unwrap().available, 1 << 20, "the one above");
    }

    #[test]
    fn pressure_of_a_cgroup_counts_where_it_has_a_limit() {
        let dir = machine();
        set(&dir, "sys/fs/cgroup/a/memory.pressure", "some avg10=40.00 avg60=0.00 avg300=0.00 total=1\n");
        let mut spare = Spare::at(dir.path()).unwrap();
        assert_eq!(spare.look().unwrap().pressure, 2.5);
        set(&dir, "sys/fs/cgroup/a/memory.max", "1099511627776\n");
        assert_eq!(spare.look().unwrap().pressure, 40.0);
    }

    #[test]
    fn a_process_may_be_moved_to_another_cgroup() {
        let dir = machine();
        let mut spare = Spare::at(dir.path()).unwrap();
        set(&dir, "sys/fs/cgroup/c/memory.max", "2147483648\n");
        assert_eq!(spare.look().unwrap().available, 8 << 30);
        set(&dir, "proc/self/cgroup", "0::/c\n");
        assert_eq!(spare.look().unwrap().available, 1 << 30);
        set(&dir, "proc/self/cgroup", "0::/../elsewhere\n");
        assert_eq!(spare.look().unwrap().available, 8 << 30, "one that is not to be seen");
    }

    #[test]
    fn the_kernels_figures_are_parsed() {
        let text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(waiting(text), Some(12.34));
        assert_eq!(waiting("nonsense"), None);
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(own("0::/system.slice/x.service (deleted)\n"), Some("system.slice/x.service"));
        assert_eq!(own("4:memory:/x\n"), None);
        assert!(Spare::open().unwrap().look().unwrap().available > 0);
    }
}
