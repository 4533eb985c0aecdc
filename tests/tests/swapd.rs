//! xpm-swapd without swap: what it is told wrongly, what it is refused, and what is left of that. Real swap is in the
//! lab, scenario `swapd`.

#![allow(missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use xpm_tests::clock::Sees;
use xpm_tests::{Cluster, Daemon, programs, wait_until};

/// xpm-swapd of a cluster's client.
struct Swapd {
    daemon: Daemon,
    config: PathBuf,
    socket: PathBuf,
}

impl Swapd {
    /// Starts it with further lines of configuration.
    fn start(cluster: &Cluster, lines: &str) -> Swapd {
        let dir = cluster.dir();
        let (config, socket) = (dir.join("swapd.toml"), dir.join("swapd.sock"));
        let text = format!(
            "allocator = \"{}\"\nblk = \"{}\"\ncontrol = \"{}\"\nstate = \"{}\"\nprotect = []\nlook = \"100ms\"\n\
             tune = {{ mode = \"off\" }}\n{lines}",
            cluster.allocator_url(),
            dir.join("blk.sock").display(),
            socket.display(),
            dir.join("swapd").display(),
        );
        std::fs::write(&config, text).unwrap();
        let daemon = Swapd::spawn(dir, &config);
        let swapd = Swapd { daemon, config, socket };
        swapd.wait_ready();
        swapd
    }

    fn spawn(dir: &Path, config: &Path) -> Daemon {
        Daemon::start(dir, "swapd", "xpm-swapd", &["--config".to_owned(), config.display().to_string()])
    }

    fn start_again(&mut self, cluster: &Cluster) {
        self.daemon = Swapd::spawn(cluster.dir(), &self.config);
        self.wait_ready();
    }

    fn wait_ready(&self) {
        wait_until("xpm-swapd answers", || !self.xpm(&["status", "--json"]).stdout.is_empty());
    }

    fn xpm(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(programs().join("xpm"));
        command.env("XPM_SWAPD", &self.socket).arg("swap").args(arguments).output().unwrap()
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&self.xpm(&["status", "--json"]).stdout).unwrap()
    }

    /// Why something does not go; empty when it does.
    fn trouble(&self, what: &str) -> String {
        let status = self.status();
        let all = status["troubles"].as_array().unwrap();
        let found = all.iter().find(|trouble| trouble["what"] == what);
        found.map_or(String::new(), |trouble| trouble["why"].as_str().unwrap().to_owned())
    }

    fn wait_trouble(&self, what: &str, why: &str) {
        wait_until(&format!("trouble {what}: {why}"), || self.trouble(what).contains(why));
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.xpm(arguments);
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert!(!output.status.success(), "{arguments:?} went well");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        said
    }
}

fn allocations(cluster: &Cluster) -> Vec<String> {
    let list = cluster.json(&["alloc", "list"]);
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned()
}

/// Whether a device could carry swap here: then this machine is no place for these tests.
fn has_ublk() -> bool {
    let has = Path::new("/dev/ublk-control").exists();
    if has {
        eprintln!("skipped: this machine has ublk, and swap would be turned on");
    }
    has
}

#[test]
fn bad_configuration_is_named_by_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("swapd.toml");
    let check = || {
        let mut command = Command::new(programs().join("xpm-swapd"));
        let output = command.arg("--config").arg(&config).arg("--check").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert!(!said.contains("panicked"), "{said}");
        (output.status.success(), said)
    };
    let (good, said) = check();
    assert!(!good && said.contains("swapd.toml"), "{said}");
    for (text, hints) in [
        ("maximum = \"1GiB\"\nbsae = 3\n", ["swapd.toml:2", "bsae"]),
        ("maximum = \"lots\"\n", ["swapd.toml:1", "lots"]),
        ("maximum = \"1GiB\"\n[grow]\nfree-below = \"200%\"\n", ["swapd.toml:3", "200%"]),
        ("maximum = \"1GiB\"\n[shrink]\nafter = \"later\"\n", ["swapd.toml:3", "later"]),
        ("maximum = \"1GiB\"\n[device]\nas = \"floppy\"\n", ["swapd.toml:3", "floppy"]),
        ("maximum = \"1GiB\"\n[fallback]\nsize = \"1GiB\"\n", ["swapd.toml:2", "path"]),
        ("maximum = \"1GiB\"\n[tune]\nmode = \"best\"\n", ["swapd.toml:3", "best"]),
        ("base = \"1GiB\"\n", ["maximum", "say how much"]),
        ("maximum = \"1GiB\"\nbase = \"2GiB\"\n", ["base", "cannot be more"]),
    ] {
        std::fs::write(&config, text).unwrap();
        let (good, said) = check();
        assert!(!good && hints.iter().all(|hint| said.contains(hint)), "{text}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    std::fs::write(&config, "maximum = \"1GiB\"\n").unwrap();
    assert_eq!(check(), (true, String::new()));
}

