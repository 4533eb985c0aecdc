//! NBD clients of other projects on xpm-blk's sockets, over each transport.

#![allow(missing_docs)]

use std::process::Command;

use xpm_tests::{Cluster, have};

const TRANSPORTS: [&str; 3] = ["nbd-tcp", "nbd-unix", "shm"];

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

#[test]
fn what_is_copied_in_comes_back() {
    if !have("nbdcopy") || !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(3);
    let (file, back) = (cluster.dir().join("in"), cluster.dir().join("out"));
    let bytes: Vec<u8> = (0..40_u32 << 18).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&file, &bytes).unwrap();
    for transport in TRANSPORTS {
        let uri = cluster.attach(transport, "40MiB", &["--stripe", "3"], transport);
        run(Command::new("nbdcopy").arg(&file).arg(&uri));
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&file).arg(&uri));
        run(Command::new("nbdcopy").arg(&uri).arg(&back));
        assert!(std::fs::read(&back).unwrap() == bytes, "{transport}: other bytes came back");
        let script =
            ["-c", "write -P 0xa5 1000 70000", "-c", "read -P 0xa5 1000 70000", "-c", "discard 0 1M"];
        let said = run(Command::new("qemu-io")
            .args(["-f", "raw", &uri])
            .args(script)
            .args(["-c", "read -P 0 0 1M"]));
        assert!(!said.contains("failed"), "{said}");
        let used = cluster.json(&["blk", "list"]);
        let used = used.as_array().unwrap().iter().find(|device| device["name"] == transport).unwrap();
        assert!(
            used["links"].as_array().unwrap().iter().all(|link| link["transport"] == transport),
            "{used}"
        );
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have("fio") {
        return;
    }
    let cluster = Cluster::start(2);
    for transport in TRANSPORTS {
        let uri = cluster.attach(transport, "64MiB", &["--stripe", "2", "--block-size", "512"], transport);
        run(Command::new("fio")
            .current_dir(cluster.dir())
            .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-128k", "--iodepth=16"])
            .args(["--size=64M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
            .arg(format!("--uri={uri}")));
    }
}

#[test]
fn trimmed_memory_goes_back_and_reads_as_zeros() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(2);
    let resident = || -> u64 {
        let list = cluster.json(&["appliance", "list"]);
        list.as_array()
            .unwrap()
            .iter()
            .map(|appliance| appliance["status"]["resident"].as_u64().unwrap())
            .sum()
    };
    let uri = cluster.attach("trimmed", "64MiB", &["--stripe", "2"], "nbd-tcp");
    run(Command::new("qemu-io").args(["-f", "raw", &uri, "-c", "write -P 7 0 64M"]));
    xpm_tests::wait_until("the appliances hold it", || resident() >= 64 << 20);
    run(Command::new("qemu-io").args(["-f", "raw", &uri, "-c", "discard 0 48M"]));
    xpm_tests::wait_until("the appliances gave it back", || resident() <= 16 << 20);
    let said = run(Command::new("qemu-io").args([
        "-f",
        "raw",
        &uri,
        "-c",
        "read -P 0 0 48M",
        "-c",
        "read -P 7 48M 16M",
    ]));
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn thirty_two_clients_at_once() {
    if !have("qemu-io") {
        return;
    }
    let cluster = Cluster::start(2);
    let uri = cluster.attach("many", "64MiB", &["--stripe", "2"], "nbd-tcp");
    std::thread::scope(|scope| {
        for client in 0..32 {
            let uri = &uri;
            scope.spawn(move || {
                let write = format!("write -P {} {}M 2M", client + 1, client * 2);
                let read = format!("read -P {} {}M 2M", client + 1, client * 2);
                let said = run(Command::new("qemu-io").args(["-f", "raw", uri, "-c", &write, "-c", &read]));
                assert!(!said.contains("failed"), "{said}");
            });
        }
    });
}
