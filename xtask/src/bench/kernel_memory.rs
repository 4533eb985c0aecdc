//! What bench `map` compares with: memory that the kernel takes away from a program in a small cgroup and brings back, from
//! swap on zram, and from a file of nbdfuse.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::servers::{Bench, Process, Way};
use crate::bench::report::Report;
use crate::util;

/// Bytes that are touched, as map_bench has it.
const LEN: u64 = 256 << 20;
/// Memory that the program needs besides.
const OWN: u64 = 16 << 20;
const PARTS: [u64; 4] = [25, 50, 75, 100];

/// By case, the rate of each peer that could be measured, in millions of pages a second.
#[derive(Default)]
pub(super) struct Rates(BTreeMap<String, Vec<(String, f64)>>);

impl Rates {
    pub(super) fn of(&self, case: &str) -> impl Iterator<Item = (&str, f64)> + '_ {
        self.0.get(case).into_iter().flatten().map(|(peer, rate)| (peer.as_str(), *rate))
    }

    fn add(&mut self, peer: &str, text: &str) -> Result<()> {
        for line in text.lines() {
            let one: Value =
                serde_json::from_str(line).with_context(|| format!("map_bench printed `{line}`"))?;
            let (case, rate) = one["case"].as_str().zip(one["value"].as_f64()).context("an odd figure")?;
            self.0.entry(case.to_owned()).or_default().push((peer.to_owned(), rate));
        }
        Ok(())
    }
}

/// Measures those peers that this machine can have; says which it cannot.
pub(super) fn measure(bench: &Bench<'_>, report: &Report) -> Result<Rates> {
    let mut rates = Rates::default();
    let group = match Cgroup::new() {
        Ok(group) => group,
        Err(error) => {
            report.note(&format!("map: without the kernel's own ways: {error:#}"));
            return Ok(rates);
        }
    };
    report.note("map: swap to zram, in a cgroup");
    match Zram::new(2 * LEN) {
        Ok(_zram) => {
            for part in PARTS {
                rates.add("zram", &group.run(bench.bin, part, None)?)?;
            }
        }
        Err(error) => report.note(&format!("map: without zram: {error:#}")),
    }
    for way in [Way::Unix, Way::Tcp] {
        report.note(&format!("map: a file of nbdfuse over {}, in a cgroup", way.name()));
        let server = bench.nbdkit_memory(way)?;
        let mounted = Mounted::new(&bench.dir.join(format!("fuse-{}", way.name())), &server.uri, LEN)?;
        for part in PARTS {
            let peer = format!("nbdfuse {}", way.name());
            rates.add(&peer, &group.run(bench.bin, part, Some(&mounted.file()))?)?;
        }
    }
    Ok(rates)
}

/// A memory cgroup of version 1 or 2.
struct Cgroup {
    dir: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    fn new() -> Result<Cgroup> {
        let name = format!("xpm-bench-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        let (dir, limit) = if controllers.split_whitespace().any(|one| one == "memory") {
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("cannot delegate memory")?;
            (root.join(name), "memory.max")
        } else {
            (root.join("memory").join(name), "memory.limit_in_bytes")
        };
        fs::create_dir(&dir)
            .with_context(|| format!("cannot make {}: run as root, with a memory cgroup", dir.display()))?;
        Ok(Cgroup { dir, limit })
    }

    fn run(&self, bin: &Path, part: u64, file: Option<&Path>) -> Result<String> {
        let limit = LEN * part / 100 + OWN;
        fs::write(self.dir.join(self.limit), limit.to_string()).context("cannot limit the cgroup")?;
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.dir.join("cgroup.procs"));
        command.arg(bin.join("examples/map_bench")).args(["kernel", &part.to_string()]).args(file);
        util::output(&mut command)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Swap on a zram device that was made for it.
struct Zram(u32);

impl Zram {
    fn new(size: u64) -> Result<Zram> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")
            .context("no zram can be made (modprobe zram, as root)")?;
        let zram = Zram(number.trim().parse().context("an odd number of a zram device")?);
        fs::write(format!("/sys/block/zram{}/disksize", zram.0), size.to_string())?;
        let device = zram.device();
        util::output(Command::new("mkswap").arg(&device))?;
        util::output(Command::new("swapon").args(["-p", "100"]).arg(&device))?;
        Ok(zram)
    }

    fn device(&self) -> String {
        format!("/dev/zram{}", self.0)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = util::output(Command::new("swapoff").arg(self.device()));
        let _ = fs::write("/sys/class/zram-control/hot_remove", self.0.to_string());
    }
}

/// An NBD export as a file.
pub(super) struct Mounted {
    dir: PathBuf,
    _process: Process,
}

impl Mounted {
    /// Mounts an export of at least `least` bytes at a new directory.
    pub(super) fn new(dir: &Path, uri: &str, least: u64) -> Result<Mounted> {
        fs::create_dir(dir)?;
        let mut command = Command::new("nbdfuse");
        command.arg(dir).arg(uri);
        let mut process = Process::start(&mut command, &dir.with_extension("log"))?;
        process.wait_for("nbdfuse", || dir.join("nbd").exists())?;
        let mounted = Mounted { dir: dir.to_owned(), _process: process };
        match fs::metadata(mounted.file())?.len() {
            len if len >= least => Ok(mounted),
            len => bail!("nbdfuse shows {len} bytes"),
        }
    }

    /// The file.
    pub(super) fn file(&self) -> PathBuf {
        self.dir.join("nbd")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = util::output(Command::new("umount").arg(&self.dir));
    }
}
