//! Network namespaces: hosts of one machine that have a network of their own.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Runs a command that has to go well.
///
/// # Panics
/// When it does not.
pub fn done(program: &str, words: &[&str]) {
    let output =
        Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A network namespace; removed when dropped, with its ends of links.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes it.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(name: &str) -> Namespace {
        done("ip", &["netns", "add", name]);
        let namespace = Namespace { name: name.to_owned() };
        namespace.ip("link set lo up");
        namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` in it, which has to go well.
    ///
    /// # Panics
    /// When it does not.
    pub fn ip(&self, words: &str) {
        let words: Vec<&str> = words.split(' ').collect();
        done("ip", &[&["-n", &self.name], &*words].concat());
    }

    /// A function that brings the thread that calls it into the namespace.
    ///
    /// # Panics
    /// When the namespace is gone, or it is called without the right to enter.
    pub fn entrance(&self) -> impl FnOnce() + Send + use<> {
        let file = File::open(self.path()).expect("the namespace is there");
        move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("it can be entered");
        }
    }

    /// Words that start a program in it. Mounts are those of this process: `ip netns exec` would hide those of other
    /// programs.
    pub fn words(&self) -> [String; 3] {
        ["/usr/bin/nsenter".to_owned(), format!("--net={}", self.path().display()), "--".to_owned()]
    }

    /// Bytes that a process in it sees received and sent by an interface.
    ///
    /// # Panics
    /// When there is no such process or interface.
    pub fn bytes(process: u32, interface: &str) -> (u64, u64) {
        let table = std::fs::read_to_string(format!("/proc/{process}/net/dev")).expect("a process");
        let line = table.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
        let fields: Vec<u64> =
            line.expect("an interface").split_whitespace().filter_map(|word| word.parse().ok()).collect();
        // proc_pid_net(5): the first of eight fields of each direction.
        (fields[0], fields[8])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}
