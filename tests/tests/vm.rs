//! Virtual machines whose RAM is a file: real QEMUs, whose guest verifies every word of its memory for ever.

use std::os::unix::process::ExitStatusExt as _;

use serde_json::{Value, json};
use xpm_tests::files::Files;
use xpm_tests::vm::{Break, Site, Wire, can_start, can_start_external, error_of};
use xpm_tests::{Cluster, unix_get, wait_until};

#[test]
fn a_machine_moves_there_and_back_and_through_a_file() {
    if !can_start() {
        return;
    }
    let site = Site::new();
    let mut first = site.run("a");
    let mut passes = first.goes_on();
    for (from, to) in [("a", "b"), ("b", "a")] {
        let (second, port) = site.receive(to, &[]);
        // Only the one runs.
        assert_eq!((site.states(from), second.passes()), (vec!["running".to_owned()], 0));
        let output = site.migrate(from, port).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
        let moved: Value = serde_json::from_slice(&output.stdout).unwrap();
        let sent = moved["sent_bytes"].as_u64().unwrap();
        assert!((1..1 << 20).contains(&sent), "{moved}");
        assert!(first.wait().success(), "{}", first.said());
        assert_eq!((site.states(from).len(), site.states(to)), (0, vec!["running".to_owned()]));
        let stopped = first.passes();
        let later = second.goes_on();
        assert!(later > stopped && stopped >= passes, "{passes} {stopped} {later}");
        (first, passes) = (second, later);
    }

    let state = site.dir().join("state");
    let path = state.display().to_string();
    let suspended = site.command("a", &["suspend", "vm1", "--to", &path]);
    assert!(suspended.status.success(), "{}", error_of(&suspended));
    assert!(first.wait().success() && site.states("a").is_empty());
    assert!(state.metadata().unwrap().len() < 1 << 20);
    let resumed = site.resume("b", &state);
    assert!(resumed.goes_on() > first.passes());
    // It fits the RAM no longer.
    assert!(!state.exists() && state.with_extension("resumed").exists());
    let again = site.command("b", &["suspend", "vm1", "--to", &site.dir().join("ram").display().to_string()]);
    assert!(error_of(&again).contains("is there already"), "{}", error_of(&again));
    resumed.goes_on();
}

/// The state after a broken move, from which the machine continues here.
fn goes_on_here(
    site: &Site,
    rule: Break,
    act: impl FnOnce(&mut std::process::Child, &mut xpm_tests::vm::Guest),
) {
    let (mut second, port) = site.receive("b", &[]);
    let wire = Wire::to(port, rule);
    let mut migrate = site.migrate("a", wire.port());
    wire.broke(|| act(&mut migrate, &mut second));
    let output = migrate.wait_with_output().unwrap();
    assert!(!output.status.success(), "{rule:?}");
    wait_until("its destination has given up", || second.qemu().is_none() || site.states("b") == ["ended"]);
    assert_eq!(second.passes(), 0, "it never ran there: {rule:?}");
    if output.status.signal().is_some() {
        // The command was killed, and the machine may be stopped.
        let settled = site.command("a", &["settle", "vm1"]);
        assert!(settled.status.success(), "{rule:?}: {}", error_of(&settled));
    } else {
        let error = error_of(&output);
        assert!(error.contains("is here as before"), "{rule:?}: {error}");
    }
    assert_eq!(site.states("a"), ["running"], "{rule:?}");
}

#[test]
fn whatever_fails_before_the_order_the_machine_goes_on_where_it_was() {
    if !can_start() {
        return;
    }
    let site = Site::new();
    let first = site.run("a");

    // Refused before anything happens; the destination goes on waiting.
    let (mut second, port) =
        site.receive("b", &["--memory", "32MiB", "--file", &site.dir().join("x").display().to_string()]);
    let refused = site.migrate("a", port).wait_with_output().unwrap();
    assert!(error_of(&refused).contains("--memory 64MiB, and here --memory 32MiB"), "{}", error_of(&refused));
    assert_eq!(
        (site.states("a"), site.states("b")),
        (vec!["running".to_owned()], vec!["incoming".to_owned()])
    );
    second.kill_qemu();
    assert!(!second.wait().success());
    first.goes_on();

    let cut = |at, passes| Break { at, passes, cuts: true, heals: true };
    for rule in
        [cut("\"ready\"", false), cut("\"state\"", true), cut("\"loaded\"", false), cut("\"run\"", false)]
    {
        goes_on_here(&site, rule, |_, _| {});
        first.goes_on();
    }
    // Its destination dies: the command, or QEMU.
    goes_on_here(&site, cut("\"loaded\"", false), |_, second| {
        second.kill_command();
        second.kill_qemu();
    });
    first.goes_on();
    let stand_still = Break { cuts: false, ..cut("\"state\"", true) };
    goes_on_here(&site, stand_still, |_, second| second.kill_qemu());
    first.goes_on();
    // The command that moves it dies.
    for at in ["\"ready\"", "\"loaded\""] {
        goes_on_here(&site, cut(at, false), |migrate, _| migrate.kill().unwrap());
        first.goes_on();
    }
}

