//! Several allocators on one etcd: whoever leads, everybody finds it and nothing is lost.

#![allow(missing_docs)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use xpm_tests::several::Several;
use xpm_tests::{LIMIT, have, http, wait_until};

/// Makes an allocation as soon as somebody takes the order; how long that took.
fn create_again(several: &Several, name: &str) -> Duration {
    let begun = Instant::now();
    wait_until("an allocation is made", || {
        several.xpm(&["alloc", "create", name, "--size", "16MiB"]).status.success()
            || several.xpm(&["alloc", "show", name]).status.success()
    });
    begun.elapsed()
}

/// Kills the leader in the middle of orders, which are not repeated; those that were acknowledged.
fn kill_while_orders_come(several: &mut Several, leader: usize) -> Vec<String> {
    let (urls, programs) = (several.url(leader), xpm_tests::programs());
    let order = move |name: &String| {
        let mut xpm = Command::new(programs.join("xpm"));
        xpm.args(["--allocator", &urls, "alloc", "create", name, "--size", "16MiB"]);
        xpm.stderr(Stdio::null()).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&acknowledged);
    let orders = std::thread::spawn(move || {
        let names = (0..30).map(|number| format!("n{number}"));
        names.take_while(order).for_each(|name| told.lock().unwrap().push(name));
    });
    wait_until("orders come", || acknowledged.lock().unwrap().len() >= 3);
    several.allocators[leader].kill();
    orders.join().unwrap();
    let acknowledged = acknowledged.lock().unwrap().clone();
    assert!(acknowledged.len() < 30, "it was killed in the middle");
    acknowledged
}

fn verified_load(several: &Several, uri: &str, seconds: u32) -> Child {
    Command::new("fio")
        .current_dir(several.dir())
        .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=4", "--size=16M"])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=64",
            "--verify_state_save=0",
            "--time_based",
        ])
        .args([format!("--runtime={seconds}"), format!("--uri={uri}")])
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

#[test]
fn the_next_leader_serves_what_was_acknowledged_and_no_io_notices() {
    assert!(have("fio"), "fio is not installed: cargo xtask setup");
    let mut several = Several::start(1, 2, 2);
    several.ok(&["alloc", "create", "busy", "--size", "32MiB"]);
    let socket = several.dir().join("busy.sock");
    several.ok(&["blk", "attach", "busy", "--as", &format!("nbd-socket={}", socket.display())]);
    let mut load = verified_load(&several, &format!("nbd+unix:///busy?socket={}", socket.display()), 8);
    several.ok(&["alloc", "create", "before", "--size", "16MiB"]);
    let first = several.leader();
    let acknowledged = kill_while_orders_come(&mut several, first);
    let back = create_again(&several, "after");
    eprintln!("orders are served again after {back:?}");
    let names = several.names();
    for name in acknowledged.iter().chain(["after", "before", "busy"].map(str::to_owned).iter()) {
        assert!(names.contains(name), "{name} was acknowledged: {names:?}");
    }
    for name in names.iter().filter(|name| name.starts_with('n')) {
        several.ok(&["alloc", "delete", name]);
    }
    let status = |several: &Several| {
        // Its exit status says that one of them does not answer.
        String::from_utf8_lossy(&several.xpm(&["status"]).stdout).into_owned()
    };
    let said = status(&several);
    for part in
        [format!("{} leads", several.url(1 - first)), format!("{} does not answer", several.url(first))]
    {
        assert!(said.contains(&part), "{said}");
    }
    several.restart(first);
    wait_until("it follows", || several.status_code(first) == Some(307));
    assert!(status(&several).contains(&format!("{} follows", several.url(first))));
    // One that ends in order gives its office away at once.
    let begun = Instant::now();
    several.allocators[1 - first].signal(Signal::TERM);
    wait_until("the first one leads again", || several.status_code(first) == Some(200));
    eprintln!("the office was given away in {:?}", begun.elapsed());
    several.ok(&["alloc", "delete", "before"]);
    wait_until("it is deleted", || several.names() == ["after", "busy"]);
    assert!(load.wait().unwrap().success(), "fio verified all it wrote");
}

#[test]
fn a_leader_that_slept_through_its_term_writes_nothing() {
    let several = Several::start(1, 2, 1);
    let (old, new) = (several.leader(), 1 - several.leader());
    several.allocators[old].signal(Signal::STOP);
    // The kernel takes the order for it meanwhile.
    let mut late = TcpStream::connect(("127.0.0.1", several.port(old))).unwrap();
    late.set_read_timeout(Some(LIMIT)).unwrap();
    let body = r#"{"name":"late","size":16777216}"#;
    write!(
        late,
        "POST /v1/allocations HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    wait_until("the other one leads", || several.status_code(new) == Some(200));
    several.allocators[old].signal(Signal::CONT);
    let mut answer = String::new();
    late.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"not-leader\"") || answer.contains("\"unavailable\""), "{answer}");
    let back = create_again(&several, "real");
    eprintln!("orders are served again after {back:?}");
    wait_until("the old one follows", || several.status_code(old) == Some(307));
    assert_eq!(several.names(), ["real"]);
}

#[test]
fn an_etcd_leader_that_dies_is_replaced_behind_the_allocators() {
    let mut several = Several::start(3, 2, 1);
    several.ok(&["alloc", "create", "before", "--size", "16MiB"]);
    let victim = several.etcd.leader();
    several.etcd.kill(victim);
    let back = create_again(&several, "after");
    eprintln!("orders are served again after {back:?}");
    assert_eq!(several.names(), ["after", "before"]);
}

