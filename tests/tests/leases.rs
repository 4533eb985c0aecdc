//! Ends of allocations, with real daemons: a clock that is wrong, an allocator that is away, and an owner that cannot
//! have heard cost nobody their memory.

#![allow(missing_docs)]

use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use xpm_tests::clock::Sees;
use xpm_tests::{Cluster, wait_until};

/// 2039-09-19, 06:06:40.
const BEGIN: u64 = 2_200_025_200;
const HOUR: u64 = 3600;

fn has_event(cluster: &Cluster, kind: &str) -> bool {
    cluster.json(&["events"]).as_array().unwrap().iter().any(|one| one["kind"] == kind)
}

fn apply(cluster: &Cluster, text: &str) {
    let file = cluster.dir().join("pool.toml");
    std::fs::write(&file, text).unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()]);
}

fn can_read(uri: &str) -> bool {
    let mut reader = Command::new("qemu-io");
    reader.args(["-r", "-f", "raw", "-c", "read 0 4096", uri]).stdout(Stdio::null()).stderr(Stdio::null());
    reader.status().is_ok_and(|status| status.success())
}

fn lease(cluster: &Cluster, what: &str) -> u64 {
    let shown = cluster.json(&["alloc", "show", "x"]);
    assert_eq!(shown["state"], "ready", "{shown}");
    shown["lease"][what].as_u64().unwrap()
}

#[test]
fn a_wrong_answer_of_a_time_server_frees_nothing() {
    let begun = Instant::now();
    let cluster = Cluster::start_at(1, BEGIN, Sees::TimeOfDay);
    apply(
        &cluster,
        "[[account]]\nname='a'\nlease={duration='1h',warning='5m',grace='5m'}\n\
         [[account]]\nname='day'\nhours=[{from='06:00',to='20:00'}]\nat-close='end'\n",
    );
    let uri = cluster.attach("x", "32MiB", &["--account", "a"], "nbd-tcp");
    cluster.ok(&["alloc", "create", "by-day", "--size", "16MiB", "--account", "day"]);
    let (ends, frees) = (lease(&cluster, "ends"), lease(&cluster, "frees"));
    cluster.set_clock(BEGIN + 24 * HOUR);
    wait_until("the jump is seen", || has_event(&cluster, "clock-jumped"));
    cluster.set_clock(BEGIN + begun.elapsed().as_secs());
    wait_until("the clock is doubted no longer", || has_event(&cluster, "clock-back"));
    assert_eq!((lease(&cluster, "ends"), lease(&cluster, "frees")), (ends, frees));
    assert!(can_read(&uri), "in use as before");
    for kind in ["freed", "lease-warning", "lease-ended", "hours-warning", "hours-ended"] {
        assert!(!has_event(&cluster, kind), "{kind}");
    }
    assert_eq!(cluster.json(&["alloc", "show", "by-day"])["state"], "ready");
}

#[test]
fn a_clock_that_is_set_leaves_of_a_lease_what_was_left() {
    let cluster = Cluster::start_at(1, BEGIN, Sees::TimeOfDay);
    apply(&cluster, "[[account]]\nname='a'\nlease={duration='1h',warning='5m',grace='5m'}\n");
    let uri = cluster.attach("x", "32MiB", &["--account", "a"], "nbd-tcp");
    let ends = lease(&cluster, "ends");
    cluster.set_clock(BEGIN + 24 * HOUR);
    wait_until("the new time is taken", || has_event(&cluster, "clock-set"));
    wait_until("the lease follows", || lease(&cluster, "ends") > ends);
    assert!(lease(&cluster, "ends").abs_diff(ends + 24 * HOUR) <= 120);
    assert!(can_read(&uri) && !has_event(&cluster, "lease-warning"));
}

#[test]
fn time_in_which_the_allocator_was_away_does_not_count() {
    let mut cluster = Cluster::start_at(1, BEGIN, Sees::TimeOfDay);
    // Its hours end at 07:00, while the allocator is away.
    apply(
        &cluster,
        "[[account]]\nname='a'\nlease={duration='1h',warning='5m',grace='5m'}\n\
         [[account]]\nname='early'\nhours=[{from='05:00',to='07:00'}]\nat-close='end'\n",
    );
    let uri = cluster.attach("x", "32MiB", &["--account", "a"], "nbd-tcp");
    cluster.ok(&["alloc", "create", "by-hours", "--size", "16MiB", "--account", "early"]);
    let ends = lease(&cluster, "ends");
    // It notes that it is there every 10 s, and at once when the first lease is there.
    std::thread::sleep(std::time::Duration::from_secs(2));
    cluster.allocator.kill();
    cluster.set_clock(BEGIN + 48 * HOUR);
    cluster.restart_allocator();
    cluster.wait_up();
    assert!(lease(&cluster, "ends").abs_diff(ends + 48 * HOUR) <= 120, "an hour is left as before");
    assert!(has_event(&cluster, "lease-moved") && !has_event(&cluster, "freed"));
    wait_until("hours that ended meanwhile are announced first", || has_event(&cluster, "hours-warning"));
    let late: Value = cluster.json(&["alloc", "show", "by-hours"]);
    assert_eq!(late["state"], "ready");
    wait_until("they end with the whole warning from now on", || {
        let ends = cluster.json(&["alloc", "show", "by-hours"])["lease"]["ends"].as_u64();
        ends.is_some_and(|ends| ends >= BEGIN + 48 * HOUR + 200)
    });
    assert!(can_read(&uri), "in use as before");
}
