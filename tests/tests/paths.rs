//! The shown state of paths to appliances is true, also of paths without I/O.

#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::Signal;
use xpm_tests::{Cluster, LIMIT, wait_until};

fn state(cluster: &Cluster, name: &str) -> String {
    cluster.json(&["blk", "show", name])["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_idle_device_shows_that_its_appliance_stands_still() {
    let cluster = Cluster::start(1);
    let [_, _, shm] = ["nbd-tcp", "nbd-unix", "shm"].map(|name| cluster.attach(name, "16MiB", &[], name));
    let mut reader = Reader::start(&shm);
    assert_eq!(reader.next(), "read");
    cluster.appliances[0].freeze();
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it holds", || state(&cluster, name) == "holding");
        let shown = cluster.json(&["blk", "show", name]);
        assert!(shown["links"][0]["reason"].to_string().contains("does not answer"), "{shown}");
    }
    // Its path is checked at the same times as the others: by now, or within this time.
    std::thread::sleep(Duration::from_secs(2));
    reader.read_again();
    assert_eq!(reader.next(), "read");
    assert_eq!(state(&cluster, "shm"), "live", "its I/O passes");
    cluster.appliances[0].signal(Signal::CONT);
    for name in ["nbd-tcp", "nbd-unix"] {
        wait_until("it lives again", || state(&cluster, name) == "live");
    }
}

/// Reads once, and again for each line of its input; prints how each read ended.
const SCRIPT: &str = "
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

/// A client of an NBD socket that stays connected.
struct Reader {
    child: Child,
    input: ChildStdin,
    printed: Receiver<String>,
}

impl Reader {
    fn start(uri: &str) -> Reader {
        let mut command = Command::new("/usr/bin/python3");
        let started = command.args(["-c", SCRIPT, uri]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = started.expect("python3 starts");
        let (sender, printed) = channel();
        let output = BufReader::new(child.stdout.take().expect("its output"));
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let input = child.stdin.take().expect("its input");
        Reader { child, input, printed }
    }

    fn read_again(&mut self) {
        writeln!(self.input).expect("it reads its input");
    }

    fn next(&self) -> String {
        self.printed.recv_timeout(LIMIT).expect("the read ends")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The connection stands, so nothing breaks; and the time that I/O is held begins when it stopped.
#[test]
fn io_fails_when_an_appliance_stands_still_for_longer_than_it_is_held() {
    let mut cluster = Cluster::start(1);
    cluster.restart_blk_with("hold = \"3s\"");
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    let mut reader = Reader::start(&uri);
    assert_eq!(reader.next(), "read");
    cluster.appliances[0].freeze();
    reader.read_again();
    assert_eq!(reader.next(), "EIO");
    cluster.appliances[0].signal(Signal::CONT);
    wait_until("it lives again", || state(&cluster, "v") == "live");
    reader.read_again();
    assert_eq!(reader.next(), "read");
}
