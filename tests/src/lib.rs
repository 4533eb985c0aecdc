//! Real daemons for end-to-end tests: started on free ports in a directory of their own, ended with
//! the value that holds them.

pub mod cgroup;
pub mod clock;
pub mod etcd;
pub mod files;
pub mod fsx;
pub mod hang;
mod http;
pub mod impostor;
pub mod machine;
pub mod manager;
pub mod mapped;
pub mod mapping;
pub mod netns;
pub mod several;
pub mod tools;
pub mod verified;
pub mod vhost;
pub mod vm;

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub use self::http::{http, status_at, unix_get};
use self::http::{http_answer, http_get};
use crate::clock::Sees;
use crate::manager::ServiceManager;
pub use crate::tools::{have, have_by_chance, skip_without};

/// Longest wait for anything that has to happen.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How often a test repeats its step: `short` times, or `long` times under `cargo xtask test --all`, which sets
/// `XPM_TESTS=all`.
pub fn rounds<T>(short: T, long: T) -> T {
    if std::env::var_os("XPM_TESTS").is_some_and(|tests| tests == "all") { long } else { short }
}

/// Directory of the programs: that of the tests' own build.
///
/// # Panics
/// When the test program does not lie in a target directory.
pub fn programs() -> PathBuf {
    let me = std::env::current_exe().expect("a process knows its program");
    me.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned()
}

/// A port that nobody listened on a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    // Below those that the kernel gives to connections, which may take one before it is listened at, and from a place of this
    // process's own (ip(7), ip_local_port_range).
    const FIRST: u32 = 10_240;
    const COUNT: u32 = 22_000;
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(97);
    loop {
        let tried = TRIED.fetch_add(1, Ordering::Relaxed);
        assert!(tried < COUNT, "no port is free");
        let port = (FIRST + start.wrapping_add(tried) % COUNT) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits until something holds.
///
/// # Panics
/// When it does not within [`LIMIT`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}: not after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A daemon; killed when dropped.
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program of this project with its output in `NAME.log` of the directory.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(dir: &Path, name: &str, program: &str, arguments: &[String]) -> Daemon {
        Daemon::start_with(dir, name, program, arguments, &[])
    }

    /// The same with more in its environment.
    fn start_with(
        dir: &Path,
        name: &str,
        program: &str,
        arguments: &[String],
        environment: &[(String, String)],
    ) -> Daemon {
        let (log, file) = open_log(dir, name);
        let child = Command::new(programs().join(program))
            .envs(environment.iter().cloned())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
        Daemon { name: name.to_owned(), child, log }
    }

    /// The same as a service manager starts it.
    fn start_managed(
        dir: &Path,
        name: &str,
        program: &str,
        arguments: &[String],
        manager: &ServiceManager,
    ) -> Daemon {
        let (log, file) = open_log(dir, name);
        let child = manager.spawn(&programs().join(program), arguments, |command| {
            let second = file.try_clone().expect("a second descriptor");
            command.stdin(Stdio::null()).stdout(second).stderr(file);
        });
        Daemon { name: name.to_owned(), child, log }
    }

    /// What it printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Stops it as SIGSTOP does, and waits until none of its threads runs any more.
    ///
    /// # Panics
    /// When they go on.
    pub fn freeze(&self) {
        self.signal(rustix::process::Signal::STOP);
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // The state follows the name, which is in brackets and may have any character.
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
        };
        let tasks = format!("/proc/{}/task", self.child.id());
        wait_until("it stands still", || {
            std::fs::read_dir(&tasks).is_ok_and(|tasks| tasks.flatten().all(stopped))
        });
    }

    /// Kills it as `kill -9` does, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Tells it to end as a service manager does, and waits until it is gone.
    ///
    /// # Panics
    /// When it does not end in time, or not well.
    pub fn stop(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        wait_until("the daemon ends when it is told to", || !self.is_alive());
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "{} ended with {status}\n{}", self.name, self.log());
    }

    fn wait_ready(&mut self, mut ready: impl FnMut() -> bool) {
        let start = Instant::now();
        while !ready() {
            let ended = self.child.try_wait().ok().flatten();
            assert!(ended.is_none(), "{} ended at its start: {ended:?}\n{}", self.name, self.log());
            assert!(start.elapsed() < LIMIT, "{} is not ready\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn open_log(dir: &Path, name: &str) -> (PathBuf, File) {
    let log = dir.join(format!("{name}.log"));
    let file = File::options().create(true).append(true).open(&log).expect("the log can be written");
    (log, file)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.log());
        }
    }
}

