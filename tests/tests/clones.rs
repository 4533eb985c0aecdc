//! Copies of a client: its state directory on a second machine, or on the same one. One of the two owns an allocation.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use xpm_tests::machine::start_elsewhere;
use xpm_tests::{Cluster, Daemon, have, wait_until};

/// How long I/O that is to be held is watched.
const HELD: Duration = Duration::from_secs(2);

/// A copy of the state directory, and the xpm-blk that serves with it.
struct Copy {
    dir: PathBuf,
    daemon: Daemon,
}

/// Where the copy of a machine lies is its own: only what the first one's sockets would be in the way of is changed.
fn copy_state(cluster: &Cluster, devices: &[&str]) -> PathBuf {
    let (from, to) = (cluster.dir().join("blk"), cluster.dir().join("copy"));
    let done = Command::new("cp").arg("-a").arg(&from).arg(&to).status().unwrap();
    assert!(done.success());
    for name in devices {
        let path = to.join(format!("devices/{name}.json"));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(&format!("{name}.sock"), &format!("{name}.copy.sock"))).unwrap();
    }
    to
}

/// Starts xpm-blk with a copy; with another `/etc/machine-id` in a mount namespace of its own where it is another
/// machine.
fn start_copy(cluster: &Cluster, state: &Path, is_another_machine: bool) -> Copy {
    let dir = cluster.dir();
    let config = dir.join("blk2.toml");
    let text = format!(
        "allocator = \"{}\"\ncontrol = \"{}\"\nstate = \"{}\"\nallow-unsafe-swap = true\n",
        cluster.allocator_url(),
        dir.join("blk2.sock").display(),
        state.display()
    );
    std::fs::write(&config, text).unwrap();
    let words = ["--config".to_owned(), config.display().to_string()];
    let daemon = match is_another_machine {
        true => start_elsewhere(dir, "copy-log", "xpm-blk", &words),
        false => Daemon::start(dir, "copy-log", "xpm-blk", &words),
    };
    let control = dir.join("blk2.sock");
    wait_until("the copy runs", || std::os::unix::net::UnixStream::connect(&control).is_ok());
    Copy { dir: dir.to_owned(), daemon }
}

impl Copy {
    fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.copy.sock"))
    }

    fn waits_for(&self, part: &str) {
        wait_until(part, || self.daemon.log().contains(part));
    }

    /// Whether a write through the copy's device ends with success while it is watched.
    fn writes(&self, name: &str) -> bool {
        let socket = self.socket(name);
        if !socket.exists() {
            return false;
        }
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw", &uri, "-c", "write -P 9 0 64k"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while start.elapsed() < HELD && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let said = child.wait_with_output().unwrap().stdout;
        String::from_utf8_lossy(&said).contains("wrote 65536/65536")
    }
}

