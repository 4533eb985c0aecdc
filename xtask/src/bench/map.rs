//! Bench `map`: external memory at addresses.
//!
//! 1. A fault, in line and by a handler, over each transport, against its floor in the same run: a fault of userfaultfd resolved from
//!    local memory, and a read of 4 KiB by the transport alone.
//! 2. Touches in a row and at random with budgets of a part of the data, against the kernel's swap to zram and its page cache of a
//!    file of nbdfuse, each in a memory cgroup that has as much.
//! 3. Faults a second for several threads.
//! 4. A scan in a row against what the transport reads in a row.
//! 5. Carving a slab, to its first byte.
//! 6. Memory that mapping takes.
//! 7. Programs under `xpm run` with half of their memory local, against the same all local.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::kernel_memory::{self, Rates};
use super::report::{Report, Row, median};
use super::servers::{Bench, Process, free_port, retry};

const TRANSPORTS: [&str; 3] = ["shm", "unix", "tcp"];
const ROUNDS: usize = 3;

/// Figures by case and metric, of all rounds.
type Figures = BTreeMap<(String, String), Vec<f64>>;

pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bench = Bench { dir: dir.path(), bin, size: ("512M", 512 << 20) };
    let (_allocator, allocator) = bench.allocator()?;
    let _appliance = appliance(&bench, &allocator)?;
    let site = Site { bin, allocator };
    retry(|| site.xpm(&["alloc", "create", "v", "--size", "512MiB"]))?;
    let kernel = kernel_memory::measure(&bench, report)?;
    for mode in ["inline", "handled"] {
        for transport in TRANSPORTS {
            report.note(&format!("map: faults {mode} over {transport}, {ROUNDS} rounds"));
            let mut figures = Figures::new();
            for _ in 0..ROUNDS {
                gather(&mut figures, &site.measure(&["floor"])?)?;
                gather(&mut figures, &site.measure(&[&site.allocator, "v", transport, mode])?)?;
            }
            rows(&Medians(&figures), mode, transport, &kernel, report)?;
        }
    }
    site.xpm(&["alloc", "delete", "v"])?;
    programs(&site, dir.path(), report)
}

fn appliance(bench: &Bench<'_>, allocator: &str) -> Result<Process> {
    let (control, data) = (free_port()?, free_port()?);
    let mut command = Command::new(bench.bin.join("xpm-appliance"));
    command.args([
        "--memory",
        "3GiB",
        "--no-lock",
        "--name",
        "bench",
        "--allocator",
        allocator,
        "--insecure",
    ]);
    command.args(["--listen", &format!("127.0.0.1:{control}"), "--nbd", &format!("127.0.0.1:{data}")]);
    command.arg("--run-dir").arg(bench.dir.join("run")).arg("--state").arg(bench.dir.join("state"));
    Process::start(&mut command, &bench.dir.join("appliance.log"))
}

struct Site<'a> {
    bin: &'a Path,
    allocator: String,
}

impl Site<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("xpm"));
        command.args(["--allocator", &self.allocator]).args(words);
        command
    }

    fn xpm(&self, words: &[&str]) -> Result<()> {
        let output = self.command(words).output().context("cannot run xpm")?;
        match output.status.success() {
            true => Ok(()),
            false => {
                bail!("xpm {} failed: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim())
            }
        }
    }

    fn measure(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(self.bin.join("examples/map_bench")).args(words).output();
        let output = output.context("cannot run map_bench")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "map_bench {} failed: {}", words.join(" "), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn gather(figures: &mut Figures, text: &str) -> Result<()> {
    for line in text.lines() {
        let one: Value = serde_json::from_str(line).with_context(|| format!("map_bench printed `{line}`"))?;
        let word =
            |key: &str| one[key].as_str().map(str::to_owned).with_context(|| format!("no {key} in `{line}`"));
        let value = one["value"].as_f64().with_context(|| format!("no value in `{line}`"))?;
        figures.entry((word("case")?, word("metric")?)).or_default().push(value);
    }
    Ok(())
}

struct Medians<'a>(&'a Figures);

impl Medians<'_> {
    fn of(&self, case: &str, metric: &str) -> Result<f64> {
        let known = self.0.get(&(case.to_owned(), metric.to_owned()));
        known
            .map(|values| median(values))
            .with_context(|| format!("map_bench did not measure {case}, {metric}"))
    }
}

