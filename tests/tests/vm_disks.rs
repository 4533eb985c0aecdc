//! A virtual machine that moves with its disks: RAM and disks change their owner together, or none of them does.

use serde_json::{Value, json};
use xpm_tests::verified::Device;
use xpm_tests::vm::{Break, Hosts, Site, Wire, can_have_hosts, error_of};
use xpm_tests::wait_until;

/// A disk of a host, as QEMU reaches it.
fn disk(site: &Site, host: &str, name: &str) -> Device {
    let socket = site.dir().join(host).join(".ram").join(format!("{name}.nbd"));
    Device::connect(&socket, name).expect("it is shown")
}

/// Epoch and owner of each of the machine's allocations.
fn owners(hosts: &Hosts) -> Vec<(Value, Value)> {
    let one = |name: &str| {
        let shown = hosts.json("a", &["alloc", "show", name]);
        (shown["epoch"].clone(), shown["owner"]["client"].clone())
    };
    ["vm1", "data", "log"].map(one).to_vec()
}

#[test]
fn ram_and_disks_change_their_owner_together() {
    if !can_have_hosts() {
        return;
    }
    let hosts = Hosts::start("standby = false").with_disks();
    for name in ["data", "log"] {
        let made = hosts.xpm("a", &["alloc", "create", name, "--size", "32MiB"]);
        assert!(made.status.success(), "{}", error_of(&made));
    }
    let site = Site::between(&hosts, "64MiB", &["--disk", "data", "--disk", "log"]);
    let mut here = site.run("a");
    // The guest has no driver for disks, but QEMU has them open.
    let disks = here.monitor().execute("query-named-block-nodes", &json!({"flat": true}));
    let nodes: Vec<&Value> = disks.as_array().into_iter().flatten().map(|node| &node["node-name"]).collect();
    assert_eq!(
        nodes.iter().filter(|node| node.as_str().is_some_and(|name| name.starts_with("xpm-disk"))).count(),
        2
    );
    for (name, version) in [("data", 11), ("log", 22)] {
        disk(&site, "a", name).write_version(5, version).unwrap();
    }

    // The other host names other disks.
    let (mut second, port) = site.receive("b", &["--disk", "data"]);
    let refused = site.migrate_to("a", site.address("b"), port).wait_with_output().unwrap();
    let error = error_of(&refused);
    assert!(error.contains("has --disk data --disk log, and here is"), "{error}");
    second.kill_qemu();
    assert!(!second.wait().success());

    // The machine moves, and back.
    let mut last = 11;
    for (from, to) in [("a", "b"), ("b", "a")] {
        let (there, port) = site.receive(to, &[]);
        let output = site.migrate_to(from, site.address(to), port).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
        assert!(here.wait().success(), "{}", here.said());
        there.goes_on();
        let mut data = disk(&site, to, "data");
        assert_eq!((data.read_version(5), disk(&site, to, "log").read_version(5)), (Ok(last), Ok(22)));
        last += 1;
        data.write_version(5, last).unwrap();
        here = there;
    }

    // The network breaks after the switch: all of them come back.
    let before = owners(&hosts);
    let (second, port) = site.receive("b", &[]);
    let cut = Break { at: "\"loaded\"", passes: false, cuts: true, heals: true };
    let wire = Wire::from(Some(hosts.namespace("a")), (site.address("b"), port).into(), vec![cut]);
    let moving = site.migrate("a", wire.port());
    wire.broke(|| {
        let switched = owners(&hosts);
        assert!(before.iter().zip(&switched).all(|(before, now)| before != now), "{before:?} {switched:?}");
    });
    let error = error_of(&moving.wait_with_output().unwrap());
    assert!(error.contains("is here as before"), "{error}");
    wait_until("all of them are the source's again", || {
        owners(&hosts).iter().zip(&before).all(|((_, now), (_, before))| now == before)
    });
    here.goes_on();
    assert_eq!(second.passes(), 0);
    for (name, version) in [("data", last), ("log", 22)] {
        assert_eq!(disk(&site, "a", name).read_version(5), Ok(version));
    }
}
