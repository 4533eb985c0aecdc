//! Several allocators on one etcd, with appliances and xpm-blk that know all of them.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::etcd::Etcd;
use crate::{
    Daemon, appliance_arguments, free_port, http_answer, programs, start_appliance, start_blk, url_of,
    wait_until,
};

/// Allocators, and those who follow the one that leads.
pub struct Several {
    // Ended in this order.
    /// The client's daemon.
    pub blk: Daemon,
    /// The appliances.
    pub appliances: Vec<Daemon>,
    /// The allocators.
    pub allocators: Vec<Daemon>,
    /// Where the metadata is.
    pub etcd: Etcd,
    ports: Vec<u16>,
    /// More options of the allocators.
    options: Vec<String>,
    dir: TempDir,
}

impl Several {
    /// Starts so many members of etcd, allocators and appliances, and xpm-blk.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start(members: usize, allocators: usize, appliances: usize) -> Several {
        Several::start_with((members, &[]), (allocators, &[]), appliances)
    }

    /// The same with more options for etcd and for the allocators.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub fn start_with(
        (members, of_etcd): (usize, &[&str]),
        (allocators, options): (usize, &[&str]),
        appliances: usize,
    ) -> Several {
        let dir = tempfile::tempdir().expect("a directory");
        let etcd = Etcd::start_with(members, of_etcd);
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let ports: Vec<u16> = (0..allocators).map(|_| free_port()).collect();
        let start =
            |(number, &port): (usize, &u16)| start_allocator(dir.path(), number, port, &etcd, &options);
        let allocators: Vec<Daemon> = ports.iter().enumerate().map(start).collect();
        let urls: Vec<String> = ports.iter().map(|&port| url_of(port)).collect();
        let urls = urls.join(",");
        let appliances = (0..appliances).map(|index| {
            start_appliance(dir.path(), index, &appliance_arguments(dir.path(), index, &urls), None)
        });
        let appliances = appliances.collect();
        let blk = start_blk(dir.path(), "blk", &urls, "");
        let several = Several { blk, appliances, allocators, etcd, ports, options, dir };
        several.wait_up();
        several
    }

    fn wait_up(&self) {
        wait_until("all appliances are up", || {
            let list = self.xpm(&["appliance", "list", "--json"]);
            let list: Value = serde_json::from_slice(&list.stdout).unwrap_or_default();
            let up = |appliance: &&Value| appliance["state"] == "up";
            list.as_array().is_some_and(|list| list.iter().filter(up).count() == self.appliances.len())
        });
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// URL of an allocator.
    pub fn url(&self, number: usize) -> String {
        url_of(self.ports[number])
    }

    /// Port of an allocator.
    pub fn port(&self, number: usize) -> u16 {
        self.ports[number]
    }

    /// Starts an allocator again that was killed.
    pub fn restart(&mut self, number: usize) {
        let (dir, port) = (self.dir.path(), self.ports[number]);
        self.allocators[number] = start_allocator(dir, number, port, &self.etcd, &self.options);
    }

    /// Number of the allocator that leads, once one does.
    ///
    /// # Panics
    /// When none does in time.
    pub fn leader(&self) -> usize {
        let mut leader = None;
        wait_until("an allocator leads", || {
            leader = (0..self.ports.len()).find(|&number| self.status_code(number) == Some(200));
            leader.is_some()
        });
        leader.expect("it was found")
    }

    /// The reply of an allocator to a request for its status: the HTTP status, none where it does not.
    pub fn status_code(&self, number: usize) -> Option<u16> {
        http_answer(self.ports[number], "/v1/status").ok()?.split(' ').nth(1)?.parse().ok()
    }

    /// Runs the operator's command.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn xpm(&self, arguments: &[&str]) -> Output {
        let urls: Vec<String> = self.ports.iter().map(|&port| url_of(port)).collect();
        Command::new(programs().join("xpm"))
            .env("XPM_ALLOCATOR", urls.join(","))
            .env("XPM_BLK", self.dir.path().join("blk.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("xpm can be started")
    }

    /// Runs the operator's command, which has to go well; what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.xpm(arguments);
        assert!(output.status.success(), "xpm {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Names of all allocations, in order.
    ///
    /// # Panics
    /// When the command fails or prints something else.
    pub fn names(&self) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.ok(&["alloc", "list", "--json"])).expect("JSON");
        let list = list.as_array().expect("a list").iter();
        let mut names: Vec<String> = list.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect();
        names.sort();
        names
    }
}

fn start_allocator(dir: &Path, number: usize, port: u16, etcd: &Etcd, options: &[String]) -> Daemon {
    let arguments = ["--listen", &format!("127.0.0.1:{port}"), "--store", &etcd.store("test")];
    let arguments: Vec<String> =
        arguments.map(str::to_owned).into_iter().chain(options.iter().cloned()).collect();
    let mut daemon = Daemon::start(dir, &format!("allocator{number}"), "xpm-allocator", &arguments);
    daemon.wait_ready(|| http_answer(port, "/v1/status").is_ok());
    daemon
}
