//! Programs under `xpm run` with half of the external memory that they touch local, against the same by themselves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::map::{ROUNDS, Site, against, alone};
use super::report::{Report, Row, median};
use super::servers::Process;

/// External memory that a program is given, and what of it is more local memory than any of them touches.
const SIZE: &str = "2GiB";
const ALL: u64 = 1 << 30;
/// The lower limit of touched memory: below it something is not external that should be.
const TOUCHED_MIN: u64 = 64 << 20;
/// How often it is looked how much of it is local.
const LOOK_EVERY: Duration = Duration::from_millis(10);

const NUMPY: &str = "import numpy
a = numpy.random.default_rng(1).random(32000000)
a.sort()
numpy.sqrt(a, out=a)
assert a[0] <= a[-1]";

/// A program, and what is done with it.
struct Program {
    name: &'static str,
    words: Vec<String>,
    work: Work,
}

/// The timed part of a program.
enum Work {
    /// All of it.
    Whole,
    /// A load on the redis that serves at this socket.
    Redis(String),
}

pub(super) fn measure(site: &Site<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    for program in [sort(dir)?, numpy(), redis(dir)?] {
        program.measure(site, dir, report)?;
    }
    Ok(())
}

fn sort(dir: &Path) -> Result<Program> {
    let (from, to) = (dir.join("lines"), dir.join("sorted"));
    let mut state = 1_u64;
    let lines: String = (0..6_000_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            format!("{:x}\n", state >> 16)
        })
        .collect();
    fs::write(&from, lines)?;
    let (from, to) = (from.display().to_string(), to.display().to_string());
    let words = ["sort", "-S", "512M", "--parallel=1", &from, "-o", &to].map(str::to_owned).to_vec();
    Ok(Program { name: "sort of 6 million lines", words, work: Work::Whole })
}

/// In place, so that what is sorted is all that is touched.
fn numpy() -> Program {
    let words = ["/usr/bin/python3", "-c", NUMPY].map(str::to_owned).to_vec();
    Program { name: "numpy: sort and square root", words, work: Work::Whole }
}

fn redis(dir: &Path) -> Result<Program> {
    // The server by its other name, under which it comes without a service of the system.
    let server = dir.join("redis-server");
    std::os::unix::fs::symlink("/usr/bin/redis-check-rdb", &server)?;
    let (server, socket) = (server.display().to_string(), dir.join("redis.sock").display().to_string());
    let words = [&server, "--port", "0", "--unixsocket", &socket, "--save", "", "--appendonly", "no"];
    let words = words.map(str::to_owned).to_vec();
    Ok(Program { name: "redis", words, work: Work::Redis(socket) })
}

impl Program {
    fn measure(&self, site: &Site<'_>, dir: &Path, report: &mut Report) -> Result<()> {
        let log = dir.join("program.log");
        report.note(&format!("map: {}, to see what it touches", self.name));
        let touched = self.touched(site, &log)?;
        report.note(&format!(
            "map: {}, by itself and with {} of {} MiB local, {ROUNDS} rounds",
            self.name,
            touched >> 21,
            touched >> 20
        ));
        let (mut local, mut half) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            local.push(self.once(Command::new(&self.words[0]).args(&self.words[1..]), &log)?);
            half.push(self.once(&mut self.under_xpm(site, touched / 2), &log)?);
            ensure!(fetched(&log)? > 0, "{}: nothing had to leave half of what it touches", self.name);
        }
        let case = format!("xpm run: {}", self.name);
        let mib = touched as f64 / f64::from(1 << 20);
        report.row(&alone(case.clone(), ("touched", "MiB"), mib, None));
        let (local, half) = (median(&local), median(&half));
        let row = against(case, ("half local", "s"), half, ("all local", local), local / half, 0.0);
        report.row(&Row { goal: None, ok: None, ..row });
        Ok(())
    }

    fn under_xpm(&self, site: &Site<'_>, local: u64) -> Command {
        let mut command = site.command(&["run", "-v", "--size", SIZE, "--local", &local.to_string(), "--"]);
        command.args(&self.words);
        command
    }

    /// Runs it once; says how long its work took, in seconds.
    fn once(&self, command: &mut Command, log: &Path) -> Result<f64> {
        let began = Instant::now();
        let mut process = Process::start(command.env("LC_ALL", "C"), log)?;
        self.work(&mut process, began).with_context(|| said(self.name, log))
    }

    fn work(&self, process: &mut Process, mut began: Instant) -> Result<f64> {
        let Work::Redis(socket) = &self.work else {
            process.wait()?;
            return Ok(began.elapsed().as_secs_f64());
        };
        let cli = |words: &[&str]| Command::new("redis-cli").args(["-s", socket]).args(words).output();
        process.wait_for("redis-server", || cli(&["ping"]).is_ok_and(|output| output.stdout == b"PONG\n"))?;
        began = Instant::now();
        let load =
            ["-s", socket, "-t", "set,get", "-d", "1000", "-r", "250000", "-n", "500000", "-P", "16", "-q"];
        crate::util::output(Command::new("redis-benchmark").args(load))?;
        let time = began.elapsed().as_secs_f64();
        cli(&["shutdown", "nosave"])?;
        process.wait()?;
        Ok(time)
    }

    /// The most external memory that it has local at a time where all of it may be.
    fn touched(&self, site: &Site<'_>, log: &Path) -> Result<u64> {
        let mut process = Process::start(self.under_xpm(site, ALL).env("LC_ALL", "C"), log)?;
        let (id, over) = (process.id(), AtomicBool::new(false));
        let touched = std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                let mut most = 0;
                while !over.load(Ordering::Relaxed) {
                    most = most.max(children(id).iter().map(|child| external(child)).sum());
                    std::thread::sleep(LOOK_EVERY);
                }
                most
            });
            let worked = self.work(&mut process, Instant::now());
            over.store(true, Ordering::Relaxed);
            worked?;
            looking.join().map_err(|_| anyhow!("cannot look at {}", self.name))
        });
        let touched: u64 = touched.with_context(|| said(self.name, log))?;
        ensure!(touched >= TOUCHED_MIN, "{} touches only {touched} bytes of external memory", self.name);
        Ok(touched)
    }
}

fn said(name: &str, log: &Path) -> String {
    format!("{name} said: {}", fs::read_to_string(log).unwrap_or_default().trim())
}

/// Pages that came back from external memory, by the account of `xpm run`.
fn fetched(log: &Path) -> Result<u64> {
    let text = fs::read_to_string(log)?;
    let before = text.split(" pages fetched").next().and_then(|before| before.rsplit(' ').next());
    before
        .and_then(|count| count.parse().ok())
        .with_context(|| format!("no account of what was external: {text}"))
}

/// The programs that a process has started, as directories of /proc; none when it has ended.
fn children(id: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|id| Path::new("/proc").join(id)).collect::<Vec<_>>())
        .collect()
}

/// Bytes of local memory in what a program has registered with userfaultfd for missing pages; none when it has ended.
fn external(program: &Path) -> u64 {
    let (mut kib, mut rss) = (0, 0);
    for line in fs::read_to_string(program.join("smaps")).unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") => rss = words.next().and_then(|word| word.parse().ok()).unwrap_or(0),
            Some("VmFlags:") if words.any(|flag| flag == "um") => kib += rss,
            _ => {}
        }
    }
    kib << 10
}
