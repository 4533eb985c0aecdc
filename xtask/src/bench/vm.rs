//! Bench `vm`: a virtual machine that moves with external memory, against QEMU's own ways of moving it, in the same
//! run.
//!
//! The guest (tests/guest/verify.c) fills its memory, verifies it, and rewrites half of it in each pass. All of it is
//! on one machine, over TCP of loopback. Memory that is shared with a process is left out, as between two hosts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::qmp::Monitor;
use super::report::{Report, Row, median};
use super::servers::{Bench, Process, free_port, retry};
use crate::util;

const MIB: u64 = 1 << 20;
/// RAM of the guests, in MiB. It runs in 32 bits without paging, so that it could see no more than 3 GiB.
const SIZES_MIB: [u64; 3] = [256, 1024, 2048];
/// Moves of each guest with external memory.
const HOPS: usize = 4;
/// Memory that a size needs for each byte of its RAM: it lies at an appliance, and both hosts may have it in their
/// caches.
const COPIES: u64 = 4;
/// How long a guest may take for two passes.
const PASSES_LIMIT: Duration = Duration::from_secs(300);
/// How long QEMU's own migration may take.
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// The longest stop that is aimed at, in milliseconds.
const DOWN_MAX_MS: f64 = 50.0;

/// The cost of a move.
#[derive(Debug, Clone, Default)]
struct Moved {
    bytes: f64,
    total_ms: f64,
    down_ms: f64,
    /// The steps that the stopped machine waited for, in milliseconds; empty where that is not told.
    steps: Vec<(String, f64)>,
}

pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    let available = util::available_memory()?;
    for mib in SIZES_MIB {
        if mib * MIB * COPIES > available {
            report.note(&format!("vm: a guest of {mib} MiB is left out: {} MiB are free", available / MIB));
            continue;
        }
        report.note(&format!("vm: a guest of {mib} MiB with external memory, {HOPS} moves"));
        let hops = external(bin, mib)?;
        let of = |pick: fn(&Moved) -> f64| median(&hops.iter().map(pick).collect::<Vec<_>>());
        let ours = Moved {
            bytes: of(|hop| hop.bytes),
            total_ms: of(|hop| hop.total_ms),
            down_ms: of(|hop| hop.down_ms),
            steps: Vec::new(),
        };
        let case = format!("{mib} MiB");
        for way in [Way::PreCopy, Way::PostCopy] {
            report.note(&format!("vm: the same guest by QEMU's {}", way.name()));
            match ordinary(mib, way) {
                Ok((theirs, damage)) => {
                    compare(&case, &ours, &theirs, way, report);
                    if let Some(damage) = damage {
                        report.note(&format!("vm: after QEMU's {} of {mib} MiB {damage:#}", way.name()));
                    }
                }
                Err(error) => report.note(&format!("vm: QEMU's {} of {mib} MiB: {error:#}", way.name())),
            }
        }
        report.row(&Row {
            bench: "vm",
            case: case.clone(),
            metric: "downtime",
            unit: "ms",
            xpm: ours.down_ms,
            peer: None,
            peer_value: None,
            ratio: None,
            goal: Some(DOWN_MAX_MS),
            ok: Some(ours.down_ms <= DOWN_MAX_MS),
        });
        for hop in &hops {
            let steps: Vec<String> = hop.steps.iter().map(|(step, ms)| format!("{step} {ms:.1}")).collect();
            report.note(&format!("vm: {case}: stopped for {:.0} ms: {}", hop.down_ms, steps.join(", ")));
        }
    }
    Ok(())
}

fn compare(case: &str, ours: &Moved, theirs: &Moved, way: Way, report: &mut Report) {
    let figures = [
        ("sent", "KiB", ours.bytes / 1024.0, theirs.bytes / 1024.0, Some(100.0)),
        ("total time", "ms", ours.total_ms, theirs.total_ms, (way == Way::PreCopy).then_some(20.0)),
        ("downtime", "ms", ours.down_ms, theirs.down_ms, None),
    ];
    for (metric, unit, xpm, peer, goal) in figures {
        let ratio = peer / xpm.max(0.001);
        report.row(&Row {
            bench: "vm",
            case: case.to_owned(),
            metric,
            unit,
            xpm,
            peer: Some(format!("QEMU {}", way.name())),
            peer_value: Some(peer),
            ratio: Some(ratio),
            goal,
            ok: goal.map(|goal| ratio >= goal),
        });
    }
}

