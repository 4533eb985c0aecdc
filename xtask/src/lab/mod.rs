//! `cargo xtask lab`: scenarios in a QEMU guest with a stock kernel and real devices.
//!
//! The guest sees the host's root file system, and so every program of the host and of this build,
//! read-only under a memory overlay. The memory that is lent lies outside of it: an allocator and
//! appliances run on the host, in a network of their own that the guest reaches.

mod cluster;
mod daemon;
pub(crate) mod disk;
mod initramfs;
mod kernel;
mod netns;
mod qemu;
mod run;
mod scenario;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{setup, util};
use kernel::Kernel;
use netns::Netns;
use qemu::{Accelerator, Guest, Threads};
use run::Place;
pub(crate) use run::Report;
use scenario::Scenario;

/// Options of `cargo xtask lab`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Scenarios to run; all tests when none is named.
    scenarios: Vec<String>,
    /// Show the scenarios and do nothing.
    #[arg(long)]
    list: bool,
    /// Keep logs and data of scenarios that pass, too.
    #[arg(long)]
    keep: bool,
    /// A shell in the guest when the scenarios are done; without a scenario, at once.
    #[arg(long)]
    shell: bool,
    /// Memory of the guest, in place of what the scenario asks for.
    #[arg(long, value_name = "MB")]
    memory: Option<u32>,
    /// Time for each scenario, in place of its own limit.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Use programs built with --release.
    #[arg(long)]
    release: bool,
}

impl Args {
    /// One scenario with optimized programs.
    pub(crate) fn release(scenario: &str) -> Args {
        Args { scenarios: vec![scenario.to_owned()], release: true, ..Args::default() }
    }
}

/// Does what the command line asks for; false when a scenario failed.
pub(crate) fn main(args: &Args) -> Result<bool> {
    if args.list {
        for scenario in scenario::ALL {
            let kind = match (scenario.bench, scenario.long) {
                (true, _) => "bench",
                (_, true) => "long",
                _ => "test",
            };
            println!("{:<26} {kind:<6} {} MB  {}", scenario.name, scenario.memory_mib, scenario.about);
        }
        return Ok(true);
    }
    if args.shell {
        let scenarios = chosen(&args.scenarios)?;
        Lab::prepare(args, &scenarios)?.shell(&scenarios)?;
        return Ok(true);
    }
    Ok(summarize(&run_all(args)?))
}

/// Runs the scenarios that the options name.
///
/// # Errors
/// When the lab itself does not work; a scenario that fails is in the reports.
pub(crate) fn run_all(args: &Args) -> Result<Vec<Report>> {
    let names = match args.scenarios.is_empty() {
        true => scenario::ALL
            .iter()
            .filter(|scenario| !scenario.bench && !scenario.long)
            .map(|scenario| scenario.name.to_owned())
            .collect(),
        false => args.scenarios.clone(),
    };
    let scenarios = chosen(&names)?;
    Lab::prepare(args, &scenarios)?.run(scenarios)
}

/// Prints how the scenarios went, and last the line `N passed, N failed`; true when none failed.
pub(crate) fn summarize(reports: &[Report]) -> bool {
    println!();
    for line in reports.iter().flat_map(|report| &report.tagged) {
        println!("{line}");
    }
    for report in reports {
        let verdict = if report.passed() { "passed" } else { "FAILED" };
        let first_line = report.failure.as_deref().and_then(|text| text.lines().next()).unwrap_or_default();
        println!("lab {:<26} {verdict:<8} {:<10} {first_line}", report.name, util::human_time(report.time));
    }
    let passed = reports.iter().filter(|report| report.passed()).count();
    println!("{passed} passed, {} failed", reports.len() - passed);
    passed == reports.len()
}

fn chosen(names: &[String]) -> Result<Vec<&'static Scenario>> {
    let find = |name: &String| {
        scenario::find(name)
            .with_context(|| format!("no scenario {name}; `cargo xtask lab --list` shows them"))
    };
    names.iter().map(find).collect()
}

/// What all boots of a run share.
struct Lab {
    programs: PathBuf,
    runs: PathBuf,
    kernel: Kernel,
    initramfs: PathBuf,
    netns: Netns,
    accelerator: Accelerator,
    memory_mib: Option<u32>,
    time_max: Option<Duration>,
    keep: bool,
}

