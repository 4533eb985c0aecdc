//! The demo's little installation on this machine: daemons, their files, and what has to be undone.

use std::cell::RefCell;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use super::account::Account;
use super::child::{Daemon, Finished, Runner};
use super::interrupt::Interrupt;
use crate::{setup, util};

/// Appliances of the demo.
pub(super) const APPLIANCES: u16 = 3;
/// The allocation's name.
pub(super) const NAME: &str = "demo";
/// Longest run of an ordinary command.
const LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for something to become so; long, for the sake of emulated and busy machines.
const READY_LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// Something that was done to this machine. It is undone in the reverse order, whatever happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Undo {
    SwapOff(String),
    Unmount(PathBuf),
    Detach,
    Cgroup(PathBuf),
}

/// The installation. Dropping it undoes everything: swap, mounts, the device, the daemons, the
/// files.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) account: Account,
    pub(super) runner: Runner,
    pub(super) size: u64,
    undo: RefCell<Vec<Undo>>,
    daemons: RefCell<Vec<Daemon>>,
    programs: PathBuf,
    allocator: String,
    dir: TempDir,
}

impl Site {
    /// An installation whose allocation has `size` bytes, of the programs in that directory or those
    /// that [`Site::build`] builds. Nothing runs yet.
    pub(super) fn new(interrupt: Interrupt, size: u64, programs: Option<PathBuf>) -> Result<Site> {
        let programs = match programs {
            Some(directory) => std::path::absolute(directory)?,
            None => util::target_dir()?.join("release"),
        };
        let dir =
            tempfile::Builder::new().prefix("xpm-demo-").tempdir().context("cannot make a directory")?;
        Ok(Site {
            account: Account::new(),
            runner: Runner::new(interrupt, dir.path()),
            size,
            undo: RefCell::default(),
            daemons: RefCell::default(),
            programs,
            allocator: format!("127.0.0.1:{}", free_port()?),
            dir,
        })
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Builds the release programs.
    pub(super) fn build(&self) -> Result<()> {
        self.account.step("Build the programs", "");
        setup::run(&[])?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.current_dir(util::repository()).args(["build", "--release", "--quiet"]);
        build.args([
            "-p",
            "xpm-allocator",
            "-p",
            "xpm-appliance",
            "-p",
            "xpm-blk",
            "-p",
            "xpm-fs",
            "-p",
            "xpm",
            "-p",
            "xpm-tests",
            "--bins",
        ]);
        self.account.command(&build);
        self.runner.output(&mut build, Duration::from_secs(1800)).map(|_| ())
    }

    /// Starts the allocator, the appliances and xpm-blk, and waits until all know each other.
    pub(super) fn start(&self, kernel_device: bool) -> Result<()> {
        let dir = self.dir().display().to_string();
        self.account.typed(&format!("export DEMO={dir} XPM_ALLOCATOR=http://{}", self.allocator));
        self.account.name(&dir, "$DEMO");
        self.account.typed(&format!("export XPM_BLK={}", self.blk_socket().display()));
        self.start_allocator()?;
        for number in 1..=APPLIANCES {
            let name = format!("appliance-{number}");
            self.start_daemon(&name, &mut self.appliance_command(&name)?)?;
        }
        self.start_blk(kernel_device)?;
        self.wait_until("the appliances did not register", || {
            let up = |list: &Value| {
                list.as_array().into_iter().flatten().filter(|one| one["state"] == "up").count()
            };
            Ok(self.ask(&["appliance", "list"]).is_ok_and(|list| up(&list) == usize::from(APPLIANCES)))
        })?;
        self.wait_until("the appliances did not clear memory for the allocation", || {
            Ok(self.sum("ready").is_ok_and(|ready| ready >= self.size))
        })?;
        self.wait_until("xpm-blk did not answer", || Ok(self.ask(&["blk", "list"]).is_ok()))
    }

    /// Starts the allocator, for the first time or again.
    pub(super) fn start_allocator(&self) -> Result<()> {
        let mut allocator = self.program("xpm-allocator");
        // Appliances report often here, so that nobody has to wait for what they say.
        allocator.args(["--listen", &self.allocator, "--heartbeat", "250ms"]);
        allocator.arg("--data").arg(self.dir().join("allocator"));
        self.start_daemon("allocator", &mut allocator)?;
        self.wait_until("the allocator did not answer", || Ok(self.ask(&["alloc", "list"]).is_ok()))
    }

    /// Kills the allocator as a crash would.
    pub(super) fn kill_allocator(&self) -> Result<()> {
        let mut daemons = self.daemons.borrow_mut();
        let index =
            daemons.iter().position(|daemon| daemon.name() == "allocator").context("no allocator runs")?;
        let mut allocator = daemons.remove(index);
        self.account.typed(&format!("kill -9 {}", allocator.pid()));
        allocator.kill()
    }

    fn appliance_command(&self, name: &str) -> Result<Command> {
        let mut appliance = self.program("xpm-appliance");
        appliance.args(["--name", name, "--memory", &format!("{}MiB", lent(self.size) / MIB), "--no-lock"]);
        appliance.args(["--listen", &format!("127.0.0.1:{}", free_port()?)]);
        appliance.args(["--nbd", &format!("127.0.0.1:{}", free_port()?)]);
        let own = self.dir().join(name);
        appliance.arg("--run-dir").arg(&own).arg("--state").arg(&own);
        appliance.args(["--allocator", &format!("http://{}", self.allocator)]);
        Ok(appliance)
    }

    fn start_blk(&self, kernel_device: bool) -> Result<()> {
        let mut blk = self.program("xpm-blk");
        blk.arg("--control").arg(self.blk_socket()).arg("--state").arg(self.dir().join("blk"));
        blk.args(["--allocator", &format!("http://{}", self.allocator)]);
        if kernel_device {
            // In containers not every safety item can hold. The demo's swap serves one program in a
            // cgroup of its own, so that the machine is never short of memory itself.
            blk.arg("--allow-unsafe-swap");
        }
        self.start_daemon("xpm-blk", &mut blk)
    }

    fn start_daemon(&self, name: &str, command: &mut Command) -> Result<()> {
        self.account.command(command);
        let daemon = Daemon::start(name, command, self.dir())?;
        self.daemons.borrow_mut().push(daemon);
        Ok(())
    }

    /// A program of this project.
    pub(super) fn program(&self, name: &str) -> Command {
        Command::new(self.programs.join(name))
    }

    fn blk_socket(&self) -> PathBuf {
        self.dir().join("blk.sock")
    }

    /// Starts the xpm-fs of a "host", which reaches appliances over TCP alone.
    pub(super) fn start_files(&self, host: &str) -> Result<()> {
        let config = self.dir().join(format!("{host}.toml"));
        let text = format!(
            "allocator = \"http://{}\"\ncontrol = {:?}\nstate = {:?}\nstandby = false\nallow-unsafe-swap = true\n\
             forbid-transports = [\"shm\", \"nbd-unix\"]\n",
            self.allocator,
            self.files_socket(host).display().to_string(),
            self.dir().join(host).display().to_string(),
        );
        fs::write(&config, text)?;
        self.start_daemon(host, self.program("xpm-fs").arg("--config").arg(config))?;
        self.wait_until("xpm-fs did not answer", || {
            Ok(self
                .runner
                .output(
                    self.program("xpm").env("XPM_FS", self.files_socket(host)).args(["fs", "list"]),
                    LIMIT,
                )
                .is_ok())
        })
    }

    fn files_socket(&self, host: &str) -> PathBuf {
        self.dir().join(format!("{host}.sock"))
    }

    /// `xpm vm` at a "host".
    pub(super) fn vm_command(&self, host: &str, words: &[&str]) -> Command {
        let mut xpm = self.program("xpm");
        xpm.env("XPM_ALLOCATOR", format!("http://{}", self.allocator)).env("XPM_FS", self.files_socket(host));
        xpm.args(["vm", "--dir"]).arg(self.dir().join(format!("{host}-vm"))).args(words);
        xpm
    }

    /// Runs it for all to see; what it printed.
    pub(super) fn vm(&self, host: &str, words: &[&str]) -> Result<String> {
        self.run(&mut self.vm_command(host, words))
    }

    /// The machines of a "host".
    pub(super) fn vm_list(&self, host: &str) -> Result<Value> {
        let output = self.runner.output(&mut self.vm_command(host, &["-o", "json", "list"]), LIMIT)?;
        serde_json::from_str(&output).context("xpm printed no JSON")
    }

    /// Runs the operator's command, without showing it.
    pub(super) fn xpm_quietly(&self, words: &[&str]) -> Result<String> {
        self.runner.output(&mut self.xpm_command(words), LIMIT)
    }

    fn xpm_command(&self, words: &[&str]) -> Command {
        let mut xpm = self.program("xpm");
        xpm.env("XPM_ALLOCATOR", format!("http://{}", self.allocator)).env("XPM_BLK", self.blk_socket());
        xpm.args(words);
        xpm
    }

    /// Runs the operator's command for all to see; what it printed.
    pub(super) fn xpm(&self, words: &[&str]) -> Result<String> {
        self.run(&mut self.xpm_command(words))
    }

    /// Runs the operator's command for all to see, whatever its end.
    pub(super) fn xpm_finish(&self, words: &[&str]) -> Result<Finished> {
        let mut command = self.xpm_command(words);
        self.account.command(&command);
        self.runner.finish(&mut command, LIMIT)
    }

    /// The JSON answer of the operator's command, without showing it.
    pub(super) fn ask(&self, words: &[&str]) -> Result<Value> {
        let output = self.runner.output(self.xpm_command(words).arg("--json"), LIMIT)?;
        serde_json::from_str(&output).context("xpm printed no JSON")
    }

    /// Runs a command for all to see; what it printed.
    pub(super) fn run(&self, command: &mut Command) -> Result<String> {
        self.account.command(command);
        self.runner.output(command, LIMIT)
    }

    /// Runs a command that compares, for all to see: whether it found no difference. An error when
    /// it could not compare.
    pub(super) fn same(&self, command: &mut Command) -> Result<bool> {
        self.account.command(command);
        let finished = self.runner.finish(command, LIMIT)?;
        match finished.status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => bail!("the comparison failed ({}): {}", finished.status, finished.err.trim()),
        }
    }

