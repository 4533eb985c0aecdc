//! Metadata of yesterday: a snapshot of the allocator's machine is reverted, or an old copy restored. No client loses
//! memory.

#![allow(missing_docs)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use xpm_tests::several::Several;
use xpm_tests::{Cluster, programs, status_at, wait_until};

/// Looks at appliances, at one a second, after which something would be judged.
const LOOKS: Duration = Duration::from_secs(4);

fn qemu_io(uri: &str, command: &str) -> bool {
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", command, uri]).output().expect("qemu-io");
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("verification failed")
}

/// Puts a copy of a directory in place of another one.
fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let done = Command::new("cp").arg("-a").args([from, to]).status().expect("cp");
    assert!(done.success());
}

fn controls(list: &Value) -> Vec<String> {
    let control = |one: &Value| one["info"]["control"].as_str().map(str::to_owned);
    list.as_array().expect("a list").iter().filter_map(control).collect()
}

fn is_lost(list: &Value) -> bool {
    list.as_array().expect("a list").iter().any(|one| one["lost"].as_array().is_some_and(|on| !on.is_empty()))
}

#[test]
fn metadata_of_yesterday_cost_nobody_their_memory() {
    let mut cluster = Cluster::start(2);
    let file = cluster.dir().join("pool.toml");
    std::fs::write(&file, "[[account]]\nname='a'\n").unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()]);
    let uri = cluster.attach("used", "32MiB", &["--region-size", "16MiB"], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 0x21 0 32M"));
    let (data, yesterday) = (cluster.data(), cluster.dir().join("yesterday"));
    cluster.allocator.stop();
    copy(&data, &yesterday);
    cluster.restart_allocator();
    cluster.wait_up();
    // Since then it grew, moved to the other appliance, and another one was made.
    cluster.ok(&["alloc", "resize", "used", "64MiB"]);
    let shown = |cluster: &Cluster| cluster.json(&["alloc", "show", "used"]);
    let settled =
        |cluster: &Cluster| shown(cluster)["size"] == 64 << 20 && shown(cluster)["change"].is_null();
    wait_until("it has grown", || settled(&cluster));
    let first = shown(&cluster)["regions"][0]["appliance_name"].as_str().unwrap().to_owned();
    cluster.ok(&["appliance", "drain", &first]);
    wait_until("it has moved", || {
        settled(&cluster)
            && shown(&cluster)["regions"]
                .as_array()
                .unwrap()
                .iter()
                .all(|one| one["appliance_name"] != *first)
    });
    cluster.ok(&["alloc", "create", "newer", "--size", "16MiB"]);
    let today = shown(&cluster);
    cluster.allocator.kill();
    copy(&yesterday, &data);
    cluster.restart_allocator();
    let behind = |cluster: &Cluster| cluster.status()["behind"].clone();
    wait_until("it is noticed", || behind(&cluster)["text"].is_string());
    std::thread::sleep(LOOKS);
    assert!(!is_lost(&cluster.json(&["alloc", "list"])), "nothing is judged");
    let events = cluster.ok(&["events"]);
    assert!(events.contains("metadata-behind"), "{events}");
    assert!(!events.contains("garbage") && !events.contains("freed"), "{events}");
    for refused in [
        &["alloc", "create", "x", "--size", "16MiB"][..],
        &["alloc", "resize", "used", "96MiB"],
        &["alloc", "show", "used"],
    ] {
        assert!(cluster.refused(refused).contains("recover --from-network"));
    }
    assert!(qemu_io(&uri, "read -P 0x21 0 32M"), "its device goes on");
    assert_eq!(cluster.json(&["blk", "show", "used"])["size"], 64 << 20, "with its own newer map");
    let controls = controls(&cluster.json(&["appliance", "list"]));
    let mut task = vec!["recover", "--from-network"];
    task.extend(controls.iter().map(String::as_str));
    let said = cluster.mend_metadata(&task);
    assert!(said.contains("`used` of 64MiB is recovered;") && said.contains("documents are as"), "{said}");
    assert!(behind(&cluster).is_null());
    for field in ["id", "size", "epoch", "owner", "regions"] {
        assert_eq!(shown(&cluster)[field], today[field], "{field}");
    }
    assert!(cluster.ok(&["get", "account"]).contains("name='a'"), "documents stay");
    assert!(qemu_io(&uri, "write -P 0x22 32M 32M") && qemu_io(&uri, "read -P 0x21 0 32M"));
    cluster.ok(&["alloc", "delete", "newer"]);
    // Appliances have no keys of the map that only they described. The owner is asked for them; it goes on meanwhile.
    let refused = cluster.xpm(&["alloc", "resize", "used", "96MiB"]);
    let line = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.success() || line.contains("its owner is asked for them"), "{line}");
    wait_until("its owner has told its keys", || {
        cluster.xpm(&["alloc", "resize", "used", "96MiB"]).status.success()
    });
    wait_until("it has grown", || shown(&cluster)["size"] == 96 << 20 && shown(&cluster)["change"].is_null());
    assert_eq!(shown(&cluster)["epoch"], today["epoch"], "nobody was cut off");
    assert!(qemu_io(&uri, "write -P 0x23 64M 32M") && qemu_io(&uri, "read -P 0x21 0 32M"));
}

