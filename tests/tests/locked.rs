//! How much memory xpm-blk locks: on a machine that is short of memory it has to leave the rest to others.

#![allow(missing_docs)]

use xpm_tests::{Cluster, Daemon};

/// The limit of anonymous memory of an xpm-blk with one device, all of it locked: heap, stacks and buffers. Its
/// program and libraries, which depend on the build, come on top.
const ANONYMOUS_MAX_KIB: u64 = 13 << 10;

fn field_kib(daemon: &Daemon, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("the field is there");
    value.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn xpm_blk_with_one_device_locks_little() {
    let cluster = Cluster::start(1);
    cluster.attach("a", "32MiB", &[], "nbd-tcp");
    let (locked, anonymous) = (field_kib(&cluster.blk, "VmLck:"), field_kib(&cluster.blk, "RssAnon:"));
    if locked == 0 {
        return eprintln!("skipped: memory cannot be locked here");
    }
    assert!(locked >= anonymous, "all of it is locked: {locked} KiB of {anonymous} KiB");
    assert!(anonymous <= ANONYMOUS_MAX_KIB, "{anonymous} KiB of anonymous memory, {locked} KiB locked");
}
