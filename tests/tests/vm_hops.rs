//! A virtual machine that moves between two hosts with networks of their own: what is sent is counted where it passes.

use serde_json::json;
use xpm_tests::vm::{Break, Hosts, Plain, Requests, Site, Wire, can_have_hosts, error_of};
use xpm_tests::{free_port, wait_until};

/// The most that may go from one host to the other, for a machine of 64 MiB.
const SENT_MAX: u64 = 1 << 20;

/// Moves a guest that rewrites a tenth of its memory in each pass, there and back.
fn hops(count: usize) {
    if !can_have_hosts() {
        return;
    }
    let hosts = Hosts::start("standby = false");
    let site = Site::between(&hosts, "64MiB", &[]);
    let mut here = site.run("a");
    for hop in 1..=count {
        let (from, to) = if hop % 2 == 1 { ("a", "b") } else { ("b", "a") };
        let (there, port) = site.receive(to, &[]);
        here.goes_on();
        let before = hosts.bytes_between();
        let rules = ["\"state\"", "\"loaded\"", "\"running\""].map(Break::pause);
        let wire = Wire::from(Some(hosts.namespace(from)), (site.address(to), port).into(), rules.to_vec());
        let moving = site.migrate(from, wire.port());

        // The RAM cannot change its owner while the allocator stands still: the source waits right before the switch.
        wire.broke(|| hosts.allocator.freeze());
        let mut monitor = here.monitor();
        wait_until("the source has written all back and waits for the switch", || {
            let dirty = hosts.json(from, &["fs", "cache", "vm1"])["dirty"].as_u64();
            let status = monitor.execute("query-migrate", &json!({}))["status"].clone();
            status == "pre-switchover" && dirty == Some(0)
        });
        drop(monitor);
        let at_switch = hosts.requests(from, "vm1").expect("it is shown at the source");
        let asked = hosts.requests(to, "vm1").expect("it is shown at the destination");
        assert_eq!(asked, Requests::default(), "the destination asked for nothing before the switch");
        let stopped = here.passes();
        hosts.allocator.signal(rustix::process::Signal::CONT);

        // All of the state is there, and the machine runs there: the source is not told yet, so its file is still
        // shown.
        wire.broke(|| ());
        let after = wire.broke(|| {
            wait_until("the source has nothing in its cache", || {
                hosts.json(from, &["fs", "cache", "vm1"])["cached"] == 0
            });
            hosts.requests(from, "vm1").expect("it is shown at the source")
        });
        assert_eq!(
            (after.writes, after.trims, here.passes()),
            (at_switch.writes, at_switch.trims, stopped),
            "the source wrote nothing after the switch, and ran no more"
        );
        let output = moving.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
        assert!(here.wait().success(), "{}", here.said());
        let sent = hosts.bytes_between() - before;
        // Both fail on a bad page.
        let passes = there.goes_on();
        assert!(passes > stopped && here.passes() == stopped, "{stopped} {passes}");
        println!(
            "hop {hop} {from} to {to}: {sent} bytes between the hosts, {} requests of the destination before the switch, {} writes \
             of the source after it (of {}), pass {passes}, 0 bad pages",
            asked.reads + asked.writes + asked.trims + asked.others,
            after.writes - at_switch.writes,
            at_switch.writes,
        );
        assert!(sent < SENT_MAX, "{sent} bytes went from one host to the other");
        here = there;
    }
}

#[test]
fn a_machine_hops_and_its_memory_is_not_sent() {
    hops(2);
}

#[test]
#[ignore = "long: twenty hops"]
fn long_a_machine_hops_twenty_times() {
    hops(20);
}

/// The counter of the other tests sees a copy: QEMU's own migration of the same guest with ordinary RAM.
#[test]
fn a_copy_is_seen_by_the_counter() {
    if !can_have_hosts() {
        return;
    }
    let hosts = Hosts::start("standby = false");
    let site = Site::between(&hosts, "64MiB", &[]);
    let start = |host: &str, more: &[&str]| {
        let command = hosts.command(host, "qemu-system-x86_64".as_ref());
        Plain::start(command, site.dir(), host, site.kernel(), &[&["-m", "64"], more].concat())
    };
    let mut first = start("a", &[]);
    let uri = format!("tcp:{}:{}", site.address("b"), free_port());
    let mut second = start("b", &["-incoming", &uri]);
    wait_until("the guest verifies its memory", || first.passes() > 1);
    let before = hosts.bytes_between();
    first.monitor.execute("migrate", &json!({"uri": uri}));
    wait_until("it has moved", || {
        first.monitor.execute("query-migrate", &json!({}))["status"] == "completed"
    });
    let sent = hosts.bytes_between() - before;
    wait_until("it runs there", || second.monitor.execute("query-status", &json!({}))["status"] == "running");
    println!("{sent} bytes between the hosts for a machine with ordinary RAM");
    assert!(sent > 48 << 20, "{sent} bytes, of 60 MiB that the guest filled");
}
