//! One boot of a guest, and the scenarios that run in it.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cluster::{self, Cluster};
use super::netns::{HOST, Netns};
use super::qemu::{self, Guest};
use super::scenario::Scenario;
use super::{daemon, disk};
use crate::util;

/// How long a guest may take to begin its first scenario: emulated, on a machine that has much else to do, minutes.
const BOOT_TIME_MAX: Duration = Duration::from_secs(300);
/// How long a guest may take from the end of a scenario to the next one, or to be off.
const PAUSE_TIME_MAX: Duration = Duration::from_secs(30);
/// Last lines of a failed scenario that the summary repeats: the output of two guests is mixed, and a summary is read
/// alone.
const LAST_LINES: usize = 20;
/// Lines of the kernel's console that a failure shows.
const CONSOLE_LINES: usize = 25;

/// How one scenario went.
#[derive(Debug)]
pub(crate) struct Report {
    /// The scenario.
    pub(crate) name: &'static str,
    /// Release of the guest's kernel.
    pub(crate) kernel: String,
    /// How long it took, without the boot.
    pub(crate) time: Duration,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
    /// The text after `BENCH ` in lines that it printed.
    pub(crate) tagged: Vec<String>,
    /// The last lines that it printed, at most [`LAST_LINES`].
    pub(crate) last: VecDeque<String>,
}

impl Report {
    /// Whether the scenario passed.
    pub(crate) fn passed(&self) -> bool {
        self.failure.is_none()
    }
}

/// The surroundings of a boot besides the guest.
pub(crate) struct Place<'a> {
    /// The network.
    pub(crate) netns: &'a Netns,
    /// Directory for logs, and in `share` for files that guest and host exchange.
    pub(crate) dir: &'a Path,
    /// Directory of the programs under test.
    pub(crate) programs: &'a Path,
    /// Directory of the programs of an earlier commit, where the boot's scenarios upgrade them.
    pub(crate) earlier: Option<&'a Path>,
    /// Release of the guest's kernel.
    pub(crate) kernel: &'a str,
    /// Replaces each scenario's own limit.
    pub(crate) time_max: Option<Duration>,
}

