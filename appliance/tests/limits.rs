//! The program in a cgroup with a limit, of the cgroup version that this machine uses for memory.

mod harness;

use harness::{Daemon, LEN, MIB, key};
use serde_json::json;
use xpm_tests::cgroup::Group;

#[test]
fn more_memory_than_a_cgroup_allows_is_refused_with_the_number() {
    let Some(group) = Group::make("refused") else { return };
    group.set_limit(300 * MIB);
    let line = harness::complaint_in(&group.procs(), &["--memory", "1GiB"]);
    assert!(
        line.contains("300MiB") && line.contains(group.limit_file()) && line.contains("lower --memory"),
        "{line}"
    );
    let daemon = Daemon::start_in(&group.procs(), &["--memory", "128MiB"]);
    assert_eq!(daemon.get("/v1/status")["free"], 128 * MIB);
}

#[test]
fn a_lowered_limit_is_reported_and_lent_memory_stays() {
    let Some(group) = Group::make("lowered") else { return };
    let daemon = Daemon::start_in(&group.procs(), &["--memory", "256MiB", "--ready", "32MiB"]);
    daemon.grant(1, 1, 2);
    let mut owner = harness::Shell::open(&daemon.tcp_uri(&key(1)));
    owner.say("h.pwrite(b'page', 0)", "");
    group.set_limit(128 * MIB);
    daemon.wait("it is noticed", |status| status["free"].as_u64().unwrap() < 128 * MIB);
    let line = daemon.wait_log("not all of --memory");
    assert!(line.contains("ERROR") && line.contains("128MiB") && line.contains(group.limit_file()), "{line}");
    let warnings = daemon.get("/v1/status")["warnings"].clone();
    assert!(warnings[0].as_str().unwrap().contains("128MiB"), "{warnings}");
    let (status, answer) = daemon.raw("POST", "/v1/regions", &daemon.reserve_body(12, LEN).to_string());
    assert_eq!((status, &answer["kind"]), (507, &json!("no-space")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("limit"), "{answer}");
    owner.say("assert h.pread(4, 0) == b'page'", "");
    group.set_limit(512 * MIB);
    daemon.wait("it is raised again", |status| status["free"] == 224 * MIB);
    daemon.wait_log("allow --memory again");
    daemon.grant(2, 2, 12);
}

/// The limit leaves no room for the piece that a move needs.
#[test]
fn shared_memory_that_cannot_be_moved_stays_with_its_owner_unless_it_may_be_lost() {
    let Some(group) = Group::make("unmovable") else { return };
    let daemon = Daemon::start_in(&group.procs(), &["--memory", "64MiB"]);
    let ids = daemon.grant(1, 1, 2);
    let mut keeper = harness::Keeper::open(&daemon, &key(1), true);
    keeper.write(0, "of the first");
    let mut owner = harness::Shell::open(&daemon.tcp_uri(&key(1)));
    group.set_limit(group.used() + 24 * MIB);
    let (path, raise) = (format!("/v1/grants/{:032x}", 1), daemon.commit_body(2, 2, &ids).to_string());
    let (status, answer) = daemon.raw("PUT", &path, &raise);
    assert_eq!((status, &answer["kind"]), (507, &json!("no-space")), "{answer}");
    let line = answer["error"].as_str().unwrap();
    assert!(line.contains("limit") && line.contains("--lose"), "{line}");
    owner.say("assert h.pread(12, 0) == b'of the first'", "");

    let (status, answer) = daemon.raw("PUT", &format!("{path}?lose=true"), &raise);
    assert_eq!((status, &answer["lost"]), (200, &json!(2 * LEN)), "{answer}");
    owner.say("h.pread(12, 0)", "nbd.Error");
    let mut next = harness::Shell::open(&daemon.tcp_uri(&key(2)));
    next.say("assert h.pread(12, 0) == bytes(12)", "");
    next.say("h.pwrite(b'SECRET', 0)", "");
    keeper.sees(0, r"\0\0\0\0\0\0");
    keeper.write(0, "FORGED");
    next.say("assert h.pread(6, 0) == b'SECRET'", "");
}
