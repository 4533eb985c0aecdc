//! One xpm-blk serves and another one stands by: real processes, with a guest's driver and NBD sockets on their
//! devices.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xpm_tests::hang::hang_thread;
use xpm_tests::vhost::{DATA, Guest, blk};
use xpm_tests::{Cluster, Daemon, wait_until};

const SETTINGS: &str =
    "standby = true\nstandby-reserve = \"1MiB\"\nhang-limit = \"4s\"\nbuffer = \"1MiB\"\nthreads = 1\n";

/// A cluster whose xpm-blk has a standby; every one of its xpm-blk is ended with it.
struct Site {
    cluster: Cluster,
    config: String,
}

impl Site {
    fn start() -> Site {
        let mut cluster = Cluster::start(2);
        cluster.restart_blk_with(SETTINGS);
        let config = cluster.dir().join("blk.toml").display().to_string();
        let site = Site { cluster, config };
        site.ready();
        site
    }

    fn status(&self) -> Option<Value> {
        let output = self.cluster.xpm(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(status["blk"].clone()).filter(Value::is_object)
    }

    /// Waits for a standby; the process that serves, and that one.
    fn ready(&self) -> (u64, u64) {
        let mut found = (0, 0);
        wait_until("a standby is ready", || {
            let Some(status) = self.status() else { return false };
            found = (status["pid"].as_u64().unwrap_or(0), status["standby"]["pid"].as_u64().unwrap_or(0));
            status["standby"]["state"] == "ready"
        });
        found
    }

    /// Waits until that process serves.
    fn wait_serving(&self, process: u64) {
        wait_until("the standby serves", || self.status().is_some_and(|status| status["pid"] == process));
    }

    /// The path of a new disk of a virtual machine.
    fn disk(&self, name: &str) -> PathBuf {
        let socket = self.cluster.dir().join(format!("{name}.sock"));
        let form = format!("vhost-user={}", socket.display());
        self.cluster.ok(&["alloc", "create", name, "--size", "64MiB", "--stripe", "2"]);
        self.cluster.ok(&["blk", "attach", name, "--as", &form, "--transport", "nbd-tcp"]);
        socket
    }

    fn names(&self) -> Vec<String> {
        let list = self.cluster.json(&["blk", "list"]);
        let names = list.as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap().to_owned());
        names.collect()
    }

    fn processes(&self) -> Vec<Pid> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            words.contains(&self.config.as_bytes())
        });
        ours.filter_map(Pid::from_raw).collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // One that is killed may be followed by its standby.
        for _ in 0..100 {
            let left = self.processes();
            for pid in &left {
                let _ = kill_process(*pid, Signal::KILL);
            }
            self.cluster.blk.is_alive();
            if left.is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn pid(number: u64) -> Pid {
    Pid::from_raw(number as i32).unwrap()
}

fn is_gone(process: u64) -> bool {
    // A zombie has no command line.
    std::fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|line| line.is_empty())
        || !Path::new(&format!("/proc/{process}")).exists()
}

fn wait_for_socket(socket: &Path) {
    wait_until("the socket is back", || UnixStream::connect(socket).is_ok());
}

#[test]
fn kill_9_again_and_again_and_the_standby_goes_on() {
    let site = Site::start();
    let socket = site.disk("disk");
    let mut guest = Guest::new(1);
    guest.connect(&socket);
    guest.write(DATA, &[7; 4096]);
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    // Two takeovers in a row, each with writes in flight that must not land late.
    for round in 0..2_u8 {
        let (serving, standby) = site.ready();
        site.cluster.appliances.iter().for_each(Daemon::freeze);
        guest.write(DATA + 8192, &[100 + round; 4096]);
        guest.submit(0, 0, (blk::WRITE, 8), &[(DATA + 8192, 4096, false)]);
        wait_until("it is in flight", || site.cluster.json(&["blk", "show", "disk"])["in_flight"] == 1);
        kill_process(pid(serving), Signal::KILL).unwrap();
        guest.disconnect();
        site.cluster.appliances.iter().for_each(|appliance| appliance.signal(Signal::CONT));
        site.wait_serving(standby);
        guest.connect(&socket);
        assert_eq!(guest.wait(0, 1)[0].2, blk::OK, "it was submitted again");
        assert_eq!(guest.run(0, (blk::READ, 8), &[(DATA, 4096, true)]).1, blk::OK);
        assert!(guest.read(DATA, 4096) == [100 + round; 4096]);
        assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA, 4096, true)]).1, blk::OK);
        assert!(guest.read(DATA, 4096) == [7; 4096]);
    }
    // The standby knows changes made after it was ready, without reading from disk.
    site.ready();
    site.disk("late");
    guest.disconnect();
    site.cluster.ok(&["blk", "detach", "disk"]);
    let (serving, standby) = site.ready();
    kill_process(pid(serving), Signal::KILL).unwrap();
    site.wait_serving(standby);
    assert_eq!(site.names(), ["late"]);
    wait_for_socket(&site.cluster.dir().join("late.sock"));
}

