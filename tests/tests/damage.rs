//! The file of the metadata is damaged, or the disk is full: the allocator refuses with the way out, or goes on to
//! answer.

#![allow(missing_docs)]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use xpm_tests::{Cluster, Daemon, LIMIT, free_port, http, programs, rounds, wait_until};

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn names(answer: &str) -> Option<Vec<String>> {
    let list: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    Some(list.as_array()?.iter().filter_map(|one| one["name"].as_str().map(str::to_owned)).collect())
}

/// Runs an allocator on the directory and has it read and write. Its message, and the names that it knew.
fn try_out(data: &Path, log: &Path) -> (String, Option<Vec<String>>) {
    let port = free_port();
    let mut child: Child = Command::new(programs().join("xpm-allocator"))
        .args(["--listen", &format!("127.0.0.1:{port}"), "--heartbeat", "300ms", "--data"])
        .arg(data)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log).unwrap())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let mut known = None;
    while begun.elapsed() < LIMIT && child.try_wait().unwrap().is_none() {
        let Ok(answer) = http(port, "GET", "/v1/allocations", "") else {
            std::thread::sleep(std::time::Duration::from_millis(10));
            continue;
        };
        known = names(&answer);
        // Decisions are written for each of these, and one record becomes another one.
        for number in 0..3 {
            let body = format!(r#"{{"name":"new{number}","size":16777216}}"#);
            let _ = http(port, "POST", "/v1/allocations", &body);
        }
        let _ = http(port, "GET", "/v1/allocations/one/decisions", "");
        let _ = http(port, "DELETE", "/v1/allocations/one", "");
        break;
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    let said = std::fs::read_to_string(log).unwrap();
    assert!(known.is_some() || status.code() == Some(1), "neither serves nor refuses: {status}\n{said}");
    (said, known)
}

#[test]
fn one_flipped_bit_is_refused_with_the_way_out_or_does_no_harm() {
    let mut cluster = Cluster::start(1);
    for name in ["one", "two", "three"] {
        cluster.ok(&["alloc", "create", name, "--size", "16MiB"]);
    }
    cluster.ok(&["alloc", "delete", "three"]);
    cluster.allocator.stop();
    // A trial run of an allocator must not notify anyone.
    cluster.appliances.iter_mut().for_each(Daemon::kill);
    let whole = std::fs::read(cluster.data().join("allocator.redb")).unwrap();
    let used: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] != 0).collect();
    let (mut dice, mut refused, flips) = (Dice(17), 0, rounds(16, 64));
    for number in 0..flips {
        let at = if number % 4 == 0 { dice.below(whole.len()) } else { used[dice.below(used.len())] };
        let bit = dice.below(8);
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << bit;
        let data = cluster.dir().join(format!("flip{number}"));
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("allocator.redb"), &flipped).unwrap();
        let (said, known) = try_out(&data, &cluster.dir().join("flip.log"));
        assert!(!said.contains("panicked"), "bit {bit} of byte {at}: {said}");
        match known {
            Some(mut known) => {
                known.sort();
                assert_eq!(known, ["one", "two"], "bit {bit} of byte {at}");
            }
            None => {
                refused += 1;
                assert!(said.contains("recover --from-network"), "bit {bit} of byte {at}: {said}");
            }
        }
        std::fs::remove_dir_all(&data).unwrap();
    }
    eprintln!("{refused} of {flips} were refused");
    assert!(refused > 0, "nothing was damaged");
}

