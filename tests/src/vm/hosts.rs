//! Two hosts with networks and daemons of their own: what they send each other, and what they ask of external memory,
//! is counted.
//!
//! ```text
//!   namespace a ── peer ─────────────── peer ── namespace b        a machine's state
//!        └──── pool ──── allocator, ──── pool ────┘                a machine's RAM
//!                        appliances
//! ```

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::files::Files;
use crate::netns::{Namespace, done};
use crate::{Daemon, free_port, programs, wait_until};

/// The addresses of all tests: a /16, of which each process has 16.
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 0);
/// The hosts, as commands name them.
const NAMES: [&str; 2] = ["a", "b"];

/// Requests to xpm-fs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    /// Reads that were answered.
    pub reads: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Holes that were made.
    pub trims: u64,
    /// Requests that wait, or are answered with an error.
    pub others: u64,
}

/// Two hosts and a pool.
pub struct Hosts {
    /// xpm-fs of each host; ended first.
    pub files: [Files; 2],
    /// xpm-blk of each host; empty where nobody asked for it.
    blks: Vec<Daemon>,
    appliances: Vec<Daemon>,
    /// The allocator.
    pub allocator: Daemon,
    allocator_address: String,
    namespaces: [Namespace; 2],
    addresses: [Ipv4Addr; 2],
    dir: tempfile::TempDir,
}

impl Hosts {
    /// Makes them, with these lines in the configuration of xpm-fs.
    ///
    /// # Panics
    /// When something does not come up.
    pub fn start(settings: &str) -> Hosts {
        let dir = tempfile::tempdir().expect("a directory");
        let id = std::process::id();
        let address = |number: u32| {
            Ipv4Addr::from_bits(NETWORK.to_bits() | (id.wrapping_mul(16).wrapping_add(number) & 0xffff))
        };
        let namespaces = NAMES.map(|host| Namespace::new(&format!("xpm-vm-{id}{host}")));
        let [a, b] = &namespaces;
        done(
            "ip",
            &["-n", a.name(), "link", "add", "peer", "type", "veth", "peer", "peer", "netns", b.name()],
        );
        let addresses = [address(1), address(2)];
        for (index, namespace) in namespaces.iter().enumerate() {
            namespace.ip(&format!("addr add {}/30 dev peer", addresses[index]));
            namespace.ip("link set peer up");
            let link = format!("xv{id}{}", NAMES[index]);
            let (here, there) = (address(4 * index as u32 + 5), address(4 * index as u32 + 6));
            let words = ["link", "add", &link, "type", "veth", "peer", "pool", "netns", namespace.name()];
            done("ip", &words);
            done("ip", &["addr", "add", &format!("{here}/30"), "dev", &link]);
            done("ip", &["link", "set", &link, "up"]);
            namespace.ip(&format!("addr add {there}/30 dev pool"));
            namespace.ip("link set pool up");
            namespace.ip(&format!("route add default via {here}"));
        }

        let under = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(under("token"), "0123456789abcdef0123456789abcdef\n").expect("a file");
        std::fs::set_permissions(under("token"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .expect("its mode");
        let pool = address(5);
        let allocator_address = format!("{pool}:{}", free_port());
        let allocator = start_allocator(dir.path(), &allocator_address);
        let appliance = |index: usize| {
            let words = format!(
                "--memory 1GiB --region-size 16MiB --ready 32MiB --no-lock --name a{index} --token-file {} --allocator \
                 http://{allocator_address} --listen {pool}:{} --nbd {pool}:{} --run-dir {} --state {}",
                under("token"),
                free_port(),
                free_port(),
                under(&format!("run{index}")),
                under(&format!("state{index}")),
            );
            let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
            Daemon::start(dir.path(), &format!("appliance{index}"), "xpm-appliance", &words)
        };
        let appliances = vec![appliance(0), appliance(1)];
        let files = [0, 1].map(|index| {
            let name = name_of(index);
            let config = configure(dir.path(), &allocator_address, name, settings);
            let daemon = start_client(&namespaces[index], dir.path(), name, "xpm-fs", &config);
            Files::of(daemon, config, dir.path().to_owned())
        });
        let hosts = Hosts {
            files,
            blks: Vec::new(),
            appliances,
            allocator,
            allocator_address,
            namespaces,
            addresses,
            dir,
        };
        wait_until("the appliances are up", || {
            let list = hosts.json("a", &["appliance", "list"]);
            list.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|one| one["state"] == "up"))
        });
        for host in NAMES {
            wait_until("xpm-fs answers", || hosts.xpm(host, &["fs", "list"]).status.success());
        }
        hosts
    }

    /// Starts an xpm-blk at each host.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn with_disks(mut self) -> Hosts {
        for (index, host) in NAMES.into_iter().enumerate() {
            let name = ["blk", "blk2"][index];
            let config = configure(self.dir.path(), &self.allocator_address, name, "");
            self.blks.push(start_client(&self.namespaces[index], self.dir.path(), name, "xpm-blk", &config));
            wait_until("xpm-blk answers", || self.xpm(host, &["blk", "list"]).status.success());
        }
        self
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The appliances.
    pub fn appliances(&mut self) -> &mut [Daemon] {
        &mut self.appliances
    }

