//! The proof that ends I/O: one answer that an export does not exist proves nothing.

#![allow(missing_docs)]

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use xpm_tests::impostor::Impostor;
use xpm_tests::{Cluster, have, wait_until};

fn qemu_io(uri: &str, command: &str) -> Command {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", uri, "-c", command]).stdin(Stdio::null());
    qemu_io
}

fn begin(uri: &str, command: &str) -> Child {
    qemu_io(uri, command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("qemu-io starts")
}

/// The output of a finished qemu-io.
fn said(child: Child) -> String {
    let output = child.wait_with_output().expect("it ends");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn device(cluster: &Cluster) -> Value {
    cluster.json(&["blk", "show", "v"])
}

fn nbd_address(cluster: &Cluster) -> SocketAddr {
    let list = cluster.json(&["appliance", "list"]);
    list[0]["info"]["endpoints"]["nbd"][0].as_str().and_then(|text| text.parse().ok()).expect("an address")
}

/// A cluster whose appliance keeps its memory, with a pattern in allocation `v`; and where the appliance listens.
fn with_pattern() -> (Cluster, String, SocketAddr) {
    let cluster = Cluster::start_kept(&[vec![]]);
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 9 0 16M").output().expect("qemu-io starts").status.success());
    let address = nbd_address(&cluster);
    (cluster, uri, address)
}

#[test]
fn forged_refusals_end_no_io_while_the_allocator_says_that_the_memory_is_there() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri, address) = with_pattern();
    cluster.restart_blk_with("refusal-limit = \"1s\"");
    wait_until("it is shown again", || device(&cluster)["state"] == "live");
    cluster.appliances[0].kill();
    let impostor = Impostor::start(address);
    let mut read = begin(&uri, "read -P 9 0 16M");
    wait_until("the client is refused again and again", || {
        assert!(read.try_wait().expect("it is ours").is_none(), "I/O was ended by a forged answer");
        impostor.refused() >= 8
    });
    let shown = device(&cluster);
    assert_eq!(shown["state"], "holding", "{shown}");
    assert!(shown["links"][0]["reason"].to_string().contains("does not know the grant"), "{shown}");
    drop(impostor);
    cluster.start_appliance(0);
    let said = said(read);
    assert!(said.contains("read 16777216/16777216") && !said.contains("failed"), "{said}");
    assert_eq!(device(&cluster)["counters"]["errors"], 0);
}

#[test]
fn refusals_that_last_end_io_where_no_allocator_can_be_asked() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri, address) = with_pattern();
    cluster.restart_blk_with("refusal-limit = \"2s\"");
    wait_until("it is shown again", || device(&cluster)["state"] == "live");
    cluster.allocator.kill();
    cluster.appliances[0].kill();
    let impostor = Impostor::start(address);
    let start = Instant::now();
    let said = said(begin(&uri, "read -P 9 0 4k"));
    assert!(said.contains("Input/output error"), "{said}");
    assert!(start.elapsed() >= Duration::from_secs(2), "one answer is no proof");
    assert!(impostor.refused() >= 3, "{} answers", impostor.refused());
    let socket = cluster.dir().join("blk.sock");
    let shown = xpm_tests::json_of(&socket, &["blk", "show", "v", "--json"]);
    assert_eq!(shown["state"], "lost", "{shown}");
    // Nothing is lost, though: the appliance is back, and knows the key.
    drop(impostor);
    cluster.start_appliance(0);
    wait_until("it lives again, though nobody uses it", || {
        xpm_tests::json_of(&socket, &["blk", "show", "v", "--json"])["state"] == "live"
    });
    let read = qemu_io(&uri, "read -P 9 0 16M").output().expect("qemu-io starts");
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stdout));
    assert_eq!(xpm_tests::json_of(&socket, &["blk", "show", "v", "--json"])["state"], "live");
}

#[test]
fn what_is_lost_or_deleted_ends_at_once_by_the_allocators_word() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 9 0 16M").output().expect("qemu-io starts").status.success());
    cluster.restart_appliance(0);
    let said_of_lost = said(begin(&uri, "read -P 9 0 4k"));
    assert!(said_of_lost.contains("Input/output error"), "{said_of_lost}");
    let shown = device(&cluster);
    assert_eq!(shown["state"], "lost", "{shown}");
    assert!(shown["links"][0]["reason"].to_string().contains("the allocator says"), "{shown}");

    let socket = cluster.dir().join("w.sock");
    cluster.ok(&["alloc", "create", "w", "--size", "16MiB"]);
    let form = format!("nbd-socket={}", socket.display());
    cluster.ok(&["blk", "attach", "w", "--as", &form, "--transport", "nbd-tcp"]);
    let uri = format!("nbd+unix:///w?socket={}", socket.display());
    cluster.ok(&["alloc", "delete", "w", "--force"]);
    let said_of_deleted = said(begin(&uri, "read 0 4k"));
    assert!(said_of_deleted.contains("Input/output error"), "{said_of_deleted}");
    let shown = cluster.json(&["blk", "show", "w"]);
    assert!(shown["links"][0]["reason"].to_string().contains("deleted"), "{shown}");
}
