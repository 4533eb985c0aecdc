//! Placement and limits, with real daemons and the operator's command: a test for each claim of
//! docs/strategies.md, which names the commands.

#![allow(missing_docs)]

use std::process::{Command, Stdio};

use serde_json::Value;
use xpm_tests::clock::Sees;
use xpm_tests::{Cluster, programs, wait_until};

const MIB: u64 = 1 << 20;

/// Applies documents.
fn apply(cluster: &Cluster, text: &str) -> String {
    let file = cluster.dir().join("pool.toml");
    std::fs::write(&file, text).unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()])
}

/// Makes an allocation; the names of its appliances.
fn create(cluster: &Cluster, name: &str, size: &str, more: &[&str]) -> Vec<String> {
    let made =
        cluster.json(&[&["alloc", "create", name, "--size", size, "--region-size", "16MiB"], more].concat());
    places(&made)
}

fn places(allocation: &Value) -> Vec<String> {
    let regions = allocation["regions"].as_array().unwrap();
    let mut names: Vec<String> =
        regions.iter().map(|one| one["appliance_name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names.dedup();
    names
}

fn refused(cluster: &Cluster, name: &str, size: &str, more: &[&str]) -> String {
    cluster.refused(&[&["alloc", "create", name, "--size", size, "--region-size", "16MiB"], more].concat())
}

fn events(cluster: &Cluster) -> Vec<String> {
    let events = cluster.json(&["events"]);
    let event =
        |one: &Value| format!("{} {}", one["kind"].as_str().unwrap(), one["subject"].as_str().unwrap());
    events.as_array().unwrap().iter().map(event).collect()
}

fn state(cluster: &Cluster, name: &str) -> Option<String> {
    let all = cluster.json(&["alloc", "list"]);
    let one = all.as_array().unwrap().iter().find(|one| one["name"] == name)?.clone();
    Some(one["state"].as_str().unwrap().to_owned())
}

#[test]
fn claims_1_10_16_17_a_strategy_decides_and_is_remembered() {
    let mut cluster = Cluster::start(3);
    apply(&cluster, "[[strategy]]\nname='default'\n[[strategy.rule]]\nname='wide'\nlayout={stripe=3}\n");
    assert_eq!(create(&cluster, "x", "96MiB", &[]), ["a0", "a1", "a2"]);
    let shown = cluster.json(&["alloc", "show", "x"]);
    assert_eq!((shown["regions"].as_array().unwrap().len(), &shown["strategy"]), (6, &"default".into()));
    cluster.restart_allocator();
    assert_eq!(
        cluster.json(&["alloc", "show", "x"])["regions"],
        shown["regions"],
        "the distribution is kept"
    );
    let explained = cluster.ok(&["alloc", "explain", "x"]);
    assert!(explained.contains("default/wide") && explained.contains("sets the layout"), "{explained}");
    assert!(explained.contains("strategy `default` version 1"), "{explained}");
    cluster.ok(&["alloc", "delete", "x"]);
    assert!(cluster.ok(&["alloc", "explain", "x"]).contains("placed"), "also when it is gone");
}

#[test]
fn claim_2_rules_are_followed_in_order() {
    let cluster = Cluster::start_pool(&[vec!["--label", "tier=gold"], vec!["--label", "tier=tin"]], false);
    apply(
        &cluster,
        "
[[account]]
name = 'web'
[[strategy]]
name = 'default'
[[strategy.rule]]
name = 'no-bulk'
when = { labels = { job = 'bulk' }, size-min = '64MiB' }
refuse = 'bulk jobs take less'
[[strategy.rule]]
name = 'web-on-gold'
when = { account = ['web'] }
require = { labels = { tier = 'gold' } }
last = true
[[strategy.rule]]
name = 'others-not'
forbid = [{ labels = { tier = 'gold' } }]
",
    );
    assert_eq!(create(&cluster, "w", "64MiB", &["--account", "web"]), ["a0"]);
    assert_eq!(create(&cluster, "o", "64MiB", &[]), ["a1"]);
    let line = refused(&cluster, "b", "64MiB", &["--label", "job=bulk"]);
    assert!(line.contains("rule default/no-bulk refuses it: bulk jobs take less"), "{line}");
    create(&cluster, "b", "16MiB", &["--label", "job=bulk"]);
    let decision = cluster.json(&[
        "alloc",
        "create",
        "d",
        "--size",
        "16MiB",
        "--account",
        "web",
        "--dry-run",
        "--explain",
    ]);
    let rules: Vec<(&str, bool)> = decision["rules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["rule"].as_str().unwrap(), one["applies"].as_bool().unwrap()))
        .collect();
    assert_eq!(rules, [("no-bulk", false), ("web-on-gold", true)], "`last` ends the list");
    assert_eq!(state(&cluster, "d"), None, "a dry run makes nothing");
}

#[test]
fn claim_3_profiles_of_appliances_clients_and_accounts() {
    let cluster = Cluster::start_pool(&[vec!["--link-speed", "1Gbps"], vec![]], false);
    apply(
        &cluster,
        "
[[appliance]]
name = 'a0'
labels = { rack = 'r1' }
link-speed = '25Gbps'
head-room = '50%'
[[client]]
name = 'db1'
account = 'data'
labels = { role = 'db' }
[[account]]
name = 'data'
strategy = 'data'
[[strategy]]
name = 'data'
[[strategy.rule]]
name = 'fast'
when = { client-labels = { role = 'db' } }
require = { link-speed-min = '10Gbps' }
",
    );
    let made = create(&cluster, "x", "64MiB", &["--client", "db1"]);
    assert_eq!(made, ["a0"], "the operator's word on its link wins");
    let shown = cluster.json(&["alloc", "show", "x"]);
    assert_eq!((&shown["account"], &shown["strategy"]), (&"data".into(), &"data".into()));
    let line = refused(&cluster, "y", "208MiB", &["--client", "db1"]);
    assert!(line.contains("192MiB free"), "half of 512 MiB stays free: {line}");
    for kind in ["appliance", "client", "account", "strategy"] {
        assert!(cluster.ok(&["--json", "get", kind]).contains("\"version\": 1"), "{kind}");
    }
}

#[test]
fn claim_4_priority_orders_those_who_wait_and_those_who_give_way() {
    let cluster = Cluster::start(1);
    apply(
        &cluster,
        "
[[account]]
name = 'low'
priority = 10
reclaimable = true
[[account]]
name = 'high'
priority = 900
",
    );
    create(&cluster, "victim", "256MiB", &["--account", "low"]);
    create(&cluster, "kept", "256MiB", &[]);
    let mut waits = Command::new(programs().join("xpm"))
        .env("XPM_ALLOCATOR", cluster.allocator_url())
        .args(["alloc", "create", "urgent", "--size", "256MiB", "--account", "high", "--wait", "1m"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it waits", || state(&cluster, "urgent").as_deref() == Some("waiting"));
    assert!(refused(&cluster, "small", "16MiB", &[]).contains("do not fit"));
    wait_until("the victim is told", || {
        cluster
            .json(&["alloc", "list"])
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["ending"]["reason"] == "reclaim")
    });
    // Its exit status tells the severity.
    let status = String::from_utf8_lossy(&cluster.xpm(&["status"]).stdout).into_owned();
    assert!(status.contains("gives way to `urgent`"), "{status}");
    assert!(waits.wait().unwrap().success());
    assert_eq!(state(&cluster, "urgent").as_deref(), Some("ready"));
    assert_eq!((state(&cluster, "victim"), state(&cluster, "kept").as_deref()), (None, Some("ready")));
    let events = events(&cluster);
    for event in ["waiting urgent", "reclaim-notice victim", "freed victim", "served urgent"] {
        assert!(events.contains(&event.to_owned()), "{event}: {events:?}");
    }
}

/// 2040-03-25 00:00 in Berlin, the day on which 02:00 to 03:00 is left out.
const SPRING: u64 = 2_216_242_800;

fn ends(cluster: &Cluster, name: &str) -> u64 {
    cluster.json(&["alloc", "show", name])["lease"]["ends"].as_u64().unwrap()
}

fn frees(cluster: &Cluster, name: &str) -> u64 {
    cluster.json(&["alloc", "show", name])["lease"]["frees"].as_u64().unwrap()
}

#[test]
fn claim_5_hours_by_the_clock_on_the_wall() {
    let cluster = Cluster::start_at(2, SPRING + 3600, Sees::BothClocks);
    apply(
        &cluster,
        "
[[account]]
name = 'early'
time-zone = 'Europe/Berlin'
hours = [{ days = ['sun'], from = '02:30', to = '04:00' }]
at-close = 'end'
lease = { duration = '1day', warning = '10m', grace = '1m' }
",
    );
    let line = refused(&cluster, "x", "16MiB", &["--account", "early"]);
    assert!(line.contains("ask again from Sun 2040-03-25 03:00 (Europe/Berlin)"), "{line}");
    cluster.set_clock(SPRING + 2 * 3600 + 1);
    // Two hours without a heartbeat: appliances are silent until the next one.
    wait_until("it is made", || {
        cluster.xpm(&["alloc", "create", "x", "--size", "16MiB", "--account", "early"]).status.success()
    });
    let lease = cluster.json(&["alloc", "show", "x"])["lease"].clone();
    assert_eq!(lease["ends"], SPRING + 3 * 3600, "04:00 is two hours after 01:00");
    cluster.set_clock(SPRING + 3 * 3600 - 600 + 1);
    wait_until("it is announced", || events(&cluster).contains(&"hours-warning x".to_owned()));
    cluster.set_clock(ends(&cluster, "x") + 1);
    wait_until("it has ended", || events(&cluster).contains(&"hours-ended x".to_owned()));
    let socket = format!("nbd-socket={}", cluster.dir().join("x.sock").display());
    let line = cluster.refused(&["blk", "attach", "x", "--as", &socket]);
    assert!(line.contains("the hours of its account have ended"), "{line}");
    cluster.set_clock(frees(&cluster, "x") + 1);
    wait_until("it is freed", || state(&cluster, "x").is_none());
}

#[test]
fn claim_6_leases_end_in_steps_that_are_seen() {
    let begin = 2_200_000_000;
    let mut cluster = Cluster::start_at(1, begin, Sees::BothClocks);
    apply(
        &cluster,
        "[[account]]\nname='a'\nlease={duration='8h',warning='1h',grace='10m',total-max='12h'}\n",
    );
    let uri = cluster.attach("x", "32MiB", &["--account", "a"], "nbd-tcp");
    assert!(ends(&cluster, "x").abs_diff(begin + 8 * 3600) < 60);
    cluster.set_clock(ends(&cluster, "x") - 3600 + 1);
    wait_until("it is announced", || events(&cluster).contains(&"lease-warning x".to_owned()));
    assert!(cluster.ok(&["status"]).contains("`xpm alloc renew x` renews it"));
    wait_until("the client knows", || cluster.json(&["blk", "show", "x"])["ending"].is_string());
    let metrics = cluster.get("/v1/metrics");
    assert!(metrics.contains("xpm_allocation_frees_timestamp_seconds{name=\"x\"}"), "{metrics}");
    assert!(metrics.contains("xpm_used_bytes{kind=\"account\",name=\"a\"} 33554432"), "{metrics}");
    cluster.ok(&["alloc", "renew", "x"]);
    assert!(ends(&cluster, "x").abs_diff(begin + 12 * 3600) < 60, "no longer than 12 hours in all");
    cluster.restart_allocator();
    cluster.wait_up();
    cluster.set_clock(ends(&cluster, "x") - 3600 + 1);
    // Events of the life before are still there.
    wait_until("it is announced again", || {
        events(&cluster).iter().filter(|event| *event == "lease-warning x").count() == 2
    });
    cluster.set_clock(ends(&cluster, "x") + 1);
    wait_until("it has ended", || events(&cluster).contains(&"lease-ended x".to_owned()));
    assert!(cluster.refused(&["alloc", "renew", "x"]).contains("as long as its account may"));
    let read = || {
        let mut reader = Command::new("qemu-io");
        reader
            .args(["-r", "-f", "raw", "-c", "read 0 4096", &uri])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        reader.status().is_ok_and(|status| status.success())
    };
    assert!(read(), "in use until its grace is over");
    cluster.set_clock(frees(&cluster, "x") + 1);
    wait_until("it is freed", || state(&cluster, "x").is_none());
    assert!(!read(), "who used it is cut off");
    assert_eq!(cluster.json(&["blk", "show", "x"])["state"], "lost");
    wait_until("its memory is free", || cluster.json(&["appliance", "list"])[0]["status"]["granted"] == 0);
}

#[test]
fn claim_7_limits_hold_when_many_ask_and_the_allocator_dies() {
    let mut cluster = Cluster::start(2);
    apply(&cluster, "[[account]]\nname='a'\nhard-limit='128MiB'\nsoft-limit='64MiB'\n");
    for round in 0..8 {
        let ask = |number: usize| {
            Command::new(programs().join("xpm"))
                .env("XPM_ALLOCATOR", cluster.allocator_url())
                .args(["alloc", "create", &format!("x{round}-{number}"), "--size", "16MiB", "--account", "a"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut asking: Vec<_> = (0..12).map(ask).collect();
        std::thread::sleep(std::time::Duration::from_millis(9 * round));
        cluster.restart_allocator();
        for one in &mut asking {
            one.wait().unwrap();
        }
    }
    let usage = |cluster: &Cluster| {
        let all = cluster.json(&["usage"]);
        all.as_array().unwrap().iter().find(|one| one["name"] == "a").unwrap()["used"].as_u64().unwrap()
    };
    // Unfinished work is undone soon.
    let taken = |cluster: &Cluster| {
        let all = cluster.json(&["alloc", "list"]);
        let ready = all.as_array().unwrap().iter().filter(|one| one["state"] == "ready");
        ready.map(|one| one["taken"].as_u64().unwrap()).sum::<u64>()
    };
    wait_until("appliances hold what is recorded, and no more", || {
        let all = cluster.json(&["appliance", "list"]);
        let granted = |one: &Value| {
            one["status"]["granted"].as_u64().unwrap() + one["status"]["reserved"].as_u64().unwrap()
        };
        let granted: u64 = all.as_array().unwrap().iter().map(granted).sum();
        granted == taken(&cluster) && usage(&cluster) == granted
    });
    assert!(usage(&cluster) <= 128 * MIB);
    cluster.wait_up();
    let mut number = 0;
    while cluster
        .xpm(&["alloc", "create", &format!("y{number}"), "--size", "16MiB", "--account", "a"])
        .status
        .success()
    {
        number += 1;
    }
    assert_eq!(usage(&cluster), 128 * MIB, "to the last byte");
    let line = refused(&cluster, "more", "16MiB", &["--account", "a"]);
    assert!(line.contains("account a has 128MiB of at most 128MiB"), "{line}");
}

#[test]
fn claim_8_a_link_is_not_promised_twice() {
    let cluster =
        Cluster::start_pool(&[vec!["--link-speed", "10Gbps"], vec!["--link-speed", "1Gbps"]], false);
    apply(
        &cluster,
        "
[[client]]
name = 'c'
own-link-speed = '6Gbps'
[[strategy]]
name = 'default'
[[strategy.rule]]
name = 'as-the-client'
link-speed = 'client'
",
    );
    assert_eq!(create(&cluster, "x", "32MiB", &["--client", "c"]), ["a0"]);
    let line = refused(&cluster, "y", "32MiB", &["--client", "c"]);
    assert!(line.contains("a0 has 4Gbps of its link left, and 6Gbps is asked"), "{line}");
    assert!(line.contains("a1 has a link of 1Gbps"), "{line}");
    cluster.ok(&["alloc", "delete", "x"]);
    create(&cluster, "y", "32MiB", &["--client", "c"]);
}

#[test]
fn claim_9_near_by_labels_and_by_measured_round_trips() {
    let near = ["--label", "site=s", "--label", "rack=r1"];
    let far = ["--label", "site=s", "--label", "rack=r2"];
    let cluster = Cluster::start_pool(&[near.to_vec(), far.to_vec()], false);
    apply(
        &cluster,
        "
[[appliance]]
name = 'a0'
ramp-up = '0s'
[[appliance]]
name = 'a1'
ramp-up = '0s'
[[client]]
name = 'c'
labels = { site = 's', rack = 'r1' }
[[strategy]]
name = 'rack'
[[strategy.rule]]
name = 'near'
locality = { within = 'rack' }
[[strategy]]
name = 'measured'
[[strategy.rule]]
name = 'quick'
locality = { round-trip-max = '400ms' }
[[strategy]]
name = 'impossible'
[[strategy.rule]]
name = 'quick'
locality = { round-trip-max = '1ns' }
",
    );
    assert_eq!(create(&cluster, "x", "64MiB", &["--client", "c", "--strategy", "rack"]), ["a0"]);
    assert_eq!(create(&cluster, "p", "16MiB", &["--client", "c"]), ["a0"], "nearness is a score, too");
    let line = refused(&cluster, "y", "64MiB", &["--client", "c", "--strategy", "measured"]);
    assert!(line.contains("has no measured round trip") && line.contains("xpm client report"), "{line}");
    cluster.ok(&["client", "report", "--name", "c"]);
    assert_eq!(cluster.json(&["client", "list"])[0]["facts"]["round_trips"].as_object().unwrap().len(), 2);
    let both = ["--client", "c", "--strategy", "measured", "--stripe", "2"];
    assert_eq!(create(&cluster, "y", "64MiB", &both), ["a0", "a1"]);
    let line = refused(&cluster, "z", "16MiB", &["--client", "c", "--strategy", "impossible"]);
    assert!(line.contains("set locality.round-trip-max = "), "{line}");
}

#[test]
fn claim_20_by_what_appliances_say() {
    let cluster = Cluster::start(3);
    apply(&cluster, "[[appliance]]\nname='a1'\ndrain=true\n[[appliance]]\nname='a2'\nhead-room='448MiB'\n");
    assert_eq!(create(&cluster, "x", "160MiB", &["--stripe", "2"]), ["a0", "a2"]);
    let decision = cluster.json(&["alloc", "create", "d", "--size", "64MiB", "--dry-run", "--explain"]);
    let verdict = |name: &str| {
        let all = decision["appliances"].as_array().unwrap();
        all.iter().find(|one| one["name"] == name).unwrap()["verdict"].clone()
    };
    assert_eq!(verdict("a1")["reason"], "drained");
    assert_eq!(verdict("a0")["verdict"], "scored");
    cluster.appliances[0].signal(rustix::process::Signal::STOP);
    wait_until("it is silent", || {
        let all = cluster.json(&["appliance", "list"]);
        all.as_array().unwrap().iter().any(|one| one["info"]["name"] == "a0" && one["state"] == "silent")
    });
    let line = refused(&cluster, "y", "128MiB", &[]);
    cluster.appliances[0].signal(rustix::process::Signal::CONT);
    assert!(line.contains("a0 is silent") && line.contains("a1 is drained"), "{line}");
}

#[test]
fn operators_cannot_break_it() {
    let cluster = Cluster::start(1);
    apply(&cluster, "[[account]]\nname='a'\nhard-limit='64MiB'\n");
    create(&cluster, "x", "32MiB", &["--account", "a"]);
    let file = cluster.dir().join("bad.toml");
    let lines = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let output = cluster.xpm(&["apply", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = lines(
        "[[account]]\nname='b'\n[[account]]\nname='a'\nhard-limit='16MiB'\ntime-zone='Nowhere'\nhours=[{}]\n",
    );
    assert!(
        said.contains("bad.toml:5: account[1].hard-limit: ") && said.contains("has 32MiB already"),
        "{said}"
    );
    assert!(said.contains("bad.toml:6: account[1].time-zone: the time zone `Nowhere` is unknown"), "{said}");
    assert!(said.contains("nothing was applied"), "{said}");
    assert!(
        cluster.refused(&["get", "account", "b"]).contains("there is no account `b`"),
        "nothing is half applied"
    );
    assert!(lines(&"[".repeat(1 << 20)).contains("bad.toml"));
    assert!(lines("[[account]]\nname='a'\nversion=77\n").contains("changed meanwhile"));
    assert!(cluster.refused(&["delete", "account", "a"]).contains("1 allocation"));
    let edited = Command::new(programs().join("xpm"))
        .env("XPM_ALLOCATOR", cluster.allocator_url())
        .env("VISUAL", "sed -i s/64MiB/128MiB/")
        .args(["edit", "account", "a"])
        .output()
        .unwrap();
    assert!(edited.status.success(), "{}", String::from_utf8_lossy(&edited.stderr));
    assert!(cluster.ok(&["--json", "get", "account", "a"]).contains("\"version\": 2"));
    assert!(cluster.ok(&["schema"]).contains("\"Account\""));
}