/// An allocator, appliances and xpm-blk.
pub struct Cluster {
    // Ended in this order.
    /// The client's daemon.
    pub blk: Daemon,
    /// The appliances.
    pub appliances: Vec<Daemon>,
    /// The allocator.
    pub allocator: Daemon,
    allocator_port: u16,
    allocator_environment: Vec<(String, String)>,
    appliance_arguments: Vec<Vec<String>>,
    /// Of the appliances; none where nobody manages them.
    managers: Vec<ServiceManager>,
    dir: TempDir,
}

impl Cluster {
    /// Starts an allocator, so many appliances that lend 512 MiB each, and xpm-blk.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start(appliances: usize) -> Cluster {
        Cluster::start_pool(&vec![Vec::new(); appliances], false)
    }

    /// Starts an allocator, an appliance with each of these options, and xpm-blk. With `clock`, the
    /// allocator sees the time of day that [`Cluster::set_clock`] sets.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start_pool(appliances: &[Vec<&str>], clock: bool) -> Cluster {
        let clock = clock.then(|| (clock::now(), Sees::TimeOfDay));
        Cluster::start_with(appliances, clock, false)
    }

    /// Starts so many appliances, and an allocator that begins at this time, in seconds since 1970, and sees what
    /// [`Cluster::set_clock`] sets.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start_at(appliances: usize, unix: u64, sees: Sees) -> Cluster {
        Cluster::start_with(&vec![Vec::new(); appliances], Some((unix, sees)), false)
    }

    /// The same, with a service manager for each appliance, which hands what it kept to the next life.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start_kept(appliances: &[Vec<&str>]) -> Cluster {
        Cluster::start_with(appliances, None, true)
    }

    fn start_with(appliances: &[Vec<&str>], clock: Option<(u64, Sees)>, managed: bool) -> Cluster {
        let dir = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let environment =
            clock.map(|(unix, sees)| clock::environment(dir.path(), unix, sees)).unwrap_or_default();
        let allocator = start_allocator(dir.path(), port, &environment);
        let arguments = |(index, more): (usize, &Vec<&str>)| {
            let more = more.iter().map(|word| (*word).to_owned());
            appliance_arguments(dir.path(), index, &url_of(port)).into_iter().chain(more).collect()
        };
        let arguments: Vec<Vec<String>> = appliances.iter().enumerate().map(arguments).collect();
        let manager = |index| ServiceManager::start(dir.path().join(format!("appliance{index}-notify")));
        let managers: Vec<ServiceManager> = (0..arguments.len()).filter(|_| managed).map(manager).collect();
        let daemons = (0..)
            .zip(&arguments)
            .map(|(index, arguments)| start_appliance(dir.path(), index, arguments, managers.get(index)));
        let appliances = daemons.collect();
        let blk = start_blk(dir.path(), "blk", &url_of(port), "");
        let cluster = Cluster {
            blk,
            appliances,
            allocator,
            allocator_port: port,
            allocator_environment: environment,
            appliance_arguments: arguments,
            managers,
            dir,
        };
        cluster.wait_up();
        cluster
    }

    /// Waits until the allocator has heard every appliance.
    ///
    /// # Panics
    /// When one is not heard in time.
    pub fn wait_up(&self) {
        wait_until("all appliances are up", || {
            let list = self.json(&["appliance", "list"]);
            let up = |appliance: &&Value| appliance["state"] == "up";
            list.as_array().is_some_and(|list| list.iter().filter(up).count() == self.appliances.len())
        });
    }

    /// Waits until every appliance with memory of the allocation has been told that no client owns it. The allocator answers a
    /// detach before that: its own metadata are what counts until they are lost.
    ///
    /// # Panics
    /// When one is not told in time.
    pub fn wait_told_unowned(&self, allocation: &str) {
        let grants = |index: usize| -> Vec<Value> {
            let answer = http_answer(control_port(&self.appliance_arguments[index]), "/v1/grants").ok();
            let body = answer.as_ref().and_then(|answer| answer.split_once("\r\n\r\n"));
            body.and_then(|(_, body)| serde_json::from_str(body).ok()).unwrap_or_default()
        };
        let is_unowned = |grant: &Value| {
            let descriptor = grant["descriptor"].as_str().unwrap_or_default();
            serde_json::from_str::<Value>(descriptor).is_ok_and(|record| record["owner"].is_null())
        };
        wait_until("the appliances are told that no client owns it", || {
            let all = (0..self.appliances.len()).flat_map(grants);
            let of: Vec<Value> = all.filter(|grant| grant["name"] == allocation).collect();
            !of.is_empty() && of.iter().all(is_unowned)
        });
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kills the allocator and throws its metadata away; a task of it, such as `restore`, then has to go well and
    /// make them anew, and it is started again. What the task said.
    ///
    /// # Panics
    /// When the task fails, or the allocator does not come up.
    pub fn replace_metadata(&mut self, task: &[&str]) -> String {
        self.allocator.kill();
        std::fs::remove_dir_all(self.data()).expect("the metadata can be removed");
        self.mend_metadata(task)
    }

    /// Directory of the allocator's metadata.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("allocator")
    }

    /// The same on the metadata that are there.
    ///
    /// # Panics
    /// When the task fails, or the allocator does not come up.
    pub fn mend_metadata(&mut self, task: &[&str]) -> String {
        self.allocator.kill();
        let data = self.data();
        let mut command = Command::new(programs().join("xpm-allocator"));
        let output = command.arg("--data").arg(&data).args(task).output().expect("it can be started");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{task:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        self.restart_allocator();
        self.wait_up();
        said
    }

    /// Kills the allocator and starts it again on what it kept.
    pub fn restart_allocator(&mut self) {
        self.allocator.kill();
        self.allocator = start_allocator(self.dir.path(), self.allocator_port, &self.allocator_environment);
    }

    /// The same on metadata at another place, which these options name; `--heartbeat` may be among them.
    pub fn restart_allocator_with(&mut self, place: &[&str]) {
        self.allocator.kill();
        let (dir, port) = (self.dir.path(), self.allocator_port);
        self.allocator = start_allocator_at(dir, port, place, &self.allocator_environment);
    }

    /// Sets the allocator's clock, in seconds since 1970; it goes on from there.
    ///
    /// # Panics
    /// When the cluster was started without one.
    pub fn set_clock(&self, unix: u64) {
        clock::set(self.dir.path(), unix);
    }

    /// Kills an appliance and starts it again: without its memory, unless a service manager kept it.
    pub fn restart_appliance(&mut self, index: usize) {
        self.appliances[index].kill();
        self.start_appliance(index);
    }

    /// Starts an appliance that ended.
    pub fn start_appliance(&mut self, index: usize) {
        let arguments = &self.appliance_arguments[index];
        let manager = self.managers.get(index);
        self.appliances[index] = start_appliance(self.dir.path(), index, arguments, manager);
    }

    /// Has an appliance started with other options from now on.
    pub fn change_appliance(&mut self, index: usize, change: impl FnOnce(&mut Vec<String>)) {
        change(&mut self.appliance_arguments[index]);
    }

    /// What one more appliance would be started with, with ports and directories of its own: its state directory is
    /// `appliance{INDEX}-state`.
    pub fn appliance_arguments(&self, index: usize) -> Vec<String> {
        appliance_arguments(self.dir.path(), index, &self.allocator_url())
    }

    /// The service manager of an appliance.
    ///
    /// # Panics
    /// When there is none.
    pub fn manager(&self, index: usize) -> &ServiceManager {
        &self.managers[index]
    }

    /// Kills xpm-blk and starts it again.
    pub fn restart_blk(&mut self) {
        self.restart_blk_with("");
    }

    /// The same with more lines in its configuration.
    pub fn restart_blk_with(&mut self, settings: &str) {
        self.blk.kill();
        self.blk = start_blk(self.dir.path(), "blk", &self.allocator_url(), settings);
    }

    /// Starts one more xpm-blk with the configuration of the one that serves; where that is not waited for.
    pub fn another_blk(&self) -> Daemon {
        let config = self.dir.path().join("blk.toml").display().to_string();
        Daemon::start(self.dir.path(), "blk", "xpm-blk", &["--config".to_owned(), config])
    }

    /// Starts xpm-fs, with these lines in its configuration.
    pub fn fs(&self, settings: &str) -> Daemon {
        start_client(self.dir.path(), "fs", "xpm-fs", &self.allocator_url(), settings)
    }

    /// Starts xpm-fs of another client, as `fs2`.
    pub fn second_fs(&self, settings: &str) -> Daemon {
        start_client(self.dir.path(), "fs2", "xpm-fs", &self.allocator_url(), settings)
    }

    /// Starts xpm-blk of another client.
    pub fn second_client(&self) -> Daemon {
        start_blk(self.dir.path(), "blk2", &self.allocator_url(), "")
    }

    /// Runs the operator's command at the host of the second client.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn xpm_of_second(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .env("XPM_BLK", self.dir.path().join("blk2.sock"))
            .output()
            .expect("xpm can be started")
    }

    /// What the allocator says of itself; null where it does not answer.
    pub fn status(&self) -> Value {
        status_at(self.allocator_port)
    }

    /// The port of the allocator.
    pub fn port(&self) -> u16 {
        self.allocator_port
    }

    /// The URL of the allocator.
    pub fn allocator_url(&self) -> String {
        url_of(self.allocator_port)
    }

    /// What the allocator answers to a request for this path.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn get(&self, path: &str) -> String {
        http_answer(self.allocator_port, path).expect("the allocator answers")
    }

    /// Runs the operator's command.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn xpm(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("xpm can be started")
    }

    /// The operator's command, to be run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join("xpm"));
        command
            .env("XPM_ALLOCATOR", self.allocator_url())
            .env("XPM_BLK", self.dir.path().join("blk.sock"))
            .env("XPM_FS", self.dir.path().join("fs.sock"))
            // An allocator that a test has stopped is not waited for.
            .env("XPM_PATIENCE", "0s")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs the operator's command, which has to go well; what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.xpm(arguments);
        assert!(output.status.success(), "xpm {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Runs the operator's command with `--json`.
    ///
    /// # Panics
    /// When it fails or prints something else.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("xpm {arguments:?}: {error}: {text}"))
    }

    /// Runs the operator's command, which has to fail: with one line, or as a usage error. What it
    /// said.
    ///
    /// # Panics
    /// When it does not fail so.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.xpm(arguments);
        let line = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert!(!output.status.success(), "xpm {arguments:?} went well");
        let usage = output.status.code() == Some(2);
        assert!(usage || line.lines().count() == 1, "xpm {arguments:?} is refused in one line: {line}");
        assert!(!line.contains("panicked"), "{line}");
        line
    }

    /// Makes an allocation and shows it at an NBD socket over this transport; the URI.
    pub fn attach(&self, name: &str, size: &str, options: &[&str], transport: &str) -> String {
        self.ok(&[&["alloc", "create", name, "--size", size], options].concat());
        let socket = self.dir.path().join(format!("{name}.sock"));
        let form = format!("nbd-socket={}", socket.display());
        self.ok(&["blk", "attach", name, "--as", &form, "--transport", transport]);
        format!("nbd+unix:///{name}?socket={}", socket.display())
    }
}

