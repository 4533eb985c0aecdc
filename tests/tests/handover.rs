//! Allocations in use go to a client that stands by, and back, while both have devices: nobody's I/O fails, and
//! exactly one of them owns them, whoever is killed when.

use std::path::PathBuf;
use std::process::Output;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xpm_tests::verified::{Device, Verified};
use xpm_tests::{Cluster, Daemon, http, rounds, wait_until};

const NAMES: [&str; 2] = ["ram", "disk"];
/// Blocks that the old owner writes, and that the new one leaves alone.
const BLOCKS: u64 = 256;
/// Longer than the limit that the old owner's I/O has, where it is not handed over.
const LONG: Duration = Duration::from_secs(3);

/// Two clients: the first one uses the allocations, and the second one stands by.
struct Pair {
    cluster: Cluster,
    second: Option<Daemon>,
    id: String,
}

impl Pair {
    fn new() -> Pair {
        let mut cluster = Cluster::start(2);
        cluster.restart_blk_with("refusal-limit = \"2s\"");
        for name in NAMES {
            cluster.ok(&["alloc", "create", name, "--size", "32MiB", "--stripe", "2"]);
            let form = format!("nbd-socket={}", cluster.dir().join(format!("{name}.sock")).display());
            cluster.ok(&["blk", "attach", name, "--as", &form, "--transport", "nbd-tcp", "--hold", "1s"]);
        }
        let second = Some(cluster.second_client());
        let mut pair = Pair { cluster, second, id: String::new() };
        let status: Value = serde_json::from_slice(&pair.at_second(&["status", "--json"]).stdout).unwrap();
        pair.id = status["blk"]["client"].as_str().expect("a client id").to_owned();
        for name in NAMES {
            let form = format!("nbd-socket={}", pair.socket_of_second(name).display());
            let attached = pair.at_second(&[
                "blk",
                "attach",
                name,
                "--standby",
                "--as",
                &form,
                "--transport",
                "nbd-tcp",
            ]);
            assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
        }
        pair.is_noted();
        pair
    }

    fn at_second(&self, arguments: &[&str]) -> Output {
        self.cluster.xpm_of_second(arguments)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.cluster.dir().join(format!("{name}.sock"))
    }

    fn socket_of_second(&self, name: &str) -> PathBuf {
        self.cluster.dir().join(format!("{name}.second.sock"))
    }

    /// The first client has written down that the second one stands by.
    fn is_noted(&self) {
        wait_until("the owner knows who stands by", || {
            NAMES.iter().all(|name| self.cluster.json(&["alloc", "show", name])["standby"]["noted"] == true)
        });
    }

    fn post(&self, path: &str, body: &Value) -> (bool, Value) {
        let answer =
            http(self.cluster.port(), "POST", path, &body.to_string()).expect("the allocator answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a body");
        (head.split(' ').nth(1) == Some("200"), serde_json::from_str(body).unwrap_or_default())
    }

    fn hand_over(&self) -> String {
        let (done, open) = self.post("/v1/handovers", &json!({"names": NAMES, "to": self.id}));
        assert!(done && open["state"] == "open", "{open}");
        open["id"].as_str().unwrap().to_owned()
    }

    fn end(&self, which: &str, how: &str) -> Value {
        let (done, over) = self.post(&format!("/v1/handovers/{which}/{how}"), &json!({}));
        assert!(done, "{over}");
        over["state"].clone()
    }

    fn role(&self, of_second: bool, name: &str) -> Value {
        let arguments = ["blk", "show", name, "--json"];
        let output = if of_second { self.at_second(&arguments) } else { self.cluster.xpm(&arguments) };
        let device: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match (device["state"].as_str(), device["role"].as_str()) {
            (None, _) => json!("none"),
            (Some(state), None) => json!(state),
            (Some(_), Some(role)) => json!(role),
        }
    }

    fn roles_are(&self, first: &str, second: &str) {
        wait_until(&format!("the first client is {first}, the second one {second}"), || {
            NAMES.iter().all(|name| self.role(false, name) == first && self.role(true, name) == second)
        });
    }