/// Builds the guest.
fn guest(dir: &Path) -> Result<PathBuf> {
    let kernel = dir.join("verify");
    let flags = "-m32 -march=i686 -O2 -ffreestanding -fno-pic -fno-stack-protector -nostdlib -static -Wl,-Ttext=0x100000 \
                 -Wl,--build-id=none -DEACH=2";
    let source = util::repository().join("tests/guest/verify.c");
    util::output(Command::new("gcc").args(flags.split_whitespace()).arg("-o").arg(&kernel).arg(source))?;
    Ok(kernel)
}

/// Passes that a guest has made, which found nothing bad.
fn passes(serial: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(serial).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    if let Some(bad) = whole.lines().find(|line| !line.ends_with(" bad 0")) {
        bail!("the guest says: {bad}");
    }
    let last = whole.lines().last().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    Ok(last.unwrap_or(0))
}

fn wait_for_passes(serial: &Path, more: u64) -> Result<()> {
    let (begun, before) = (Instant::now(), passes(serial)?);
    while passes(serial)? < before + more {
        ensure!(begun.elapsed() < PASSES_LIMIT, "the guest does not go on");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// QEMU's arguments but for memory and monitor.
fn machine(command: &mut Command, kernel: &Path, serial: &Path) {
    command.args("-display none -nodefaults -vga none -accel tcg,tb-size=16 -kernel".split(' ')).arg(kernel);
    command.arg("-serial").arg(format!("file:{}", serial.display()));
}

/// Two hosts of this machine that reach a pool over TCP.
struct Hosts<'a> {
    bin: &'a Path,
    dir: &'a Path,
    allocator: String,
    kernel: PathBuf,
    memory: String,
}

/// Moves a guest with external memory.
fn external(bin: &Path, mib: u64) -> Result<Vec<Moved>> {
    let dir = tempfile::tempdir()?;
    let bench = Bench { dir: dir.path(), bin, size: ("", 0) };
    let (_allocator, allocator) = bench.allocator()?;
    let kernel = guest(dir.path())?;
    let hosts = Hosts { bin, dir: dir.path(), allocator, kernel, memory: format!("{mib}MiB") };
    let _daemons = (hosts.appliance(mib)?, hosts.files("a")?, hosts.files("b")?);
    let mut machines = vec![hosts.machine("a", &["run", "bench", "--memory", &hosts.memory])?];
    wait_for_passes(&hosts.serial("a", 0), 2)?;
    let mut moved = Vec::new();
    for hop in 0..HOPS {
        let (from, to) = if hop % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let address = format!("127.0.0.1:{}", free_port()?);
        let words = ["receive", "bench", "--listen", &address, "--memory", &hosts.memory];
        let next = hosts.machine_numbered(to, &words, hop + 1)?;
        retry(|| {
            let list: Value = serde_json::from_str(&hosts.xpm(to, &["-o", "json", "list"])?)?;
            ensure!(list[0]["state"] == "incoming", "no machine is waited for");
            Ok(())
        })?;
        let done: Value =
            serde_json::from_str(&hosts.xpm(from, &["-o", "json", "migrate", "bench", "--to", &address])?)?;
        let steps = done["steps"].as_array().into_iter().flatten();
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        moved.push(Moved {
            bytes: number(&done["sent_bytes"]),
            total_ms: number(&done["total_ms"]),
            down_ms: number(&done["down_ms"]),
            steps: steps
                .map(|step| {
                    let name = step["step"].as_str().unwrap_or_default().to_owned();
                    (name, number(&step["took_us"]) / 1000.0)
                })
                .collect(),
        });
        machines.push(next);
        // The first pass fetches all that it touches.
        wait_for_passes(&hosts.serial(to, hop + 1), 2)?;
    }
    Ok(moved)
}

impl Hosts<'_> {
    fn appliance(&self, mib: u64) -> Result<Process> {
        let (control, data) = (free_port()?, free_port()?);
        let mut command = Command::new(self.bin.join("xpm-appliance"));
        command.args(["--memory", &format!("{}MiB", mib + 256), "--no-lock", "--name", "bench"]);
        command.args(["--allocator", &self.allocator, "--insecure"]);
        command.args(["--listen", &format!("127.0.0.1:{control}"), "--nbd", &format!("127.0.0.1:{data}")]);
        command.arg("--run-dir").arg(self.dir.join("run")).arg("--state").arg(self.dir.join("state"));
        Process::start(&mut command, &self.dir.join("appliance.log"))
    }

    fn files(&self, host: &str) -> Result<Process> {
        let (config, control) = (self.dir.join(format!("{host}.toml")), self.control(host));
        let text = format!(
            "allocator = {:?}\ncontrol = {:?}\nstate = {:?}\nstandby = false\ndirty-budget = \"64MiB\"\n\
             allow-unsafe-swap = true\nforbid-transports = [\"shm\", \"nbd-unix\"]\n",
            self.allocator,
            control.display().to_string(),
            self.dir.join(format!("{host}-state")).display().to_string(),
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(self.bin.join("xpm-fs"));
        let log = self.dir.join(format!("{host}.log"));
        let mut process = Process::start(command.arg("--config").arg(config), &log)?;
        process.wait_for("xpm-fs", || std::os::unix::net::UnixStream::connect(&control).is_ok())?;
        Ok(process)
    }

    fn control(&self, host: &str) -> PathBuf {
        self.dir.join(format!("{host}.sock"))
    }

    fn serial(&self, host: &str, number: usize) -> PathBuf {
        self.dir.join(format!("{host}{number}.serial"))
    }

    fn command(&self, host: &str, words: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("xpm"));
        command.env("XPM_CONFIG", "/dev/null").env("XPM_FS", self.control(host));
        command
            .args(["--allocator", &self.allocator, "vm", "--dir"])
            .arg(self.dir.join(format!("{host}-vm")));
        command.args(words).stdin(Stdio::null());
        command
    }

    fn xpm(&self, host: &str, words: &[&str]) -> Result<String> {
        util::output(&mut self.command(host, words))
    }

    fn machine(&self, host: &str, words: &[&str]) -> Result<Process> {
        self.machine_numbered(host, words, 0)
    }

    fn machine_numbered(&self, host: &str, words: &[&str], number: usize) -> Result<Process> {
        let mut command = self.command(host, words);
        command.args(["--", "qemu-system-x86_64"]);
        machine(&mut command, &self.kernel, &self.serial(host, number));
        Process::start(&mut command, &self.dir.join(format!("{host}{number}.said")))
    }
}

