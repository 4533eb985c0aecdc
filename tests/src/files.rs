//! xpm-fs for tests, whose processes and mounts end with it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xpm_control::proc::unescape;

use crate::{Cluster, Daemon, unix_get, wait_until};

/// Whether files can be mounted here.
///
/// # Errors
/// When they cannot, with the reason.
pub fn can_mount() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("mounting takes root".to_owned());
    }
    if !Path::new("/dev/fuse").exists() {
        return Err("there is no /dev/fuse (modprobe fuse)".to_owned());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers =
        release.split(|byte: char| !byte.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 9) => {
            Err(format!("Linux {major}.{minor} cannot send FUSE requests again; 6.9 can"))
        }
        _ => Ok(()),
    }
}

/// A cluster of two appliances with an xpm-fs, whose mounts and processes end before it. None, with a line that says
/// why, where this machine cannot mount files.
pub fn start(settings: &str) -> Option<(Files, Cluster)> {
    if let Err(why) = can_mount() {
        eprintln!("skipped: {why}");
        return None;
    }
    let cluster = Cluster::start(2);
    Some((Files::start(&cluster, settings), cluster))
}

/// A shell in a mount namespace with private copies of all mounts; killed when dropped.
pub struct Namespaced(Child);

/// Runs these words of a shell in a mount namespace of its own, and waits until the shell is in it.
///
/// # Panics
/// When it cannot be started.
pub fn in_a_namespace(words: &str) -> Namespaced {
    let mut command = Command::new("unshare");
    let child = command.args(["--mount", "--propagation", "private", "sh", "-c", words]).spawn();
    let child = Namespaced(child.expect("unshare(1) is there"));
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let own = namespace("self");
    wait_until("it has a mount namespace", || namespace(&child.id().to_string()) != own);
    child
}

impl Namespaced {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Namespaced {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The xpm-fs of a cluster.
pub struct Files {
    /// The process that was started.
    pub daemon: Daemon,
    config: PathBuf,
    /// Its mounts are below.
    directory: PathBuf,
}

impl Files {
    /// Starts it, with these lines in its configuration. All its mounts have to be below the cluster's directory.
    pub fn start(cluster: &Cluster, settings: &str) -> Files {
        let daemon = cluster.fs(settings);
        Files { daemon, config: cluster.dir().join("fs.toml"), directory: cluster.dir().to_owned() }
    }

    /// The same of another client.
    pub fn start_second(cluster: &Cluster, settings: &str) -> Files {
        let daemon = cluster.second_fs(settings);
        Files { daemon, config: cluster.dir().join("fs2.toml"), directory: cluster.dir().to_owned() }
    }

    /// An xpm-fs that was started otherwise, with this configuration, whose mounts are below a directory.
    pub fn of(daemon: Daemon, config: PathBuf, directory: PathBuf) -> Files {
        Files { daemon, config, directory }
    }

    /// All its processes.
    ///
    /// # Panics
    /// When /proc cannot be read.
    pub fn processes(&self) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let config = self.config.display().to_string();
        let ours = pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == config.as_bytes())
        });
        ours.collect()
    }

    /// The status of the process that serves; null while none answers.
    pub fn status(&self) -> Value {
        let text = unix_get(&self.config.with_extension("sock"), "/v1/status").unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// The process that serves; none while none answers.
    pub fn serving(&self) -> Option<u64> {
        self.status()["pid"].as_u64()
    }

    /// Waits until a process stands by, which takes some seconds after a takeover. Without one, the death of the
    /// process that serves is the end of the daemon.
    ///
    /// # Panics
    /// When none does in time.
    pub fn wait_standby(&self) {
        wait_until("a standby is ready", || self.status()["standby"]["state"] == "ready");
    }

    /// Kills the process that serves, as `kill -9` does; the one that stands by takes over.
    pub fn kill_serving(&self) {
        if let Some(pid) = self.serving().and_then(|pid| Pid::from_raw(pid as i32)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// The same, and waits until the standby serves.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn replace_serving(&self) {
        let before = self.serving();
        self.kill_serving();
        wait_until("the standby serves", || {
            let now = self.serving();
            now.is_some() && now != before
        });
    }

    /// Ends every process: the standby of one that is killed goes on, so both are killed.
    ///
    /// # Panics
    /// When they do not end.
    pub fn kill_all(&mut self) {
        wait_until("every xpm-fs is gone", || {
            let left = self.processes();
            for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = kill_process(pid, Signal::KILL);
            }
            self.daemon.is_alive();
            left.is_empty()
        });
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.kill_all();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        // Field 5 is the path.
        let paths = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
        for path in paths.filter(|path| Path::new(path).starts_with(&self.directory)) {
            let _ = unmount(&*path, UnmountFlags::DETACH);
        }
    }
}
