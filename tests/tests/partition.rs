//! Clients in network namespaces of their own, whose network fails in part.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use xpm_tests::netns::{self, done};
use xpm_tests::{Daemon, free_port, have, programs, wait_until};

/// A namespace with two links to this one: by the first it reaches the allocator, by the second the appliance.
struct Namespace {
    inside: netns::Namespace,
    links: [String; 2],
    /// This end of each link.
    here: [Ipv4Addr; 2],
}

/// The addresses of all namespaces: a /16, of which each link has a /30.
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 0);

/// Number of namespaces that this process made.
static MADE: AtomicU32 = AtomicU32::new(0);

/// An end of a link of one namespace. Tests run beside each other, each with its own names and addresses: with the same
/// addresses, one test's packets would leave by the link of another.
fn address(namespace: u32, link: usize, end: u32) -> Ipv4Addr {
    let links = namespace * 2 + link as u32;
    Ipv4Addr::from_bits(NETWORK.to_bits() | ((links * 4 + end) & 0xffff))
}

impl Namespace {
    fn new() -> Namespace {
        // Two for each process, in which both tests may run.
        let number = std::process::id() * 2 + MADE.fetch_add(1, Ordering::Relaxed);
        let (name, links) = (format!("xpm-test-{number}"), [format!("xt{number}a"), format!("xt{number}b")]);
        let here = [0, 1].map(|link| address(number, link, 1));
        let namespace = Namespace { inside: netns::Namespace::new(&name), links, here };
        for (index, link) in namespace.links.iter().enumerate() {
            let there = format!("eth{index}");
            done("ip", &["link", "add", link, "type", "veth", "peer", "name", &there, "netns", &name]);
            done("ip", &["addr", "add", &format!("{}/30", here[index]), "dev", link]);
            done("ip", &["link", "set", link, "up"]);
            let address = format!("{}/30", address(number, index, 2));
            namespace.inside.ip(&format!("addr add {address} dev {there}"));
            namespace.inside.ip(&format!("link set {there} up"));
        }
        namespace
    }

    fn set(&self, link: usize, state: &str) {
        done("ip", &["link", "set", &self.links[link], state]);
    }
}

/// An allocator at one link, an appliance at the other, and a client on either side.
struct Site {
    dir: tempfile::TempDir,
    allocator: String,
    _daemons: Vec<Daemon>,
    /// xpm-blk in the namespace; ended with the site.
    old: Child,
    namespace: Namespace,
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.old.kill();
        let _ = self.old.wait();
    }
}

impl Site {
    fn start() -> Site {
        let namespace = Namespace::new();
        let dir = tempfile::tempdir().expect("a directory");
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let under = |name: &str| dir.path().join(name).display().to_string();
        let address = format!("{}:{}", namespace.here[0], free_port());
        let allocator = format!("http://{address}");
        let flags = format!("--listen {address} --insecure --heartbeat 300ms --data {}", under("allocator"));
        let mut daemons = vec![Daemon::start(dir.path(), "allocator", "xpm-allocator", &words(&flags))];
        let flags = format!(
            "--memory 256MiB --no-lock --name a0 --insecure --allocator {allocator} --listen {host}:{} --nbd {host}:{} --run-dir {} --state {}",
            free_port(),
            free_port(),
            under("run"),
            under("state"),
            host = namespace.here[1],
        );
        daemons.push(Daemon::start(dir.path(), "appliance", "xpm-appliance", &words(&flags)));
        let config = configure(dir.path(), "new", &allocator);
        daemons.push(Daemon::start(
            dir.path(),
            "new",
            "xpm-blk",
            &words(&format!("--config {}", config.display())),
        ));
        let config = configure(dir.path(), "old", &allocator);
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", namespace.inside.name()])
            .arg(programs().join("xpm-blk"))
            .arg("--config")
            .arg(config);
        let old = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let old = old.expect("it can be started");
        let site = Site { dir, allocator, _daemons: daemons, old, namespace };
        wait_until("the appliance is up", || {
            let list = site.xpm("new", &["--json", "appliance", "list"]);
            serde_json::from_slice::<Value>(&list.stdout).is_ok_and(|list| list[0]["state"] == "up")
        });
        for client in ["new", "old"] {
            wait_until("xpm-blk answers", || site.xpm(client, &["blk", "list"]).status.success());
        }
        site
    }

    /// The operator's command, with the xpm-blk of this client.
    fn xpm(&self, client: &str, words: &[&str]) -> Output {
        let mut command = Command::new(programs().join("xpm"));
        command
            .args(["--allocator", &self.allocator, "--blk"])
            .arg(self.dir.path().join(format!("{client}.sock")));
        command.args(words).output().expect("it can be started")
    }

