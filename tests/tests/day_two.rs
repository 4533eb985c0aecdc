//! The second day of a pool: ordinary trouble, one after the other, while two clients verify what they read. No byte
//! may be wrong, no request fail, and nothing may end in a state that only `--force` resolves.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use xpm_tests::verified::Verified;
use xpm_tests::{Cluster, Daemon, free_port, wait_until};

/// Blocks of each client that are under load; 8 MiB.
const BLOCKS: u64 = 2048;
/// Half-open handshakes of the flood.
const FLOOD: usize = 600;

/// A pool of three lenders with two clients, each with a device under verified load.
struct Pool {
    cluster: Cluster,
    /// xpm-blk of the second client.
    _second: Daemon,
    loads: Vec<Verified>,
}

impl Pool {
    fn start() -> Pool {
        let cluster = Cluster::start_kept(&[vec![], vec![], vec![]]);
        let second = cluster.second_client();
        cluster.attach("first", "64MiB", &["--stripe", "2"], "nbd-tcp");
        cluster.ok(&["alloc", "create", "second", "--size", "64MiB", "--stripe", "3"]);
        let socket = cluster.dir().join("second.sock");
        let form = format!("nbd-socket={}", socket.display());
        let words = ["blk", "attach", "second", "--as", &form, "--transport", "nbd-tcp"];
        let attached = cluster.xpm_of_second(&words);
        assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
        let load = |name: &str| Verified::start(&cluster.dir().join(format!("{name}.sock")), name, BLOCKS);
        let loads = vec![load("first"), load("second")];
        let pool = Pool { cluster, _second: second, loads };
        pool.goes_on("at first");
        pool
    }

    fn goes_on(&self, when: &str) {
        self.loads.iter().for_each(|load| load.goes_on(when));
    }

    /// Both loads have read all that they wrote once more.
    fn finish(&mut self) {
        for load in self.loads.drain(..) {
            let outcome = load.finish();
            println!("{} operations, the longest took {:?}", outcome.operations, outcome.longest);
        }
    }

    fn allocation(&self, name: &str) -> Value {
        let list = self.cluster.json(&["alloc", "list"]);
        let found = list.as_array().unwrap().iter().find(|one| one["name"] == name);
        found.unwrap_or_else(|| panic!("no allocation {name} in {list}")).clone()
    }

    /// The value behind a flag of an appliance.
    fn flag(&mut self, index: usize, flag: &str) -> String {
        let mut found = String::new();
        self.cluster.change_appliance(index, |words| found = words[place(words, flag)].clone());
        found
    }
}

/// Where the value of a flag is.
fn place(words: &[String], flag: &str) -> usize {
    1 + words.iter().position(|word| word == flag).expect("the flag is given")
}

/// Handshakes that never go on; they last as long as this value.
fn flood(address: &str) -> Vec<TcpStream> {
    let open = |_| {
        let mut stream = TcpStream::connect(address).ok()?;
        // NBD_FLAG_C_FIXED_NEWSTYLE, and no option.
        stream.write_all(&1_u32.to_be_bytes()).ok()?;
        Some(stream)
    };
    (0..FLOOD).filter_map(open).collect()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target: PathBuf = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[test]
fn an_allocator_that_is_restarted_refuses_nothing_for_that() {
    let mut pool = Pool::start();
    for round in 0..5 {
        // It answers since some milliseconds when this returns.
        pool.cluster.restart_allocator();
        let name = format!("round-{round}");
        pool.cluster.ok(&["alloc", "create", &name, "--size", "16MiB"]);
        pool.cluster.ok(&["alloc", "delete", &name]);
    }
    pool.goes_on("after the allocator's restarts");
    pool.finish();
}

#[test]
fn a_lender_gets_another_address_and_is_flooded_as_it_returns() {
    let mut pool = Pool::start();
    pool.cluster.appliances[0].kill();
    let nbd = format!("127.0.0.1:{}", free_port());
    pool.cluster.change_appliance(0, |words| {
        let at = place(words, "--nbd");
        words[at] = nbd;
    });
    pool.cluster.start_appliance(0);
    pool.goes_on("with a lender at another address");

    let address = pool.flag(1, "--nbd");
    pool.cluster.appliances[1].kill();
    pool.cluster.start_appliance(1);
    let open = flood(&address);
    assert!(open.len() > FLOOD / 2, "only {} handshakes began", open.len());
    pool.goes_on("beside a flood of handshakes");
    drop(open);
    pool.finish();
}

#[test]
fn metadata_of_an_hour_ago_takes_nothing_away() {
    let mut pool = Pool::start();
    let data = pool.cluster.dir().join("allocator");
    let old = pool.cluster.dir().join("old");
    pool.cluster.allocator.stop();
    copy(&data, &old);
    pool.cluster.restart_allocator();
    pool.cluster.wait_up();
    pool.cluster.ok(&["alloc", "resize", "first", "128MiB"]);
    wait_until("the owner has followed", || pool.allocation("first")["change"].is_null());
    pool.goes_on("after it grew");

    pool.cluster.allocator.stop();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&old, &data);
    pool.cluster.restart_allocator();
    let status = || pool.cluster.xpm(&["status"]);
    wait_until("the allocator says that its metadata is of yesterday", || {
        let output = status();
        output.status.code() == Some(2) && String::from_utf8_lossy(&output.stdout).contains("recover")
    });
    let refused = pool.cluster.refused(&["alloc", "create", "new", "--size", "16MiB"]);
    assert!(refused.contains("recover"), "{refused}");
    pool.goes_on("with metadata of an hour ago");

    let controls: Vec<String> =
        (0..3).map(|index| format!("http://{}", pool.flag(index, "--listen"))).collect();
    let task: Vec<&str> =
        ["recover", "--from-network"].into_iter().chain(controls.iter().map(String::as_str)).collect();
    let said = pool.cluster.replace_metadata(&task);
    assert!(said.contains("`first` of 128MiB is recovered;"), "{said}");
    pool.goes_on("after the metadata was recovered");
    pool.cluster.ok(&["alloc", "create", "new", "--size", "16MiB"]);
    pool.finish();
}
