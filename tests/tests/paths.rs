//! The shown state of paths to appliances is true, also of paths without I/O.

#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use xpm_tests::{Cluster, LIMIT, wait_until};

fn state(cluster: &Cluster, name: &str) -> String {
    cluster.json(&["blk", "show", name])["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_idle_device_shows_that_its_appliance_stands_still() {
    let cluster = Cluster::start(1);
    for transport in ["nbd-tcp", "nbd-unix", "shm"] {
        cluster.attach(transport, "16MiB", &[], transport);
    }
    cluster.appliances[0].freeze();
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it holds", || state(&cluster, name) == "holding");
        let shown = cluster.json(&["blk", "show", name]);
        assert!(shown["links"][0]["reason"].to_string().contains("does not answer"), "{shown}");
    }
    assert_eq!(state(&cluster, "shm"), "live", "its I/O passes");
    cluster.appliances[0].signal(Signal::CONT);
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it lives again", || state(&cluster, name) == "live");
    }
}

/// Reads once, and again for each line that it is told; says how each read ended.
const READER: &str = "
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
while True:
    try:
        h.pread(4096, 0)
        print('read', flush=True)
    except nbd.Error as error:
        print(error.errno, flush=True)
    if not sys.stdin.readline():
        break
";

/// The connection stands, so nothing breaks; and the time that I/O is held begins when it stopped.
#[test]
fn io_fails_when_an_appliance_stands_still_for_longer_than_it_is_held() {
    let mut cluster = Cluster::start(1);
    cluster.restart_blk_with("hold = \"3s\"");
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    let mut reader = Command::new("/usr/bin/python3");
    let reader = reader.args(["-c", READER, &uri]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut reader = reader.expect("python3 starts");
    let (said, lines) = std::sync::mpsc::channel();
    let output = BufReader::new(reader.stdout.take().expect("its output"));
    std::thread::spawn(move || output.lines().map_while(Result::ok).for_each(|line| drop(said.send(line))));
    let next = || lines.recv_timeout(LIMIT).expect("it is not held for ever");
    assert_eq!(next(), "read");
    let mut tell = reader.stdin.take().expect("its input");
    cluster.appliances[0].freeze();
    writeln!(tell).expect("it listens");
    assert_eq!(next(), "EIO");
    cluster.appliances[0].signal(Signal::CONT);
    wait_until("it lives again", || state(&cluster, "v") == "live");
    writeln!(tell).expect("it listens");
    assert_eq!(next(), "read");
    let _ = reader.kill();
    let _ = reader.wait();
}
