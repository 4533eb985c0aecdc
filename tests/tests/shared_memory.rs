//! Memory of an appliance that was shared with a process of its host, and bad memory, with all daemons.

#![allow(missing_docs)]

use std::process::{Command, Output};

use xpm_tests::cgroup::Group;
use xpm_tests::{Cluster, have, wait_until};

fn io(uri: &str, command: &str) -> Result<(), String> {
    let output = Command::new("qemu-io").args(["-f", "raw", uri, "-c", command]).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let is_good = output.status.success() && !said.contains("failed");
    if is_good { Ok(()) } else { Err(said) }
}

fn line_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_change_of_owner_that_cannot_move_shared_memory_is_refused_and_lose_gives_zeros() {
    let Some(group) = Group::make("owner") else { return };
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(1);
    // 32 MiB were made ready before; the memory of the other half of the allocation is the group's.
    group.take(cluster.appliances[0].pid());
    let uri = cluster.attach("kept", "64MiB", &[], "shm");
    io(&uri, "write -P 9 0 64M").unwrap();
    wait_until("as much as before is ready", || {
        let list = cluster.json(&["appliance", "list"]);
        list[0]["status"]["ready"].as_u64().is_some_and(|ready| ready >= 32 << 20)
    });
    // Less than the 64 MiB that a move takes, and more than what zeros take when the old memory has been given up.
    group.set_limit(group.used() + (44 << 20));
    let second = cluster.second_client();
    let socket = cluster.dir().join("moved.sock");
    let form = format!("nbd-socket={}", socket.display());
    let attach = ["blk", "attach", "kept", "--as", &form, "--transport", "nbd-tcp", "--force"];
    let refused = cluster.xpm_of_second(&attach);
    let line = line_of(&refused);
    assert!(!refused.status.success() && line.contains("stays with its owner"), "{line}");
    assert!(line.contains("--lose") && line.contains(group.limit_file()), "{line}");
    io(&uri, "read -P 9 0 64M").unwrap();
    // Nothing of the attempt stays in the way.
    io(&uri, "write -P 8 0 1M").unwrap();

    let taken = cluster.xpm_of_second(&[&attach[..], &["--lose"]].concat());
    assert!(taken.status.success(), "{}", line_of(&taken));
    // Each page that is read takes memory, which this limit has not.
    group.set_limit(1 << 30);
    let new = format!("nbd+unix:///kept?socket={}", socket.display());
    io(&new, "read -P 0 0 64M").unwrap();
    let events = cluster.ok(&["events"]);
    assert!(events.contains("content-lost") && events.contains("64MiB"), "{events}");
    drop(second);
}

#[test]
fn bad_memory_is_an_io_error_of_its_pages_and_an_event() {
    if !have("qemu-io") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    let backing = format!("file:{}", path.display());
    let cluster = Cluster::start_pool(&[vec!["--backing", &backing]], false);
    // All of it, so that the end of the file is in it.
    let uri = cluster.attach("whole", "512MiB", &[], "nbd-tcp");
    io(&uri, "write -P 7 0 512M").unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(std::fs::metadata(&path).unwrap().len() - 8192).unwrap();
    // Somewhere at the end of a region.
    let bad: Vec<u64> =
        (0..32).filter(|region| io(&uri, &format!("read -P 7 {}M 16M", region * 16)).is_err()).collect();
    assert_eq!(bad.len(), 1, "one region has the bad pages");
    let start = (bad[0] + 1) * (16 << 20) - 8192;
    assert!(io(&uri, &format!("read {start} 4k")).unwrap_err().contains("Input/output error"));
    io(&uri, &format!("read -P 7 {} {}", start - (1 << 20), 1 << 20)).unwrap();
    wait_until("an event names allocation and range", || {
        let events = cluster.ok(&["events"]);
        events.contains("appliance-warning") && events.contains("`whole`") && events.contains("bad")
    });
    assert!(is_up(&cluster), "the appliance ended");
}

fn is_up(cluster: &Cluster) -> bool {
    std::path::Path::new(&format!("/proc/{}", cluster.appliances[0].pid())).exists()
}
