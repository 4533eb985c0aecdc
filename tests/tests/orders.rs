//! Orders to the allocator, with real daemons: right after a start, while others wait, and what is shown of it.

#![allow(missing_docs)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;

use serde_json::Value;
use xpm_client_core::owner::{Heard, Listener};
use xpm_control::client::Client;
use xpm_tests::{Cluster, wait_until};

const MIB: u64 = 1 << 20;

fn state(cluster: &Cluster, name: &str) -> Option<String> {
    let all = cluster.json(&["alloc", "list"]);
    let one = all.as_array().unwrap().iter().find(|one| one["name"] == name)?.clone();
    Some(one["state"].as_str().unwrap().to_owned())
}

fn places(allocation: &Value) -> Vec<String> {
    let regions = allocation["regions"].as_array().unwrap();
    let mut names: Vec<String> =
        regions.iter().map(|one| one["appliance_name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names.dedup();
    names
}

/// An owner that hears of an order only while it listens would carry out what it missed when it asks by the clock, much later.
#[test]
fn a_listener_that_was_out_of_touch_reports_that_it_missed_events() {
    let mut cluster = Cluster::start(1);
    let allocator = Client::new(&cluster.allocator_url(), None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut listener = Listener::new(&allocator);
    let mut hear = || runtime.block_on(listener.hear());
    assert_eq!(hear(), [Heard::Missed], "events from before the first call");
    cluster.ok(&["alloc", "create", "v", "--size", "16MiB"]);
    cluster.ok(&["alloc", "delete", "v"]);
    assert_eq!(hear(), [Heard::Allocation("v".parse().unwrap())]);
    cluster.allocator.kill();
    assert_eq!(hear(), [], "no allocator answers");
    cluster.restart_allocator();
    assert_eq!(hear(), [Heard::Missed], "events from while the allocator was away");
}

#[test]
fn the_first_orders_after_a_restart_find_the_whole_pool() {
    let mut cluster = Cluster::start(3);
    for round in 0..4 {
        cluster.restart_allocator();
        let name = format!("x{round}");
        let made = cluster.json(&["alloc", "create", &name, "--size", "48MiB", "--stripe", "3"]);
        assert_eq!(places(&made), ["a0", "a1", "a2"], "round {round}");
    }
}

#[test]
fn promised_memory_counts_once() {
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "x", "--size", "256MiB", "--stripe", "2", "--region-size", "16MiB"]);
    // Before the appliances tell of it, and while they do, by heartbeats that they send because of it.
    wait_until("the appliances tell of it", || {
        let status = cluster.json(&["status"]);
        let all = status["appliances"].as_array().unwrap();
        let table: u64 = all.iter().map(|one| one["status"]["free"].as_u64().unwrap()).sum();
        assert_eq!(status["allocator"]["free"].as_u64(), Some(table), "one number in both places: {status}");
        all.iter().all(|one| one["status"]["granted"] == 128 * MIB) && table == 768 * MIB
    });
    let rest = ["alloc", "create", "y", "--size", "768MiB", "--stripe", "2", "--region-size", "16MiB"];
    cluster.ok(&[&rest[..], &["--dry-run"]].concat());
    cluster.ok(&rest);
}

#[test]
fn an_appliance_that_comes_back_without_its_grants_is_noticed_at_once() {
    let mut cluster = Cluster::start(2);
    let made = cluster.json(&["alloc", "create", "x", "--size", "64MiB", "--region-size", "16MiB"]);
    let on = if places(&made) == ["a0"] { 0 } else { 1 };
    cluster.restart_appliance(on);
    wait_until("it is lost", || {
        let lost = cluster.json(&["alloc", "show", "x"])["lost"].clone();
        lost.as_array().is_some_and(|lost| !lost.is_empty())
    });
    let problems = problems(&cluster);
    assert!(problems.iter().any(|one| one["code"] == "ALLOCATION_LOST"), "{problems:?}");
}

/// The problems of `xpm status`, whose exit status tells their severity.
fn problems(cluster: &Cluster) -> Vec<Value> {
    let output = cluster.xpm(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["problems"].as_array().unwrap().clone()
}

#[test]
fn a_request_that_was_taken_back_stays_away() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "full", "--size", "512MiB"]);
    let mut asking = cluster
        .command(&["alloc", "create", "x", "--size", "64MiB", "--wait", "10m"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("it waits", || state(&cluster, "x").as_deref() == Some("waiting"));
    cluster.ok(&["alloc", "delete", "x"]);
    wait_until("the command ends", || asking.try_wait().unwrap().is_some());
    let output = asking.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("was taken back"), "{said}");
    assert_eq!(state(&cluster, "x"), None);
}

