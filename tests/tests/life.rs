//! The life of an allocation in use: it is resized, its appliances are emptied, it goes to another client.
//! Programs write and verify meanwhile.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use xpm_tests::{Cluster, have, rounds, wait_until};

/// fio that writes at random places and verifies, for so many seconds.
fn fio(uri: &str, size: &str, seconds: u32) -> Child {
    Command::new("fio")
        .args([
            "--name=v",
            "--ioengine=nbd",
            "--rw=randrw",
            "--bs=4k-64k",
            "--bsrange=4k-64k",
            "--iodepth=16",
        ])
        .args([&format!("--uri={uri}"), &format!("--size={size}"), &format!("--runtime={seconds}")])
        .args([
            "--time_based",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=512",
            "--verify_state_save=0",
            "--output-format=json",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio can be started")
}

fn fine(fio: Child) -> Value {
    let output = fio.wait_with_output().expect("fio ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "fio: {errors}\n{said}");
    let start = said.find('{').expect("fio prints JSON");
    let report: Value = serde_json::from_str(&said[start..]).expect("fio prints JSON");
    assert_eq!(report["jobs"][0]["error"], 0, "{report}");
    assert!(report["jobs"][0]["read"]["total_ios"].as_u64() > Some(100), "it verified something");
    report
}

fn qemu_io(uri: &str, commands: &[&str]) -> (bool, String) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = qemu_io.arg(uri).output().expect("qemu-io can be started");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success() && !said.contains("verification failed"), said)
}

/// Names of the appliances that an allocation lies on.
fn places(cluster: &Cluster, name: &str) -> Vec<String> {
    let shown = cluster.json(&["alloc", "show", name]);
    let regions = shown["regions"].as_array().expect("it has regions");
    let mut names: Vec<String> =
        regions.iter().map(|one| one["appliance_name"].as_str().unwrap_or_default().to_owned()).collect();
    names.sort();
    names.dedup();
    names
}

fn drained_under_verify(transport: &str) {
    let cluster = Cluster::start(3);
    let uri = cluster.attach("v", "128MiB", &["--stripe", "2"], transport);
    let before = places(&cluster, "v");
    let load = fio(&uri, "128M", 12);
    std::thread::sleep(Duration::from_secs(2));
    let said = cluster.ok(&["appliance", "drain", &before[0]]);
    assert!(said.contains("is empty"), "{said}");
    let after = places(&cluster, "v");
    assert!(!after.contains(&before[0]), "{before:?} {after:?}");
    let granted = || cluster.json(&["appliance", "show", &before[0]])["status"]["granted"].clone();
    wait_until("its memory is free", || granted() == 0);
    assert!(cluster.ok(&["appliance", "list"]).contains("draining"));
    cluster.ok(&["appliance", "undrain", &before[0]]);
    fine(load);
    let device = cluster.json(&["blk", "list"])[0].clone();
    assert_eq!((&device["state"], &device["counters"]["errors"]), (&"live".into(), &0.into()), "{device}");
    let links = device["links"].as_array().expect("links").len();
    assert_eq!(links, after.len(), "the old way is gone: {device}");
    // The records of the old life suffice for the next one.
    let mut cluster = cluster;
    let marked = ["write -P 7 5M 20M", "write -P 9 100M 64k"];
    let (wrote, said) = qemu_io(&uri, &marked);
    assert!(wrote, "{said}");
    cluster.restart_blk();
    wait_until("it is shown again", || qemu_io(&uri, &["read -P 7 5M 20M", "read -P 9 100M 64k"]).0);
}

#[test]
fn an_appliance_is_emptied_under_verify_over_tcp() {
    if have("fio") && have("qemu-io") {
        drained_under_verify("nbd-tcp");
    }
}

#[test]
fn an_appliance_is_emptied_under_verify_over_shared_memory() {
    if have("fio") && have("qemu-io") {
        drained_under_verify("shm");
    }
}

#[test]
fn an_allocation_grows_and_shrinks_under_verify() {
    if !have("fio") || !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(3);
    let uri = cluster.attach("v", "64MiB", &["--stripe", "2"], "nbd-tcp");
    let load = fio(&uri, "64M", 10);
    std::thread::sleep(Duration::from_secs(1));
    let grown = cluster.json(&["alloc", "resize", "v", "256MiB"]);
    assert_eq!((&grown["size"], &grown["change"]), (&(256 << 20).into(), &Value::Null), "{grown}");
    assert!(grown["followed"].as_str().unwrap_or_default().contains("connect again"), "{grown}");
    assert_eq!(grown["taken"], 256 << 20);
    let (wrote, said) = qemu_io(&uri, &["write -P 5 200M 1M"]);
    assert!(wrote, "the new size is there: {said}");
    let refused = cluster.refused(&["alloc", "resize", "v", "64MiB"]);
    assert!(refused.contains("are in use beyond the new size"), "{refused}");
    assert_eq!(cluster.json(&["alloc", "show", "v"])["size"], 256 << 20, "nothing has changed");
    assert!(qemu_io(&uri, &["read -P 5 200M 1M", "discard 200M 1M", "write -z 200M 1M"]).0);
    let shrunk = cluster.json(&["alloc", "resize", "v", "64MiB"]);
    assert_eq!((&shrunk["size"], &shrunk["taken"]), (&(64 << 20).into(), &(64 << 20).into()), "{shrunk}");
    assert!(!qemu_io(&uri, &["read 200M 1M"]).0, "what was beyond is gone");
    fine(load);
    // And up again: what is new is zeros.
    cluster.ok(&["alloc", "resize", "v", "128MiB"]);
    let (zeros, said) = qemu_io(&uri, &["read -P 0 64M 64M"]);
    assert!(zeros, "{said}");
}

#[test]
fn what_nobody_uses_is_resized_and_moved_by_the_appliances() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(3);
    let uri = cluster.attach("v", "64MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, &["write -P 3 1M 30M"]).0);
    cluster.ok(&["blk", "detach", "v"]);
    let before = places(&cluster, "v");
    for appliance in &before {
        cluster.ok(&["appliance", "drain", appliance]);
        assert!(!places(&cluster, "v").contains(appliance));
        cluster.ok(&["appliance", "undrain", appliance]);
    }
    let refused = cluster.refused(&["alloc", "resize", "v", "16MiB"]);
    assert!(refused.contains("beyond the new size"), "{refused}");
    cluster.ok(&["alloc", "resize", "v", "32MiB"]);
    cluster.ok(&["alloc", "resize", "v", "100MiB"]);
    let socket = cluster.dir().join("again.sock");
    cluster.ok(&["blk", "attach", "v", "--as", &format!("nbd-socket={}", socket.display())]);
    let uri = format!("nbd+unix:///v?socket={}", socket.display());
    let (same, said) = qemu_io(&uri, &["read -P 3 1M 30M", "read -P 0 0 1M", "read -P 0 31M 69M"]);
    assert!(same, "{said}");
}

#[test]
fn the_pool_is_rebalanced_when_an_appliance_comes() {
    if !have("fio") {
        return;
    }
    let cluster = Cluster::start(3);
    cluster.ok(&["appliance", "drain", "a2", "--no-wait"]);
    let uri = cluster.attach("v", "384MiB", &["--region-size", "16MiB", "--stripe", "2"], "nbd-tcp");
    assert_eq!(places(&cluster, "v"), ["a0", "a1"]);
    let plan = cluster.ok(&["rebalance", "--dry-run"]);
    assert!(plan.contains("Nothing"), "a2 is not to be used: {plan}");
    cluster.ok(&["appliance", "undrain", "a2"]);
    let load = fio(&uri, "384M", 12);
    let plan = cluster.json(&["rebalance", "--dry-run"]);
    let bytes: u64 =
        plan["moves"].as_array().expect("moves").iter().filter_map(|one| one["bytes"].as_u64()).sum();
    assert_eq!(bytes, 128 << 20, "a third moves: {plan}");
    cluster.ok(&["rebalance", "--rate", "256MiB"]);
    let on_a2 = || {
        let shown = cluster.json(&["alloc", "show", "v"]);
        let regions = shown["regions"].as_array().expect("regions").iter();
        regions.filter(|one| one["appliance_name"] == "a2").count()
    };
    wait_until("a third is on the new one", || on_a2() == 8);
    fine(load);
    assert!(cluster.ok(&["rebalance", "--status"]).contains("Nothing"));
    let seen = cluster.ok(&["events"]);
    assert!(seen.contains("changed"), "{seen}");
}

/// A client that writes the same byte all over, again and again, whatever becomes of it.
fn writer(uri: &str) -> Child {
    const WRITE: &str = "import nbd, sys, time\nend = time.time() + 300\nwhile time.time() < end:\n  try:\n    h = nbd.NBD()\n    \
                         h.connect_uri(sys.argv[1])\n    while time.time() < end:\n      for at in range(0, 64 << 20, 1 << 16):\n        \
                         h.pwrite(b'\\x11' * 65536, at)\n  except Exception:\n    time.sleep(0.01)\n";
    Command::new("/usr/bin/python3")
        .args(["-c", WRITE, uri])
        .stdin(Stdio::null())
        .spawn()
        .expect("python3 starts")
}

#[test]
fn a_client_that_is_cut_off_writes_nothing_more() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("v", "64MiB", &["--stripe", "2"], "nbd-tcp");
    let _second = cluster.second_client();
    let id = {
        let output = cluster.xpm_of_second(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).expect("a status");
        status["blk"]["client"].as_str().expect("a client id").to_owned()
    };
    let mut old = writer(&uri);
    wait_until("it writes", || {
        cluster.json(&["blk", "show", "v"])["counters"]["writes"].as_u64().is_some_and(|writes| writes > 0)
    });
    // The owner is alive and its device is used: it stays.
    let kept = cluster.refused(&["alloc", "transfer", "v", "--to", &id, "--deadline", "5s"]);
    assert!(kept.contains("stays where it is") && kept.contains("NBD client"), "{kept}");
    // Cut off from the allocator, it cannot be told; it goes on to write.
    cluster.ok(&["alloc", "transfer", "v", "--to", &id, "--force"]);
    let socket = cluster.dir().join("second.sock");
    let form = format!("nbd-socket={}", socket.display());
    let attached = cluster.xpm_of_second(&["blk", "attach", "v", "--as", &form]);
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    let uri = format!("nbd+unix:///v?socket={}", socket.display());
    let (wrote, said) = qemu_io(&uri, &["write -P 0x22 0 64M"]);
    assert!(wrote, "{said}");
    for _ in 0..20 {
        let (same, said) = qemu_io(&uri, &["read -P 0x22 0 64M"]);
        assert!(same, "something of the old owner landed: {said}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(old.try_wait().expect("it is ours").is_none(), "the old owner still tries");
    let _ = old.kill();
    let _ = old.wait();
    wait_until("the old owner hears that it is none", || {
        cluster.json(&["blk", "list"])[0]["state"] == "lost"
    });
}

#[test]
fn an_allocation_goes_to_another_client_with_its_data() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("v", "64MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, &["write -P 0x33 0 64M"]).0);
    let _second = cluster.second_client();
    let output = cluster.xpm_of_second(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).expect("a status");
    let id = status["blk"]["client"].as_str().expect("a client id");
    // Well before its next regular look at its orders, the owner hears of it.
    cluster.ok(&["alloc", "transfer", "v", "--to", id, "--deadline", "9s"]);
    assert!(cluster.json(&["blk", "list"]).as_array().is_some_and(Vec::is_empty), "it has let go");
    let stolen = cluster.refused(&["blk", "attach", "v", "--as", "nbd-socket=/tmp/xpm-never.sock"]);
    assert!(stolen.contains("in use by"), "it is the other one's: {stolen}");
    let socket = cluster.dir().join("second.sock");
    let form = format!("nbd-socket={}", socket.display());
    let attached = cluster.xpm_of_second(&["blk", "attach", "v", "--as", &form]);
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    let (same, said) =
        qemu_io(&format!("nbd+unix:///v?socket={}", socket.display()), &["read -P 0x33 0 64M"]);
    assert!(same, "{said}");
    let unknown = cluster.refused(&["alloc", "transfer", "v", "--to", "nobody"]);
    assert!(unknown.contains("xpm client list"), "{unknown}");
}

/// Memory in grants at all appliances, and memory that allocations take, in bytes.
fn granted_and_taken(cluster: &Cluster) -> (u64, u64) {
    let sum = |list: &Value, value: &dyn Fn(&Value) -> Option<u64>| -> u64 {
        list.as_array().expect("a list").iter().filter_map(value).sum()
    };
    let granted = sum(&cluster.json(&["appliance", "list"]), &|one| one["status"]["granted"].as_u64());
    let taken = sum(&cluster.json(&["alloc", "list"]), &|one| one["taken"].as_u64());
    (granted, taken)
}

/// The allocator is killed at random moments of every operation, while programs write and verify. No I/O
/// notices, and in the end each appliance has what the allocations have.
#[test]
fn an_allocator_that_is_killed_in_the_middle_loses_nothing() {
    if !have("fio") {
        return;
    }
    let kills = rounds(60, 200);
    let mut cluster = Cluster::start(3);
    let uri = cluster.attach("v", "64MiB", &["--region-size", "16MiB"], "nbd-tcp");
    cluster.ok(&["alloc", "create", "t", "--size", "32MiB", "--region-size", "16MiB"]);
    let load = fio(&uri, "32M", 3600);
    let ids = ["1".repeat(32), "2".repeat(32)];
    let mut random = u64::from(std::process::id()) | 1;
    for kill in 0..kills {
        // xorshift: any spread will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let appliance = format!("a{}", random % 3);
        let sizes = ["128MiB", "64MiB", "96MiB"];
        let operation: Vec<&str> = match (random >> 8) % 6 {
            0 => vec!["alloc", "resize", "v", sizes[(random >> 16) as usize % 3]],
            // Its owner may be one that never was there.
            1 => vec!["alloc", "resize", "t", sizes[(random >> 16) as usize % 3], "--no-wait"],
            2 => vec!["appliance", "drain", &appliance, "--no-wait"],
            3 => vec!["appliance", "undrain", &appliance],
            4 => vec!["alloc", "transfer", "t", "--to", &ids[(random >> 16) as usize % 2], "--force"],
            _ => vec!["rebalance"],
        };
        let mut command = cluster.command(&operation);
        let mut running =
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("xpm can be started");
        std::thread::sleep(Duration::from_micros((random >> 24) % 60_000));
        cluster.restart_allocator();
        let _ = running.wait();
        if kill % 20 == 19 {
            wait_until("no I/O notices", || cluster.json(&["blk", "list"])[0]["state"] == "live");
        }
    }
    (0..3).for_each(|one| drop(cluster.ok(&["appliance", "undrain", &format!("a{one}")])));
    // Whatever that owner was to carry out is given up.
    ids.iter().for_each(|id| drop(cluster.xpm(&["alloc", "transfer", "t", "--to", id, "--force"])));
    let changing = || {
        let all = cluster.json(&["alloc", "list"]);
        all.as_array().expect("a list").iter().any(|one| one["change"].is_object() || one["state"] != "ready")
    };
    wait_until("every change ends", || !changing());
    wait_until("appliances have what allocations have", || {
        let (granted, taken) = granted_and_taken(&cluster);
        granted == taken
    });
    wait_until("records and appliances agree", || cluster.xpm(&["fsck"]).status.success());
    assert_eq!(cluster.json(&["blk", "list"])[0]["counters"]["errors"], 0);
    // fio is told to end, and reports what it verified.
    let pid = rustix::process::Pid::from_raw(load.id().cast_signed()).expect("it runs");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it is ours");
    let output = load.wait_with_output().expect("fio ends");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("verify:") && !said.contains("error="), "{said}");
    let start = said.find('{').expect("fio prints JSON");
    let report: Value =
        serde_json::from_str(said[start..].split("\nfio: ").next().unwrap_or_default().trim())
            .unwrap_or_default();
    assert_eq!(report["jobs"][0]["error"].as_u64().unwrap_or(0), 0, "{said}");
    assert!(report["jobs"][0]["read"]["total_ios"].as_u64() > Some(100), "{said}");
}

/// The client's daemon is killed at random moments of moves; whatever it had got to, nothing that was written
/// is lost, and the moves end.
#[test]
fn a_client_that_is_killed_in_the_middle_of_moves_loses_nothing() {
    if !have("qemu-io") {
        return;
    }
    let kills: u64 = rounds(12, 48);
    let mut cluster = Cluster::start(3);
    let uri = cluster.attach("v", "96MiB", &["--region-size", "16MiB", "--stripe", "2"], "nbd-tcp");
    let mut random = u64::from(std::process::id()) | 1;
    let pattern = |number: u64| format!("{} {}M 8M", number % 250 + 1, number % 12 * 8);
    for kill in 0..kills {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let appliance = format!("a{}", kill % 3);
        cluster.ok(&["appliance", "drain", &appliance, "--no-wait"]);
        // At once, once it copies, or once all is moved, however long that takes on this machine.
        if kill % 4 == 3 {
            wait_until("it is moved", || !places(&cluster, "v").contains(&appliance));
        } else if kill % 4 > 0 {
            wait_until("it copies, or there is nothing to copy", || {
                let change = cluster.json(&["alloc", "show", "v"])["change"].clone();
                change["copied"].as_u64().is_some_and(|copied| copied > 0)
                    || !places(&cluster, "v").contains(&appliance)
            });
        }
        std::thread::sleep(Duration::from_micros(random % 300_000));
        cluster.restart_blk();
        wait_until("it is shown again", || qemu_io(&uri, &["read 0 4k"]).0);
        let (wrote, said) = qemu_io(&uri, &[&format!("write -P {}", pattern(kill))]);
        assert!(wrote, "{said}");
        for earlier in kill.saturating_sub(11)..=kill {
            let (same, said) = qemu_io(&uri, &[&format!("read -P {}", pattern(earlier))]);
            assert!(same, "after kill {kill}, what was written after kill {earlier}: {said}");
        }
        cluster.ok(&["appliance", "undrain", &appliance]);
    }
    wait_until("every change ends", || cluster.json(&["alloc", "show", "v"])["change"].is_null());
    for earlier in kills - 12..kills {
        assert!(qemu_io(&uri, &[&format!("read -P {}", pattern(earlier))]).0, "{earlier}");
    }
    wait_until("records and appliances agree", || cluster.xpm(&["fsck"]).status.success());
    let moved = cluster.ok(&["events"]);
    assert!(moved.matches(" changed ").count() > 3, "something moved: {moved}");
}

/// All is copied when the allocator is dead, and the client's daemon dies too: its next life writes to both
/// places until the allocator is back and says which holds.
#[test]
fn a_move_that_nobody_could_end_is_ended_later() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(3);
    let uri = cluster.attach("v", "96MiB", &["--region-size", "16MiB", "--stripe", "2"], "nbd-tcp");
    assert!(qemu_io(&uri, &["write -P 1 0 96M"]).0);
    let from = places(&cluster, "v")[0].clone();
    cluster.ok(&["appliance", "drain", &from, "--no-wait", "--rate", "16MiB"]);
    wait_until("the owner copies", || {
        cluster.json(&["alloc", "show", "v"])["change"]["copied"].as_u64().is_some_and(|copied| copied > 0)
    });
    cluster.allocator.kill();
    let record = cluster.dir().join("blk/devices/v.json");
    let kept = || std::fs::read_to_string(&record).unwrap_or_default();
    wait_until("the change is firm and written down", || kept().contains("\"change\""));
    cluster.restart_blk();
    wait_until("it is shown again", || qemu_io(&uri, &["read -P 1 0 96M"]).0);
    assert!(qemu_io(&uri, &["write -P 2 0 48M", "discard 80M 16M"]).0);
    assert!(kept().contains("\"change\""), "nobody has said which holds");
    cluster.restart_allocator();
    cluster.wait_up();
    wait_until("it is moved", || !places(&cluster, "v").contains(&from));
    wait_until("the change ends", || cluster.json(&["alloc", "show", "v"])["change"].is_null());
    wait_until("it is forgotten", || !kept().contains("\"change\""));
    let (same, said) = qemu_io(&uri, &["read -P 2 0 48M", "read -P 1 48M 32M", "read -P 0 80M 16M"]);
    assert!(same, "{said}");
    wait_until("records and appliances agree", || cluster.xpm(&["fsck"]).status.success());
}
