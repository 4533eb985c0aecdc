//! `cargo xtask lab`: scenarios in a QEMU guest with a stock kernel and real devices.
//!
//! The guest sees the host's root file system, and so every program of the host and of this build,
//! read-only under a memory overlay. The memory that is lent lies outside of it: an allocator and
//! appliances run on the host, in a network of their own that the guest reaches.

mod cluster;
mod daemon;
pub(crate) mod disk;
mod earlier;
mod initramfs;
mod kernel;
mod netns;
mod qemu;
mod run;
mod scenario;

use std::collections::VecDeque;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{package, setup, util};
use kernel::{Kernel, Source};
use netns::Netns;
use qemu::{Accelerator, Guest, Threads};
use run::Place;
pub(crate) use run::Report;
use scenario::Scenario;

/// Boots that go on at the same time, at most: each has daemons with gigabytes of memory.
const BOOTS_MAX: usize = 2;

/// Options of `cargo xtask lab`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Scenarios to run; all tests that are not long when none is named.
    scenarios: Vec<String>,
    /// Run the long tests, too.
    #[arg(long, conflicts_with = "scenarios")]
    all: bool,
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
    /// The guest's kernel: `6.12`, Debian 12's; `newest`, that of the backports for Debian 13; or the directory in
    /// which somebody unpacked the packages of a kernel, which has `boot` or `usr` in it.
    #[arg(long, default_value = "6.12", value_name = "6.12|newest|PATH")]
    kernel: Source,
}

impl Args {
    /// The tests; with `all`, the long ones, too.
    pub(crate) fn tests(all: bool) -> Args {
        Args { all, ..Args::default() }
    }

    /// One scenario with optimized programs.
    pub(crate) fn release(scenario: &str) -> Args {
        Args { scenarios: vec![scenario.to_owned()], release: true, ..Args::default() }
    }

