//! Refusals: each with one clear line, nothing lost, everything alive.

#![allow(missing_docs)]

use std::process::Command;

use xpm_tests::{Cluster, free_port, programs};

/// A program of this project that has to fail at its start; what it said.
fn fails(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(programs().join(program)).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert!(!output.status.success(), "{program} {arguments:?} went well");
    assert!(!said.contains("panicked") && !said.is_empty(), "{program} {arguments:?}: {said}");
    said
}

#[test]
fn what_cannot_be_asked_of_the_pool() {
    let mut cluster = Cluster::start(2);
    assert!(cluster.refused(&["alloc", "create", "none", "--size", "0"]).contains("cannot be 0"));
    cluster.refused(&["alloc", "create", "huge", "--size", "2TiB"]);
    cluster.refused(&["alloc", "create", "wide", "--size", "64MiB", "--region-size", "3MiB"]);
    cluster.ok(&["alloc", "create", "twice", "--size", "32MiB"]);
    assert!(cluster.refused(&["alloc", "create", "twice", "--size", "32MiB"]).contains("twice"));
    assert!(cluster.refused(&["alloc", "show", "missing"]).contains("missing"));
    assert!(cluster.refused(&["alloc", "delete", "missing"]).contains("missing"));
    assert!(
        cluster.refused(&["blk", "attach", "missing", "--as", "nbd-socket=/tmp/x.sock"]).contains("missing")
    );
    assert!(cluster.refused(&["blk", "detach", "missing"]).contains("missing"));
    // Nothing of all that is left, and everyone lives.
    let list = cluster.json(&["alloc", "list"]);
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert!(cluster.allocator.is_alive() && cluster.blk.is_alive());
    assert!(cluster.appliances.iter_mut().all(xpm_tests::Daemon::is_alive));
}

#[test]
fn what_is_in_use_stays() {
    let cluster = Cluster::start(2);
    cluster.attach("used", "32MiB", &[], "nbd-tcp");
    let line = cluster.refused(&["alloc", "delete", "used"]);
    assert!(line.contains("used") && line.contains("force"), "{line}");
    assert_eq!(cluster.json(&["alloc", "show", "used"])["state"], "ready");
    // Another form of the same allocation is refused too.
    cluster.refused(&["blk", "attach", "used", "--as", "nbd-socket=127.0.0.1:1"]);
    cluster.ok(&["blk", "detach", "used"]);
    cluster.ok(&["alloc", "delete", "used"]);
    let free = || {
        let list = cluster.json(&["appliance", "list"]);
        list.as_array().unwrap().iter().all(|appliance| appliance["status"]["granted"] == 0)
    };
    xpm_tests::wait_until("all memory is back", free);
}

#[test]
fn kernel_devices_without_a_driver_say_what_to_do() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "dev", "--size", "16MiB"]);
    for (form, node, hint) in [("ublk", "/dev/ublk-control", "ublk_drv"), ("nbd", "/dev/nbd0", "nbd")] {
        if !std::path::Path::new(node).exists() {
            let line = cluster.refused(&["blk", "attach", "dev", "--as", form]);
            assert!(line.contains(hint), "{form}: {line}");
        }
    }
    assert!(
        cluster.json(&["alloc", "show", "dev"])["owner"].is_null(),
        "nobody owns it after a failed attach"
    );
}