#[test]
fn one_that_waits_for_a_month_stops_nobody() {
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "used", "--size", "768MiB", "--stripe", "2"]);
    let mut asking = cluster
        .command(&["alloc", "create", "month", "--size", "512MiB", "--wait", "720h"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it waits", || state(&cluster, "month").as_deref() == Some("waiting"));
    cluster.ok(&["alloc", "create", "small", "--size", "128MiB"]);
    let problems = problems(&cluster);
    let waits = problems.iter().find(|one| one["code"] == "REQUEST_WAITING").unwrap();
    assert_eq!((&waits["severity"], &waits["object"]), (&"info".into(), &"allocation/month".into()));
    cluster.ok(&["alloc", "delete", "used"]);
    assert!(asking.wait().unwrap().success(), "it is served when others give their memory back");
}

#[test]
fn a_linear_allocation_lies_on_one_machine() {
    let cluster = Cluster::start(2);
    let made = cluster.json(&["alloc", "create", "x", "--size", "256MiB", "--region-size", "16MiB"]);
    assert_eq!((places(&made).len(), made["regions"].as_array().unwrap().len()), (1, 16));
    let larger = cluster.json(&["alloc", "resize", "x", "384MiB"]);
    assert_eq!(places(&larger), places(&made), "it grows where it lies");
    cluster.ok(&["alloc", "create", "y", "--size", "512MiB", "--region-size", "16MiB"]);
    let both = cluster.json(&["alloc", "create", "z", "--size", "112MiB", "--region-size", "16MiB"]);
    assert_eq!(places(&both), places(&made), "on the one that still holds it");
}

/// Sends a request with a body as no program of this project would; the answer.
fn send(cluster: &Cluster, method: &str, path: &str, body: &str) -> String {
    let url = cluster.allocator_url();
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn text_of_others_forges_no_line_of_the_log() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "x", "--size", "16MiB"]);
    let id = "0123456789abcdef0123456789abcdef";
    let body = format!(
        r#"{{"client":"{id}","host":"{id}","host_name":"web1\n INFO xpm_allocator: FORGED","purpose":"a\u001b[31m\u202eb"}}"#
    );
    let answer = send(&cluster, "PUT", "/v1/allocations/x/owner", &body);
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    let log = cluster.allocator.log();
    assert!(log.lines().any(|line| line.contains("attached: `x` is used by web1 INFO")), "{log}");
    assert!(!log.lines().any(|line| line.starts_with(" INFO xpm_allocator: FORGED")), "{log}");
    let owner = cluster.json(&["alloc", "show", "x"])["owner"].clone();
    assert_eq!(owner["host_name"], "web1 INFO xpm_allocator: FORGED");
    assert_eq!(owner["purpose"], "a?[31m?b");
    let path = r#"{"host":"0123456789abcdef0123456789abcdef","nbd":[],"shm":"/run/x\u001b[2J"}"#;
    let beat = format!(
        r#"{{"info":{{"id":"{id}","name":"n","version":"1","control":"http://127.0.0.1:1","endpoints":{path},"medium":"memory","region_len":16777216}},"status":{{}}}}"#
    );
    let answer = send(&cluster, "PUT", &format!("/v1/appliances/{id}"), &beat);
    assert!(answer.contains("not printed"), "{answer}");
}

#[test]
fn events_outlive_the_allocator_and_come_in_pages() {
    let mut cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "x", "--size", "16MiB"]);
    cluster.ok(&["alloc", "create", "y", "--size", "16MiB"]);
    let before = cluster.json(&["events"]);
    let before = before.as_array().unwrap();
    cluster.restart_allocator();
    cluster.ok(&["alloc", "delete", "x"]);
    let after = cluster.json(&["events"]);
    let after = after.as_array().unwrap();
    assert_eq!(after[..before.len()], before[..], "what was told before is still there");
    let numbers: Vec<u64> = after.iter().map(|one| one["number"].as_u64().unwrap()).collect();
    assert!(numbers.windows(2).all(|two| two[0] + 1 == two[1]), "{numbers:?}");
    let kinds = |arguments: &[&str]| -> Vec<String> {
        let events = cluster.json(&[&["events"], arguments].concat());
        let kind =
            |one: &Value| format!("{} {}", one["kind"].as_str().unwrap(), one["subject"].as_str().unwrap());
        events.as_array().unwrap().iter().map(kind).collect()
    };
    assert_eq!(kinds(&["--object", "allocation/x"]), ["created x", "deleted x"]);
    assert_eq!(kinds(&["--kind", "created,deleted"]), ["created x", "created y", "deleted x"]);
    assert!(
        cluster.refused(&["events", "--kind", "creation"]).contains("kinds are appliance-up"),
        "says which there are"
    );
    let page = cluster.get("/v1/events?after=0&limit=2");
    assert_eq!(page.matches("\"number\"").count(), 2, "{page}");
    assert!(cluster.ok(&["events", "--kind", "deleted"]).contains("Z  deleted"), "clock times");
}

