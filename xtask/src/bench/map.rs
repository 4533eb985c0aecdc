//! Bench `map`: external memory at addresses.
//!
//! 1. A fault, in line and by a handler, over each transport, against its floor in the same run: a fault of
//!    userfaultfd that is ended by a bare read of 4 KiB by the transport and a copy, on memory of the kind that the
//!    library uses on this kernel.
//! 2. Touches in a row and at random with budgets of a part of the data, against the kernel's swap to zram and its
//!    page cache of a file of nbdfuse, each in a memory cgroup that has as much.
//! 3. Faults a second for several threads, with one handler, and with one for each as far as there are processors.
//! 4. A scan in a row against what the transport reads in a row.
//! 5. Carving a slab, to its first byte.
//! 6. Memory that mapping takes beside the pages that are local, by two sizes: what is fixed, what comes with each
//!    GiB that is mapped, and both of the larger size right after a scan, when memory of pages that have left is kept
//!    for the next ones.
//! 7. Programs under `xpm run` with half of the external memory that they touch local, against the same by themselves.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::kernel_memory::{self, Rates};
use super::programs;
use super::report::{Report, Row, median};
use super::servers::{Bench, Process, free_port, retry};

const TRANSPORTS: [&str; 3] = ["shm", "unix", "tcp"];
pub(super) const ROUNDS: usize = 3;
/// MiB that are mapped to see what memory that takes, and what percentages of them are local.
const MAPPED: [u32; 2] = [512, 1024];
const LOCAL: [u32; 2] = [100, 50];

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
                gather(&mut figures, &site.measure(&[&site.allocator, "v", transport, mode])?)?;
            }
            rows(&Medians(&figures), mode, transport, &kernel, report)?;
        }
    }
    site.xpm(&["alloc", "delete", "v"])?;
    memory(&site, report)?;
    programs::measure(&site, dir.path(), report)
}

/// Memory that mapping takes, which is the same over any transport.
fn memory(site: &Site<'_>, report: &mut Report) -> Result<()> {
    let [small, large] = MAPPED;
    site.xpm(&["alloc", "create", "m", "--size", &format!("{large}MiB")])?;
    for mode in ["inline", "handled"] {
        report.note(&format!("map: memory that it takes, {mode}"));
        for part in LOCAL.map(|part| part.to_string()) {
            let mut figures = Figures::new();
            for mib in MAPPED.map(|mib| mib.to_string()) {
                let words = ["memory", &site.allocator, "m", mode, &mib, &part];
                gather(&mut figures, &site.measure(&words)?)?;
            }
            let over = |when: &str, mib: u32| {
                Medians(&figures).of(&format!("memory {when}, {part} % local, {mib} MiB"), "mib")
            };
            let each = (over("at rest", large)? - over("at rest", small)?) / f64::from(large - small);
            let fixed = over("at rest", large)? - each * f64::from(large);
            let case = format!("{mode}: memory besides, {part} % local");
            report.row(&alone(case.clone(), ("fixed", "MiB"), fixed, None));
            report.row(&alone(case.clone(), ("each GiB", "MiB"), each * 1024.0, None));
            report.row(&alone(case, ("in a scan", "MiB"), over("in a scan", large)?, None));
        }
    }
    site.xpm(&["alloc", "delete", "m"])
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

pub(super) struct Site<'a> {
    bin: &'a Path,
    allocator: String,
}

impl Site<'_> {
    pub(super) fn command(&self, words: &[&str]) -> Command {
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

    /// The figures of one metric, by case.
    fn all_of(&self, metric: &str) -> impl Iterator<Item = (&str, f64)> {
        let of_it = self.0.iter().filter(move |((_, other), _)| other == metric);
        of_it.map(|((case, _), values)| (case.as_str(), median(values)))
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
        let floor = medians.of("floor", metric)?;
        let fault = medians.of("fault", metric)?;
        report.row(&against(
            case("fault"),
            (metric, "us"),
            fault,
            ("bare fault with a read", floor),
            floor / fault,
            0.8,
        ));
    }
    for metric in ["p50", "p99"] {
        let read = medians.of("raw 4 KiB", metric)?;
        report.row(&alone(case("bare read of 4 KiB"), (metric, "us"), read, None));
    }
    let raw = medians.of("raw sequential", "mib_s")?;
    for (what, measured) in
        [("scan, into new memory", "sequential"), ("scan, half local", "sequential, half local")]
    {
        let scan = medians.of(measured, "mib_s")?;
        report.row(&against(case(what), ("rate", "MiB/s"), scan, ("transport", raw), scan / raw, 0.7));
    }
    for (threads, rate) in medians.all_of("faults_s") {
        report.row(&alone(case(&format!("faults, {threads}")), ("rate", "/s"), rate, None));
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
    Ok(())
}

pub(super) fn against(
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

pub(super) fn alone(
    case: String,
    (metric, unit): (&'static str, &'static str),
    xpm: f64,
    most: Option<f64>,
) -> Row {
    let ok = most.map(|most| xpm <= most);
    Row { bench: "map", case, metric, unit, xpm, peer: None, peer_value: None, ratio: None, goal: most, ok }
}
