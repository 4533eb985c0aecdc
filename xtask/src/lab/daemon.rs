//! One daemon on the host. Daemons of which scenarios see several lives have a small service manager each
//! (`supervise` of the tests), which keeps for the next life what the daemon hands over.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::qemu;

/// How long a daemon may take from one life to the next; its service manager gives up earlier.
const LIFE_TIME_MAX: Duration = Duration::from_secs(150);
/// How long a daemon may take to stop when it is asked to.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// A running daemon.
pub(super) struct Daemon {
    pub(super) name: String,
    /// The daemon, or its service manager.
    child: Child,
    log: PathBuf,
    service: Option<Service>,
}

/// The two ends of a service manager.
struct Service {
    wishes: ChildStdin,
    answers: Receiver<String>,
    /// The daemon's process.
    pid: Option<Pid>,
    lives: u32,
    /// Says how many lives there were.
    account: PathBuf,
}

impl Daemon {
    /// Starts a daemon that has one life. Its log goes to `dir`.
    pub(super) fn start(dir: &Path, name: &str, mut command: Command) -> Result<Daemon> {
        let log = dir.join(format!("{name}.log"));
        let file = create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Daemon { name: name.to_owned(), child, log, service: None })
    }

    /// Starts a daemon by its service manager, `command`, and waits until it is ready. The number of its lives is
    /// always in `lives`, in a file that has its name.
    pub(super) fn start_service(
        dir: &Path,
        lives: &Path,
        name: &str,
        mut command: Command,
    ) -> Result<Daemon> {
        let log = dir.join(format!("{name}.log"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(create(&log)?);
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let wishes = child.stdin.take().context("a service manager has no input")?;
        let answers = qemu::read_lines(child.stdout.take().context("a service manager has no output")?);
        let service = Service { wishes, answers, pid: None, lives: 0, account: lives.join(name) };
        let mut daemon = Daemon { name: name.to_owned(), child, log, service: Some(service) };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Has the daemon end and start again: `wish` is `kill` or `restart`, with how many seconds are between.
    pub(super) fn replace(&mut self, wish: &str) -> Result<()> {
        let service =
            self.service.as_mut().with_context(|| format!("{} has no service manager", self.name))?;
        writeln!(service.wishes, "{wish}").with_context(|| format!("cannot {wish} {}", self.name))?;
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let Some(service) = &mut self.service else { return Ok(()) };
        let answer = service.answers.recv_timeout(LIFE_TIME_MAX).unwrap_or_default();
        let pid = answer.strip_prefix("ready ").and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        if pid.is_none() {
            bail!("{} does not get ready; its log ends with:\n{}", self.name, tail(&self.log, 20));
        }
        service.pid = pid;
        service.lives += 1;
        // The guest never sees half of it.
        let new = service.account.with_extension("new");
        fs::write(&new, format!("{}\n", service.lives)).context("cannot write the number of lives")?;
        fs::rename(&new, &service.account).context("cannot write the number of lives")
    }

    /// How often it was started.
    pub(super) fn lives(&self) -> u32 {
        self.service.as_ref().map_or(1, |service| service.lives)
    }

    /// Signals the daemon. One that has ended is found by [`Daemon::check_alive`].
    pub(super) fn signal(&self, signal: Signal) {
        let pid = match &self.service {
            Some(service) => service.pid,
            None => Some(Pid::from_child(&self.child)),
        };
        let _ = pid.map(|pid| kill_process(pid, signal));
    }

    /// An error when it has ended.
    pub(super) fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => {
                bail!("{} ended ({status}); its log ends with:\n{}", self.name, tail(&self.log, 20))
            }
            None => Ok(()),
        }
    }

    /// Kills it as `kill -9` does.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).map_err(Into::into)
    }

    /// Asks the daemon to stop, and kills it when it does not. Failures mean that it is gone.
    pub(super) fn stop(&mut self) {
        match self.service.take() {
            // The end of its input is what the service manager stops at.
            Some(service) => drop(service.wishes),
            None => self.signal(Signal::TERM),
        }
        let deadline = Instant::now() + STOP_TIME_MAX;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("lab: {} did not stop within {STOP_TIME_MAX:?} and is killed", self.name);
                let _ = self.kill();
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn create(log: &Path) -> Result<File> {
    File::create(log).with_context(|| format!("cannot write {}", log.display()))
}

/// The last lines of a text file; empty when it cannot be read.
pub(super) fn tail(file: &Path, lines: usize) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