    /// One scenario on the newest kernel.
    pub(crate) fn newest(scenario: &str) -> Args {
        Args { scenarios: vec![scenario.to_owned()], kernel: Source::Newest, ..Args::default() }
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
            .filter(|scenario| !scenario.bench && (args.all || !scenario.long))
            .map(|scenario| scenario.name.to_owned())
            .collect(),
        false => args.scenarios.clone(),
    };
    let scenarios = chosen(&names)?;
    Lab::prepare(args, &scenarios)?.run(&scenarios)
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
        let time = util::human_time(report.time);
        println!("lab {:<26} {:<22} {verdict:<8} {time:<10} {first_line}", report.name, report.kernel);
    }
    for report in reports.iter().filter(|report| !report.passed()) {
        println!("\nlab {} failed; the last lines of its output:", report.name);
        report.last.iter().for_each(|line| println!("  {line}"));
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

/// Scenarios that share a boot.
type Group = Vec<&'static Scenario>;

/// The groups of scenarios, in the order of their first ones.
fn groups(scenarios: &[&'static Scenario]) -> VecDeque<Group> {
    let mut groups: VecDeque<Group> = VecDeque::new();
    for &scenario in scenarios {
        match groups.iter_mut().find(|group| group[0].group == scenario.group) {
            Some(group) => group.push(scenario),
            None => groups.push_back(vec![scenario]),
        }
    }
    groups
}

/// A test's guest keeps one processor of the host busy and its daemons part of another; where something is measured,
/// nothing runs beside it.
fn boots_at_once(scenarios: &[&Scenario]) -> usize {
    let measures = scenarios.iter().any(|scenario| scenario.bench);
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    if measures { 1 } else { processors.clamp(1, BOOTS_MAX) }
}

fn join(boots: ScopedJoinHandle<'_, Result<Vec<Report>>>) -> Result<Vec<Report>> {
    boots.join().unwrap_or_else(|_| bail!("a thread of the lab panicked"))
}

/// The state that all boots of a run share.
struct Lab {
    programs: PathBuf,
    /// Programs of an earlier commit, where a scenario upgrades them.
    earlier: Option<PathBuf>,
    runs: PathBuf,
    kernel: Kernel,
    initramfs: PathBuf,
    /// A network for each boot that goes on at the same time.
    networks: Vec<Netns>,
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
            util::build(&target, args.release)?;
        }
        let cache = target.join("lab");
        let runs = cache.join("run");
        fs::create_dir_all(&runs).with_context(|| format!("cannot make {}", runs.display()))?;
        let upgrades = scenarios.iter().any(|scenario| scenario.upgrades);
        let earlier = upgrades.then(|| earlier::programs(&cache)).transpose()?;
        let kernel = Kernel::get(&args.kernel, &cache)?;
        let initramfs = cache.join(format!("initramfs-{}", std::process::id()));
        initramfs::build(&kernel, &initramfs)?;
        let networks = (0..boots_at_once(scenarios)).map(|_| Netns::new()).collect::<Result<Vec<_>>>()?;
        let accelerator = qemu::choose(&kernel, &initramfs, &networks[0], &cache)?;
        println!("lab: kernel {} under {accelerator:?}", kernel.release());
        Ok(Lab {
            programs: target.join(if args.release { "release" } else { "debug" }),
            earlier,
            runs,
            kernel,
            initramfs,
            networks,
            accelerator,
            memory_mib: args.memory,
            time_max: args.timeout.map(Duration::from_secs),
            keep: args.keep,
        })
    }

    /// Runs scenarios, those of a group in one boot for as long as they pass, and as many boots at once as there are
    /// networks. Gives the reports in the scenarios' order.
    fn run(&self, scenarios: &[&'static Scenario]) -> Result<Vec<Report>> {
        let start = Instant::now();
        let (alone, together): (VecDeque<Group>, VecDeque<Group>) =
            groups(scenarios).into_iter().partition(|group| group[0].alone);
        let together = Mutex::new(together);
        let mut reports = thread::scope(|scope| {
            let boots =
                self.networks.iter().map(|network| scope.spawn(|| self.run_groups(&together, network)));
            let boots: Vec<_> = boots.collect();
            boots.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        reports.push(self.run_groups(&Mutex::new(alone), &self.networks[0])?);
        println!("lab: all in {}", util::human_time(start.elapsed()));
        let mut reports: Vec<Report> = reports.into_iter().flatten().collect();
        let place = |report: &Report| scenarios.iter().position(|scenario| scenario.name == report.name);
        reports.sort_by_key(place);
        Ok(reports)
    }

    /// Runs groups until none waits.
    fn run_groups(&self, groups: &Mutex<VecDeque<Group>>, network: &Netns) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        let next = || groups.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        while let Some(mut waiting) = next() {
            while !waiting.is_empty() {
                let new = self.boot(&waiting, network)?;
                ensure!(!new.is_empty(), "the guest ran no scenario");
                waiting.retain(|scenario| new.iter().all(|report| report.name != scenario.name));
                reports.extend(new);
            }
        }
        Ok(reports)
    }

    /// One boot. Its logs are kept when something failed.
    fn boot(&self, scenarios: &[&'static Scenario], network: &Netns) -> Result<Vec<Report>> {
        let prefix = format!("{}-", scenarios[0].group);
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.runs)?;
        if scenarios.iter().any(|scenario| scenario.systemd) {
            self.make_packages(dir.path(), scenarios)?;
        }
        let reports = run::boot(
            &self.place(dir.path(), network, scenarios),
            &self.guest(dir.path(), scenarios),
            scenarios,
        );
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

    /// The Debian packages where the guest finds them; where they are what is tested, as Debian wants them, and in a
    /// second version.
    fn make_packages(&self, dir: &Path, scenarios: &[&'static Scenario]) -> Result<()> {
        let tested = scenarios.iter().any(|scenario| scenario.script == "packages.sh");
        for version in if tested { &["1", "2"][..] } else { &["1"] } {
            let output = dir.join("share/debs").join(version);
            let packages = package::make(&self.programs, &format!("+lab{version}"), &output, false)?;
            ensure!(!tested || package::lintian(&packages)?, "lintian has found errors");
        }
        Ok(())
    }

    /// A boot on the terminal.
    fn shell(&self, scenarios: &[&'static Scenario]) -> Result<()> {
        if let [first, rest @ ..] = scenarios
            && let Some(other) = rest.iter().find(|other| other.group != first.group)
        {
            bail!("--shell is for one guest; {} and {} need different ones", first.name, other.name);
        }
        let dir = tempfile::Builder::new().prefix("shell-").tempdir_in(&self.runs)?;
        if scenarios.iter().any(|scenario| scenario.systemd) {
            self.make_packages(dir.path(), scenarios)?;
        }
        run::shell(
            &self.place(dir.path(), &self.networks[0], scenarios),
            &self.guest(dir.path(), scenarios),
            scenarios,
        )
    }

    fn place<'a>(&'a self, dir: &'a Path, network: &'a Netns, scenarios: &[&Scenario]) -> Place<'a> {
        let upgrades = scenarios.first().is_some_and(|scenario| scenario.upgrades);
        Place {
            netns: network,
            dir,
            programs: &self.programs,
            earlier: self.earlier.as_deref().filter(|_| upgrades),
            kernel: self.kernel.release(),
            time_max: self.time_max,
        }
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
            systemd: scenarios
                .first()
                .is_some_and(|scenario| scenario.systemd)
                .then(|| dir.join("files.img")),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A file that is left here is only a waste of a few megabytes.
        let _ = fs::remove_file(&self.initramfs);
    }
}