/// QEMU's own ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    PreCopy,
    PostCopy,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::PreCopy => "pre-copy",
            Way::PostCopy => "post-copy",
        }
    }
}

/// Moves the same guest with ordinary RAM: the cost, and why the guest is not well after it. QEMU 7.2's pre-copy loses
/// pages of this guest under TCG; its cost can be compared all the same.
fn ordinary(mib: u64, way: Way) -> Result<(Moved, Option<anyhow::Error>)> {
    let dir = tempfile::tempdir()?;
    let kernel = guest(dir.path())?;
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    let start = |name: &str, more: &[&str]| -> Result<(Process, Monitor, PathBuf)> {
        let (serial, socket) =
            (dir.path().join(format!("{name}.serial")), dir.path().join(format!("{name}.qmp")));
        let mut command = Command::new("qemu-system-x86_64");
        machine(&mut command, &kernel, &serial);
        command.args([
            "-m",
            &mib.to_string(),
            "-qmp",
            &format!("unix:{},server=on,wait=off", socket.display()),
        ]);
        let process = Process::start(command.args(more), &dir.path().join(format!("{name}.log")))?;
        Ok((process, Monitor::connect(&socket)?, serial))
    };
    let (_first, mut source, serial) = start("a", &[])?;
    wait_for_passes(&serial, 2)?;
    let (_second, mut destination, there) = start("b", &["-incoming", "defer"])?;
    let mut capabilities = vec![json!({"capability": "events", "state": true})];
    if way == Way::PostCopy {
        capabilities.push(json!({"capability": "postcopy-ram", "state": true}));
    }
    for monitor in [&mut source, &mut destination] {
        monitor.execute("migrate-set-capabilities", &json!({"capabilities": capabilities}))?;
        // By default it sends 128 MiB a second at most.
        monitor.execute("migrate-set-parameters", &json!({"max-bandwidth": 100_u64 << 30}))?;
    }
    destination.execute("migrate-incoming", &json!({"uri": uri}))?;
    source.execute("migrate", &json!({"uri": uri}))?;
    let begun = Instant::now();
    let mut is_switched = way == Way::PreCopy;
    let done = loop {
        let state = source.execute("query-migrate", &json!({}))?;
        match state["status"].as_str() {
            Some("completed") => break state,
            Some("active") if !is_switched => {
                source.execute("migrate-start-postcopy", &json!({}))?;
                is_switched = true;
            }
            Some("failed" | "cancelled") => {
                bail!("it failed: {}", state["error-desc"].as_str().unwrap_or("without a reason"))
            }
            _ if begun.elapsed() > MOVE_LIMIT => {
                bail!("it did not end within {MOVE_LIMIT:?}, {} bytes sent", state["ram"]["transferred"])
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let damage = wait_for_passes(&there, 1).err();
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("QEMU tells no {what}"));
    let moved = Moved {
        bytes: number(&done["ram"]["transferred"], "bytes")?,
        total_ms: number(&done["total-time"], "time")?,
        down_ms: number(&done["downtime"], "downtime")?,
        steps: Vec::new(),
    };
    Ok((moved, damage))
}
