//! Real etcd servers on free ports of loopback.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::{LIMIT, free_port, have, wait_until};

/// A cluster of etcd; ended when dropped.
pub struct Etcd {
    members: Vec<Member>,
    /// How each is started.
    peers: String,
    options: Vec<String>,
    dir: TempDir,
}

struct Member {
    child: Option<Child>,
    port: u16,
    peer: u16,
}

impl Etcd {
    /// Starts so many members and waits until all are healthy.
    ///
    /// # Panics
    /// When etcd is not installed or does not come up.
    pub fn start(members: usize) -> Etcd {
        Etcd::start_with(members, &[])
    }

    /// The same with more options.
    ///
    /// # Panics
    /// When etcd is not installed or does not come up.
    pub fn start_with(members: usize, options: &[&str]) -> Etcd {
        assert!(have("etcd"), "etcd is not installed: apt-get install etcd-server (or `cargo xtask setup`)");
        let dir = tempfile::tempdir().expect("a directory");
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let peers: Vec<String> = (0..)
            .zip(&ports)
            .map(|(number, (_, peer)): (usize, _)| format!("m{number}=http://127.0.0.1:{peer}"))
            .collect();
        let start = |(number, &(port, peer)): (usize, &(u16, u16))| Member {
            child: Some(start_member(dir.path(), number, (port, peer), &peers.join(","), &options)),
            port,
            peer,
        };
        let members = ports.iter().enumerate().map(start).collect();
        let cluster = Etcd { members, peers: peers.join(","), options, dir };
        wait_until("etcd is healthy", || (0..cluster.members.len()).all(|number| cluster.is_healthy(number)));
        cluster
    }

    /// Its address for `--store`, with this prefix of keys.
    pub fn store(&self, prefix: &str) -> String {
        let members: Vec<String> =
            self.members.iter().map(|member| format!("127.0.0.1:{}", member.port)).collect();
        format!("etcd://{}/{prefix}", members.join(","))
    }

    /// Kills a member as `kill -9` does.
    pub fn kill(&mut self, number: usize) {
        end(self.members[number].child.take());
    }

    /// Starts a member again that was killed, and waits until it is healthy.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start_again(&mut self, number: usize) {
        let Member { port, peer, .. } = self.members[number];
        let child = start_member(self.dir.path(), number, (port, peer), &self.peers, &self.options);
        self.members[number].child = Some(child);
        wait_until("etcd is healthy", || self.is_healthy(number));
    }

    /// Directory of what a member keeps.
    pub fn data(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("m{number}"))
    }

    /// The reply of a member to a request of its gateway, as JSON; none where it does not reply.
    pub fn ask(&self, number: usize, path: &str, body: &str) -> Option<Value> {
        let answer = crate::http(self.members[number].port, "POST", path, body).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    /// The newest revision of a member.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn revision(&self, number: usize) -> u64 {
        let status = self.ask(number, "/v3/maintenance/status", "{}").expect("it answers");
        status["header"]["revision"].as_str().and_then(|text| text.parse().ok()).expect("a revision")
    }

    /// Whether a member has been compacted beyond that revision, so that it can no longer be read at.
    pub fn has_forgotten(&self, number: usize, revision: u64) -> bool {
        let body = format!(r#"{{"key":"AA==","revision":"{revision}"}}"#);
        let answer = self.ask(number, "/v3/kv/range", &body).unwrap_or_default();
        answer["error"].as_str().is_some_and(|error| error.contains("compacted"))
    }

    /// Number of the member that leads.
    ///
    /// # Panics
    /// When none does in time.
    pub fn leader(&self) -> usize {
        let mut leader = None;
        wait_until("etcd has a leader", || {
            leader = (0..self.members.len()).find(|&number| self.leads(number));
            leader.is_some()
        });
        leader.expect("it was found")
    }

    fn is_healthy(&self, number: usize) -> bool {
        ask(self.members[number].port, "GET", "/health").is_some_and(|answer| answer["health"] == "true")
    }

    fn leads(&self, number: usize) -> bool {
        let answer = ask(self.members[number].port, "POST", "/v3/maintenance/status");
        answer.is_some_and(|answer| {
            answer["leader"].is_string() && answer["leader"] == answer["header"]["member_id"]
        })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(|member| end(member.child.take()));
    }
}

fn end(child: Option<Child>) {
    if let Some(mut child) = child {
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn start_member(dir: &Path, number: usize, (port, peer): (u16, u16), all: &str, options: &[String]) -> Child {
    let log = File::create(dir.join(format!("etcd{number}.log"))).expect("the log can be written");
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
    Command::new("etcd")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .args(["--name", &format!("m{number}"), "--data-dir"])
        .arg(dir.join(format!("m{number}")))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(options)
        .args(["--initial-cluster", all, "--initial-cluster-state", "new", "--logger", "zap"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("etcd can be started")
}

/// The reply of a member, if it is JSON.
fn ask(port: u16, method: &str, path: &str) -> Option<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}