#[test]
fn documents_are_limited_in_number() {
    let cluster = Cluster::start(0);
    let file = cluster.dir().join("many.toml");
    let text: String = (0..10_001).map(|number| format!("[[client]]\nname='c{number}'\n")).collect();
    std::fs::write(&file, text).unwrap();
    let output = cluster.xpm(&["apply", file.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("at most 10000 are kept"), "{said}");
    assert!(cluster.ok(&["get", "client"]).contains("no client"), "none of them is there");
}

/// The command's output, byte for byte.
fn printed(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = cluster.xpm(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn documents_come_back_as_they_were_written() {
    let mut cluster = Cluster::start(0);
    let file = cluster.dir().join("pool.toml");
    let text = "# The pool of the lab.\n\n# At night only:\n[[account]]\nname = 'batch'   # of Anna\nhard-limit = \"1GiB\"\n\n\n[[strategy]]\nname = 'default'\n\n  [[strategy.rule]]\n  name = 'r'\n  layout = { stripe = 2 }\n# The end.\n";
    std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    cluster.ok(&["apply", path]);
    assert_eq!(printed(&cluster, &["get", "--file", path]), text, "byte for byte");
    assert_eq!(
        printed(&cluster, &["get", "account", "batch"]),
        "# At night only:\n[[account]]\nname = 'batch'   # of Anna\nhard-limit = \"1GiB\"\n"
    );
    cluster.restart_allocator();
    assert_eq!(printed(&cluster, &["get", "--file", path]), text, "also after a restart");
    let edited =
        cluster.command(&["edit", "account", "batch"]).env("VISUAL", "sed -i s/1GiB/2GiB/").output().unwrap();
    assert!(edited.status.success(), "{}", String::from_utf8_lossy(&edited.stderr));
    assert_eq!(
        printed(&cluster, &["get", "--file", path]),
        text.replace("1GiB", "2GiB"),
        "the comments stay"
    );
    let bad = cluster.dir().join("bad.toml");
    std::fs::write(
        &bad,
        "[[account]]\nname='a'\npriority='x'\nnonsense=1\n[[account]]\nname='b'\nstrategy='none'\n[[client]]\nname='c'\naccount='a'\n",
    )
    .unwrap();
    let output = cluster.xpm(&["apply", bad.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    for part in [
        "bad.toml:3: account[0].priority",
        "bad.toml:4: account[0]",
        "bad.toml:7: account[1].strategy: there is no",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("client[0]"), "an account that cannot be read is there: {said}");
}

#[test]
fn an_allocation_gets_another_name() {
    let mut cluster = Cluster::start(2);
    let socket = format!("nbd-socket={}", cluster.dir().join("x.sock").display());
    cluster.ok(&["alloc", "create", "old", "--size", "32MiB", "--stripe", "2"]);
    cluster.ok(&["alloc", "create", "other", "--size", "16MiB"]);
    let id = cluster.json(&["alloc", "show", "old"])["id"].clone();
    cluster.ok(&["blk", "attach", "old", "--as", &socket]);
    assert!(cluster.refused(&["alloc", "rename", "old", "new"]).contains("detach it there first"));
    cluster.ok(&["blk", "detach", "old"]);
    assert!(cluster.refused(&["alloc", "rename", "old", "other"]).contains("there already"));
    cluster.ok(&["alloc", "rename", "old", "new"]);
    assert_eq!(
        (state(&cluster, "old"), cluster.json(&["alloc", "show", "new"])["id"].clone()),
        (None, id.clone())
    );
    cluster.restart_allocator();
    assert_eq!(cluster.json(&["alloc", "show", "new"])["id"], id);
    cluster.ok(&["blk", "attach", "new", "--as", &socket]);
    wait_until("appliances know it by its name", || cluster.xpm(&["fsck"]).status.success());
}

#[test]
fn a_refusal_can_be_followed_as_it_is_written() {
    let cluster = Cluster::start_pool(&[vec!["--link-speed", "5Gbps"]], false);
    let file = cluster.dir().join("pool.toml");
    let text = "[[account]]\nname='fast'\nlink-speed='10Gbps'\n[[client]]\nname='c'\n[[strategy]]\nname='near'\n[[strategy.rule]]\nname='rack'\nlocality={within='rack'}\n";
    std::fs::write(&file, text).unwrap();
    cluster.ok(&["apply", file.to_str().unwrap()]);
    let line = cluster.refused(&["alloc", "create", "x", "--size", "16MiB", "--account", "fast"]);
    assert!(
        line.contains("set link-speed = \"5Gbps\" (now 10Gbps) in account `fast` (`xpm edit account fast`)"),
        "{line}"
    );
    let edited = cluster
        .command(&["edit", "account", "fast"])
        .env("VISUAL", "sed -i s/10Gbps/5Gbps/")
        .status()
        .unwrap();
    assert!(edited.success());
    cluster.ok(&["alloc", "create", "x", "--size", "16MiB", "--account", "fast"]);
    let near = ["alloc", "create", "y", "--size", "16MiB", "--strategy", "near"];
    let line = cluster.refused(&near);
    assert!(line.contains("no client is named; name the client (`--client NAME`)"), "{line}");
    let line = cluster.refused(&[&near[..], &["--client", "c"]].concat());
    assert!(line.contains("client `c` has no label `rack`; give it one (`xpm edit client c`)"), "{line}");
}
