//! Bench `life`: what moving and handing over cost those who use the memory.
//!
//! 1. Copying: an appliance is emptied of an allocation that is full and in use, into memory that is ready, against the
//!    rate of plain NBD writes to an appliance in the same run.
//! 2. Latency of small I/O while an appliance is emptied at a limited rate, against that of the same I/O alone.
//! 3. Handing an allocation over, with its owner alive: 64 regions, as 64 GiB in regions of 1 GiB have. No data
//!    moves, so regions of 256 MiB do.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::report::{Report, Row};
use super::servers::{Bench, Process, free_port, http, retry};
use crate::util;

/// Size of the allocation that is copied, in MiB.
const COPY_MIB: u64 = 2048;
/// The limited rate of copying, in MiB per second.
const RATE_MIB: u64 = 64;
const ROUNDS: usize = 3;
/// Seconds of small I/O.
const SECONDS: u32 = 6;

pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let size = format!("{COPY_MIB}M");
    let bench = Bench { dir: dir.path(), bin, size: (&size, COPY_MIB << 20) };
    let (_allocator, allocator) = bench.allocator()?;
    let site = Site { bench: &bench, allocator, control: PathBuf::new() };
    let _appliances = [site.appliance("a", "2560MiB", None)?, site.appliance("b", "2560MiB", None)?];
    let (_blk, control) = bench.blk(&site.allocator)?;
    let site = Site { control, ..site };
    retry(|| site.xpm(&["alloc", "create", "v", "--size", &size, "--region-size", "256MiB"]).map(drop))?;
    let uri = site.attach("v")?;
    report.note("life: an allocation of 2 GiB is filled and moved");
    site.gather("b")?;
    copying(&site, &uri, report)?;
    latency(&site, &uri, report)?;
    transfer(&site, report)
}

/// The daemons, and how they are asked.
struct Site<'a> {
    bench: &'a Bench<'a>,
    allocator: String,
    control: PathBuf,
}

impl Site<'_> {
    fn appliance(&self, name: &str, memory: &str, backing: Option<&Path>) -> Result<Process> {
        let (control, data) = (free_port()?, free_port()?);
        let path = |what: &str| self.bench.dir.join(format!("{name}-{what}"));
        let mut command = Command::new(self.bench.bin.join("xpm-appliance"));
        command.args(["--memory", memory, "--no-lock", "--name", name, "--region-size", "256MiB"]);
        command.args(["--listen", &format!("127.0.0.1:{control}"), "--nbd", &format!("127.0.0.1:{data}")]);
        command.arg("--run-dir").arg(path("run")).arg("--state").arg(path("state"));
        command.args(["--allocator", &self.allocator]);
        match backing {
            Some(file) => {
                command.arg("--backing").arg(format!("file:{}", file.display())).args(["--ready", "0"])
            }
            None => command.args(["--ready", memory]),
        };
        let mut process = Process::start(&mut command, &path("log"))?;
        process.wait_for("xpm-appliance", || http("GET", control, "/v1/status", None).is_ok())?;
        Ok(process)
    }

    fn xpm(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(self.bench.bin.join("xpm"));
        command.args(["--json", "--allocator", &self.allocator, "--blk"]).arg(&self.control).args(arguments);
        let output = command.output().context("cannot run xpm")?;
        if !output.status.success() {
            bail!("xpm {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("xpm printed no JSON")
    }

    fn attach(&self, name: &str) -> Result<String> {
        let socket = self.bench.dir.join(format!("{name}.sock"));
        let form = format!("nbd-socket={}", socket.display());
        self.xpm(&["blk", "attach", name, "--as", &form, "--transport", "nbd-tcp"])?;
        Ok(format!("nbd+unix:///{name}?socket={}", socket.display()))
    }

    /// Empties an appliance; how long that took.
    fn drain(&self, appliance: &str, options: &[&str]) -> Result<Duration> {
        let began = Instant::now();
        self.xpm(&[&["appliance", "drain", appliance], options].concat())?;
        let spent = began.elapsed();
        self.xpm(&["appliance", "undrain", appliance])?;
        Ok(spent)
    }

    /// Waits until an appliance has memory ready for all of it.
    fn wait_ready(&self, appliance: &str) -> Result<()> {
        retry(|| {
            let shown = self.xpm(&["appliance", "show", appliance])?;
            match shown["status"]["ready"].as_u64() {
                Some(ready) if ready >= COPY_MIB << 20 => Ok(()),
                ready => bail!("appliance {appliance} has {ready:?} bytes ready"),
            }
        })
    }

    /// All of it comes to the other appliance than this one.
    fn gather(&self, appliance: &str) -> Result<()> {
        self.drain(appliance, &[]).map(drop)
    }
}

fn copying(site: &Site<'_>, uri: &str, report: &mut Report) -> Result<()> {
    let mib = COPY_MIB as f64;
    let mut rows = Vec::new();
    for round in 0..ROUNDS {
        // Written by the same number of bytes at once and in flight as the appliance copies with.
        let raw =
            fio(uri, &["--rw=write", "--bs=512k", "--iodepth=16", &format!("--io_size={COPY_MIB}M")], 60)?;
        let raw = raw["write"]["bw_bytes"].as_f64().context("fio says no rate")? / f64::from(1 << 20);
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        site.wait_ready(to)?;
        rows.push((mib / site.drain(from, &[])?.as_secs_f64(), raw));
    }
    let (copied, raw) = (median(rows.iter().map(|row| row.0)), median(rows.iter().map(|row| row.1)));
    report.row(&against(
        "an appliance is emptied, in use",
        "throughput",
        "MiB/s",
        (copied, raw),
        "plain NBD writes",
        0.8,
        false,
    ));
    Ok(())
}

fn latency(site: &Site<'_>, uri: &str, report: &mut Report) -> Result<()> {
    let small = ["--rw=randrw", "--bs=4k", "--iodepth=1", "--norandommap", "--time_based"];
    let (mut idle, mut moving) = (Vec::new(), Vec::new());
    // It is on `b` after an odd number of moves.
    for from in ["b", "a", "b"] {
        idle.push(p99(&fio(uri, &small, SECONDS)?)?);
        let mut drain = site.drain_slowly(from)?;
        std::thread::sleep(Duration::from_millis(500));
        moving.push(p99(&fio(uri, &small, SECONDS)?)?);
        let ended = drain.try_wait()?.is_some();
        if ended {
            bail!("the move ended before the measurement");
        }
        if !drain.wait()?.success() {
            bail!("an appliance could not be emptied");
        }
        site.xpm(&["appliance", "undrain", from])?;
    }
    let values = (median(moving), median(idle));
    report.row(&against("4k, while 64 MiB/s are moved", "p99", "us", values, "the same alone", 0.5, true));
    Ok(())
}

impl Site<'_> {
    fn drain_slowly(&self, appliance: &str) -> Result<Child> {
        let mut command = Command::new(self.bench.bin.join("xpm"));
        command.args(["--allocator", &self.allocator, "appliance", "drain", appliance, "--rate"]);
        command.arg(format!("{RATE_MIB}MiB")).stdout(Stdio::null());
        command.spawn().context("cannot run xpm")
    }
}

