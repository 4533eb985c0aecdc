//! Virtual machines for tests: a guest that verifies its memory (guest/verify.c), commands that look after it, and a
//! network between two of them that breaks where a test wants it to.

mod hosts;
mod monitor;
mod wire;

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

pub use self::hosts::{Hosts, Requests};
pub use self::monitor::{Monitor, Plain};
pub use self::wire::{Break, Wire};

use crate::files::can_mount;
use crate::{Cluster, free_port, have, programs, wait_until};

/// The machine's RAM.
const MEMORY: &str = "64MiB";
/// Its name.
const NAME: &str = "vm1";

/// Whether machines can be started here; says so when not.
pub fn can_start() -> bool {
    have("qemu-system-x86_64") && have("gcc")
}

/// Whether machines with external RAM can be started here; says so when not.
pub fn can_start_external() -> bool {
    if let Err(why) = can_mount() {
        eprintln!("skipped: {why}");
        return false;
    }
    can_start()
}

/// Whether there can be two hosts with networks of their own; says so when not.
pub fn can_have_hosts() -> bool {
    have("ip") && have("nsenter") && can_start_external()
}

/// Two "hosts" of one machine, with one RAM for both.
pub struct Site {
    dir: tempfile::TempDir,
    kernel: PathBuf,
    memory: &'static str,
    /// Of all commands.
    environment: Vec<(String, String)>,
    /// Of those that start QEMU.
    options: Vec<String>,
    /// The words that start a program at host `a` and `b`, and their addresses; none where both are this machine.
    hosts: Option<[(Vec<String>, Ipv4Addr); 2]>,
    /// Held by one site at a time: an emulated processor takes all of a real one, and two of them leave nothing to the
    /// daemons.
    _alone: File,
}

impl Site {
    /// The RAM is an ordinary file.
    ///
    /// # Panics
    /// When the guest cannot be built.
    pub fn new() -> Site {
        let dir = tempfile::tempdir().expect("a directory");
        let mut site = Site::build(dir, MEMORY, Vec::new(), Vec::new());
        site.options = vec!["--file".to_owned(), site.dir().join("ram").display().to_string()];
        site
    }

