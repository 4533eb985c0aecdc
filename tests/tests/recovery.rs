//! The allocator's metadata are lost, old, or at odds with what appliances have.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use xpm_tests::{Cluster, have, wait_until};

fn verified_load(uri: &str, seconds: u32) -> Child {
    Command::new("fio")
        .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=8", "--size=32M"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--time_based"])
        .args([format!("--runtime={seconds}"), format!("--uri={uri}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("fio can be started")
}

fn qemu_io(uri: &str, command: &str) -> bool {
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", command, uri]).output().expect("qemu-io");
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("verification failed")
}

fn controls(cluster: &Cluster) -> Vec<String> {
    let list = cluster.json(&["appliance", "list"]);
    let control = |one: &Value| one["info"]["control"].as_str().map(str::to_owned);
    list.as_array().expect("a list").iter().filter_map(control).collect()
}

fn fsck(cluster: &Cluster) -> (bool, String) {
    let output = cluster.xpm(&["fsck"]);
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn metadata_that_are_gone_are_recovered_from_the_network() {
    if !have("fio") || !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(3);
    let kept = cluster.attach("kept", "64MiB", &["--stripe", "2"], "nbd-tcp");
    assert!(qemu_io(&kept, "write -P 0x44 0 64M"));
    cluster.ok(&["blk", "detach", "kept"]);
    let uri = cluster.attach("used", "64MiB", &["--region-size", "16MiB", "--reclaimable"], "nbd-tcp");
    // Once moved and once grown: what appliances know has to be of now.
    let first = cluster.json(&["alloc", "show", "used"])["regions"][0]["appliance_name"].clone();
    cluster.ok(&["appliance", "drain", first.as_str().expect("a name")]);
    cluster.ok(&["alloc", "resize", "used", "96MiB"]);
    let before = cluster.json(&["alloc", "show", "used"]);
    assert!(fsck(&cluster).0, "{:?}", fsck(&cluster));
    let mut load = verified_load(&uri, 8);
    let controls = controls(&cluster);
    let state = cluster.dir().join("blk").display().to_string();
    let mut task = vec!["recover", "--from-network"];
    task.extend(controls.iter().map(String::as_str));
    task.extend(["--client-state", &state]);
    let said = cluster.replace_metadata(&task);
    assert!(said.contains("`used` of 96MiB is recovered\n"), "{said}");
    assert!(said.contains("`kept` of 64MiB is recovered; its keys are made anew"), "{said}");
    let (fine, found) = fsck(&cluster);
    assert!(fine, "{found}");
    let after = cluster.json(&["alloc", "show", "used"]);
    for field in ["id", "size", "epoch", "layout", "regions", "reclaimable", "taken"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    assert_eq!(before["owner"]["client"], after["owner"]["client"]);
    // It is as good as before.
    cluster.ok(&["alloc", "resize", "used", "128MiB"]);
    let socket = cluster.dir().join("kept-again.sock");
    cluster.ok(&["blk", "attach", "kept", "--as", &format!("nbd-socket={}", socket.display())]);
    assert!(qemu_io(&format!("nbd+unix:///kept?socket={}", socket.display()), "read -P 0x44 0 64M"));
    assert!(load.wait().expect("fio ends").success(), "no I/O noticed");
    let full = cluster.dir().join("allocator").display().to_string();
    let mut again = Command::new(xpm_tests::programs().join("xpm-allocator"));
    cluster.allocator.kill();
    let output =
        again.args(["--data", &full, "recover", "--from-network", &controls[0]]).output().expect("it starts");
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && line.contains("there are metadata already"), "{line}");
}

#[test]
fn memory_that_a_restored_backup_does_not_know_is_freed_after_its_grace() {
    let mut cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "old", "--size", "32MiB"]);
    let backup = cluster.dir().join("backup.json").display().to_string();
    cluster.ok(&["backup", &backup]);
    assert!(cluster.refused(&["backup", &backup]).contains("backup.json"), "it is not written over");
    cluster.ok(&["alloc", "create", "newer", "--size", "64MiB", "--stripe", "2"]);
    cluster.replace_metadata(&["restore", &backup]);
    let (fine, found) = fsck(&cluster);
    assert!(!fine && found.contains("of `newer` that no record knows"), "{found}");
    let names = cluster.json(&["alloc", "list"]);
    assert_eq!(names.as_array().map(Vec::len), Some(1), "{names}");
    wait_until("it is told", || cluster.ok(&["events"]).contains("garbage-found"));
    wait_until("it is freed", || cluster.ok(&["events"]).contains("garbage-freed"));
    wait_until("all agrees", || fsck(&cluster).0);
    let granted = |list: &Value| -> u64 {
        list.as_array().expect("a list").iter().filter_map(|one| one["status"]["granted"].as_u64()).sum()
    };
    wait_until("its memory is free", || granted(&cluster.json(&["appliance", "list"])) == 32 << 20);
}

#[test]
fn memory_that_an_appliance_lost_is_shown() {
    let mut cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "half", "--size", "64MiB", "--stripe", "2"]);
    assert!(fsck(&cluster).0);
    cluster.restart_appliance(1);
    wait_until("it is shown", || cluster.ok(&["alloc", "list"]).contains("lost on a1"));
    let (fine, found) = fsck(&cluster);
    assert!(!fine && found.contains("`half` has lost memory on appliance a1"), "{found}");
    cluster.restart_appliance(0);
    wait_until("all of it is lost", || {
        cluster.json(&["alloc", "show", "half"])["lost"].as_array().is_some_and(|lost| lost.len() == 2)
    });
    let list = cluster.ok(&["alloc", "list"]);
    assert!(list.lines().any(|line| line.starts_with("half") && line.contains(" lost ")), "{list}");
    std::thread::sleep(Duration::from_millis(100));
    cluster.ok(&["alloc", "delete", "half"]);
    wait_until("nothing is wrong", || fsck(&cluster).0);
}