    fn ok(&self, client: &str, words: &[&str]) -> String {
        let output = self.xpm(client, words);
        assert!(output.status.success(), "{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Shows the allocation at a socket of this client, over TCP; its URI.
    fn attach(&self, client: &str) -> String {
        let socket = self.dir.path().join(format!("{client}-nbd.sock"));
        let form = format!("nbd-socket={}", socket.display());
        self.ok(client, &["blk", "attach", "v", "--as", &form, "--transport", "nbd-tcp"]);
        format!("nbd+unix:///v?socket={}", socket.display())
    }
}

fn configure(dir: &Path, client: &str, allocator: &str) -> PathBuf {
    let file = dir.join(format!("{client}.toml"));
    let (control, state) = (dir.join(format!("{client}.sock")), dir.join(client));
    let (control, state) = (control.display(), state.display());
    let text = format!(
        "allocator = \"{allocator}\"\ncontrol = \"{control}\"\nstate = \"{state}\"\nallow-unsafe-swap = true\n"
    );
    std::fs::write(&file, text).expect("the configuration can be written");
    file
}

/// Writes 0x11 all over the device, again and again, whatever becomes of it.
const WRITER: &str = "
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
page = b'\\x11' * 65536
while True:
    for offset in range(0, 64 << 20, 65536):
        try:
            h.pwrite(page, offset)
            print('.', end='', flush=True)
        except nbd.Error:
            pass
";

fn qemu_io(uri: &str, order: &str) -> (bool, String) {
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", order, uri]).output().expect("qemu-io");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success() && !said.contains("verification failed"), said)
}

/// The owner of an allocation loses its way to the allocator, and not the one to the appliance: it goes on to write. The
/// allocation is given to another client, and from then on not one byte of the old one lands, also when it reaches
/// the allocator again.
#[test]
fn an_owner_that_is_cut_off_from_the_allocator_only() {
    if !have("qemu-io") || !rustix::process::geteuid().is_root() {
        eprintln!("not tested: this needs root, for namespaces, and qemu-io");
        return;
    }
    let site = Site::start();
    site.ok("new", &["alloc", "create", "v", "--size", "64MiB"]);
    let uri = site.attach("old");
    let wrote = site.dir.path().join("wrote");
    let log = std::fs::File::create(&wrote).expect("a file");
    let mut writer = Command::new("/usr/bin/python3");
    let mut writer = writer.args(["-c", WRITER, &uri]).stdout(log).spawn().expect("python3 starts");
    let written = || std::fs::metadata(&wrote).map_or(0, |file| file.len());
    wait_until("the old owner writes", || written() > 100);
    site.namespace.set(0, "down");
    let before = written();
    wait_until("it goes on without the allocator", || written() > before + 100);
    let status: Value =
        serde_json::from_slice(&site.xpm("new", &["--json", "status"]).stdout).expect("a status");
    let id = status["blk"]["client"].as_str().expect("a client id").to_owned();
    site.ok("new", &["alloc", "transfer", "v", "--to", &id, "--force"]);
    let new = site.attach("new");
    let (wrote, said) = qemu_io(&new, "write -P 0x22 0 64M");
    assert!(wrote, "{said}");
    for round in 0..20 {
        let (same, said) = qemu_io(&new, "read -P 0x22 0 64M");
        assert!(same, "something of the old owner landed: {said}");
        if round == 10 {
            site.namespace.set(0, "up");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(writer.try_wait().expect("it is ours").is_none(), "the old owner still tries");
    let _ = writer.kill();
    let _ = writer.wait();
    wait_until("the old owner hears that it is none", || {
        let list: Value = serde_json::from_str(&site.ok("old", &["--json", "blk", "list"])).expect("a list");
        list[0]["state"] == "lost"
    });
}

#[test]
fn an_idle_device_shows_how_its_network_is() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: this needs root, for namespaces");
        return;
    }
    let site = Site::start();
    site.ok("new", &["alloc", "create", "v", "--size", "64MiB"]);
    let _uri = site.attach("old");
    let state = || {
        let list: Value = serde_json::from_str(&site.ok("old", &["--json", "blk", "list"])).expect("a list");
        list[0]["state"].as_str().unwrap_or_default().to_owned()
    };
    wait_until("it lives", || state() == "live");
    for _ in 0..2 {
        site.namespace.set(1, "down");
        wait_until("its network is gone", || state() == "holding");
        site.namespace.set(1, "up");
        wait_until("its network is back", || state() == "live");
    }
}
