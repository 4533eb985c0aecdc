//! The operator's command with a pool of real daemons, and how it waits for an allocator that starts.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::Value;
use xpm_tests::{Cluster, wait_until};

/// Codes and severities of the problems, and the exit status.
fn status(cluster: &Cluster) -> (Vec<(String, String)>, Option<i32>) {
    let output = cluster.xpm(&["status", "-o", "json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    let problems = printed["problems"].as_array().expect("a list").iter();
    (problems.map(|one| (text(one, "code"), text(one, "severity"))).collect(), output.status.code())
}

#[test]
fn the_exit_status_tells_the_worst_and_a_request_that_waits_is_no_failure() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "first", "--size", "384MiB"]);
    assert_eq!(status(&cluster), (Vec::new(), Some(0)));
    let mut waits = cluster
        .command(&["alloc", "create", "second", "--size", "256MiB", "--wait", "5m"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    wait_until("it waits", || !status(&cluster).0.is_empty());
    assert_eq!(status(&cluster), (vec![("REQUEST_WAITING".to_owned(), "info".to_owned())], Some(0)));
    let list = cluster.ok(&["alloc", "list"]);
    assert!(
        list.lines().any(|line| line.starts_with("second") && line.contains("waiting, 0 before it: ")),
        "{list}"
    );
    assert!(list.lines().all(|line| line.chars().count() <= 80), "{list}");
    waits.kill().expect("it is ours");
    waits.wait().expect("it is ours");
    cluster.ok(&["alloc", "rm", "second"]);
    cluster.appliances[0].signal(rustix::process::Signal::STOP);
    wait_until("its silence is critical", || status(&cluster).1 == Some(2));
    assert!(status(&cluster).0.contains(&("APPLIANCE_SILENT".to_owned(), "critical".to_owned())));
    cluster.appliances[0].signal(rustix::process::Signal::CONT);
    wait_until("all is well", || status(&cluster).1 == Some(0));
}

#[test]
fn a_request_reaches_an_allocator_that_is_just_starting() {
    let mut cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "data", "--size", "16MiB"]);
    cluster.allocator.stop();
    assert!(!cluster.xpm(&["alloc", "show", "data"]).status.success(), "without patience it fails");
    let mut request = cluster
        .command(&["alloc", "show", "data"])
        .env("XPM_PATIENCE", "1m")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut said = BufReader::new(request.stderr.take().expect("a pipe")).lines();
    let first = said.next().expect("it says that it waits").expect("text");
    assert!(first.contains("cannot reach the allocator") && first.contains("trying again for 1m"), "{first}");
    cluster.restart_allocator();
    let output = request.wait_with_output().expect("it ends");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("16MiB"));
    assert!(said.next().is_none(), "it is said once");
}