/// What the operator's command prints that asks the xpm-blk with this control socket, which has to go well, as JSON.
///
/// # Panics
/// When it fails or prints something else.
pub fn json_of(blk: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(programs().join("xpm")).env("XPM_BLK", blk).args(arguments).output();
    let output = output.expect("xpm can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("it is JSON")
}

fn start_allocator(dir: &Path, port: u16, environment: &[(String, String)]) -> Daemon {
    let data = dir.join("allocator").display().to_string();
    start_allocator_at(dir, port, &["--data", &data], environment)
}

fn start_allocator_at(dir: &Path, port: u16, place: &[&str], environment: &[(String, String)]) -> Daemon {
    let arguments = [
        "--listen".to_owned(),
        format!("127.0.0.1:{port}"),
        "--reclaim-grace".to_owned(),
        "2s".to_owned(),
        "--reconcile".to_owned(),
        "1s".to_owned(),
        "--garbage-grace".to_owned(),
        "4s".to_owned(),
    ];
    let beats: &[&str] = if place.contains(&"--heartbeat") { &[] } else { &["--heartbeat", "300ms"] };
    let place = beats.iter().chain(place).map(|word| (*word).to_owned());
    let arguments: Vec<String> = arguments.into_iter().chain(place).collect();
    let mut daemon = Daemon::start_with(dir, "allocator", "xpm-allocator", &arguments, environment);
    daemon.wait_ready(|| http_get(port, "/v1/status"));
    daemon
}

fn url_of(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn appliance_arguments(dir: &Path, index: usize, allocator: &str) -> Vec<String> {
    let under = |name: &str| dir.join(format!("appliance{index}-{name}")).display().to_string();
    let flags = [
        ("--memory", "512MiB".to_owned()),
        ("--region-size", "16MiB".to_owned()),
        ("--ready", "32MiB".to_owned()),
        ("--name", format!("a{index}")),
        ("--listen", format!("127.0.0.1:{}", free_port())),
        ("--nbd", format!("127.0.0.1:{}", free_port())),
        ("--run-dir", under("run")),
        ("--state", under("state")),
        ("--allocator", allocator.to_owned()),
    ];
    let words = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    words.chain(["--no-lock".to_owned()]).collect()
}

/// The port of an appliance's control plane.
fn control_port(arguments: &[String]) -> u16 {
    let address = arguments.iter().skip_while(|word| *word != "--listen").nth(1);
    address.and_then(|address| address.rsplit_once(':')?.1.parse().ok()).expect("its own arguments")
}

fn start_appliance(
    dir: &Path,
    index: usize,
    arguments: &[String],
    manager: Option<&ServiceManager>,
) -> Daemon {
    let port = control_port(arguments);
    let name = format!("appliance{index}");
    let Some(manager) = manager else {
        let mut daemon = Daemon::start(dir, &name, "xpm-appliance", arguments);
        daemon.wait_ready(|| http_get(port, "/v1/status"));
        return daemon;
    };
    manager.take_said("READY");
    let mut daemon = Daemon::start_managed(dir, &name, "xpm-appliance", arguments, manager);
    daemon.wait_ready(|| manager.take_said("READY").is_some());
    daemon
}

fn start_blk(dir: &Path, name: &str, allocator: &str, settings: &str) -> Daemon {
    start_client(dir, name, "xpm-blk", allocator, settings)
}

fn start_client(dir: &Path, name: &str, program: &str, allocator: &str, settings: &str) -> Daemon {
    let (config, control) = (dir.join(format!("{name}.toml")), dir.join(format!("{name}.sock")));
    let text = format!(
        "allocator = \"{allocator}\"\ncontrol = \"{}\"\nstate = \"{}\"\nallow-unsafe-swap = true\n{settings}\n",
        control.display(),
        dir.join(name).display()
    );
    std::fs::write(&config, text).expect("the configuration can be written");
    let mut daemon =
        Daemon::start(dir, name, program, &["--config".to_owned(), config.display().to_string()]);
    daemon.wait_ready(|| std::os::unix::net::UnixStream::connect(&control).is_ok());
    daemon
}
