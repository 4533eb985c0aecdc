//! Two appliances with one identity, or with one name: the allocator takes one of the two, and says so of the other.

#![allow(missing_docs)]

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use xpm_tests::machine::start_elsewhere;
use xpm_tests::{Cluster, Daemon, wait_until};

/// Several heartbeats of both appliances; a refused one asks again within five seconds.
const BEATS: Duration = Duration::from_secs(6);

fn set_flag(words: &mut [String], flag: &str, value: &str) {
    let at = words.iter().position(|word| word == flag).expect("the flag is there");
    value.clone_into(&mut words[at + 1]);
}

fn flag<'a>(words: &'a [String], flag: &str) -> &'a str {
    &words[words.iter().position(|word| word == flag).expect("the flag is there") + 1]
}

/// Where the allocator reaches each appliance of the name `a0`.
fn controls(cluster: &Cluster) -> Vec<String> {
    let list = cluster.json(&["appliance", "list"]);
    let named = list.as_array().unwrap().iter().filter(|one| one["info"]["name"] == "a0");
    named.map(|one| one["info"]["control"].as_str().unwrap().to_owned()).collect()
}

fn refusal(cluster: &Cluster) -> Option<String> {
    let status = cluster.status();
    let problems = status["problems"].as_array()?;
    let refused = problems.iter().find(|one| one["code"] == "APPLIANCE_REFUSED")?;
    refused["summary"].as_str().map(str::to_owned)
}

fn refusals_in(log: &str) -> usize {
    log.lines().filter(|line| line.contains("the allocator refuses this appliance")).count()
}

fn state_of(cluster: &Cluster) -> Value {
    cluster.json(&["appliance", "list"])[0]["state"].clone()
}

#[test]
fn a_copy_of_an_appliance_is_refused_while_the_first_one_is_up() {
    let mut cluster = Cluster::start(1);
    let first = controls(&cluster);
    let mut words = cluster.appliance_arguments(1);
    set_flag(&mut words, "--name", "a0");
    let copied = Command::new("cp")
        .arg("-a")
        .args([cluster.dir().join("appliance0-state"), cluster.dir().join("appliance1-state")])
        .status();
    assert!(copied.unwrap().success());
    let copy = start_elsewhere(cluster.dir(), "copy", "xpm-appliance", &words);
    wait_until("the copy is refused", || refusals_in(&copy.log()) == 1);
    let places = [first[0].clone(), format!("http://{}", flag(&words, "--listen"))];
    let said = refusal(&cluster).expect("it is a problem");
    assert!(places.iter().all(|place| said.contains(place)), "both places are named: {said}");
    assert_eq!(said.matches("(machine ").count(), 2, "both machines are named: {said}");

    // The entry stays the first one's, however often both are heard, and memory comes from the first one.
    std::thread::sleep(BEATS);
    assert_eq!(controls(&cluster), first);
    let log = copy.log();
    assert_eq!(refusals_in(&log), 1, "it says so once: {log}");
    let events = cluster.ok(&["events", "--kind", "appliance-refused"]);
    assert_eq!(events.matches("appliance-refused").count(), 1, "one event: {events}");
    let moved = cluster.ok(&["events", "--kind", "appliance-moved"]);
    assert!(!moved.contains("a0"), "{moved}");
    cluster.ok(&["alloc", "create", "a", "--size", "16MiB"]);
    wait_until("the first one lends it", || {
        cluster.json(&["appliance", "list"])[0]["status"]["granted"] == 16 << 20
    });
    cluster.ok(&["alloc", "delete", "a"]);

    // After the first one it is the copy's turn.
    cluster.appliances[0].kill();
    wait_until("the copy is taken", || controls(&cluster) == places[1..] && state_of(&cluster) == "up");
    assert!(refusal(&cluster).is_none());
    cluster.start_appliance(0);
    wait_until("now the first one is refused", || refusals_in(&cluster.appliances[0].log()) == 1);
    assert_eq!(controls(&cluster), places[1..]);
}

#[test]
fn of_two_appliances_with_one_name_the_second_is_refused() {
    let mut cluster = Cluster::start(1);
    let first = controls(&cluster);
    let mut words = cluster.appliance_arguments(1);
    set_flag(&mut words, "--name", "a0");
    let second = Daemon::start(cluster.dir(), "second", "xpm-appliance", &words);
    wait_until("the second one is refused", || refusals_in(&second.log()) == 1);
    assert!(second.log().contains("the name a0 belongs to"), "{}", second.log());
    std::thread::sleep(BEATS);
    assert_eq!(controls(&cluster), first);
    assert!(refusal(&cluster).is_some_and(|said| said.contains(&first[0])));

    // The place of an appliance that has ended is free, and its name, too.
    cluster.appliances[0].kill();
    wait_until("the second one is taken", || controls(&cluster).len() == 2);
}

#[test]
fn an_appliance_that_starts_again_is_the_same_one() {
    let mut cluster = Cluster::start(2);
    for _ in 0..3 {
        cluster.restart_appliance(0);
        cluster.wait_up();
    }
    let events = cluster.ok(&["events"]);
    assert!(!events.contains("appliance-refused"), "{events}");
}
