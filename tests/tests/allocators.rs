//! Several allocators on one etcd: whoever leads, everybody finds it and nothing is lost.

#![allow(missing_docs)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use xpm_tests::several::Several;
use xpm_tests::{LIMIT, have, wait_until};

/// Makes an allocation as soon as somebody takes the order; how long that took.
fn create_again(several: &Several, name: &str) -> Duration {
    let begun = Instant::now();
    wait_until("an allocation is made", || {
        several.xpm(&["alloc", "create", name, "--size", "16MiB"]).status.success()
            || several.names().contains(&name.to_owned())
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
    let status = several.ok(&["status"]);
    for part in
        [format!("{} leads", several.url(1 - first)), format!("{} does not answer", several.url(first))]
    {
        assert!(status.contains(&part), "{status}");
    }
    several.restart(first);
    wait_until("it follows", || several.status_code(first) == Some(307));
    assert!(several.ok(&["status"]).contains(&format!("{} follows", several.url(first))));
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