#[test]
fn after_the_order_the_machine_is_at_its_destination_or_stopped() {
    if !can_start() {
        return;
    }
    let site = Site::new();
    let mut first = site.run("a");

    // The answer is lost, and asked for.
    let (mut second, port) = site.receive("b", &[]);
    let wire = Wire::to(port, Break { at: "\"running\"", passes: false, cuts: true, heals: true });
    let migrate = site.migrate("a", wire.port());
    wire.broke(|| {});
    let output = migrate.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", error_of(&output));
    assert!(first.wait().success());
    second.goes_on();

    // The answer is lost, and nobody can be asked: the machine runs there alone, and is frozen here.
    let (third, port) = site.receive("a", &[]);
    let wire = Wire::to(port, Break { at: "\"running\"", passes: false, cuts: true, heals: false });
    let migrate = site.migrate("b", wire.port());
    wire.broke(|| {});
    let output = migrate.wait_with_output().unwrap();
    let error = error_of(&output);
    assert!(!output.status.success() && error.contains("nobody answers whether it runs there"), "{error}");
    assert_eq!(site.states("b"), ["gone"]);
    third.goes_on();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", second.qemu().unwrap())).unwrap();
    assert!(stat.rsplit_once(") ").unwrap().1.starts_with('T'), "{stat}");
    let unsure = site.command("b", &["settle", "vm1"]);
    assert!(error_of(&unsure).contains("does not say whether"), "{}", error_of(&unsure));
    assert_eq!(site.states("b"), ["gone"]);

    let settled = site.command("b", &["settle", "vm1", "--gone"]);
    assert!(settled.status.success(), "{}", error_of(&settled));
    assert!(second.wait().success() && site.states("b").is_empty());
    third.goes_on();

    // The order is lost, and nobody can be asked: it never ran there, and the user says so.
    let (mut fourth, port) = site.receive("b", &[]);
    let wire = Wire::to(port, Break { at: "\"run\"", passes: false, cuts: true, heals: false });
    let migrate = site.migrate("a", wire.port());
    wire.broke(|| {});
    let error = error_of(&migrate.wait_with_output().unwrap());
    assert!(error.contains("nobody answers whether it runs there"), "{error}");
    wait_until("its destination has given up", || site.states("b").is_empty());
    fourth.kill_command();
    let settled = site.command("a", &["settle", "vm1", "--here"]);
    assert!(settled.status.success(), "{}", error_of(&settled));
    third.goes_on();
    assert_eq!(fourth.passes(), 0);
}

#[test]
fn external_memory_is_the_ram_of_a_machine_with_little_local_memory() {
    if !can_start_external() {
        return;
    }
    let cluster = Cluster::start(2);
    let _files = Files::start(&cluster, "standby-reserve = \"1MiB\"");
    let site = Site::external(&cluster, "48MiB", &["--local", "8MiB", "--overhead", "28MiB"]);
    let mut first = site.run("a");
    let bounded = site.list("a")[0]["cgroup"].is_string();
    if bounded {
        let cached = site.list("a")[0]["cached_bytes"].as_u64().unwrap();
        assert!(cached < 36 << 20, "{cached} bytes of RAM are local");
    }
    // QEMU asked for huge pages; nobody heard it.
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", first.qemu().unwrap())).unwrap();
    let flags = maps
        .split("\nVmFlags:")
        .find(|part| part.contains("/vm1\n"))
        .and_then(|part| maps.split(part).nth(1));
    let flags = flags.unwrap().lines().next().unwrap().to_owned();
    assert!(!flags.contains(" hg"), "{flags}");

    let state = site.dir().join("state");
    let suspended = site.command("a", &["suspend", "vm1", "--to", &state.display().to_string()]);
    assert!(suspended.status.success(), "{}", error_of(&suspended));
    assert!(first.wait().success(), "{}", first.said());
    assert_eq!(cluster.ok(&["fs", "list", "--no-headers"]), "", "the file is given back");
    let second = site.resume("a", &state);
    second.goes_on();
    assert!(second.passes() > first.passes());
    assert_eq!(cluster.json(&["alloc", "show", "vm1"])["size"], 48 << 20);
}