#[test]
fn a_newer_process_takes_over_from_the_one_that_serves() {
    let mut site = Site::start();
    let socket = site.disk("disk");
    let mut guest = Guest::new(1);
    guest.connect(&socket);
    guest.write(DATA, &[9; 4096]);
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    let (_, standby) = site.ready();
    let newer = site.cluster.another_blk();
    wait_until("the newer one serves", || {
        site.status().is_some_and(|status| status["pid"] == u64::from(newer.pid()))
    });
    wait_until("the older one has ended", || !site.cluster.blk.is_alive());
    assert!(is_gone(standby), "the older one's standby is not the newer one's");
    guest.disconnect();
    guest.connect(&socket);
    assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA, 4096, true)]).1, blk::OK);
    assert!(guest.read(DATA, 4096) == [9; 4096]);
    assert_ne!(site.ready().1, standby);
    let alive: Vec<Pid> =
        site.processes().into_iter().filter(|pid| !is_gone(pid.as_raw_pid() as u64)).collect();
    assert_eq!(alive.len(), 2, "one serves and one stands by: {alive:?}");
}

/// Three processes that fill their memory at once are more than a machine has that is short of memory.
#[test]
fn a_newer_process_takes_the_place_of_a_standby_that_is_not_ready() {
    let mut site = Site::start();
    let (serving, mut standby) = site.ready();
    let stopped = loop {
        kill_process(pid(standby), Signal::KILL).unwrap();
        let mut next = None;
        wait_until("another standby is started", || {
            let others = site.processes().into_iter().map(|pid| pid.as_raw_pid() as u64);
            next = others.filter(|&other| other != serving && other != standby && !is_gone(other)).max();
            next.is_some_and(|next| kill_process(pid(next), Signal::STOP).is_ok())
        });
        standby = next.unwrap();
        wait_until("it is known", || site.status().is_some_and(|status| status["standby"]["pid"] == standby));
        if site.status().is_some_and(|status| status["standby"]["state"] == "starting") {
            break standby;
        }
    };
    let newer = site.cluster.another_blk();
    site.wait_serving(newer.pid().into());
    assert!(is_gone(stopped));
    wait_until("the older one has ended", || !site.cluster.blk.is_alive());
    let log = site.cluster.blk.log();
    assert!(log.contains(&format!("process {stopped}, makes room for a newer process")), "{log}");
}

#[test]
fn one_that_hangs_is_replaced() {
    let site = Site::start();
    let socket = site.disk("disk");
    // The standby first: the one that serves has another one.
    let (serving, standby) = site.ready();
    kill_process(pid(standby), Signal::STOP).unwrap();
    wait_until("it is replaced", || {
        is_gone(standby) && site.status().is_some_and(|status| status["standby"]["state"] == "ready")
    });
    let (still, standby) = site.ready();
    assert_eq!(still, serving);
    // Then the one that serves.
    kill_process(pid(serving), Signal::STOP).unwrap();
    wait_until("it is killed", || is_gone(serving));
    site.wait_serving(standby);
    wait_for_socket(&socket);
    let log = site.cluster.blk.log();
    assert!(log.contains("has hung for"), "{log}");
}

#[test]
fn one_of_whose_threads_one_hangs_is_replaced() {
    let site = Site::start();
    let socket = site.disk("disk");
    let mut guest = Guest::new(1);
    guest.connect(&socket);
    guest.write(DATA, &[9; 4096]);
    // Served for longer than the limit, nothing is taken for a thread that hangs.
    let busy = Instant::now();
    while busy.elapsed() < Duration::from_secs(6) {
        assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    }
    for thread in ["xpm-vu-diskq0", "xpm-nbd-0"] {
        let (serving, standby) = site.ready();
        hang_thread(serving, thread);
        guest.disconnect();
        site.wait_serving(standby);
        guest.connect(&socket);
        assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA, 4096, true)]).1, blk::OK);
        assert!(guest.read(DATA, 4096) == [9; 4096]);
        let log = site.cluster.blk.log();
        assert!(log.contains(&format!("thread {thread} has hung for 4 s")), "{log}");
    }
}

#[test]
fn an_older_process_and_rubbish_are_turned_away() {
    let site = Site::start();
    let (serving, standby) = site.ready();
    let door = site.cluster.dir().join("blk/handover.sock");
    let say = |text: &[u8]| {
        let mut socket = UnixStream::connect(&door).unwrap();
        socket.write_all(&(text.len() as u32).to_le_bytes()).unwrap();
        socket.write_all(text).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let answer = say(br#"{"Hello":{"pid":1,"successor":true,"records":1}}"#);
    assert!(answer.contains("Refused") && answer.contains("older"), "{answer}");
    assert_eq!(say(b"{}"), "");
    assert_eq!(site.ready(), (serving, standby), "both go on");
}
