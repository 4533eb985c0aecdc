//! Peers that only knock at a door keep nobody out who has a key or a token.

#![allow(missing_docs)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use xpm_protocol::nbd::ExportName;
use xpm_tests::{Cluster, LIMIT, have, wait_until};
use xpm_transport::nbd::client::Target;

/// A connection waits for a second where the server's queue is full.
const THREADS: u8 = 32;

/// Holds connections to a port that say `words` and nothing more, and makes those anew that are closed; until it is
/// dropped.
struct Flood {
    over: Arc<AtomicBool>,
    /// Connections that were made, or tried.
    held: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// So many connections, from several addresses of this machine, as of several attackers.
    fn begin(target: SocketAddr, count: usize, words: &'static [u8]) -> Flood {
        let (over, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let share = count.div_ceil(THREADS.into());
        let begin = |number: u8| {
            let (over, held) = (over.clone(), held.clone());
            std::thread::spawn(move || hold(target, [127, 0, 9, 1 + number % 4], share, words, &over, &held))
        };
        let threads = (0..THREADS).map(begin).collect();
        let flood = Flood { over, held, threads };
        wait_until("the flood is there", || flood.begun() >= count);
        flood
    }
}

impl Flood {
    fn begun(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn hold(
    target: SocketAddr,
    from: [u8; 4],
    count: usize,
    words: &[u8],
    over: &AtomicBool,
    held: &AtomicUsize,
) {
    let knock = || -> std::io::Result<TcpStream> {
        let socket: OwnedFd =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddr::from((from, 0)))?;
        connect(&socket, &target)?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(words)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let mut streams: Vec<TcpStream> = Vec::new();
    while !over.load(Ordering::Acquire) {
        streams.retain_mut(|stream| match stream.read(&mut [0; 256]) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        });
        for _ in streams.len()..count {
            if over.load(Ordering::Acquire) {
                return;
            }
            match knock() {
                Ok(stream) => streams.push(stream),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
            held.fetch_add(1, Ordering::Release);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn address(cluster: &Cluster, path: &str) -> SocketAddr {
    let list = cluster.json(&["appliance", "list"]);
    let text = list[0].pointer(path).and_then(|text| text.as_str()).expect("it is told").to_owned();
    text.trim_start_matches("http://").parse().expect("an address")
}

#[test]
fn half_open_handshakes_keep_no_client_out() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start_kept(&[vec![]]);
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    // The client flags of a handshake, and no option.
    let target = address(&cluster, "/info/endpoints/nbd/0");
    let flood = Flood::begin(target, 5000, &[0, 0, 0, 3]);
    // A client that is there stays, one that has to come back comes back, and a new one comes in.
    cluster.restart_appliance(0);
    let output = std::process::Command::new("qemu-io").args(["-f", "raw", &uri, "-c", "write 0 1M"]).output();
    assert!(output.expect("qemu-io starts").status.success());
    // The connections that the restart had closed are there again.
    wait_until("the flood is there again", || flood.begun() >= 9_000);
    let record = std::fs::read_to_string(cluster.dir().join("blk/devices/v.json")).expect("a record");
    let record: serde_json::Value = serde_json::from_str(&record).expect("it is JSON");
    let key = record.pointer("/map/grants/0/key").and_then(|key| key.as_str()).expect("a key");
    let name = ExportName { key: key.parse().expect("it is one"), session: None };
    for attempt in 0..10 {
        // A client whose handshake is slower than the newcomers fill all places tries again, as xpm-blk does.
        wait_until(&format!("client {attempt} comes in"), || {
            xpm_transport::nbd::client::connect(&Target::Tcp(target), &name, LIMIT).is_ok()
        });
    }
    drop(flood);
}

#[test]
fn connections_that_say_nothing_keep_no_order_from_an_appliance() {
    let cluster = Cluster::start(1);
    let flood = Flood::begin(address(&cluster, "/info/control"), 700, b"GET /v1/status HTTP/1.1\r\n");
    for name in ["a", "b", "c"] {
        cluster.ok(&["alloc", "create", name, "--size", "16MiB"]);
    }
    wait_until("its heartbeats get through", || cluster.json(&["appliance", "list"])[0]["state"] == "up");
    drop(flood);
}