#[test]
fn a_guest_that_does_not_follow_a_resize_is_told() {
    if !can_start() {
        return;
    }
    // The guest has no driver for virtio-mem.
    let site = Site::new().with(&["--max", "128MiB"]);
    let guest = site.run("a");
    let resized = site.command("a", &["resize", "vm1", "96MiB", "--wait", "100ms"]);
    assert_eq!(resized.status.code(), Some(1));
    let error = error_of(&resized);
    assert!(error.contains("the guest has 64MiB and was asked to have 96MiB"), "{error}");
    for (size, reason) in
        [("32MiB", "can have 64MiB (--memory) to 128MiB (--max)"), ("65MiB", "cannot be reached")]
    {
        let error = error_of(&site.command("a", &["resize", "vm1", size]));
        assert!(error.contains(reason), "{size}: {error}");
    }
    guest.goes_on();
}

/// Two hosts that reach external memory over sockets, as over a network: memory that was shared with a process is moved
/// when it changes its owner, which takes time. The site has to end first, and the cluster last.
fn two_hosts() -> (Cluster, [Files; 2], Site) {
    let cluster = Cluster::start(2);
    let settings = "standby = false\nforbid-transports = [\"shm\"]";
    let files = [Files::start(&cluster, settings), Files::start_second(&cluster, settings)];
    let site = Site::external(&cluster, "64MiB", &[]);
    (cluster, files, site)
}

#[test]
fn external_memory_moves_with_its_machine_by_changing_its_owner() {
    if !can_start_external() {
        return;
    }
    let (_cluster, _files, site) = two_hosts();
    let mut first = site.run("a");
    for (from, to) in [("a", "b"), ("b", "a")] {
        let (second, port) = site.receive(to, &[]);
        let output = site.migrate(from, port).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
        let moved: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!((1..1 << 20).contains(&moved["sent_bytes"].as_u64().unwrap()), "{moved}");
        assert!(first.wait().success(), "{}", first.said());
        assert!(second.goes_on() > first.passes());
        first = second;
    }

    // Its network breaks after the RAM has its new owner: it is taken back.
    let (second, port) = site.receive("b", &[]);
    let wire = Wire::to(port, Break { at: "\"loaded\"", passes: false, cuts: true, heals: true });
    let migrate = site.migrate("a", wire.port());
    wire.broke(|| {});
    let error = error_of(&migrate.wait_with_output().unwrap());
    assert!(error.contains("is here as before"), "{error}");
    first.goes_on();
    assert_eq!(second.passes(), 0);
}

/// The machine is paused, so that its processor touches no page at its destination.
#[test]
fn the_destination_fetches_what_the_source_had_cached() {
    if !can_start_external() {
        return;
    }
    let (cluster, _files, site) = two_hosts();
    let mut first = site.run("a");
    let passes = first.goes_on();
    first.monitor().execute("stop", &json!({}));
    let cached = |host: &str| site.list(host)[0]["cached_bytes"].as_u64().unwrap();
    let before = cached("a");
    assert!(before > 32 << 20, "the guest goes over all of its RAM: {before}");
    let (second, port) = site.receive("b", &[]);
    let output = site.migrate("a", port).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", error_of(&output));
    assert!(first.wait().success(), "{}", first.said());
    wait_until("all of it is cached at the destination", || cached("b") >= before);
    let shown = unix_get(&cluster.dir().join("fs2.sock"), "/v1/devices/vm1").unwrap();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let reads = shown["counters"]["reads"].as_u64().unwrap();
    assert!(
        reads < before / (64 << 10),
        "{reads} requests fetched {before} bytes, and one can fetch 128 KiB"
    );
    second.monitor().execute("cont", &json!({}));
    assert!(second.goes_on() > passes);
}