    fn owner(&self) -> Value {
        let owners = NAMES.map(|name| self.cluster.json(&["alloc", "show", name])["owner"]["client"].clone());
        assert_eq!(owners[0], owners[1], "all of them have one owner");
        owners[0].clone()
    }

    fn restart_second(&mut self) {
        if let Some(mut second) = self.second.take() {
            second.kill();
        }
        self.second = Some(self.cluster.second_client());
    }

    /// The second client sees each write of the first one that was acknowledged.
    fn sees_all(&self, load: &Verified, when: &str) -> Vec<u64> {
        let mut device = Device::connect(&self.socket_of_second("ram"), "ram").unwrap();
        let acknowledged = load.acknowledged();
        let seen: Vec<u64> =
            (0..BLOCKS as usize).map(|block| device.read_version(block).expect("it is the owner")).collect();
        for (block, (seen, acknowledged)) in seen.iter().zip(&acknowledged).enumerate() {
            // One write may have been in flight.
            assert!((acknowledged..=&(acknowledged + 1)).contains(&seen), "block {block} {when}");
        }
        assert!(acknowledged.iter().any(|version| *version > 0), "there is something to see");
        seen
    }
}

#[test]
fn there_and_back_under_load_without_a_failure() {
    let pair = Pair::new();
    let load = Verified::start(&pair.socket("ram"), "ram", BLOCKS);
    load.goes_on("before anything happens");
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for hop in 1..=rounds(5, 20_u64) {
        // A read of the second client waits from before the switch on.
        let (sender, first_read) = mpsc::channel();
        let socket = pair.socket_of_second("ram");
        let reader = std::thread::spawn(move || {
            let mut device = Device::connect(&socket, "ram").unwrap();
            sender.send(None).unwrap();
            let read = device.read_version(BLOCKS as usize);
            sender.send(Some((Instant::now(), read))).unwrap();
        });
        assert!(first_read.recv().unwrap().is_none());
        assert!(first_read.recv_timeout(Duration::from_millis(50)).is_err(), "it waits");
        let start = Instant::now();
        let id = pair.hand_over();
        let (served, read) = first_read.recv().unwrap().expect("it was read");
        assert_eq!(read, Ok(hop - 1), "what it wrote before");
        there.push(served - start);
        reader.join().unwrap();

        let held = load.operations();
        let seen = pair.sees_all(&load, "after the switch");
        let mut device = Device::connect(&pair.socket_of_second("ram"), "ram").unwrap();
        device.write_version(BLOCKS as usize, hop).unwrap();
        assert_eq!(pair.sees_all(&load, "a moment later"), seen, "nobody else writes");
        assert!(load.operations() <= held + 1, "the old owner waits");
        if hop % 5 == 0 {
            std::thread::sleep(LONG);
            assert_eq!(pair.sees_all(&load, "after a while"), seen, "nobody else writes");
        }

        let start = Instant::now();
        assert_eq!(pair.end(&id, "rollback"), "returned");
        let before = load.operations();
        wait_until("the old owner goes on", || load.operations() > before);
        back.push(start.elapsed());
        load.goes_on("after it has them again");
    }
    let outcome = load.finish();
    there.sort_unstable();
    back.sort_unstable();
    println!(
        "order to first I/O of the new owner: median {:?}, longest {:?}; rollback to first I/O of the old one: median {:?}, \
         longest {:?}; {} operations",
        there[there.len() / 2],
        there[there.len() - 1],
        back[back.len() / 2],
        back[back.len() - 1],
        outcome.operations
    );
    assert_eq!(pair.cluster.json(&["blk", "show", "ram"])["counters"]["errors"], 0);
    let events = pair.cluster.ok(&["events"]);
    assert!(events.contains("handover-open") && events.contains("handover-returned"), "{events}");
}

