//! The lean NBD client of the benchmark, on a server of another project.

use std::process::{Command, Output};

use serde_json::Value;

const NBDLOAD: &str = env!("CARGO_BIN_EXE_nbdload");

/// Runs nbdload on nbdkit's memory disk of this size.
fn on_nbdkit(size: &str, arguments: &str) -> Output {
    let line = format!("\"$NBDLOAD\" \"$uri\" --seconds 1 --ramp-ms 10 {arguments}");
    let mut command = Command::new("nbdkit");
    command.env("NBDLOAD", NBDLOAD).args(["-U", "-", "memory", size, "--run", &line]);
    command.output().expect("nbdkit is installed")
}

fn refused(output: &Output, reason: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with("nbdload: ") && said.contains(reason), "{said}");
}

#[test]
fn reads_and_writes_are_measured() {
    for arguments in ["--op read", "--op write --depth 1", "--op write --len 65536 --depth 200"] {
        let output = on_nbdkit("64M", arguments);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        for figure in ["iops", "p50_ns", "p99_ns", "cpu_ns_per_op", "cpu_percent"] {
            assert!(said[figure].as_f64().is_some_and(|value| value > 0.0), "{arguments}: {said}");
        }
        assert!(said["p50_ns"].as_f64() <= said["p99_ns"].as_f64(), "{arguments}: {said}");
    }
}

#[test]
fn what_cannot_be_done_is_said_in_one_line() {
    refused(&on_nbdkit("1K", "--op read"), "less than one operation");
    let run = |uri: &str| Command::new(NBDLOAD).arg(uri).output().unwrap();
    refused(&run("nbd:/x"), "`nbd:/x` is no NBD URI");
    refused(&run("nbd+unix:///?socket=/nonexistent/socket"), "cannot connect to nbd+unix:///");
}