#[test]
fn daemons_that_cannot_start_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let taken = std::net::TcpListener::bind(("127.0.0.1", free_port())).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let port = address.rsplit_once(':').unwrap().1;
    let said = fails("xpm-allocator", &["--listen", &address, "--data", &path("a")]);
    assert!(said.contains(port), "{said}");
    let said = fails(
        "xpm-appliance",
        &["--memory", "64MiB", "--nbd", &address, "--state", &path("b"), "--run-dir", &path("r")],
    );
    assert!(said.contains(port), "{said}");
    for memory in ["0", "lots", "-5"] {
        fails("xpm-appliance", &["--memory", memory, "--state", &path("c"), "--run-dir", &path("r")]);
    }
    fails(
        "xpm-appliance",
        &["--memory", "64MiB", "--region-size", "3MiB", "--state", &path("c"), "--run-dir", &path("r")],
    );
    for program in ["xpm-allocator", "xpm-appliance", "xpm-blk", "xpm"] {
        assert!(fails(program, &["--no-such-flag"]).contains("--no-such-flag"));
    }
    // Beyond this machine only with a token.
    let said = fails("xpm-allocator", &["--listen", "0.0.0.0:0", "--data", &path("d")]);
    assert!(said.contains("token"), "{said}");
    let open = path("token");
    std::fs::write(&open, "0123456789abcdef0123456789abcdef\n").unwrap();
    let said = fails("xpm-allocator", &["--token-file", &open, "--data", &path("d")]);
    assert!(said.contains("mode") || said.contains("chmod"), "{said}");
}

#[test]
fn bad_configuration_is_named_by_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("blk.toml");
    for (text, hint) in [
        ("allocator = \"http://127.0.0.1:1\"\nsped = 3\n", "sped"),
        ("allocator = \"http://127.0.0.1:1\"\nhold = \"later\"\n", "hold"),
        ("allocator = \n", "blk.toml"),
        ("allocator = \"http://127.0.0.1:1\"\n[[device]]\nname = \"../x\"\nas = \"ublk\"\n", "name"),
        ("allocator = \"http://127.0.0.1:1\"\n[[device]]\nname = \"x\"\nas = \"floppy\"\n", "floppy"),
    ] {
        std::fs::write(&config, text).unwrap();
        let said = fails("xpm-blk", &["--config", &config.display().to_string(), "--check"]);
        assert!(said.contains(hint) && said.contains("blk.toml"), "{text}: {said}");
    }
}

#[test]
fn an_allocation_is_not_shown_to_the_network_by_mistake() {
    let mut cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "16MiB"]);
    let form = format!("nbd-socket=0.0.0.0:{}", free_port());
    let line = cluster.refused(&["blk", "attach", "v", "--as", &form]);
    assert!(line.contains("other machines") && line.contains("insecure"), "{line}");
    assert!(cluster.json(&["alloc", "show", "v"])["owner"].is_null(), "nothing was begun");
    cluster.restart_blk_with("insecure = true");
    cluster.ok(&["blk", "attach", "v", "--as", &form]);
    // One that is shown already stays after the operator changed that: it may be in use.
    cluster.restart_blk();
    xpm_tests::wait_until("it is shown again", || cluster.json(&["blk", "show", "v"])["state"] == "live");
    assert!(cluster.blk.log().contains("can be reached from other machines"), "{}", cluster.blk.log());
}

#[test]
fn a_key_is_sent_to_no_socket_that_others_can_replace() {
    use std::os::unix::fs::PermissionsExt;
    let open = tempfile::tempdir().expect("a directory");
    let run = open.path().join("run").display().to_string();
    let [nbd, shm] = ["nbd.sock", "shm.sock"].map(|name| format!("{run}/{name}"));
    let cluster = Cluster::start_pool(&[vec!["--unix", &nbd, "--shm", &shm]], false);
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o1777)).expect("it can be opened to all");
    cluster.ok(&["alloc", "create", "v", "--size", "16MiB"]);
    let form = format!("nbd-socket={}", cluster.dir().join("v.sock").display());
    for transport in ["shm", "nbd-unix"] {
        let line = cluster.refused(&["blk", "attach", "v", "--as", &form, "--transport", transport]);
        assert!(line.contains("written to by others"), "{line}");
    }
    cluster.ok(&["blk", "attach", "v", "--as", &form]);
    let shown = cluster.json(&["blk", "show", "v"]);
    assert_eq!(shown["links"][0]["transport"], "nbd-tcp", "{shown}");
}