/// Makes and deletes allocations, so many times or until it is refused; the refusal.
fn make_history(several: &Several, pairs: usize) -> Option<String> {
    let port = several.port(several.leader());
    for number in 0..pairs {
        let body = format!(r#"{{"name":"h{number}","size":16777216}}"#);
        let made = http(port, "POST", "/v1/allocations", &body).unwrap();
        let gone = http(port, "DELETE", &format!("/v1/allocations/h{number}"), "").unwrap();
        if let Some(refusal) = [made, gone].into_iter().find(|answer| !answer.starts_with("HTTP/1.0 20")) {
            return Some(refusal);
        }
    }
    None
}

/// Smaller than what twice [`PAIRS`] leave behind.
const QUOTA: &str = "1048576";
/// The events of [`PAIRS`] take 0.8 MB and stay; the history of as many pairs at once takes 0.25 MB until it is
/// compacted, and that of all of them 1.2 MB.
const QUOTA_OF_EVENTS: &str = "1572864";
const PAIRS: usize = 320;
/// As many leave a third of the quota behind.
const PAIRS_AT_ONCE: usize = 80;

#[test]
fn history_of_etcd_is_forgotten() {
    let of_etcd = ["--quota-backend-bytes", QUOTA_OF_EVENTS];
    let several = Several::start_with((1, &of_etcd), (1, &["--compact-every", "1s"]), 1);
    // History of up to two intervals is there at any time, so a quick machine must not fill the quota within them.
    for _ in 0..PAIRS / PAIRS_AT_ONCE {
        assert_eq!(make_history(&several, PAIRS_AT_ONCE), None);
        let revision = several.etcd.revision(0);
        wait_until("what was made is forgotten", || several.etcd.has_forgotten(0, revision));
    }
    assert_eq!(several.names(), Vec::<String>::new());
}

#[test]
fn without_room_in_etcd_reading_goes_on_and_the_remedy_is_named() {
    let of_etcd = ["--quota-backend-bytes", QUOTA];
    let mut several = Several::start_with((1, &of_etcd), (1, &["--compact-every", "1h"]), 1);
    several.ok(&["alloc", "create", "kept", "--size", "16MiB"]);
    let refusal = make_history(&several, PAIRS * 2).expect("there is not so much room");
    assert!(refusal.contains("NOSPACE") && refusal.contains("etcdctl alarm disarm"), "{refusal}");
    let reads = |several: &Several| several.ok(&["alloc", "show", "kept"]).contains("ready");
    assert!(reads(&several));
    let status = several.xpm(&["status"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("NOSPACE"), "{status:?}");
    // No allocator can be elected now, and all of them may read.
    several.allocators[0].kill();
    several.restart(0);
    wait_until("it answers", || several.xpm(&["alloc", "show", "kept"]).status.success());
    let refused = several.xpm(&["alloc", "create", "more", "--size", "16MiB"]);
    let line = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && line.contains("etcdctl alarm disarm"), "{line}");
    // The remedy. Without `physical` the compaction goes on after its answer, and the defragmentation finds nothing
    // to free.
    let status = several.etcd.ask(0, "/v3/maintenance/status", "{}").unwrap();
    let revision = status["header"]["revision"].as_str().unwrap();
    several
        .etcd
        .ask(0, "/v3/kv/compaction", &format!(r#"{{"revision":"{revision}","physical":true}}"#))
        .unwrap();
    several.etcd.ask(0, "/v3/maintenance/defragment", "{}").unwrap();
    let member = status["header"]["member_id"].as_str().unwrap();
    let disarm = format!(r#"{{"action":"DEACTIVATE","memberID":"{member}","alarm":"NOSPACE"}}"#);
    several.etcd.ask(0, "/v3/maintenance/alarm", &disarm).unwrap();
    wait_until("orders are taken again", || {
        let made = several.xpm(&["alloc", "create", "more", "--size", "16MiB"]);
        eprint!("{}", String::from_utf8_lossy(&made.stderr));
        made.status.success() || several.xpm(&["alloc", "show", "more"]).status.success()
    });
    assert!(several.names().contains(&"kept".to_owned()));
}

#[test]
fn an_allocator_waits_for_etcd_and_says_so() {
    let mut several = Several::start(1, 1, 1);
    several.ok(&["alloc", "create", "before", "--size", "16MiB"]);
    several.etcd.kill(0);
    let port = several.port(0);
    let body = r#"{"name":"meanwhile","size":16777216}"#;
    let asked = || http(port, "POST", "/v1/allocations", body).unwrap_or_default();
    // Longer than a lease, and than what a request for etcd may take.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(12) {
        let answer = asked();
        assert!(
            answer.contains("wait") && answer.contains("etcd") || answer.contains("metadata"),
            "{answer}"
        );
        assert!(!answer.contains("is ending"), "{answer}");
        std::thread::sleep(Duration::from_millis(200));
    }
    several.etcd.start_again(0);
    let back = create_again(&several, "after");
    eprintln!("orders are taken again after {back:?}");
    assert!(several.names().contains(&"before".to_owned()));
}

#[test]
fn an_allocator_ends_whatever_is_away() {
    for round in 0..2 {
        let mut several = Several::start(1, 1, 1);
        let port = several.port(several.leader());
        let asking: Vec<_> = (0..8)
            .map(|number| {
                std::thread::spawn(move || {
                    for one in 0..20 {
                        let body = format!(r#"{{"name":"n{number}-{one}","size":16777216}}"#);
                        if http(port, "POST", "/v1/allocations", &body).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100 + 150 * round));
        // The whole machine goes down.
        several.allocators[0].signal(Signal::TERM);
        several.etcd.kill(0);
        several.appliances[0].kill();
        several.allocators[0].stop();
        asking.into_iter().for_each(|one| one.join().unwrap());
    }
}
