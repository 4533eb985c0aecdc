//! The allocator's metadata are lost, old, or at odds with what appliances have.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use xpm_control::client::Client;
use xpm_protocol::api::appliance::{Commit, Grant};
use xpm_protocol::{Epoch, GrantKey};
use xpm_tests::{Cluster, have, wait_until};

fn verified_load(uri: &str, seconds: u32) -> Child {
    Command::new("fio")
        .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=8", "--size=32M"])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=64",
            "--verify_state_save=0",
            "--time_based",
        ])
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
    let output = cluster.xpm(&["fsck", "-o", "wide"]);
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
    assert!(!output.status.success() && line.contains("is known, and not named"), "{line}");
}

#[test]
fn memory_that_a_restored_backup_does_not_know_is_freed_after_its_grace() {
    let mut cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "old", "--size", "32MiB"]);
    let backup = cluster.dir().join("backup.json").display().to_string();
    cluster.ok(&["backup", &backup]);
    assert!(cluster.refused(&["backup", &backup]).contains("backup.json"), "it is not written over");
    cluster.ok(&["alloc", "create", "newer", "--size", "64MiB", "--stripe", "2"]);
    cluster.replace_metadata(&["restore", &backup, "--accept-loss"]);
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
    assert!(list.lines().any(|line| line.starts_with("half") && line.contains(" lost")), "{list}");
    std::thread::sleep(Duration::from_millis(100));
    cluster.ok(&["alloc", "delete", "half"]);
    wait_until("nothing is wrong", || fsck(&cluster).0);
}

#[test]
fn who_uses_it_is_its_owner_after_a_recovery() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let second = cluster.second_client();
    let uri = cluster.attach("plain", "32MiB", &["--stripe", "2"], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 0x21 0 32M"));
    let before = cluster.json(&["alloc", "show", "plain"]);
    let controls = controls(&cluster);
    let state = cluster.dir().join("blk").display().to_string();
    let socket = format!("nbd-socket={}", cluster.dir().join("second.sock").display());
    let network: Vec<&str> =
        ["recover", "--from-network"].into_iter().chain(controls.iter().map(String::as_str)).collect();
    let with_keys = [network.as_slice(), &["--client-state", &state]].concat();
    for (task, asks) in [(network, true), (with_keys, false)] {
        // Nothing of it was moved or resized: only its first owner was told.
        let said = cluster.replace_metadata(&task);
        assert_eq!(said.contains("its owner is asked for its keys"), asks, "{said}");
        let after = cluster.json(&["alloc", "show", "plain"]);
        assert_eq!(before["owner"], after["owner"]);
        let (fine, found) = fsck(&cluster);
        assert!(fine, "{found}");
        let taken = cluster.xpm_of_second(&["blk", "attach", "plain", "--as", &socket]);
        let line = String::from_utf8_lossy(&taken.stderr).into_owned();
        assert!(!taken.status.success() && line.contains("in use by"), "{line}");
        assert!(cluster.refused(&["alloc", "delete", "plain"]).contains("in use by"));
        assert!(qemu_io(&uri, "read -P 0x21 0 32M"), "who uses it notices nothing");
    }
    cluster.ok(&["blk", "detach", "plain"]);
    let taken = cluster.xpm_of_second(&["blk", "attach", "plain", "--as", &socket]);
    assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    let uri = format!("nbd+unix:///plain?socket={}", cluster.dir().join("second.sock").display());
    assert!(qemu_io(&uri, "read -P 0x21 0 32M"));
    drop(second);
}

/// Raises the epoch of the only grant of the appliance at this URL, which no allocator wanted.
fn raise_behind_its_back(control: &str) {
    let client = Client::new(control, None).expect("a URL");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let raised = runtime.block_on(async {
        let grants: Vec<Grant> = client.get("/v1/grants").await?;
        let grant = &grants[0];
        let commit = Commit {
            allocation: grant.allocation,
            name: grant.name.clone(),
            epoch: grant.epoch.next(),
            key: GrantKey::from_bytes([9; 32]),
            regions: grant.regions.clone(),
            from: None,
            descriptor: None,
        };
        client.put::<_, Grant>(&format!("/v1/grants/{}", grant.id), &commit).await
    });
    assert_eq!(raised.expect("it is raised").epoch, Epoch(2));
}

#[test]
fn fsck_sees_another_epoch_and_what_it_cannot_see() {
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "split", "--size", "64MiB", "--stripe", "2"]);
    assert!(fsck(&cluster).0);
    raise_behind_its_back(&controls(&cluster)[0]);
    let (fine, found) = fsck(&cluster);
    assert!(!fine && found.contains("`split` is at epoch 1 by the record, and at epoch 2"), "{found}");
    cluster.appliances[1].signal(rustix::process::Signal::STOP);
    wait_until("it is silent", || fsck(&cluster).1.contains("APPLIANCE_UNCHECKED: appliance a1"));
    cluster.appliances[1].signal(rustix::process::Signal::CONT);
    cluster.wait_up();
    let json = cluster.xpm(&["fsck", "--json"]);
    let found: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(
        (json.status.code(), found["problems"].as_array().map(Vec::len)),
        (Some(2), Some(1)),
        "{found}"
    );
}