/// Boots a guest and runs scenarios in it, one after the other, until one fails. Gives a report
/// for each that was begun, and at least one.
pub(crate) fn boot(
    place: &Place<'_>,
    guest: &Guest<'_>,
    scenarios: &[&'static Scenario],
) -> Result<Vec<Report>> {
    let mut cluster = start_cluster(place, scenarios.first())?;
    let mut command = prepare(place, guest, scenarios, false)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut qemu = command.spawn().context("cannot start QEMU")?;
    let lines = qemu::read_lines(qemu.stdout.take().context("QEMU has no output")?);
    let complaints = qemu::read_lines(qemu.stderr.take().context("QEMU has no error output")?);
    let mut watch = Watch::new(place, scenarios);
    let ending = watch.follow(&lines, &mut cluster);
    stop(&mut qemu, guest, &ending)?;
    let mut reports = watch.finish(&ending, &guest.console, &complaints);
    for report in reports.iter_mut().filter(|report| report.passed()) {
        let scenario = scenarios.iter().find(|scenario| scenario.name == report.name);
        let checked = scenario.map_or(Ok(()), |scenario| (scenario.check)(&mut cluster));
        report.failure = checked.err().map(|error| format!("{error:#}"));
    }
    Ok(reports)
}

/// Boots a guest on the terminal, which has a shell there when the scenarios are done.
pub(crate) fn shell(place: &Place<'_>, guest: &Guest<'_>, scenarios: &[&'static Scenario]) -> Result<()> {
    let _cluster = start_cluster(place, scenarios.first())?;
    util::run(&mut prepare(place, guest, scenarios, true)?)
}

/// The daemons on the host that a scenario, and its group, want.
fn start_cluster<'a>(place: &Place<'a>, scenario: Option<&&'static Scenario>) -> Result<Cluster<'a>> {
    let appliances = scenario.map_or(&[][..], |scenario| scenario.appliances);
    let mut cluster = Cluster::start(place.netns, place.programs, place.earlier, place.dir, appliances)?;
    if let Some(size) = scenario.and_then(|scenario| scenario.vhost) {
        cluster.serve_disk(size)?;
    }
    cluster.serve_disks(scenario.map_or(&[][..], |scenario| scenario.disks))?;
    Ok(cluster)
}

/// Writes what the guest's runner reads, and makes QEMU's command line.
fn prepare(
    place: &Place<'_>,
    guest: &Guest<'_>,
    scenarios: &[&'static Scenario],
    with_shell: bool,
) -> Result<std::process::Command> {
    let share = place.dir.join("share");
    fs::create_dir_all(&share)?;
    let scripts = util::repository().join("tests/lab");
    let mut list = String::new();
    for scenario in scenarios {
        writeln!(list, "{} {} {}", scenario.name, scenario.script, scenario.args.join(" "))?;
    }
    fs::write(share.join("scenarios"), list)?;
    let shell = if with_shell { "1" } else { "" };
    let env = format!(
        "LAB_BIN='{}'\nLAB_SCRIPTS='{}'\nLAB_HOST={HOST}\nLAB_ECHO_PORT={}\nXPM_ALLOCATOR={}\nLAB_SHELL={shell}\n\
         LAB_DISKS='{}'\nLAB_EARLIER_BIN='{}'\n",
        place.programs.display(),
        scripts.display(),
        cluster::ECHO_PORT,
        Cluster::allocator_url(),
        disk::list(scenarios.first().map_or(&[][..], |scenario| scenario.disks)),
        place.earlier.unwrap_or(Path::new("")).display(),
    );
    fs::write(share.join("env"), env)?;
    guest.on_host_root(place.netns, &scripts.join("run"), &share)
}

/// Why the guest is no longer followed.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// It is off.
    Off,
    /// Its time was up.
    TimeUp,
}

/// Waits for QEMU to end; ends it when it is not known to be ending.
fn stop(qemu: &mut Child, guest: &Guest<'_>, ending: &Ending) -> Result<()> {
    if *ending == Ending::TimeUp {
        guest.show_tasks()?;
        qemu.kill()?;
    }
    qemu.wait()?;
    Ok(())
}

/// Follows what the guest prints.
struct Watch<'a> {
    waiting: VecDeque<&'static Scenario>,
    running: Option<Running>,
    reports: Vec<Report>,
    deadline: Instant,
    booted: Instant,
    place: &'a Place<'a>,
}

struct Running {
    scenario: &'static Scenario,
    since: Instant,
    tagged: Vec<String>,
    /// The last message of its script when it failed (`fail` in `lib.sh`).
    complaint: Option<String>,
    last: VecDeque<String>,
}

impl<'a> Watch<'a> {
    fn new(place: &'a Place<'a>, scenarios: &[&'static Scenario]) -> Watch<'a> {
        let now = Instant::now();
        Watch {
            waiting: scenarios.iter().copied().collect(),
            running: None,
            reports: Vec::new(),
            deadline: now + BOOT_TIME_MAX,
            booted: now,
            place,
        }
    }

    /// Takes lines until the guest is off or its time is up.
    fn follow(&mut self, lines: &Receiver<String>, cluster: &mut Cluster<'_>) -> Ending {
        loop {
            match lines.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.take(&line, cluster),
                Err(RecvTimeoutError::Disconnected) => return Ending::Off,
                Err(RecvTimeoutError::Timeout) => return Ending::TimeUp,
            }
        }
    }

    /// Takes one line: a marker of the runner (`@lab begin NAME`, `@lab end NAME STATUS`), a wish of the scenario, or
    /// output of it. Wishes are `@lab kill-blk` for the host's xpm-blk, and `@lab kill|restart|upgrade NAME SECONDS`
    /// for `allocator` and `appliance-N`: so long they are away. A script has `on_host` for these, in `lib.sh`. After
    /// `@lab freeze NAME` one stands still, and looks dead to all others, until `@lab thaw NAME`.
    fn take(&mut self, line: &str, cluster: &mut Cluster<'_>) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [] => {}
            ["@lab", "begin", name] => self.begin(name),
            ["@lab", "end", _, status] => self.end(status),
            ["@lab", "kill-blk"] => match cluster.kill_blk() {
                Ok(()) => self.show("the host's xpm-blk was killed, and started again"),
                Err(error) => self.report(Some(format!("the host's xpm-blk cannot be replaced: {error:#}"))),
            },
            ["@lab", how @ ("freeze" | "thaw"), name] => match cluster.freeze(name, how == "freeze") {
                Ok(()) => self.show(&format!("{how} {name}: done")),
                Err(error) => self.report(Some(format!("{how} {name}: {error:#}"))),
            },
            ["@lab", how @ ("kill" | "restart" | "upgrade"), name, seconds] => {
                match cluster.replace(how, name, seconds) {
                    Ok(()) => self.show(&format!("{how} {name}: life {} has begun", cluster.lives(name))),
                    Err(error) => self.report(Some(format!("{how} {name}: {error:#}"))),
                }
            }
            _ => self.show(line),
        }
    }

    fn begin(&mut self, name: &str) {
        let Some(scenario) = self.waiting.front().copied().filter(|next| next.name == name) else { return };
        self.waiting.pop_front();
        let now = Instant::now();
        if self.reports.is_empty() {
            println!("lab: booted in {}", util::human_time(now - self.booted));
        }
        println!("[{name}] begins: {}", scenario.about);
        self.deadline = now + self.place.time_max.unwrap_or(Duration::from_secs(scenario.seconds_max));
        self.running = Some(Running {
            scenario,
            since: now,
            tagged: Vec::new(),
            complaint: None,
            last: VecDeque::new(),
        });
    }

    fn end(&mut self, status: &str) {
        let complaint = self.running.as_mut().and_then(|running| running.complaint.take());
        let failure = (status != "0").then(|| match complaint {
            Some(text) => format!("ended with status {status}: {text}"),
            None => format!("ended with status {status}"),
        });
        self.report(failure);
        self.deadline = Instant::now() + PAUSE_TIME_MAX;
    }

    fn show(&mut self, line: &str) {
        let name = self.running.as_ref().map_or("guest", |running| running.scenario.name);
        if let (Some(running), Some(complaint)) = (&mut self.running, line.strip_prefix("FAIL: ")) {
            running.complaint = Some(complaint.to_owned());
        }
        match (&mut self.running, line.strip_prefix("BENCH ")) {
            (Some(running), Some(tagged)) => running.tagged.push(tagged.to_owned()),
            (running, _) => {
                println!("[{name}] {line}");
                let Some(running) = running else { return };
                if running.last.len() == LAST_LINES {
                    running.last.pop_front();
                }
                running.last.push_back(line.to_owned());
            }
        }
    }

    /// Closes the running scenario, or, when none is, the next one that should have begun.
    fn report(&mut self, failure: Option<String>) {
        let (name, time, tagged, last) = match self.running.take() {
            Some(running) => (running.scenario.name, running.since.elapsed(), running.tagged, running.last),
            None => match self.waiting.pop_front() {
                Some(next) => (next.name, self.booted.elapsed(), Vec::new(), VecDeque::new()),
                None => return,
            },
        };
        let kernel = self.place.kernel.to_owned();
        self.reports.push(Report { name, kernel, time, failure, tagged, last });
    }

    /// The reports, with one for what the guest's end interrupted.
    fn finish(mut self, ending: &Ending, console: &Path, complaints: &Receiver<String>) -> Vec<Report> {
        let nothing_failed = self.reports.iter().all(Report::passed);
        let interrupted = self.running.is_some() || (nothing_failed && !self.waiting.is_empty());
        if interrupted {
            let what = match (ending, &self.running) {
                (Ending::TimeUp, Some(_)) => "took too long",
                (Ending::Off, Some(_)) => "the guest went off in it",
                (_, None) => "the guest did not get to it",
            };
            let complaints: Vec<String> = complaints.try_iter().collect();
            let text = daemon::tail(console, CONSOLE_LINES);
            self.report(Some(format!(
                "{what}; the guest's console ends with:\n{text}\n{}",
                complaints.join("\n")
            )));
        }
        self.reports
    }
}