fn io(uri: &str, command: &str) -> String {
    let output = Command::new("qemu-io").args(["-f", "raw", uri, "-c", command]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn write(uri: &str) {
    assert!(io(uri, "write -P 5 0 1M").contains("wrote 1048576/1048576"));
}

/// The first one goes on, with its own bytes.
fn is_unharmed(uri: &str) {
    let said = io(uri, "read -P 5 0 1M");
    assert!(said.contains("read 1048576/1048576") && !said.contains("failed"), "{said}");
    write(uri);
}

fn client_id(state: &Path) -> String {
    std::fs::read_to_string(state.join("client-id")).unwrap()
}

#[test]
fn a_copy_on_another_machine_is_refused_while_the_first_one_lives_and_fences_it_only_by_force() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("a", "32MiB", &["--stripe", "2"], "nbd-tcp");
    write(&uri);
    let copy = start_copy(&cluster, &copy_state(&cluster, &["a"]), true);
    copy.waits_for("it was shown on another machine");
    assert!(!copy.writes("a"), "the copy writes");
    is_unharmed(&uri);
    let events = cluster.ok(&["events"]);
    assert!(events.contains("copy-refused"), "{events}");

    // The copy lets go of its record; the allocation stays the first one's.
    let detached = cluster.xpm_of_second(&["blk", "detach", "a"]);
    assert!(detached.status.success(), "{}", String::from_utf8_lossy(&detached.stderr));
    let owner = cluster.json(&["alloc", "show", "a"])["owner"].clone();
    assert!(owner.is_object(), "the copy gave the first one's allocation back");
    let form = format!("nbd-socket={}", copy.socket("a").display());
    let refused = cluster.xpm_of_second(&["blk", "attach", "a", "--as", &form]);
    let line = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && line.matches("(machine ").count() == 2, "both are named: {line}");
    is_unharmed(&uri);

    let forced = cluster.xpm_of_second(&["blk", "attach", "a", "--as", &form, "--force"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    assert!(copy.writes("a"));
    assert!(io(&uri, "write -P 6 0 64k").contains("Input/output error"), "the first one is cut off");
}

#[test]
fn the_allocators_word_ends_the_io_of_a_first_one_that_is_fenced_by_force() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    // Refusals alone end nothing for as long as the test runs.
    cluster.restart_blk_with("refusal-limit = \"1h\"");
    let uri = cluster.attach("a", "16MiB", &[], "nbd-tcp");
    write(&uri);
    let copy = start_copy(&cluster, &copy_state(&cluster, &["a"]), true);
    copy.waits_for("it was shown on another machine");
    assert!(cluster.xpm_of_second(&["blk", "detach", "a"]).status.success());
    let form = format!("nbd-socket={}", copy.socket("a").display());
    let forced = cluster.xpm_of_second(&["blk", "attach", "a", "--as", &form, "--force"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    wait_until("the first one hears of it", || cluster.json(&["blk", "show", "a"])["state"] == "lost");
    assert!(io(&uri, "write -P 6 0 64k").contains("Input/output error"), "its I/O ends");
    let shown = cluster.json(&["blk", "show", "a"]).to_string();
    assert!(shown.contains("belongs to") && shown.contains("(machine "), "it says to whom: {shown}");
    assert!(copy.writes("a"));
}

#[test]
fn a_copy_on_another_machine_shows_nothing_while_the_allocator_is_away() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("a", "16MiB", &[], "nbd-tcp");
    write(&uri);
    cluster.allocator.kill();
    let copy = start_copy(&cluster, &copy_state(&cluster, &["a"]), true);
    copy.waits_for("it was shown on another machine");
    assert!(!copy.writes("a"), "the copy writes");
    is_unharmed(&uri);
}

#[test]
fn of_two_copies_with_one_machine_id_the_appliance_lets_the_first_one_in() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let transports = ["nbd-tcp", "nbd-unix", "shm"];
    let names = ["t", "u", "s"];
    let uris: Vec<String> = names
        .iter()
        .zip(transports)
        .map(|(name, transport)| cluster.attach(name, "16MiB", &[], transport))
        .collect();
    uris.iter().for_each(|uri| write(uri));
    cluster.allocator.kill();
    let copy = start_copy(&cluster, &copy_state(&cluster, &names), false);
    for (name, uri) in names.iter().zip(&uris) {
        copy.waits_for(&format!("`{name}` is held by "));
        assert!(!copy.writes(name), "the copy writes to {name}");
        is_unharmed(uri);
    }
    // Also when the first one's process is killed and comes back.
    cluster.restart_blk();
    for uri in &uris {
        wait_until("it is back", || io(uri, "read -P 5 0 1M").contains("read 1048576/1048576"));
        is_unharmed(uri);
    }
}

#[test]
fn after_a_reboot_devices_come_back_without_the_allocator() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("a", "16MiB", &[], "nbd-tcp");
    write(&uri);
    cluster.allocator.kill();
    cluster.blk.kill();
    // A reboot, as an appliance sees it: the same machine and installation, and another seat.
    let copy = start_copy(&cluster, &copy_state(&cluster, &["a"]), false);
    wait_until("the appliance lets it in", || copy.writes("a"));
    // The one that it followed is let in no more.
    let socket = cluster.dir().join("a.sock");
    let _ = std::fs::remove_file(&socket);
    cluster.restart_blk();
    wait_until("it is refused", || cluster.blk.log().contains("`a` is held by "));
}

#[test]
fn a_copy_of_an_image_without_devices_is_a_client_of_its_own() {
    let mut cluster = Cluster::start(1);
    cluster.blk.stop();
    let state = copy_state(&cluster, &[]);
    let copy = start_copy(&cluster, &state, true);
    copy.waits_for("this becomes a new client");
    assert_ne!(client_id(&cluster.dir().join("blk")), client_id(&state));
    cluster.restart_blk();
}