    /// Memory that belongs to allocations, in bytes, as the appliances last said.
    pub(super) fn granted(&self) -> Result<u64> {
        self.sum("granted")
    }

    /// Memory that the appliances really hold for allocations, in bytes, as they last said.
    pub(super) fn resident(&self) -> Result<u64> {
        self.sum("resident")
    }

    /// Whether everything may be lent again.
    pub(super) fn all_free(&self) -> Result<bool> {
        Ok(self.sum("free")? == self.sum("capacity")?)
    }

    fn sum(&self, field: &str) -> Result<u64> {
        let list = self.ask(&["appliance", "list"])?;
        let each = list.as_array().into_iter().flatten();
        Ok(each.filter_map(|appliance| appliance["status"][field].as_u64()).sum())
    }

    /// Waits until it is so; an error when it is not in time, or a daemon ended.
    pub(super) fn wait_until(&self, otherwise: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            self.daemons.borrow_mut().iter_mut().try_for_each(Daemon::check_alive)?;
            if so()? {
                return Ok(());
            }
            if start.elapsed() > READY_LIMIT {
                bail!("{otherwise} within {} s", READY_LIMIT.as_secs());
            }
            self.runner.pause(Duration::from_millis(50))?;
        }
    }

    /// Remembers what has to be undone.
    pub(super) fn done(&self, undo: Undo) {
        self.undo.borrow_mut().push(undo);
    }

    /// Forgets what has been undone.
    pub(super) fn undone(&self, undo: &Undo) {
        self.undo.borrow_mut().retain(|one| one != undo);
    }

    /// Keeps the daemons' logs for whoever looks for the cause, and shows where.
    pub(super) fn keep_logs(&self) {
        if self.daemons.borrow().is_empty() {
            return;
        }
        let kept = std::env::temp_dir().join(format!("xpm-demo-logs-{}", std::process::id()));
        let copied = fs::create_dir_all(&kept).and_then(|()| copy_logs(self.dir(), &kept));
        match copied {
            Ok(()) => eprintln!("demo: the daemons' logs are in {}", kept.display()),
            Err(error) => eprintln!("demo: the daemons' logs could not be kept: {error}"),
        }
    }

    fn undo_all(&self) {
        while let Some(undo) = self.undo.borrow_mut().pop() {
            if let Err(error) = self.undo_one(&undo) {
                eprintln!("demo: cleaning up: {error:#}");
            }
        }
    }

    /// Undoes one thing, if it was done: an interruption may have come before.
    fn undo_one(&self, undo: &Undo) -> Result<()> {
        match undo {
            Undo::SwapOff(device) if is_listed("/proc/swaps", 0, device) => {
                self.runner.clean_up(util::command("swapoff").arg(device))
            }
            Undo::Unmount(directory) if is_listed("/proc/self/mounts", 1, &directory.to_string_lossy()) => {
                self.runner.clean_up(util::command("umount").arg(directory))
            }
            Undo::Detach if self.runner.clean_up(&mut self.xpm_command(&["blk", "show", NAME])).is_ok() => {
                self.runner.clean_up(&mut self.xpm_command(&["blk", "detach", NAME, "--force"]))
            }
            Undo::Cgroup(directory) if directory.exists() => Ok(fs::remove_dir(directory)?),
            Undo::SwapOff(_) | Undo::Unmount(_) | Undo::Detach | Undo::Cgroup(_) => Ok(()),
        }
    }
}

/// Whether a line of that file has the word in this column.
fn is_listed(file: &str, column: usize, word: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().any(|line| line.split_whitespace().nth(column) == Some(word))
}

impl Drop for Site {
    fn drop(&mut self) {
        self.undo_all();
        // The last one started ends first; the allocator, which all others speak to, at the end.
        while let Some(daemon) = self.daemons.borrow_mut().pop() {
            drop(daemon);
        }
    }
}

/// What each appliance lends: together half as much again as the allocation takes, so that its last
/// row of regions has room.
fn lent(size: u64) -> u64 {
    (size * 3 / 2).div_ceil(u64::from(APPLIANCES)).next_multiple_of(64 * MIB)
}

/// A port that nobody listened on a moment ago.
pub(super) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").context("cannot find a free port")?.local_addr()?.port())
}

fn copy_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if let (Some("log"), Some(name)) = (path.extension().and_then(|e| e.to_str()), path.file_name()) {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_appliances_have_room() {
        for size in [64 * MIB, 100 * MIB, 1 << 30, 1 << 40] {
            assert!(lent(size) * u64::from(APPLIANCES) >= size * 3 / 2, "{size}");
        }
        assert_eq!(lent(1 << 30), 512 * MIB);
    }
}