#[test]
fn a_client_that_starts_again_after_a_recovery_keeps_its_keys() {
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("used", "32MiB", &["--region-size", "16MiB"], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 0x21 0 32M"));
    // It hears nothing of the recovery.
    cluster.blk.kill();
    let controls = controls(&cluster.json(&["appliance", "list"]));
    let said = cluster.replace_metadata(&["recover", "--from-network", &controls[0]]);
    assert!(said.contains("its owner is asked for its keys"), "{said}");
    cluster.restart_blk();
    wait_until("its owner has told its keys", || {
        cluster.xpm(&["alloc", "resize", "used", "64MiB"]).status.success()
    });
    assert!(qemu_io(&uri, "read -P 0x21 0 32M"), "its keys are the right ones");
    assert_eq!(cluster.json(&["alloc", "show", "used"])["epoch"], 1, "nobody was cut off");
}

#[test]
fn an_allocator_that_lived_for_one_order_leaves_a_trace() {
    let mut cluster = Cluster::start(1);
    let (data, yesterday) = (cluster.data(), cluster.dir().join("yesterday"));
    cluster.allocator.stop();
    cluster.blk.stop();
    copy(&data, &yesterday);
    // From now on the appliance hears orders only: its heartbeats go elsewhere.
    let nowhere = format!("http://127.0.0.1:{}", xpm_tests::free_port());
    cluster.change_appliance(0, |words| {
        let at = words.iter().position(|word| word == "--allocator").unwrap();
        words[at + 1] = nowhere;
    });
    cluster.restart_appliance(0);
    let place = data.display().to_string();
    let place = ["--data", &place, "--heartbeat", "1m"];
    cluster.restart_allocator_with(&place);
    cluster.ok(&["alloc", "create", "newer", "--size", "16MiB"]);
    cluster.allocator.kill();
    copy(&yesterday, &data);
    cluster.restart_allocator_with(&place);
    wait_until("it is noticed", || cluster.status()["behind"]["text"].is_string());
}

#[test]
fn an_old_copy_of_etcd_is_noticed_and_mended() {
    let mut several = Several::start(1, 1, 2);
    several.ok(&["alloc", "create", "kept", "--size", "16MiB"]);
    several.ok(&[
        "blk",
        "attach",
        "kept",
        "--as",
        &format!("nbd-socket={}", several.dir().join("k").display()),
    ]);
    let (data, yesterday) = (several.etcd.data(0), several.dir().join("yesterday"));
    let swap = |several: &mut Several, from: &Path, to: &Path| {
        several.allocators[0].kill();
        several.etcd.kill(0);
        copy(from, to);
        several.etcd.start_again(0);
    };
    swap(&mut several, &data, &yesterday);
    several.restart(0);
    several.leader();
    let resized = || several.xpm(&["alloc", "resize", "kept", "32MiB"]).status.success();
    wait_until("it is resized", resized);
    wait_until("its owner follows", || {
        let shown: Value = serde_json::from_str(&several.ok(&["alloc", "show", "kept", "--json"])).unwrap();
        shown["size"] == 32 << 20 && shown["change"].is_null()
    });
    swap(&mut several, &yesterday, &data);
    several.restart(0);
    several.leader();
    let port = several.port(0);
    wait_until("it is noticed", || status_at(port)["behind"]["text"].is_string());
    let list: Value = serde_json::from_str(&several.ok(&["appliance", "list", "--json"])).unwrap();
    let recover = || {
        let mut command = Command::new(programs().join("xpm-allocator"));
        command
            .args(["--store", &several.etcd.store("test"), "recover", "--from-network"])
            .args(controls(&list));
        command.output().unwrap()
    };
    let line = String::from_utf8_lossy(&recover().stderr).into_owned();
    assert!(line.contains("stop every allocator first"), "one still leads: {line}");
    several.allocators[0].stop();
    let done = recover();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    several.restart(0);
    several.leader();
    let shown = || -> Value {
        let output = several.xpm(&["alloc", "show", "kept", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    wait_until("it is as it was", || shown()["size"] == 32 << 20);
    assert!(status_at(port)["behind"].is_null());
}

#[test]
fn metadata_move_between_a_file_and_etcd() {
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("used", "32MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 0x33 0 32M"));
    let etcd = xpm_tests::etcd::Etcd::start(1);
    let task = |arguments: &[&str]| {
        let output = Command::new(programs().join("xpm-allocator")).args(arguments).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let data = cluster.data().display().to_string();
    let store = etcd.store("moved");
    let (done, said) = task(&["--data", &data, "migrate", "--to", &store]);
    assert!(!done && said.contains("another allocator uses"), "{said}");
    let before = cluster.json(&["alloc", "show", "used"]);
    let explain = |cluster: &Cluster| {
        let text = cluster.ok(&["alloc", "explain", "used"]);
        // The first line says how long ago it was.
        text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let decided = explain(&cluster);
    cluster.allocator.stop();
    let (done, said) = task(&["--data", &data, "migrate", "--to", &store]);
    assert!(done && said.contains("1 allocations are in etcd://"), "{said}");
    let (done, said) = task(&["--data", &data, "migrate", "--to", &store]);
    assert!(!done && said.contains("already"), "only into an empty place: {said}");
    // The old place is of yesterday from now on: it is noticed when somebody starts an allocator on it.
    let back = cluster.dir().join("back").display().to_string();
    cluster.restart_allocator_with(&["--store", &store]);
    cluster.wait_up();
    assert_eq!(cluster.json(&["alloc", "show", "used"])["regions"], before["regions"]);
    assert_eq!(explain(&cluster), decided);
    cluster.ok(&["alloc", "create", "more", "--size", "16MiB"]);
    assert!(qemu_io(&uri, "read -P 0x33 0 32M"));
    // An appliance hears of the state of the metadata by the answers to its heartbeats.
    wait_until("the appliance has heard of the newest state", || {
        cluster.json(&["appliance", "list"])[0]["status"]["metadata"] == cluster.status()["metadata"]
    });
    cluster.restart_allocator();
    wait_until("the old place is of yesterday", || cluster.status()["behind"]["text"].is_string());
    cluster.allocator.stop();
    let (done, said) = task(&["--store", &store, "migrate", "--to", &back]);
    assert!(done, "{said}");
    cluster.restart_allocator_with(&["--data", &back]);
    cluster.wait_up();
    assert!(cluster.status()["uptime"].is_string() && cluster.status()["behind"].is_null());
    let names = cluster.json(&["alloc", "list"]);
    assert_eq!(names.as_array().map(Vec::len), Some(2), "{names}");
    cluster.ok(&["alloc", "delete", "more"]);
    assert!(qemu_io(&uri, "read -P 0x33 0 32M"));
}
