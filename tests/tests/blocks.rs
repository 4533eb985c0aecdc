//! The logical block size belongs to the allocation: every form shows the same, or refuses.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use xpm_tests::vhost::Guest;
use xpm_tests::{Cluster, have};

/// Shows an allocation in a form with a socket; the socket.
fn show(cluster: &Cluster, name: &str, form: &str) -> PathBuf {
    let socket = cluster.dir().join(format!("{name}-{form}.sock"));
    cluster.ok(&["blk", "attach", name, "--as", &format!("{form}={}", socket.display())]);
    socket
}

/// The logical block size that a guest reads of a vhost-user disk.
fn of_guest(cluster: &Cluster, name: &str) -> u32 {
    let mut guest = Guest::new(1);
    guest.connect(&show(cluster, name, "vhost-user"));
    let config = guest.config(20, 4);
    guest.disconnect();
    xpm_tests::wait_until("the device is not used", || {
        cluster.xpm(&["blk", "detach", name]).status.success()
    });
    u32::from_le_bytes(config.try_into().expect("4 bytes"))
}

/// The smallest block that an NBD client is told of.
fn of_client(cluster: &Cluster, name: &str) -> u64 {
    let socket = show(cluster, name, "nbd-socket");
    let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
    let output = Command::new("nbdinfo").args(["--json", &uri]).output().expect("nbdinfo");
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    cluster.ok(&["blk", "detach", name]);
    told["exports"][0]["block_size_minimum"].as_u64().expect("a number")
}

#[test]
fn every_form_shows_the_block_size_of_the_allocation() {
    if !have("nbdinfo") {
        return;
    }
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "pages", "--size", "16MiB"]);
    cluster.ok(&["alloc", "create", "sectors", "--size", "16MiB", "--block-size", "512"]);
    for (name, size) in [("pages", 4096), ("sectors", 512)] {
        assert_eq!(cluster.json(&["alloc", "show", name])["block_size"], size, "{name}");
        assert_eq!(of_guest(&cluster, name), size, "{name} as vhost-user");
        assert_eq!(of_client(&cluster, name), u64::from(size), "{name} as nbd-socket");
    }
    let form = format!("vhost-user={}", cluster.dir().join("other.sock").display());
    let line = cluster.refused(&["blk", "attach", "pages", "--as", &form, "--block-size", "512"]);
    assert!(line.contains("4096 bytes, for good") && line.contains("--block-size 512"), "{line}");
    assert!(
        cluster
            .refused(&["alloc", "create", "no", "--size", "16MiB", "--block-size", "1024"])
            .contains("512 or 4096")
    );
}

/// The metadata of an allocator that knew no block sizes.
#[test]
fn an_allocation_of_before_is_asked_for_its_block_size_once() {
    let mut cluster = Cluster::start(1);
    for name in ["used", "free", "idle"] {
        cluster.ok(&["alloc", "create", name, "--size", "16MiB"]);
    }
    // It was used, and is not now: nothing says as what.
    show(&cluster, "free", "vhost-user");
    cluster.ok(&["blk", "detach", "free"]);
    show(&cluster, "used", "vhost-user");
    let backup = cluster.dir().join("backup.json").display().to_string();
    cluster.ok(&["backup", &backup]);
    let text = std::fs::read_to_string(&backup).expect("the backup");
    let mut old: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(forget_block_sizes(&mut old), 3, "{old}");
    std::fs::write(&backup, old.to_string()).expect("it can be written");
    cluster.replace_metadata(&["restore", &backup]);
    let shown = |name: &str| cluster.json(&["alloc", "show", name])["block_size"].clone();
    assert_eq!(shown("used"), 512, "that of the form in which it is in use");
    assert_eq!(shown("free"), Value::Null);
    cluster.ok(&["blk", "detach", "used"]);
    assert_eq!(of_guest(&cluster, "used"), 512, "it is kept");
    let form = format!("vhost-user={}", cluster.dir().join("free.sock").display());
    let line = cluster.refused(&["blk", "attach", "free", "--as", &form]);
    assert!(line.contains("--block-size 512") && line.contains("--block-size 4096"), "{line}");
    cluster.ok(&["blk", "attach", "free", "--as", &form, "--block-size", "512"]);
    cluster.ok(&["blk", "detach", "free"]);
    assert_eq!(of_guest(&cluster, "free"), 512, "it was said once");
    assert_eq!(of_guest(&cluster, "idle"), 4096, "nobody ever wrote to it");
}

/// Takes the block sizes out of a backup, of how many allocations.
fn forget_block_sizes(value: &mut Value) -> usize {
    match value {
        Value::Object(fields) => {
            let here = usize::from(fields.remove("block_size").is_some());
            here + fields.values_mut().map(forget_block_sizes).sum::<usize>()
        }
        Value::Array(values) => values.iter_mut().map(forget_block_sizes).sum(),
        _ => 0,
    }
}