    /// A host's namespace.
    pub fn namespace(&self, host: &str) -> &Namespace {
        &self.namespaces[index_of(host)]
    }

    /// A host's address on the link to the other one.
    pub fn address(&self, host: &str) -> Ipv4Addr {
        self.addresses[index_of(host)]
    }

    /// Where commands at a host find daemons and the token.
    pub fn environment(&self, host: &str) -> Vec<(String, String)> {
        let under = |name: &str| self.dir().join(name).display().to_string();
        let (fs, blk) = [("fs.sock", "blk.sock"), ("fs2.sock", "blk2.sock")][index_of(host)];
        [
            ("XPM_ALLOCATOR", format!("http://{}", self.allocator_address)),
            ("XPM_FS", under(fs)),
            ("XPM_BLK", under(blk)),
            ("XPM_TOKEN_FILE", under("token")),
            ("XPM_PATIENCE", "0s".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec()
    }

    /// Starts a program at a host.
    pub fn command(&self, host: &str, program: &Path) -> Command {
        let [enter, words @ ..] = self.namespace(host).words();
        let mut command = Command::new(enter);
        command.args(words).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs the operator's command at a host.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn xpm(&self, host: &str, words: &[&str]) -> Output {
        let mut command = self.command(host, &programs().join("xpm"));
        command.env("XPM_CONFIG", "/dev/null").envs(self.environment(host)).args(words);
        command.output().expect("it can be started")
    }

    /// The output of a command with `--json`; null when it fails.
    pub fn json(&self, host: &str, words: &[&str]) -> Value {
        let output = self.xpm(host, &[words, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Requests to xpm-fs of a host for an allocation; none where it does not show that.
    pub fn requests(&self, host: &str, name: &str) -> Option<Requests> {
        let shown = self.json(host, &["fs", "show", name]);
        let number = |key: &str| shown["counters"][key].as_u64();
        Some(Requests {
            reads: number("reads")?,
            writes: number("writes")?,
            trims: number("trims")?,
            others: number("errors")? + shown["in_flight"].as_u64()?,
        })
    }

    /// Bytes that went over the link between the hosts, in both directions.
    pub fn bytes_between(&self) -> u64 {
        self.bytes("a", "peer")
    }

    /// The same over a host's link to the pool.
    pub fn bytes_to_pool(&self, host: &str) -> u64 {
        self.bytes(host, "pool")
    }

    fn bytes(&self, host: &str, interface: &str) -> u64 {
        let process = self.files[index_of(host)].processes().first().copied().expect("xpm-fs runs");
        let (received, sent) = Namespace::bytes(process.cast_unsigned(), interface);
        received + sent
    }

    /// Waits until a process stands by for the xpm-fs of each host. After a takeover that lasts some seconds.
    ///
    /// # Panics
    /// When none does in time.
    pub fn wait_standbys(&self) {
        self.files.iter().for_each(Files::wait_standby);
    }

    /// Kills the process of xpm-fs that serves at a host, as `kill -9` does; the one that stands by goes on.
    pub fn kill_files(&self, host: &str) {
        self.files[index_of(host)].kill_serving();
    }

    /// Kills the allocator and starts it again on what it kept.
    pub fn restart_allocator(&mut self) {
        self.allocator.kill();
        self.allocator = start_allocator(self.dir.path(), &self.allocator_address);
    }
}

/// The configuration of a client. Both hosts are one machine, whose clients would share memory with the appliances.
fn configure(dir: &Path, allocator: &str, name: &str, settings: &str) -> PathBuf {
    let under = |name: &str| dir.join(name).display().to_string();
    let text = format!(
        "allocator = \"http://{allocator}\"\ntoken-file = \"{}\"\ncontrol = \"{}\"\nstate = \"{}\"\nallow-unsafe-swap = true\n\
         forbid-transports = [\"shm\", \"nbd-unix\"]\n{settings}\n",
        under("token"),
        under(&format!("{name}.sock")),
        under(name),
    );
    let config = dir.join(format!("{name}.toml"));
    std::fs::write(&config, text).expect("the configuration can be written");
    config
}

fn start_client(namespace: &Namespace, dir: &Path, name: &str, program: &str, config: &Path) -> Daemon {
    let [enter, words @ ..] = namespace.words();
    let program = programs().join(program).display().to_string();
    let more = [program, "--config".to_owned(), config.display().to_string()];
    Daemon::start(dir, name, &enter, &[&words[..], &more].concat())
}

fn start_allocator(dir: &Path, address: &str) -> Daemon {
    let under = |name: &str| dir.join(name).display().to_string();
    let words = format!(
        "--listen {address} --token-file {} --heartbeat 300ms --data {}",
        under("token"),
        under("allocator")
    );
    let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    Daemon::start(dir, "allocator", "xpm-allocator", &words)
}

/// The name of xpm-fs at a host.
fn name_of(index: usize) -> &'static str {
    ["fs", "fs2"][index]
}

fn index_of(host: &str) -> usize {
    NAMES.iter().position(|name| *name == host).expect("a host")
}
