//! What is shown of the ways to appliances is true, though nobody uses them.

#![allow(missing_docs)]

use std::process::{Command, Stdio};

use rustix::process::Signal;
use xpm_tests::{Cluster, have, wait_until};

fn state(cluster: &Cluster, name: &str) -> String {
    cluster.json(&["blk", "show", name])["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_idle_device_shows_that_its_appliance_stands_still() {
    let cluster = Cluster::start(1);
    for transport in ["nbd-tcp", "nbd-unix", "shm"] {
        cluster.attach(transport, "16MiB", &[], transport);
    }
    cluster.appliances[0].freeze();
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it holds", || state(&cluster, name) == "holding");
        let shown = cluster.json(&["blk", "show", name]);
        assert!(shown["links"][0]["reason"].to_string().contains("does not answer"), "{shown}");
    }
    assert_eq!(state(&cluster, "shm"), "live", "its I/O passes");
    cluster.appliances[0].signal(Signal::CONT);
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it lives again", || state(&cluster, name) == "live");
    }
}

/// The connection stands, so nothing breaks; and the time that I/O is held begins when it stopped.
#[test]
fn io_fails_when_an_appliance_stands_still_for_longer_than_it_is_held() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    cluster.restart_blk_with("hold = \"3s\"");
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    let read = || {
        let mut read = Command::new("qemu-io");
        read.args(["-f", "raw", &uri, "-c", "read 0 4k"]).stdin(Stdio::null());
        read.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("qemu-io starts")
    };
    cluster.appliances[0].freeze();
    let mut first = read();
    wait_until("it is not held for ever", || first.try_wait().expect("it is ours").is_some());
    let output = first.wait_with_output().expect("it ended");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Input/output error"), "{said}");
    cluster.appliances[0].signal(Signal::CONT);
    wait_until("it lives again", || state(&cluster, "v") == "live");
    assert!(read().wait().expect("it ends").success());
}
