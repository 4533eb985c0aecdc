//! Parts that go away while there is I/O.

#![allow(missing_docs)]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use xpm_tests::{Cluster, have, wait_until};

/// fio that writes and verifies for some seconds, as one pass after the other.
fn verified_load(cluster: &Cluster, uri: &str, seconds: u32) -> Child {
    Command::new("fio")
        .current_dir(cluster.dir())
        .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=8", "--size=32M"])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=64",
            "--verify_state_save=0",
            "--time_based",
        ])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--uri={uri}"))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

/// The state of the device; empty while it does not exist.
fn state(cluster: &Cluster, name: &str) -> String {
    let devices = cluster.json(&["blk", "list"]);
    let device = devices.as_array().and_then(|devices| devices.iter().find(|device| device["name"] == name));
    device.and_then(|device| device["state"].as_str()).unwrap_or_default().to_owned()
}

#[test]
fn no_io_notices_that_the_allocator_is_restarted() {
    if !have("fio") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let uri = cluster.attach("busy", "32MiB", &["--stripe", "2"], "nbd-tcp");
    let mut load = verified_load(&cluster, &uri, 4);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(700));
        cluster.restart_allocator();
    }
    assert!(load.wait().unwrap().success(), "fio saw an error");
    let kept = cluster.json(&["alloc", "show", "busy"]);
    assert_eq!(kept["state"], "ready");
    assert!(kept["owner"].is_object(), "{kept}");
    assert_eq!(cluster.json(&["blk", "show", "busy"])["counters"]["errors"], 0);
}

#[test]
fn a_stopped_appliance_is_waited_for() {
    if !have("fio") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("held", "32MiB", &["--stripe", "2"], "nbd-tcp");
    let mut load = verified_load(&cluster, &uri, 4);
    std::thread::sleep(Duration::from_secs(1));
    cluster.appliances[1].signal(rustix::process::Signal::STOP);
    std::thread::sleep(Duration::from_secs(1));
    assert!(load.try_wait().unwrap().is_none(), "I/O waits");
    cluster.appliances[1].signal(rustix::process::Signal::CONT);
    assert!(load.wait().unwrap().success(), "fio saw an error");
}

#[test]
fn memory_that_is_gone_is_lost_and_never_zeros() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("lost", "16MiB", &[], "nbd-tcp");
    let io =
        |command: &str| Command::new("qemu-io").args(["-f", "raw", &uri, "-c", command]).output().unwrap();
    let written = io("write -P 9 0 1M");
    assert!(written.status.success());
    cluster.restart_appliance(0);
    let read = io("read -P 9 0 1M");
    let said = String::from_utf8_lossy(&read.stdout).into_owned() + &String::from_utf8_lossy(&read.stderr);
    assert!(said.contains("Input/output error"), "{said}");
    wait_until("the device says so", || state(&cluster, "lost") == "lost");
    assert!(!cluster.xpm(&["status"]).stdout.is_empty());
}

#[test]
fn devices_come_back_while_the_allocator_is_away() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let uri = cluster.attach("back", "32MiB", &["--stripe", "2"], "nbd-tcp");
    let io = |command: &str| {
        let output = Command::new("qemu-io").args(["-f", "raw", &uri, "-c", command]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    assert!(!io("write -P 5 0 32M").contains("failed"));
    cluster.allocator.kill();
    cluster.restart_blk();
    wait_until("the device is back", || state(&cluster, "back") == "live");
    let said = io("read -P 5 0 32M");
    assert!(said.contains("read 33554432/33554432") && !said.contains("failed"), "{said}");
}

#[test]
fn a_client_that_is_killed_harms_no_other() {
    if !have("fio") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("shared", "64MiB", &["--stripe", "2"], "nbd-unix");
    let mut good = verified_load(&cluster, &uri, 4);
    for _ in 0..8 {
        let mut victim = Command::new("fio")
            .current_dir(cluster.dir())
            .args([
                "--thread",
                "--name=r",
                "--ioengine=nbd",
                "--rw=read",
                "--bs=1m",
                "--iodepth=16",
                "--offset=32M",
                "--size=32M",
            ])
            .args(["--time_based", "--runtime=30"])
            .arg(format!("--uri={uri}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(250));
        victim.kill().unwrap();
        victim.wait().unwrap();
    }
    assert!(good.wait().unwrap().success(), "fio saw an error");
}
