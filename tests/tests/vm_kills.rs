//! A virtual machine that moves while one of the processes that take part is killed: it never runs twice, and its RAM
//! is never lost.

use std::time::{Duration, Instant};

use serde_json::json;
use xpm_tests::vm::{Break, Guest, Hosts, Site, Wire, can_have_hosts, error_of};
use xpm_tests::wait_until;

/// Messages of a move, before which somebody is killed.
const STEPS: [&str; 5] = ["\"ready\"", "\"state\"", "\"loaded\"", "\"run\"", "\"running\""];
/// Longest wait for two passes of a machine that QEMU says to run, on a machine of other loads.
const PASS_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    FilesHere,
    FilesThere,
    Allocator,
    QemuHere,
    QemuThere,
}

const VICTIMS: [Victim; 5] =
    [Victim::FilesThere, Victim::Allocator, Victim::QemuThere, Victim::FilesHere, Victim::QemuHere];

struct Scene {
    /// The machine, and its host. It ends first, since what ends it is found in the site's directory.
    here: Guest,
    hosts: Hosts,
    site: Site,
    at: &'static str,
    /// Outcomes of the kills, in order.
    ends: Vec<&'static str>,
}

impl Scene {
    fn new() -> Scene {
        let hosts = Hosts::start("standby-reserve = \"1MiB\"");
        let site = Site::between(&hosts, "64MiB", &[]);
        let here = site.run("a");
        Scene { hosts, site, here, at: "a", ends: Vec::new() }
    }

    /// Moves the machine and kills somebody meanwhile.
    fn kill(&mut self, step: &'static str, victim: Victim) {
        let (from, to) = (self.at, if self.at == "a" { "b" } else { "a" });
        let when = format!("{victim:?} at {step}, from {from}");
        // Without, a second kill at the same host would end its xpm-fs for good.
        self.hosts.wait_standbys();
        let (mut there, port) = self.site.receive(to, &[]);
        let address = (self.site.address(to), port).into();
        let wire = Wire::from(Some(self.hosts.namespace(from)), address, vec![Break::pause(step)]);
        let moving = self.site.migrate(from, wire.port());
        wire.broke(|| match victim {
            Victim::FilesHere => self.hosts.kill_files(from),
            Victim::FilesThere => self.hosts.kill_files(to),
            Victim::Allocator => self.hosts.restart_allocator(),
            Victim::QemuHere => self.here.kill_qemu(),
            Victim::QemuThere => there.kill_qemu(),
        });
        let output = moving.wait_with_output().unwrap();
        let said = error_of(&output);
        let mut runs = self.who_runs(&there, &when);
        if runs == (false, false) && self.here.qemu_is_alive() {
            // The way out that is named.
            assert!(said.contains("xpm vm settle vm1"), "{when}: {said}");
            let settled = self.site.command(from, &["settle", "vm1"]);
            assert!(settled.status.success(), "{when}: {said}: {}", error_of(&settled));
            runs = self.who_runs(&there, &when);
        }
        match runs {
            (true, false) => self.ends.push("stayed"),
            (false, true) => {
                self.ends.push("moved");
                wait_until("it has ended where it was", || !self.here.qemu_is_alive());
                (self.here, self.at) = (there, to);
            }
            (false, false) => {
                // As with a host whose power failed. Its RAM is there still, for whoever runs it next.
                assert_eq!(victim, Victim::QemuHere, "{when}: nobody runs: {said}");
                self.ends.push("its QEMU died");
                // The destination ends by itself, and returns its memory. A killed command would do neither.
                there.wait();
                self.start_anew(&when, &said);
            }
            (true, true) => unreachable!("checked"),
        }
        println!("{when}: {}", self.ends.last().unwrap_or(&""));
    }

    /// Whether the machine makes passes where it was, and where it goes.
    fn who_runs(&self, there: &Guest, when: &str) -> (bool, bool) {
        let (begun, before) = (Instant::now(), (self.here.passes(), there.passes()));
        while begun.elapsed() < PASS_LIMIT {
            let now = (self.here.passes(), there.passes());
            // The rest of a line of before may have come late.
            let runs = (now.0 > before.0 + 1, now.1 > before.1 + 1);
            if runs.0 || runs.1 {
                assert_ne!(runs, (true, true), "two machines run: {when}");
                assert!(!runs.0 || now.1 == 0, "it went on where it was after it ran elsewhere: {when}");
                return runs;
            }
            let is_running = |host| self.site.states(host).iter().any(|state| state == "running");
            if !is_running("a") && !is_running("b") {
                return (false, false);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{when}: a machine is said to run, and makes no pass");
    }

    /// The machine is gone with its QEMU: its allocation goes to a new one.
    fn start_anew(&mut self, when: &str, said: &str) {
        let list = self.hosts.json("a", &["alloc", "handover", "--list"]);
        for open in list.as_array().into_iter().flatten() {
            let id = open["id"].as_str().unwrap_or_default();
            let ended = self.hosts.xpm("a", &["alloc", "handover", "--rollback", id]);
            assert!(ended.status.success(), "{when}: {said}: {}", error_of(&ended));
        }
        self.here.wait();
        wait_until("nobody shows its RAM", || {
            ["a", "b"].iter().all(|host| self.hosts.json(host, &["fs", "list"]) == json!([]))
        });
        self.here = self.site.run("a");
        self.at = "a";
    }
}

#[test]
fn whoever_is_killed_one_machine_runs() {
    if !can_have_hosts() {
        return;
    }
    let mut scene = Scene::new();
    for (step, victim) in STEPS.into_iter().zip(VICTIMS) {
        scene.kill(step, victim);
    }
    scene.here.goes_on();
}

#[test]
#[ignore = "long: a hundred moves"]
fn long_whichever_process_is_killed_a_hundred_times_one_machine_runs() {
    if !can_have_hosts() {
        return;
    }
    let mut scene = Scene::new();
    for round in 0..4 {
        for step in STEPS {
            for victim in VICTIMS {
                println!("round {round}");
                scene.kill(step, victim);
            }
        }
    }
    scene.here.goes_on();
    let count = |end: &str| scene.ends.iter().filter(|one| **one == end).count();
    println!("{} moved, {} stayed, {} died", count("moved"), count("stayed"), count("its QEMU died"));
}