fn rows(
    medians: &Medians<'_>,
    mode: &str,
    transport: &str,
    kernel: &Rates,
    report: &mut Report,
) -> Result<()> {
    let case = |what: &str| format!("{mode} {transport}: {what}");
    for metric in ["p50", "p99"] {
        let floor = medians.of(&format!("floor {mode}"), metric)? + medians.of("raw 4 KiB", metric)?;
        let fault = medians.of("fault", metric)?;
        report.row(&against(
            case("fault"),
            (metric, "us"),
            fault,
            ("local fault + read", floor),
            floor / fault,
            0.8,
        ));
    }
    let raw = medians.of("raw sequential", "mib_s")?;
    for (what, measured) in
        [("scan, into new memory", "sequential"), ("scan, half local", "sequential, half local")]
    {
        let scan = medians.of(measured, "mib_s")?;
        report.row(&against(case(what), ("rate", "MiB/s"), scan, ("transport", raw), scan / raw, 0.7));
    }
    for threads in [1, 2, 4, 8] {
        let rate = medians.of(&format!("{threads} threads"), "faults_s")?;
        report.row(&alone(case(&format!("faults, {threads} threads")), ("rate", "/s"), rate, None));
    }
    for part in [25, 50, 75, 100] {
        for what in ["scan twice", "random 80/20"] {
            let what = format!("{what}, {part} % local");
            let rate = medians.of(&what, "mpages_s")?;
            report.row(&alone(case(&what), ("rate", "Mpages/s"), rate, None));
            for (peer, rate_of_peer) in kernel.of(&what) {
                let row = against(
                    case(&what),
                    ("rate", "Mpages/s"),
                    rate,
                    (peer, rate_of_peer),
                    rate / rate_of_peer,
                    0.0,
                );
                report.row(&Row { goal: None, ok: None, ..row });
            }
        }
    }
    let usable = medians.of("carve and first write", "p50")?;
    report.row(&alone(case("slab, to its first byte"), ("p50", "us"), usable, Some(20.0)));
    // Of half a GiB.
    let open = medians.of("open", "mib")? * 2.0;
    report.row(&alone(case("memory for a GiB"), ("resident", "MiB"), open, None));
    Ok(())
}

fn against(
    case: String,
    (metric, unit): (&'static str, &'static str),
    xpm: f64,
    (peer, value): (&str, f64),
    ratio: f64,
    goal: f64,
) -> Row {
    let (peer, peer_value) = (Some(peer.to_owned()), Some(value));
    let (ratio, goal, ok) = (Some(ratio), Some(goal), Some(ratio >= goal));
    Row { bench: "map", case, metric, unit, xpm, peer, peer_value, ratio, goal, ok }
}

fn alone(case: String, (metric, unit): (&'static str, &'static str), xpm: f64, most: Option<f64>) -> Row {
    let ok = most.map(|most| xpm <= most);
    Row { bench: "map", case, metric, unit, xpm, peer: None, peer_value: None, ratio: None, goal: most, ok }
}

/// Programs whose pieces are about 512 MiB in all, with 256 MiB of them local.
fn programs(site: &Site<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    let (from, to) = (dir.join("lines"), dir.join("sorted"));
    let mut state = 1_u64;
    let lines: String = (0..6_000_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            format!("{:x}\n", state >> 16)
        })
        .collect();
    std::fs::write(&from, lines)?;
    let (from, to) = (from.display().to_string(), to.display().to_string());
    let numpy = "import numpy\na = numpy.random.default_rng(1).random(32000000)\na.sort()\nb = numpy.sqrt(a)\nassert b[0] <= b[-1]";
    let runs: [(&str, Vec<&str>); 2] = [
        ("sort of 6 million lines", vec!["sort", "-S", "512M", "--parallel=1", &from, "-o", &to]),
        ("numpy: sort and square root", vec!["/usr/bin/python3", "-c", numpy]),
    ];
    for (name, words) in &runs {
        report.note(&format!("map: {name}, all local and half local"));
        let local = seconds(Command::new(words[0]).args(&words[1..]).env("LC_ALL", "C"))?;
        let run = ["run", "--size", "2GiB", "--local", "256MiB", "--"];
        let half = seconds(site.command(&[&run[..], words].concat()).env("LC_ALL", "C"))?;
        let row = Row {
            goal: None,
            ok: None,
            ..against(
                format!("xpm run: {name}"),
                ("time", "s"),
                half,
                ("all local", local),
                local / half,
                0.0,
            )
        };
        report.row(&row);
    }
    redis(site, dir, report)
}

/// Values for about 300 MiB are set and got.
fn redis(site: &Site<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    report.note("map: redis-server under redis-benchmark, all local and half local");
    // The server by its other name, under which it comes without a service of the system.
    let server = dir.join("redis-server");
    std::os::unix::fs::symlink("/usr/bin/redis-check-rdb", &server)?;
    let socket = dir.join("redis.sock").display().to_string();
    let server = server.display().to_string();
    let words = [&server, "--port", "0", "--unixsocket", &socket, "--save", "", "--appendonly", "no"];
    let timed = |command: &mut Command, log: &str| -> Result<f64> {
        let mut process = Process::start(command, &dir.join(log))?;
        let cli = |words: &[&str]| Command::new("redis-cli").args(["-s", &socket]).args(words).output();
        process.wait_for("redis-server", || cli(&["ping"]).is_ok_and(|output| output.stdout == b"PONG\n"))?;
        let load =
            ["-s", &socket, "-t", "set,get", "-d", "1000", "-r", "250000", "-n", "500000", "-P", "16", "-q"];
        let time = seconds(Command::new("redis-benchmark").args(load));
        cli(&["shutdown", "nosave"])?;
        time
    };
    let local = timed(Command::new(words[0]).args(&words[1..]), "redis-local.log")?;
    let run = ["run", "--size", "2GiB", "--local", "128MiB", "--"];
    let half = timed(&mut site.command(&[&run[..], &words].concat()), "redis-half.log")?;
    let row =
        against("xpm run: redis".to_owned(), ("time", "s"), half, ("all local", local), local / half, 0.0);
    report.row(&Row { goal: None, ok: None, ..row });
    Ok(())
}

fn seconds(command: &mut Command) -> Result<f64> {
    let began = Instant::now();
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?}: {}",
        command.get_program(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(began.elapsed().as_secs_f64())
}