    /// The same with more options of `xpm vm run`.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Site {
        self.options.extend(options.iter().map(|word| (*word).to_owned()));
        self
    }

    /// The RAM is an allocation of a cluster with an xpm-fs.
    ///
    /// # Panics
    /// When the guest cannot be built.
    pub fn external(cluster: &Cluster, memory: &'static str, options: &[&str]) -> Site {
        let socket = |name: &str| cluster.dir().join(name).display().to_string();
        let environment = [
            ("XPM_ALLOCATOR", cluster.allocator_url()),
            ("XPM_FS", socket("fs.sock")),
            ("XPM_PATIENCE", "0s".to_owned()),
        ];
        let environment = environment.map(|(key, value)| (key.to_owned(), value));
        let options = options.iter().map(|word| (*word).to_owned());
        let dir = tempfile::tempdir_in(cluster.dir()).expect("a directory");
        Site::build(dir, memory, environment.to_vec(), options.collect())
    }

    /// The RAM is an allocation that two hosts reach over their networks.
    ///
    /// # Panics
    /// When the guest cannot be built.
    pub fn between(hosts: &Hosts, memory: &'static str, options: &[&str]) -> Site {
        let options = options.iter().map(|word| (*word).to_owned());
        let dir = tempfile::tempdir_in(hosts.dir()).expect("a directory");
        let mut site = Site::build(dir, memory, hosts.environment("a"), options.collect());
        let host = |name| (hosts.namespace(name).words().to_vec(), hosts.address(name));
        site.hosts = Some([host("a"), host("b")]);
        site
    }

    /// Builds the guest.
    fn build(
        dir: tempfile::TempDir,
        memory: &'static str,
        environment: Vec<(String, String)>,
        options: Vec<String>,
    ) -> Site {
        let alone = File::create(std::env::temp_dir().join("xpm-tests-vm.lock")).expect("a file to lock");
        alone.lock().expect("it can be locked");
        let kernel = dir.path().join("verify");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/verify.c");
        let flags = "-m32 -march=i686 -O2 -ffreestanding -fno-pic -fno-stack-protector -nostdlib -static -Wl,-Ttext=0x100000 \
                     -Wl,--build-id=none";
        let built =
            Command::new("gcc").args(flags.split_whitespace()).arg("-o").arg(&kernel).arg(source).status();
        assert!(built.is_ok_and(|status| status.success()), "the guest cannot be built");
        Site { dir, kernel, memory, environment, options, hosts: None, _alone: alone }
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs `xpm vm` at a host.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn command(&self, host: &str, arguments: &[&str]) -> Output {
        self.prepare(host, arguments).output().expect("the command can be started")
    }

    fn prepare(&self, host: &str, arguments: &[&str]) -> Command {
        let mut command = self.at(host, &programs().join("xpm"));
        command.arg("vm").arg("--dir").arg(self.dir().join(host)).args(arguments);
        // Settings and a token of the machine that tests run on are not theirs.
        command.env_remove("XPM_TOKEN_FILE").env("XPM_CONFIG", "/dev/null").stdin(Stdio::null());
        for (key, value) in &self.environment {
            // Host `b` has daemons of its own.
            let value = match host {
                "b" => value.replace("/fs.sock", "/fs2.sock").replace("/blk.sock", "/blk2.sock"),
                _ => value.clone(),
            };
            command.env(key, value);
        }
        command
    }

    /// A program at a host.
    fn at(&self, host: &str, program: &Path) -> Command {
        match &self.hosts {
            None => Command::new(program),
            Some([a, b]) => {
                let (words, _) = if host == "a" { a } else { b };
                let mut command = Command::new(&words[0]);
                command.args(&words[1..]).arg(program);
                command
            }
        }
    }

    /// Where a host is reached.
    pub fn address(&self, host: &str) -> Ipv4Addr {
        match &self.hosts {
            None => Ipv4Addr::LOCALHOST,
            Some([a, b]) => {
                if host == "a" {
                    a.1
                } else {
                    b.1
                }
            }
        }
    }

    /// The guest, as QEMU's `-kernel`.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Starts the machine at a host.
    pub fn run(&self, host: &str) -> Guest {
        let guest = self.start(host, &["run", NAME, "--memory", self.memory], &[]);
        wait_until("the guest verifies its memory", || guest.passes() > 1);
        guest
    }

    /// The same from a file that it was suspended to.
    pub fn resume(&self, host: &str, state: &Path) -> Guest {
        self.start(host, &["resume", NAME, "--from", &state.display().to_string()], &[])
    }

    /// Waits for the machine at a host; with the port.
    pub fn receive(&self, host: &str, more: &[&str]) -> (Guest, u16) {
        let port = free_port();
        let listen = format!("{}:{port}", self.address(host));
        let memory = if more.contains(&"--memory") { &[][..] } else { &["--memory", self.memory] };
        let words = [&["receive", NAME, "--listen", &listen], memory].concat();
        let guest = self.start(host, &words, more);
        wait_until("a machine is waited for", || self.states(host) == ["incoming"]);
        (guest, port)
    }

    fn start(&self, host: &str, words: &[&str], more: &[&str]) -> Guest {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let id = COUNT.fetch_add(1, Ordering::Relaxed);
        let serial = self.dir().join(format!("serial{id}"));
        let mut command = self.prepare(host, words);
        if !more.contains(&"--file") && !more.contains(&"--disk") {
            command.args(&self.options);
        }
        command.args(more).args(["--", "qemu-system-x86_64", "-display", "none", "-nodefaults"]);
        command.args(["-vga", "none", "-accel", "tcg,tb-size=16", "-kernel"]).arg(&self.kernel);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        let said = self.dir().join(format!("said{id}"));
        let file = std::fs::File::create(&said).expect("a file");
        let child = command.stdout(Stdio::null()).stderr(file).spawn().expect("the command can be started");
        Guest { child, serial, said, dir: self.dir().join(host) }
    }

    /// Starts to move the machine from a host to a port.
    ///
    /// # Panics
    /// When the command cannot be started.
    pub fn migrate(&self, host: &str, port: u16) -> Child {
        self.migrate_to(host, Ipv4Addr::LOCALHOST, port)
    }

    /// The same to an address.
    ///
    /// # Panics
    /// When the command cannot be started.
    pub fn migrate_to(&self, host: &str, address: Ipv4Addr, port: u16) -> Child {
        let to = format!("{address}:{port}");
        let mut command = self.prepare(host, &["-o", "json", "migrate", NAME, "--to", &to]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command can be started")
    }

    /// The machines of a host.
    ///
    /// # Panics
    /// When they cannot be listed.
    pub fn list(&self, host: &str) -> Vec<Value> {
        let listed = self.command(host, &["-o", "json", "list"]);
        serde_json::from_slice(&listed.stdout).expect("a list")
    }

    /// Their states.
    pub fn states(&self, host: &str) -> Vec<String> {
        let state = |machine: &Value| machine["state"].as_str().unwrap_or_default().to_owned();
        self.list(host).iter().map(state).collect()
    }
}

impl Default for Site {
    fn default() -> Site {
        Site::new()
    }
}

/// What a command printed on standard error.
pub fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// A command that looks after a machine; ended with its QEMU when dropped.
pub struct Guest {
    child: Child,
    serial: PathBuf,
    said: PathBuf,
    dir: PathBuf,
}

impl Guest {
    /// How many passes over its memory it has made here.
    ///
    /// # Panics
    /// When it found a bad page.
    pub fn passes(&self) -> u64 {
        passes(&self.serial)
    }

    /// Waits until it has verified all its memory as it is now, and returns its passes.
    ///
    /// # Panics
    /// When it does not, or finds a bad page.
    pub fn goes_on(&self) -> u64 {
        let before = self.passes();
        // One may have been under way.
        wait_until("the guest goes on", || self.passes() >= before + 2);
        self.passes()
    }

    /// The process id of its QEMU, while there is one.
    pub fn qemu(&self) -> Option<i32> {
        let record = std::fs::read(self.dir.join(NAME).join("machine.json")).ok()?;
        let record: Value = serde_json::from_slice(&record).ok()?;
        record["qemu"]["id"].as_i64()?.try_into().ok()
    }

    /// Whether its QEMU is there, running or not.
    pub fn qemu_is_alive(&self) -> bool {
        self.qemu().is_some_and(|process| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            // proc_pid_stat(5): the state follows the name, which ends with a bracket.
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
        })
    }

    /// Kills the command as `kill -9` does, and not its QEMU.
    pub fn kill_command(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Kills its QEMU.
    pub fn kill_qemu(&self) {
        if let Some(process) = self.qemu().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
    }

    /// Waits until the command has ended.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait(&mut self) -> ExitStatus {
        wait_until("the command ends", || matches!(self.child.try_wait(), Ok(Some(_))));
        self.child.wait().expect("a child can be waited for")
    }

    /// A second connection to its QEMU, beside the one of the commands.
    ///
    /// # Panics
    /// When its QEMU has ended.
    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.dir.join(NAME).join("look.qmp"))
    }

    /// What it printed on standard error.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }
}

/// Passes that a guest with this serial port has made.
fn passes(serial: &Path) -> u64 {
    let text = std::fs::read_to_string(serial).unwrap_or_default();
    // The last line may not be whole.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        assert!(line.ends_with(" bad 0"), "the guest says: {line}");
    }
    let last = whole.lines().last().and_then(|line| line.split(' ').nth(1));
    last.and_then(|pass| pass.parse().ok()).unwrap_or(0)
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill_qemu();
            self.kill_command();
        }
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.dir.display(), self.said());
        }
    }
}