fn transfer(site: &Site<'_>, report: &mut Report) -> Result<()> {
    let file = site.bench.dir.join("large");
    let _large = site.appliance("large", "16640MiB", Some(&file))?;
    site.xpm(&["appliance", "drain", "a", "--no-wait"])?;
    site.xpm(&["appliance", "drain", "b", "--no-wait", "--pause"])?;
    retry(|| {
        site.xpm(&["alloc", "create", "large", "--size", "16GiB", "--region-size", "256MiB"]).map(drop)
    })?;
    let other = "2".repeat(32);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        site.attach("large")?;
        let began = Instant::now();
        site.xpm(&["alloc", "transfer", "large", "--to", &other])?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        let own = site.xpm(&["status"])?["blk"]["client"].as_str().context("no client id")?.to_owned();
        site.xpm(&["alloc", "transfer", "large", "--to", &own, "--force"])?;
    }
    let time = median(times);
    report.row(&Row {
        bench: "life",
        case: "64 regions handed over, owner alive".to_owned(),
        metric: "time",
        unit: "ms",
        xpm: time,
        peer: None,
        peer_value: None,
        ratio: None,
        goal: Some(100.0),
        ok: Some(time <= 100.0),
    });
    Ok(())
}

fn fio(uri: &str, options: &[&str], seconds: u32) -> Result<Value> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--buffer_pattern=0x5a"]);
    command.args([&format!("--uri={uri}"), &format!("--size={COPY_MIB}M"), &format!("--runtime={seconds}")]);
    let output = util::output(command.args(options))?;
    let json = output.find('{').map_or("", |start| &output[start..]);
    let report: Value = serde_json::from_str(json).context("fio's report cannot be read")?;
    Ok(report["jobs"][0].clone())
}

/// The worse of reads and writes, in microseconds.
fn p99(job: &Value) -> Result<f64> {
    let of = |kind: &str| job[kind]["clat_ns"]["percentile"]["99.000000"].as_f64();
    let (read, write) = of("read").zip(of("write")).context("fio says no percentiles")?;
    Ok(read.max(write) / 1000.0)
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A comparison; the ratio is larger where xpm is better.
fn against(
    case: &str,
    metric: &'static str,
    unit: &'static str,
    (xpm, peer_value): (f64, f64),
    peer: &str,
    goal: f64,
    less_is_better: bool,
) -> Row {
    let ratio = if less_is_better { peer_value / xpm } else { xpm / peer_value };
    Row {
        bench: "life",
        case: case.to_owned(),
        metric,
        unit,
        xpm,
        peer: Some(peer.to_owned()),
        peer_value: Some(peer_value),
        ratio: Some(ratio),
        goal: Some(goal),
        ok: Some(ratio >= goal),
    }
}