#[test]
fn what_is_committed_ends_the_old_device_and_cannot_be_rolled_back() {
    let pair = Pair::new();
    let load = Verified::start(&pair.socket("ram"), "ram", BLOCKS);
    load.goes_on("before anything happens");
    let id = pair.cluster.ok(&["alloc", "handover", "ram,disk", "--to", &pair.id]).trim().to_owned();
    let list = pair.cluster.ok(&["alloc", "handover", "--list"]);
    assert!(list.contains(&id) && list.contains("open"), "{list}");
    pair.roles_are("handed-over", "live");
    let seen = pair.sees_all(&load, "before it is committed");
    for arguments in [
        ["alloc", "resize", "ram", "64MiB"].as_slice(),
        &["alloc", "transfer", "ram", "--to", &pair.id, "--force"],
        &["alloc", "delete", "disk"],
    ] {
        let refused = pair.cluster.refused(arguments);
        assert!(refused.contains("--rollback") || refused.contains("already"), "{refused}");
    }
    let said = pair.cluster.ok(&["alloc", "handover", "--commit", "disk"]);
    assert!(said.contains("committed"), "{said}");
    let why = load.fails("once it is committed");
    assert!(why.contains("error 5") || why.contains("gone"), "{why}");
    pair.roles_are("none", "live");
    let refused = pair.cluster.refused(&["alloc", "handover", "--rollback", &id]);
    assert!(refused.contains("no such hand-over"), "{refused}");
    assert_eq!(pair.owner(), json!(pair.id));
    let mut device = Device::connect(&pair.socket_of_second("ram"), "ram").unwrap();
    for (block, version) in seen.iter().enumerate() {
        assert_eq!(device.read_version(block), Ok(*version));
    }
    // And back by the same way.
    let form = format!("nbd-socket={}", pair.socket("ram").display());
    pair.cluster.ok(&["blk", "attach", "ram", "--standby", "--as", &form]);
    let refused = pair.cluster.refused(&["blk", "attach", "disk", "--standby", "--as", "ublk"]);
    assert!(refused.contains("cannot stand by"), "{refused}");
    pair.cluster.ok(&["blk", "detach", "ram"]);
    assert!(pair.cluster.json(&["alloc", "show", "ram"])["standby"].is_null(), "it was withdrawn");
}

#[test]
fn the_old_owner_dies_at_each_step() {
    let mut pair = Pair::new();
    let mut device = Device::connect(&pair.socket("ram"), "ram").unwrap();
    (0..16).for_each(|block| device.write_version(block, 1).unwrap());

    // While somebody stands by.
    pair.cluster.restart_blk();
    pair.roles_are("live", "stands-by");

    // While it is handed over: it is killed, and dead at the switch.
    pair.cluster.blk.kill();
    let id = pair.hand_over();
    wait_until("the new owner has it", || pair.role(true, "ram") == "live");
    let mut second = Device::connect(&pair.socket_of_second("ram"), "ram").unwrap();
    assert_eq!((0..16).map(|block| second.read_version(block).unwrap()).sum::<u64>(), 16);
    pair.cluster.restart_blk();
    pair.roles_are("handed-over", "live");
    pair.cluster.restart_blk();
    pair.roles_are("handed-over", "live");
    second.write_version(16, 7).unwrap();

    // It is dead while it gets them back.
    pair.cluster.blk.kill();
    assert_eq!(pair.end(&id, "rollback"), "returned");
    pair.cluster.restart_blk();
    pair.roles_are("live", "stands-by");
    let mut device = Device::connect(&pair.socket("ram"), "ram").unwrap();
    assert_eq!((device.read_version(3), device.read_version(16)), (Ok(1), Ok(7)));

    // It is dead while the new owner gets them for good.
    pair.is_noted();
    let id = pair.hand_over();
    pair.roles_are("handed-over", "live");
    pair.cluster.blk.kill();
    assert_eq!(pair.end(&id, "commit"), "committed");
    pair.cluster.restart_blk();
    pair.roles_are("none", "live");
}

