//! Which signals end a daemon: SIGTERM and SIGINT, and no other that can be caught.

#![allow(missing_docs)]

use std::process::Command;

use xpm_tests::{Cluster, Daemon, wait_until};

/// SIGHUP first, which does something; then all others that end a process by default and can be caught.
const SIGNALS: [i32; 15] = [1, 3, 10, 12, 13, 14, 16, 24, 25, 26, 27, 29, 30, 34, 64];

fn send(pid: u32, signal: i32) {
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().unwrap();
    assert!(sent.success(), "process {pid} was gone before signal {signal}");
}

/// Whether a process is there and no zombie.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

#[test]
fn no_daemon_ends_by_a_hang_up_or_any_other_signal_that_is_not_meant_to_end_it() {
    let mut cluster = Cluster::start(1);
    cluster.restart_blk_with(
        "standby = true\nstandby-reserve = \"1MiB\"\nhang-limit = \"10s\"\nbuffer = \"1MiB\"\nthreads = 1\n",
    );
    let dir = cluster.dir().to_owned();
    let config = dir.join("swapd.toml");
    let text = format!(
        "allocator = \"{}\"\nblk = \"{}\"\ncontrol = \"{}\"\nstate = \"{}\"\nprotect = []\nmaximum = \"64MiB\"\ntune = {{ mode = \"off\" }}\n",
        cluster.allocator_url(),
        dir.join("blk.sock").display(),
        dir.join("swapd.sock").display(),
        dir.join("swapd").display()
    );
    std::fs::write(&config, text).unwrap();
    let arguments = ["--config".to_owned(), config.display().to_string()];
    let swapd = Daemon::start(&dir, "swapd", "xpm-swapd", &arguments);
    wait_until("xpm-swapd is ready", || swapd.log().contains("is ready"));
    let mut standby = 0;
    wait_until("a standby is ready", || {
        let blk = cluster.json(&["status"])["blk"].clone();
        standby = u32::try_from(blk["standby"]["pid"].as_u64().unwrap_or(0)).unwrap();
        blk["standby"]["state"] == "ready"
    });
    let daemons = [&cluster.allocator, &cluster.appliances[0], &cluster.blk, &swapd];
    for signal in SIGNALS {
        for daemon in daemons {
            send(daemon.pid(), signal);
        }
        send(standby, signal);
    }
    for daemon in daemons {
        wait_until("it says that it read its files anew", || daemon.log().contains("SIGHUP: reading"));
    }
    // A daemon that answers now has seen all of the signals.
    wait_until("all answer", || {
        let status = cluster.json(&["status"]);
        status["blk"]["pid"] == cluster.blk.pid() && status["blk"]["standby"]["pid"] == standby
    });
    for (index, daemon) in daemons.into_iter().enumerate() {
        assert!(is_alive(daemon.pid()), "daemon {index} ended: {}", daemon.log());
    }
    assert!(is_alive(standby), "the standby ended");
}