#[test]
fn what_this_machine_lacks_is_told_once_and_nothing_is_left() {
    if has_ublk() {
        return;
    }
    let cluster = Cluster::start(1);
    let swapd = Swapd::start(&cluster, "base = \"32MiB\"\nmaximum = \"256MiB\"\n");
    swapd.wait_trouble("grow", "ublk");
    let output = swapd.xpm(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("SWAP_NOT_GROWN") && shown.contains("ublk_drv"), "{shown}");
    // It is tried again, and said in the log but once.
    let tries = || {
        let status = swapd.status();
        let all = status["troubles"].as_array().unwrap();
        all.iter().find(|one| one["what"] == "grow").map_or(0, |one| one["tries"].as_u64().unwrap())
    };
    wait_until("it is tried again", || tries() >= 3);
    let log = swapd.daemon.log();
    assert_eq!(
        log.lines().filter(|line| line.contains("ERROR") && line.contains("grow: ")).count(),
        1,
        "{log}"
    );
    // The parts made for it are removed each time.
    wait_until("nothing is left", || allocations(&cluster).is_empty());
    assert!(swapd.refused(&["grow", "32MiB"]).contains("ublk"));
    wait_until("nothing is left", || allocations(&cluster).is_empty());
}

#[test]
fn a_limit_and_a_full_pool_are_told() {
    if has_ublk() {
        return;
    }
    let cluster = Cluster::start(1);
    let file = cluster.dir().join("account.toml");
    std::fs::write(&file, "[[account]]\nname = \"swap\"\nhard-limit = \"16MiB\"\n").unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()]);
    let lines = "base = \"64MiB\"\nmaximum = \"1GiB\"\n[device]\naccount = \"swap\"\n";
    let mut swapd = Swapd::start(&cluster, lines);
    // Half and a quarter were asked for, and a quarter would be given: then it is the device that is missing.
    swapd.wait_trouble("grow", "ublk");
    assert!(swapd.daemon.log().contains("half of it is asked for"), "{}", swapd.daemon.log());
    // By hand it is all or nothing.
    let said = swapd.refused(&["grow", "128MiB"]);
    assert!(said.contains("limit") && said.contains("swap"), "{said}");
    swapd.daemon.stop();

    let lines = "base = \"64MiB\"\nmaximum = \"8GiB\"\n";
    cluster.ok(&["alloc", "create", "filler", "--size", "496MiB"]);
    let swapd = Swapd::start(&cluster, lines);
    let said = swapd.refused(&["grow", "1GiB"]);
    assert!(said.contains("fit"), "{said}");
    assert!(cluster.json(&["alloc", "show", "filler"])["state"] == "ready");
}

#[test]
fn hours_are_told_and_waited_for() {
    if has_ublk() {
        return;
    }
    // Thursday, 1970-01-15.
    let noon = 14 * 24 * 3600 + 12 * 3600;
    let cluster = Cluster::start_at(1, noon, Sees::TimeOfDay);
    let file = cluster.dir().join("account.toml");
    std::fs::write(&file, "[[account]]\nname = \"swap\"\nhours = [{ from = \"18:00\", to = \"20:00\" }]\n")
        .unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()]);
    let swapd =
        Swapd::start(&cluster, "base = \"64MiB\"\nmaximum = \"128MiB\"\n[device]\naccount = \"swap\"\n");
    swapd.wait_trouble("grow", "ask again from Thu 1970-01-15 18:00");
    assert!(swapd.refused(&["grow", "16MiB"]).contains("18:00"));
    cluster.set_clock(noon + 6 * 3600 + 1);
    // Now only the device is missing.
    swapd.wait_trouble("grow", "ublk");
}