#[test]
fn the_new_owner_dies_at_each_step() {
    let mut pair = Pair::new();
    let load = Verified::start(&pair.socket("ram"), "ram", BLOCKS);
    load.goes_on("before anything happens");

    // While it stands by.
    pair.restart_second();
    pair.roles_are("live", "stands-by");

    // It is dead at the switch, and at the rollback.
    if let Some(second) = &mut pair.second {
        second.kill();
    }
    let id = pair.hand_over();
    wait_until("the old owner waits", || pair.role(false, "disk") == "handed-over");
    assert_eq!(pair.end(&id, "rollback"), "returned");
    load.goes_on("although the other one is dead");
    let id = pair.hand_over();
    pair.restart_second();
    pair.roles_are("handed-over", "live");
    pair.sees_all(&load, "after its start");

    // It dies as the owner.
    pair.restart_second();
    pair.roles_are("handed-over", "live");
    pair.sees_all(&load, "after the next one");
    if let Some(second) = &mut pair.second {
        second.kill();
    }
    assert_eq!(pair.end(&id, "rollback"), "returned");
    load.goes_on("after it has them again");
    pair.restart_second();
    pair.roles_are("live", "stands-by");
    load.finish();
}

#[test]
fn the_allocator_dies_at_each_step() {
    let mut pair = Pair::new();
    let load = Verified::start(&pair.socket("ram"), "ram", BLOCKS);
    load.goes_on("before anything happens");
    let first = pair.owner();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut opened = 0;
    for kill in 0..8_u32 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let list = pair.cluster.json(&["alloc", "handover", "--list"]);
        let id = list[0]["id"].as_str().map(str::to_owned);
        let arguments = match &id {
            Some(id) => vec!["alloc", "handover", "--rollback", id],
            None => vec!["alloc", "handover", "ram,disk", "--to", &pair.id],
        };
        let mut command = pair.cluster.command(&arguments);
        let mut running =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random % 160_000));
        pair.cluster.restart_allocator();
        let _ = running.wait();
        // It ends in one of two ways, by itself.
        wait_until("it is open, or nothing", || {
            let list = pair.cluster.json(&["alloc", "handover", "--list"]);
            list.as_array().is_some_and(|all| all.iter().all(|one| one["state"] == "open"))
        });
        let owner = pair.owner();
        if owner == first {
            pair.roles_are("live", "stands-by");
            load.goes_on(&format!("after kill {kill}"));
            pair.is_noted();
        } else {
            opened += 1;
            pair.roles_are("handed-over", "live");
            pair.sees_all(&load, &format!("after kill {kill}"));
        }
    }
    println!("{opened} of 8 kills found it open");
    if let Some(id) = pair.cluster.json(&["alloc", "handover", "--list"])[0]["id"].as_str() {
        assert_eq!(pair.end(id, "rollback"), "returned");
    }
    load.goes_on("at the end");
    load.finish();
    assert_eq!(pair.cluster.json(&["blk", "show", "ram"])["counters"]["errors"], 0);
}

/// No proof that an appliance gives ends the I/O of who may get its allocation back, also when no allocator can be
/// asked.
#[test]
fn the_old_owner_waits_while_no_allocator_answers() {
    let mut pair = Pair::new();
    let load = Verified::start(&pair.socket("ram"), "ram", BLOCKS);
    load.goes_on("before anything happens");
    // It cannot hear of the switch before the allocator is gone.
    pair.cluster.blk.freeze();
    let id = pair.hand_over();
    wait_until("the new owner has it", || pair.role(true, "ram") == "live");
    pair.cluster.allocator.kill();
    pair.cluster.blk.signal(rustix::process::Signal::CONT);
    let before = load.operations();
    std::thread::sleep(LONG * 2);
    assert!(load.operations() <= before + 1, "it waits");
    pair.cluster.restart_allocator();
    pair.roles_are("handed-over", "live");
    assert_eq!(pair.end(&id, "rollback"), "returned");
    load.goes_on("after it has them again");
    load.finish();
}