impl Lab {
    /// Gets everything that a boot needs: packages, programs, kernel, initramfs, network.
    fn prepare(args: &Args, scenarios: &[&Scenario]) -> Result<Lab> {
        setup::run(setup::ALL)?;
        let target = util::target_dir()?;
        if scenarios.iter().any(|scenario| scenario.needs_programs) {
            build(&target, args.release)?;
        }
        let cache = target.join("lab");
        let runs = cache.join("run");
        fs::create_dir_all(&runs).with_context(|| format!("cannot make {}", runs.display()))?;
        let kernel = Kernel::get(&cache)?;
        let initramfs = cache.join(format!("initramfs-{}", std::process::id()));
        initramfs::build(&kernel, &initramfs)?;
        let netns = Netns::new()?;
        let accelerator = qemu::choose(&kernel, &initramfs, &netns, &cache)?;
        println!("lab: kernel {} under {accelerator:?}", kernel.release());
        Ok(Lab {
            programs: target.join(if args.release { "release" } else { "debug" }),
            runs,
            kernel,
            initramfs,
            netns,
            accelerator,
            memory_mib: args.memory,
            time_max: args.timeout.map(Duration::from_secs),
            keep: args.keep,
        })
    }

    /// Runs scenarios, those of a group in one boot for as long as they pass.
    fn run(&self, scenarios: Vec<&'static Scenario>) -> Result<Vec<Report>> {
        let start = Instant::now();
        let mut reports = Vec::new();
        let mut waiting = scenarios;
        while let Some(first) = waiting.first().copied() {
            let group: Vec<_> =
                waiting.iter().copied().filter(|scenario| scenario.group == first.group).collect();
            let new = self.boot(&group)?;
            ensure!(!new.is_empty(), "the guest ran no scenario");
            waiting.retain(|scenario| new.iter().all(|report| report.name != scenario.name));
            reports.extend(new);
        }
        println!("lab: all in {}", util::human_time(start.elapsed()));
        Ok(reports)
    }

    /// One boot. Its logs are kept when something failed.
    fn boot(&self, scenarios: &[&'static Scenario]) -> Result<Vec<Report>> {
        let prefix = format!("{}-", scenarios[0].group);
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.runs)?;
        let reports = run::boot(&self.place(dir.path()), &self.guest(dir.path(), scenarios), scenarios);
        let failed = reports.as_ref().map_or(true, |reports| !reports.iter().all(Report::passed));
        if failed || self.keep {
            println!("lab: logs are in {}", dir.keep().display());
        }
        let reports = reports?;
        for (name, failure) in
            reports.iter().filter_map(|report| Some((report.name, report.failure.as_ref()?)))
        {
            println!("[{name}] FAILED: {failure}");
        }
        Ok(reports)
    }

    /// A boot on the terminal.
    fn shell(&self, scenarios: &[&'static Scenario]) -> Result<()> {
        if let [first, rest @ ..] = scenarios
            && let Some(other) = rest.iter().find(|other| other.group != first.group)
        {
            bail!("--shell is for one guest; {} and {} need different ones", first.name, other.name);
        }
        let dir = tempfile::Builder::new().prefix("shell-").tempdir_in(&self.runs)?;
        run::shell(&self.place(dir.path()), &self.guest(dir.path(), scenarios), scenarios)
    }

    fn place<'a>(&'a self, dir: &'a Path) -> Place<'a> {
        Place { netns: &self.netns, dir, programs: &self.programs, time_max: self.time_max }
    }

    fn guest<'a>(&'a self, dir: &Path, scenarios: &[&'static Scenario]) -> Guest<'a> {
        let asked = scenarios.first().map_or(512, |scenario| scenario.memory_mib);
        let measures = scenarios.iter().any(|scenario| scenario.bench);
        Guest {
            kernel: &self.kernel,
            initramfs: &self.initramfs,
            memory_mib: self.memory_mib.unwrap_or(asked),
            accelerator: self.accelerator,
            threads: if measures { Threads::Each } else { Threads::One },
            console: dir.join("console.log"),
            monitor: dir.join("monitor"),
            disk: scenarios.first().and_then(|scenario| scenario.vhost).map(|_| cluster::disk_socket(dir)),
            disks: scenarios.first().map_or(&[][..], |scenario| scenario.disks),
            dir: dir.to_owned(),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A file that is left here is only a waste of a few megabytes.
        let _ = fs::remove_file(&self.initramfs);
    }
}

/// Builds the programs under test into the target directory that this program comes from.
fn build(target: &Path, release: bool) -> Result<()> {
    let mut cargo = util::command("cargo");
    cargo.current_dir(util::repository()).arg("build").arg("--quiet").arg("--target-dir").arg(target);
    for package in ["xpm-allocator", "xpm-appliance", "xpm-blk", "xpm", "xpm-tests"] {
        cargo.args(["--package", package]);
    }
    if release {
        cargo.arg("--release");
    }
    util::run(&mut cargo)
}