#[test]
fn an_empty_file_is_no_new_pool_and_is_recovered() {
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("used", "32MiB", &[], "nbd-tcp");
    let list = cluster.json(&["appliance", "list"]);
    let control = list[0]["info"]["control"].as_str().unwrap().to_owned();
    cluster.allocator.kill();
    File::create(cluster.data().join("allocator.redb")).unwrap();
    let refused = || {
        let mut command = Command::new(programs().join("xpm-allocator"));
        let output =
            command.args(["--listen", "127.0.0.1:0", "--data"]).arg(cluster.data()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let line = refused();
    assert!(line.contains("empty") && line.contains("recover --from-network"), "{line}");
    std::fs::remove_file(cluster.data().join("allocator.redb")).unwrap();
    let line = refused();
    assert!(line.contains("gone") && line.contains("recover --from-network"), "{line}");
    cluster.mend_metadata(&["recover", "--from-network", &control]);
    assert_eq!(cluster.json(&["alloc", "show", "used"])["state"], "ready");
    let mut reader = Command::new("qemu-io");
    reader.args(["-r", "-f", "raw", "-c", "read 0 4096", &uri]).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(reader.status().unwrap().success());
}

/// A file system of its own for the metadata, which another mount namespace has.
struct SmallDisk {
    holder: Child,
    directory: PathBuf,
}

impl SmallDisk {
    /// None where this process may not mount.
    fn mount(directory: &Path) -> Option<SmallDisk> {
        std::fs::create_dir(directory).unwrap();
        let script = format!(
            "mount -t tmpfs -o size=3m,mode=0700 tmpfs {} && echo ready && exec sleep 600",
            directory.display()
        );
        let mut holder = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let stdout = holder.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        if line.trim() != "ready" {
            eprintln!("skipped: this process may not mount a tmpfs");
            let _ = holder.wait();
            return None;
        }
        Some(SmallDisk { holder, directory: directory.to_owned() })
    }

    fn start_allocator(&self, dir: &Path, port: u16) -> Daemon {
        let program = programs().join("xpm-allocator").display().to_string();
        let pid = self.holder.id().to_string();
        let data = self.directory.display().to_string();
        let listen = format!("127.0.0.1:{port}");
        let arguments =
            ["-m", "-t", &pid, "--", &program, "--listen", &listen, "--data", &data, "--heartbeat", "300ms"];
        let daemon = Daemon::start(dir, "allocator", "/usr/bin/nsenter", &arguments.map(str::to_owned));
        wait_until("the allocator answers", || http(port, "GET", "/v1/status", "").is_ok());
        daemon
    }

    /// The directory as others see it.
    fn inside(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(self.directory.strip_prefix("/").unwrap()).join(name)
    }

    fn fill(&self) {
        let mut file = File::create(self.inside("filler")).unwrap();
        while file.write_all(&[7; 4096]).is_ok() {}
        while file.write_all(&[7]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn a_full_disk_makes_it_read_only_until_there_is_room() {
    // An appliance that knows an allocator at another port.
    let mut cluster = Cluster::start(1);
    let Some(disk) = SmallDisk::mount(&cluster.dir().join("small")) else { return };
    let port = cluster.port();
    cluster.allocator.kill();
    let mut allocator = disk.start_allocator(cluster.dir(), port);
    cluster.wait_up();
    cluster.ok(&["alloc", "create", "before", "--size", "16MiB"]);
    disk.fill();
    let create = |cluster: &Cluster, name: &str| cluster.xpm(&["alloc", "create", name, "--size", "16MiB"]);
    let mut number = 0;
    wait_until("it says that the disk is full", || {
        number += 1;
        let name = format!("n{number}");
        let output = create(&cluster, &name);
        String::from_utf8_lossy(&output.stderr).contains("is full")
    });
    let read_only = |cluster: &Cluster| cluster.status()["read_only"].clone();
    wait_until("it is read-only", || read_only(&cluster).is_string());
    assert!(allocator.is_alive());
    for refused in [&["alloc", "delete", "before"][..], &["alloc", "create", "y", "--size", "16MiB"]] {
        assert!(cluster.refused(refused).contains("is full"));
    }
    assert_eq!(cluster.json(&["alloc", "show", "before"])["state"], "ready", "it answers");
    assert!(cluster.ok(&["events"]).contains("metadata-read-only"));
    // Also one that begins in this state.
    allocator.kill();
    let mut allocator = disk.start_allocator(cluster.dir(), port);
    cluster.wait_up();
    assert_eq!(cluster.json(&["alloc", "show", "before"])["state"], "ready");
    // One more appliance, which cannot be remembered, is no reason to end either.
    cluster.restart_appliance(0);
    cluster.wait_up();
    assert!(allocator.is_alive());
    std::fs::remove_file(disk.inside("filler")).unwrap();
    wait_until("it goes on by itself", || {
        number += 1;
        create(&cluster, &format!("n{number}")).status.success()
    });
    wait_until("it is not read-only any more", || read_only(&cluster).is_null());
    cluster.ok(&["alloc", "create", "after", "--size", "16MiB"]);
    allocator.kill();
    let mut allocator = disk.start_allocator(cluster.dir(), port);
    cluster.wait_up();
    assert_eq!(cluster.json(&["alloc", "show", "after"])["state"], "ready", "it was durable");
    allocator.stop();
}
