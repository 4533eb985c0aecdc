//! Child processes: commands that end by themselves, and daemons.
//!
//! Every child has a process group of its own, so that a Ctrl-C reaches the demo alone, which then
//! undoes things in their order: swap off before the daemon behind it ends.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::interrupt::Interrupt;

/// How often a child is asked whether it has ended.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a child may take to end when it is asked to.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// Runs commands to their end, unless somebody interrupts the demo.
#[derive(Debug)]
pub(super) struct Runner {
    interrupt: Interrupt,
    /// Where the output of commands is kept until it is read.
    dir: PathBuf,
}

/// The output of a command, and its exit status.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) out: String,
    pub(super) err: String,
}

impl Runner {
    pub(super) fn new(interrupt: Interrupt, dir: &Path) -> Runner {
        Runner { interrupt, dir: dir.to_owned() }
    }

    /// An error when somebody asked the demo to end.
    pub(super) fn go_on(&self) -> Result<()> {
        match self.interrupt.is_set() {
            true => bail!("interrupted"),
            false => Ok(()),
        }
    }

    /// Waits a moment.
    pub(super) fn pause(&self, time: Duration) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            self.go_on()?;
            thread::sleep(PAUSE.min(time));
        }
        Ok(())
    }

    /// Runs the command; its standard output. An error when it fails or takes longer than
    /// `limit`.
    pub(super) fn output(&self, command: &mut Command, limit: Duration) -> Result<String> {
        let finished = self.finish(command, limit)?;
        if !finished.status.success() {
            bail!("{} failed ({}): {}", program(command), finished.status, finished.err.trim());
        }
        Ok(finished.out)
    }

    /// Runs the command, whatever its end.
    pub(super) fn finish(&self, command: &mut Command, limit: Duration) -> Result<Finished> {
        self.go_on()?;
        self.wait(command, limit, || self.interrupt.is_set())
    }

    /// Runs a command of the clean-up, which an interruption does not stop.
    pub(super) fn clean_up(&self, command: &mut Command) -> Result<()> {
        let finished = self.wait(command, Duration::from_secs(60), || false)?;
        match finished.status.success() {
            true => Ok(()),
            false => bail!("{} failed ({}): {}", program(command), finished.status, finished.err.trim()),
        }
    }

    fn wait(&self, command: &mut Command, limit: Duration, stop: impl Fn() -> bool) -> Result<Finished> {
        // Files rather than pipes: nobody has to read while the command runs.
        let (out, err) = (tempfile::tempfile_in(&self.dir)?, tempfile::tempfile_in(&self.dir)?);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", program(command)))?;
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Finished { status, out: content(out)?, err: content(err)? });
            }
            if stop() || start.elapsed() > limit {
                end(&mut child, Signal::TERM);
                match stop() {
                    true => bail!("interrupted"),
                    false => bail!("{} did not end within {} s", program(command), limit.as_secs()),
                }
            }
            thread::sleep(PAUSE);
        }
    }
}

fn content(mut file: File) -> Result<String> {
    use std::io::{Read as _, Seek as _};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn program(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}

/// Asks the child and what it started to end; kills it when it does not.
fn end(child: &mut Child, signal: Signal) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    // A failure of either call means that it is gone, which is what is wanted.
    let _ = kill_process_group(pid, signal);
    let start = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if start.elapsed() > STOP_TIME_MAX {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = child.wait();
            return;
        }
        thread::sleep(PAUSE);
    }
}

/// A running daemon; stopped when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the command with its output in a log file of that directory.
    pub(super) fn start(name: &str, command: &mut Command, dir: &Path) -> Result<Daemon> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Daemon { name: name.to_owned(), child, log })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// An error, with the end of its log, when it is no longer there.
    pub(super) fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}): {}", self.name, self.log_tail(5)),
        }
    }

    /// The last lines that it logged.
    pub(super) fn log_tail(&self, lines: usize) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a crash would, at once and without a word to it.
    pub(super) fn kill(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(pid, Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child, Signal::TERM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runner() -> (tempfile::TempDir, Runner) {
        let dir = tempfile::tempdir().unwrap();
        let runner = Runner::new(Interrupt::default(), dir.path());
        (dir, runner)
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_failure_of_a_command() {
        let (_dir, runner) = runner();
        let limit = Duration::from_secs(20);
        assert_eq!(runner.output(&mut shell("echo hello"), limit).unwrap(), "hello\n");
        let error = runner.output(&mut shell("echo no such thing >&2; exit 3"), limit).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended() {
        let (_dir, runner) = runner();
        let error = runner.finish(&mut shell("sleep 600"), Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }

    #[test]
    fn a_daemon_that_ended_is_noticed_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start("d", &mut shell("echo port in use; exit 1"), dir.path()).unwrap();
        daemon.child.wait().unwrap();
        assert!(daemon.check_alive().unwrap_err().to_string().contains("port in use"));
        let mut daemon = Daemon::start("e", &mut shell("sleep 600"), dir.path()).unwrap();
        daemon.check_alive().unwrap();
    }
}