#[test]
fn orders_that_cannot_be_carried_out() {
    let cluster = Cluster::start(1);
    let swapd = Swapd::start(&cluster, "maximum = \"256MiB\"\n");
    assert!(swapd.status()["areas"].as_array().unwrap().is_empty());
    let said = swapd.refused(&["grow", "1GiB"]);
    assert!(said.contains("256MiB") && said.contains("maximum"), "{said}");
    assert!(swapd.refused(&["drain", "nothing"]).contains("nothing"));
    assert!(swapd.refused(&["shrink", "1GiB"]).contains("xpm swap status"));
    for wrong in [&["grow", "0"][..], &["grow"], &["drain"], &["drain", "--all", "x"], &["shrink", "-1"]] {
        assert_eq!(swapd.xpm(wrong).status.code(), Some(2), "{wrong:?}");
    }
    // With everything drained it rests, across its own restart too, until it is told to go on.
    assert!(swapd.xpm(&["drain", "--all"]).status.success());
    assert!(swapd.status()["rest"]["why"].as_str().unwrap().contains("resume"));
    let mut swapd = swapd;
    swapd.daemon.kill();
    swapd.start_again(&cluster);
    assert!(swapd.status()["rest"].is_object());
    assert!(swapd.xpm(&["resume"]).status.success());
    assert!(swapd.status()["rest"].is_null());
    // One looks after a machine's swap.
    let second = Command::new(programs().join("xpm-swapd"))
        .arg("--config")
        .arg(&swapd.config)
        .args(["--control", cluster.dir().join("second.sock").to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("another xpm-swapd"), "{said}");
    swapd.daemon.stop();
    let output = swapd.xpm(&["status"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("systemctl start xpm-swapd"));
}

#[test]
fn an_allocation_of_others_is_left_and_its_name_with_it() {
    if has_ublk() {
        return;
    }
    let cluster = Cluster::start(1);
    let name = format!("swap-{}-1", host());
    cluster.ok(&["alloc", "create", &name, "--size", "16MiB"]);
    let before = cluster.json(&["alloc", "show", &name]);
    let swapd = Swapd::start(&cluster, "base = \"32MiB\"\nmaximum = \"256MiB\"\n");
    wait_until("another name is tried", || swapd.daemon.log().contains(&format!("swap-{}-2", host())));
    swapd.wait_trouble("grow", "ublk");
    assert_eq!(cluster.json(&["alloc", "show", &name])["id"], before["id"]);
    wait_until("of its own nothing is left", || allocations(&cluster) == [name.clone()]);
}

#[test]
fn killed_between_allocation_and_device_it_takes_back_what_it_made() {
    if has_ublk() {
        return;
    }
    let cluster = Cluster::start(1);
    let mut swapd = Swapd::start(&cluster, "maximum = \"256MiB\"\n");
    // A frozen xpm-blk holds it between the two.
    cluster.blk.freeze();
    let mut grow = Command::new(programs().join("xpm"))
        .env("XPM_SWAPD", &swapd.socket)
        .args(["swap", "grow", "32MiB"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the allocation is made", || allocations(&cluster).len() == 1);
    swapd.daemon.kill();
    assert!(!grow.wait().unwrap().success());
    let state = std::fs::read_to_string(cluster.dir().join("swapd/state.json")).unwrap();
    assert!(state.contains("making"), "{state}");
    cluster.blk.signal(rustix::process::Signal::CONT);
    swapd.start_again(&cluster);
    // There is no ublk here, so it cannot be finished.
    wait_until("the half-made allocation is undone", || allocations(&cluster).is_empty());
    wait_until("it is forgotten", || swapd.status()["areas"].as_array().unwrap().is_empty());
}

#[test]
fn without_an_allocator_it_waits_and_goes_on() {
    if has_ublk() {
        return;
    }
    let mut cluster = Cluster::start(1);
    cluster.allocator.kill();
    let swapd = Swapd::start(&cluster, "base = \"32MiB\"\nmaximum = \"256MiB\"\n");
    swapd.wait_trouble("grow", "allocator");
    assert!(swapd.status()["areas"].as_array().unwrap().is_empty(), "{}", swapd.status());
    cluster.restart_allocator();
    cluster.wait_up();
    swapd.wait_trouble("grow", "ublk");
}
