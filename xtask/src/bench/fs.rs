//! Bench `fs`: pages of external memory as a mapped file, against the same memory mapped by the library, and against
//! nbdfuse.
//!
//! 1. A page that is touched for the first time, at random, over each transport. Reads of the daemon for each touch.
//! 2. All pages in a row.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::kernel_memory::Mounted;
use super::map::{against, alone};
use super::report::{Report, Row, median};
use super::servers::{Bench, Way, retry};
use crate::util;

const ROUNDS: usize = 3;
const MIB: u64 = 512;
/// A transport as `xpm fs attach` and as map_bench name it, and the most that a fault may take of one by handler
/// threads.
const TRANSPORTS: [(&str, &str, Option<f64>); 3] =
    [("nbd-tcp", "tcp", Some(1.3)), ("nbd-unix", "unix", None), ("shm", "shm", None)];

/// Figures by what they are of, of all rounds.
#[derive(Default)]
struct Figures(BTreeMap<String, Vec<f64>>);

impl Figures {
    fn gather(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            let one: Value = serde_json::from_str(line).with_context(|| format!("an odd line `{line}`"))?;
            let word = |key: &str| one[key].as_str().unwrap_or_default();
            let value = one["value"].as_f64().context("a figure without a value")?;
            self.0.entry(format!("{} {}", word("case"), word("metric"))).or_default().push(value);
        }
        Ok(())
    }

    fn of(&self, what: &str) -> Result<f64> {
        self.0.get(what).map(|values| median(values)).with_context(|| format!("{what} was not measured"))
    }
}

pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bench = Bench { dir: dir.path(), bin, size: ("512M", MIB << 20) };
    let (_allocator, allocator) = bench.allocator()?;
    let _appliance = bench.appliance()?;
    let (_fs, control) = bench.fs(&allocator)?;
    let xpm = |words: &[&str]| {
        let mut command = Command::new(bin.join("xpm"));
        command.env("XPM_CONFIG", "/dev/null").env("XPM_FS", &control);
        util::output(command.args(["--allocator", &allocator]).args(words))
    };
    retry(|| xpm(&["alloc", "create", "f", "--size", &format!("{MIB}MiB")]).map(drop))?;
    let mut peers = Vec::new();
    for way in [Way::Tcp, Way::Unix] {
        report.note(&format!("fs: nbdfuse over {}", way.name()));
        match nbdfuse(&bench, way) {
            Ok(figures) => peers.push((format!("nbdfuse {}", way.name()), figures)),
            Err(error) => report.note(&format!("fs: without nbdfuse over {}: {error:#}", way.name())),
        }
    }
    for (transport, name, most) in TRANSPORTS {
        report.note(&format!("fs: mapped by the library with handler threads, over {name}"));
        let mut handled = Figures::default();
        let mut command = Command::new(bin.join("examples/map_bench"));
        handled.gather(&util::output(command.args([&allocator, "f", name, "handled"]))?)?;

        report.note(&format!("fs: a file over {name}, {ROUNDS} rounds"));
        let file = dir.path().join("file");
        let at = file.display().to_string();
        xpm(&["fs", "attach", "f", "--at", &at, "--transport", transport])?;
        touch(bin, "fill", &file)?;
        let mut figures = Figures::default();
        let mut pages = Vec::new();
        for _ in 0..ROUNDS {
            let read = || -> Result<f64> {
                let shown: Value = serde_json::from_str(&xpm(&["fs", "show", "f", "--json"])?)?;
                shown["counters"]["read_bytes"].as_f64().context("xpm-fs counts no bytes")
            };
            let before = read()?;
            figures.gather(&touch(bin, "random", &file)?)?;
            pages.push((read()? - before) / 4096.0 / figures.of("fault touches")?);
            figures.gather(&touch(bin, "row", &file)?)?;
        }
        xpm(&["fs", "detach", "f"])?;
        let case = |what: &str| format!("{name}: {what}");
        for metric in ["p50", "p99"] {
            let (ours, theirs) =
                (figures.of(&format!("fault {metric}"))?, handled.of(&format!("fault {metric}"))?);
            let goal = most.filter(|_| metric == "p50").map(|most| 1.0 / most);
            report.row(&row(
                case("fault"),
                (metric, "us"),
                (ours, theirs),
                "handler threads",
                theirs / ours,
                goal,
            ));
            for (peer, theirs) in &peers {
                let theirs = theirs.of(&format!("fault {metric}"))?;
                let same = peer.ends_with(name) && metric == "p50";
                let goal = same.then_some(1.5);
                report.row(&row(case("fault"), (metric, "us"), (ours, theirs), peer, theirs / ours, goal));
            }
        }
        let read = alone(case("pages read for each random touch"), ("pages", ""), median(&pages), Some(1.2));
        report.row(&Row { bench: "fs", ..read });
        let ours = figures.of("row mib_s")?;
        for (peer, theirs) in &peers {
            let theirs = theirs.of("row mib_s")?;
            report.row(&row(
                case("all pages in a row"),
                ("rate", "MiB/s"),
                (ours, theirs),
                peer,
                ours / theirs,
                None,
            ));
        }
    }
    Ok(())
}

/// A comparison, with a goal or without one.
fn row(
    case: String,
    metric: (&'static str, &'static str),
    (ours, theirs): (f64, f64),
    peer: &str,
    ratio: f64,
    goal: Option<f64>,
) -> Row {
    let row = against(case, metric, ours, (peer, theirs), ratio, goal.unwrap_or(0.0));
    Row { bench: "fs", goal, ok: row.ok.filter(|_| goal.is_some()), ..row }
}

/// Has the pages of a file touched; what was measured.
fn touch(bin: &Path, mode: &str, file: &Path) -> Result<String> {
    util::output(Command::new(bin.join("filetouch")).arg(mode).arg(file))
}

fn nbdfuse(bench: &Bench<'_>, way: Way) -> Result<Figures> {
    let server = bench.nbdkit_memory(way)?;
    let mounted = Mounted::new(&bench.dir.join(format!("fuse-{}", way.name())), &server.uri, MIB << 20)?;
    let file = mounted.file();
    touch(bench.bin, "fill", &file)?;
    let mut figures = Figures::default();
    for mode in ["random", "row"].repeat(ROUNDS) {
        figures.gather(&touch(bench.bin, mode, &file)?)?;
    }
    Ok(figures)
}
