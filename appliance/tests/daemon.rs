//! The program: its control interface, and its exports used by NBD clients of other projects.

mod harness;

use std::process::Command;

use harness::{Daemon, LEN, MIB, key, run};
use serde_json::{Value, json};
use xpm_protocol::api::ErrorKind;

#[test]
fn invalid_orders_get_one_clear_answer() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    for (method, path, body, kind, word) in [
        ("POST", "/v1/regions", "{", ErrorKind::Invalid, "EOF"),
        ("POST", "/v1/regions", "{\"count\":1}", ErrorKind::Invalid, "missing field"),
        ("PUT", "/v1/grants/7", "{}", ErrorKind::Invalid, "grant id"),
        ("DELETE", "/v1/regions/xyz", "", ErrorKind::Invalid, "region id"),
        ("GET", "/v1/nothing", "", ErrorKind::NotFound, "/v1/nothing"),
        ("POST", "/v1/status", "", ErrorKind::Invalid, "POST"),
    ] {
        let (status, answer) = daemon.raw(method, path, body);
        assert!(status >= 400, "{path}: {status} {answer}");
        assert_eq!(answer["kind"], json!(kind), "{path}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(word), "{path}: {answer}");
    }
    let unknown = daemon.raw("POST", "/v1/regions", &json!({ "surprise": 1 }).to_string());
    assert!(unknown.1["error"].as_str().unwrap().contains("surprise"), "{unknown:?}");
    assert_eq!(daemon.get("/v1/status")["capacity"], 64 * MIB, "alive");
}

#[test]
fn unknown_ids_and_excessive_orders() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    let unknown = format!("{:032x}", 99);
    let commit = daemon.commit_body(1, 1, std::slice::from_ref(&unknown));
    let (status, answer) = daemon.raw("PUT", &format!("/v1/grants/{:032x}", 1), &commit.to_string());
    assert_eq!((status, &answer["kind"]), (404, &json!("not-found")), "{answer}");
    // Deleting an unknown id succeeds.
    assert_eq!(daemon.raw("DELETE", &format!("/v1/regions/{unknown}"), "").0, 204);
    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{unknown}"), "").0, 204);
    let (status, answer) = daemon.raw("POST", "/v1/regions", &daemon.reserve_body(5, LEN).to_string());
    assert_eq!((status, &answer["kind"]), (507, &json!("no-space")), "{answer}");
    let ids = daemon.grant(1, 1, 2);
    let (status, answer) = daemon.raw("DELETE", &format!("/v1/regions/{}", ids[0]), "");
    assert_eq!((status, &answer["kind"]), (409, &json!("in-use")), "{answer}");
    assert_eq!(daemon.get("/v1/grants")[0]["len"], 2 * LEN);
}

#[test]
fn a_token_is_required_where_one_is_set() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let token = "0123456789abcdef0123456789abcdef";
    std::fs::write(&file, token).unwrap();
    run("chmod", &["600", file.to_str().unwrap()]);
    let arguments = ["--memory", "64MiB", "--token-file", file.to_str().unwrap()];
    let mut daemon = Daemon::start_with_token(&arguments, token);
    for wrong in ["", "0123456789abcdef0123456789abcdeF", "x"] {
        daemon.token = wrong.to_owned();
        let (status, answer) = daemon.raw("GET", "/v1/status", "");
        assert_eq!((status, &answer["kind"]), (401, &json!("unauthorized")), "{wrong}: {answer}");
        assert_eq!(daemon.raw("POST", "/v1/regions", &daemon.reserve_body(1, LEN).to_string()).0, 401);
    }
}

/// The token of a pool is changed while all daemons run: they accept both tokens for a while.
#[test]
fn a_hang_up_reads_the_token_anew() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let (old, new) = ("old-old-old-old-old", "new-new-new-new-new");
    let write = |text: &str| {
        std::fs::write(&file, text).unwrap();
        run("chmod", &["600", file.to_str().unwrap()]);
    };
    write(old);
    let mut daemon =
        Daemon::start_with_token(&["--memory", "16MiB", "--token-file", file.to_str().unwrap()], old);
    let mut status_with = |token: &str| {
        daemon.token = token.to_owned();
        daemon.raw("GET", "/v1/status", "").0
    };
    assert_eq!(status_with(new), 401);
    write(&format!("{new}\n{old}\n"));
    daemon.signal(1);
    daemon.wait_log("two tokens are accepted");
    let mut status_with = |token: &str| {
        daemon.token = token.to_owned();
        daemon.raw("GET", "/v1/status", "").0
    };
    assert_eq!((status_with(old), status_with(new)), (200, 200));
    write("x");
    daemon.signal(1);
    daemon.wait_log("the token of before stays");
    let mut status_with = |token: &str| {
        daemon.token = token.to_owned();
        daemon.raw("GET", "/v1/status", "").0
    };
    assert_eq!((status_with(old), status_with(new)), (200, 200));
}

#[test]
fn a_hang_up_reads_the_level_of_the_log_anew() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("level");
    std::fs::write(&file, "warn\n").unwrap();
    let mut daemon = Daemon::start_with_level(&file, &["--memory", "16MiB"]);
    assert!(!daemon.log().contains("lends"), "{}", daemon.log());
    std::fs::write(&file, "info\n").unwrap();
    daemon.signal(1);
    daemon.wait_log("the log's level is info, by");
    assert!(daemon.is_alive());
}

#[test]
fn only_the_intended_signals_end_it() {
    let daemon = Daemon::start(&["--memory", "16MiB"]);
    // SIGHUP, QUIT, USR1, USR2, PIPE, ALRM, STKFLT, XCPU, XFSZ, VTALRM, PROF, IO, PWR, and the first and last
    // real-time signals.
    for number in [1, 3, 10, 12, 13, 14, 16, 24, 25, 26, 27, 29, 30, 34, 64] {
        daemon.signal(number);
        assert_eq!(daemon.get("/v1/status")["capacity"], 16 * MIB, "signal {number} ended it");
    }
}

#[test]
fn nbd_clients_of_other_projects_use_a_grant_by_its_key() {
    let daemon = Daemon::start(&["--memory", "128MiB"]);
    daemon.grant(1, 1, 2);
    for uri in [daemon.tcp_uri(&key(1)), daemon.unix_uri(&key(1))] {
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), (2 * LEN).to_string());
        let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
        let export = &info["exports"][0];
        for can in ["trim", "zero", "fast_zero", "flush", "fua", "cache", "multi_conn"] {
            let key = format!("can_{can}");
            assert_eq!(export[&key], true, "{key}: {export}");
        }
        assert_eq!(export["block_size_minimum"], 1, "{export}");
        assert_eq!(export["block_size_maximum"], 32 << 20, "{export}");
        // Across the border of the two regions, and with parts of pages.
        let script = [
            "write -P 5 15M 2M",
            "read -P 5 15M 2M",
            "write -P 6 4095 3",
            "read -P 6 4095 3",
            "discard 0 32M",
            "read -P 0 0 32M",
        ];
        let commands: Vec<&str> = script.iter().flat_map(|line| ["-c", line]).collect();
        let said = run("qemu-io", &[&["-f", "raw"], commands.as_slice(), &[&uri]].concat());
        assert!(!said.contains("verification failed"), "{said}");
    }
}

#[test]
fn a_copy_is_read_back_unchanged() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    daemon.grant(1, 1, 2);
    let directory = tempfile::tempdir().unwrap();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    let content: Vec<u8> =
        (0..2 * LEN).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&there, &content).unwrap();
    run("nbdcopy", &[there.to_str().unwrap(), &daemon.tcp_uri(&key(1))]);
    run("nbdcopy", &[&daemon.unix_uri(&key(1)), back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == content);
    let counters = &daemon.get("/v1/status")["counters"];
    assert_eq!(counters["write_bytes"], 2 * LEN, "{counters}");
}

#[test]
fn a_wrong_key_is_refused_like_an_unknown_export() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    daemon.grant(1, 1, 1);
    let refused = |name: &str| {
        let output = Command::new("nbdinfo").arg(daemon.tcp_uri(name)).output().unwrap();
        assert!(!output.status.success(), "{name} was let in");
        String::from_utf8_lossy(&output.stderr).replace(name, "NAME")
    };
    let wrong = refused(&key(2));
    assert_eq!(wrong, refused("no-such-export"));
    assert_eq!(wrong, refused(&key(1)[..63]));
    assert!(wrong.contains("No such file or directory"), "{wrong}");
    let list = Command::new("nbdinfo").args(["--list", &daemon.tcp_uri("")]).output().unwrap();
    let said = String::from_utf8_lossy(&list.stdout).into_owned() + &String::from_utf8_lossy(&list.stderr);
    assert!(!list.status.success() && !said.contains(&key(1)), "keys are not listed: {said}");
}

#[test]
fn a_deleted_region_is_cleared_before_it_is_lent_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = format!("file:{}", directory.path().join("memory").display());
    let mut backings = vec![vec!["--backing", "memfd"], vec!["--backing", &file]];
    match xpm_appliance::host::MemInfo::read().unwrap().huge_free >= 256 * MIB {
        true => backings.push(vec!["--huge"]),
        false => println!("huge pages are left out: this host has less than 256MiB of them free"),
    }
    for backing in backings {
        let daemon = Daemon::start(&[&["--memory", "32MiB"], backing.as_slice()].concat());
        daemon.grant(1, 1, 2);
        let uri = daemon.tcp_uri(&key(1));
        run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 0 32M", &uri]);
        assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 1), "").0, 204);
        let gone = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
        assert!(!gone.status.success(), "{backing:?}: a deleted grant still works");
        daemon.wait("all memory free", |status| status["free"] == 32 * MIB);
        daemon.grant(2, 2, 2);
        let said = run("qemu-io", &["-f", "raw", "-r", "-c", "read -P 0 0 32M", &daemon.unix_uri(&key(2))]);
        assert!(!said.contains("verification failed"), "{backing:?}: {said}");
    }
}

#[test]
fn trim_lowers_resident_memory() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    daemon.grant(1, 1, 4);
    assert_eq!(daemon.get("/v1/status")["resident"], 64 * MIB);
    let uri = daemon.tcp_uri(&key(1));
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 1M 1M", "-c", "discard 16M 40M", &uri]);
    assert_eq!(daemon.get("/v1/status")["resident"], 23 * MIB);
    let map = run("nbdinfo", &["--map", "--json", &uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let holes = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 3);
    assert_eq!(holes.map(|extent| extent["length"].as_u64().unwrap()).sum::<u64>(), 41 * MIB, "{map}");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 16M 4M", &uri]);
    assert_eq!(daemon.get("/v1/status")["resident"], 27 * MIB);
}

#[test]
fn a_raised_epoch_cuts_the_old_client_off() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    let ids = daemon.grant(1, 1, 1);
    let mut old = harness::Shell::open(&daemon.tcp_uri(&key(1)));
    old.say("h.pwrite(b'a' * 4096, 0)", "");
    let (status, answer) =
        daemon.raw("PUT", &format!("/v1/grants/{:032x}", 1), &daemon.commit_body(2, 2, &ids).to_string());
    assert_eq!((status, &answer["epoch"]), (200, &json!(2)), "{answer}");
    old.say("h.pwrite(b'b' * 4096, 0)", "nbd.Error");
    let refused = Command::new("nbdinfo").args(["--size", &daemon.tcp_uri(&key(1))]).output().unwrap();
    assert!(!refused.status.success(), "the old key still works");
    let said = run("qemu-io", &["-f", "raw", "-c", "read -P 0x61 0 4096", &daemon.tcp_uri(&key(2))]);
    assert!(!said.contains("verification failed"), "{said}");
    let (status, answer) =
        daemon.raw("PUT", &format!("/v1/grants/{:032x}", 1), &daemon.commit_body(1, 1, &ids).to_string());
    assert_eq!((status, &answer["kind"]), (409, &json!("conflict")), "{answer}");
}

#[test]
fn a_client_on_the_same_host_has_the_memory_itself() {
    let daemon = Daemon::start(&["--memory", "32MiB"]);
    daemon.grant(1, 1, 2);
    let mut shared = harness::Shared::open(&daemon, &key(1)).unwrap();
    shared.write(LEN + 5, b"page");
    let uri = daemon.tcp_uri(&key(1));
    let said = run("qemu-io", &["-f", "raw", "-r", "-c", &format!("read -v {} 4", LEN + 5), &uri]);
    assert!(said.contains("70 61 67 65"), "NBD sees what was stored: {said}");
    // The server notices a moment later that qemu-io has disconnected.
    daemon.wait("it is the only one", |_| daemon.get("/v1/grants")[0]["connections"] == 1);
    assert!(harness::Shared::open(&daemon, &key(2)).is_err(), "a wrong key was let in");

    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 1), "").0, 204);
    shared.wait_down();
    assert!(harness::Shared::open(&daemon, &key(1)).is_err(), "a deleted grant still works");
    drop(shared);
    daemon.wait("all memory ready again", |status| status["ready"] == 32 * MIB);
    daemon.grant(2, 2, 2);
    let said = run("qemu-io", &["-f", "raw", "-r", "-c", "read -P 0 0 32M", &daemon.tcp_uri(&key(2))]);
    assert!(!said.contains("verification failed"), "{said}");
}

/// A process may keep the memory mapped whether or not it closed its connection.
#[test]
fn a_process_that_keeps_memory_mapped_cannot_access_the_next_owners_data() {
    let mut ways = vec![(true, "--no-lock"), (false, "--no-lock")];
    match xpm_appliance::host::MemInfo::read().unwrap().huge_free >= 64 * MIB {
        true => ways.extend([(true, "--huge"), (false, "--huge")]),
        false => println!("huge pages are left out: this host has less than 64MiB of them free"),
    }
    for (disconnected, option) in ways {
        let daemon = Daemon::start(&["--memory", "32MiB", option]);
        let ids = daemon.grant(1, 1, 2);
        let mut keeper = harness::Keeper::open(&daemon, &key(1), disconnected);
        keeper.write(1, "of the first");
        let raise = daemon.commit_body(2, 2, &ids).to_string();
        let (status, answer) = daemon.raw("PUT", &format!("/v1/grants/{:032x}", 1), &raise);
        assert_eq!((status, &answer["epoch"]), (200, &json!(2)), "{answer}");
        let mut owner = harness::Shell::open(&daemon.tcp_uri(&key(2)));
        owner.say(&format!("assert h.pread(12, {LEN}) == b'of the first'"), "");
        owner.say(&format!("h.pwrite(b'SECRET', {LEN})"), "");
        keeper.sees(1, r"\0\0\0\0\0\0");
        keeper.write(1, "FORGED");
        keeper.write(0, "FORGED");
        owner.say(&format!("assert h.pread(6, {LEN}) == b'SECRET', h.pread(6, {LEN})"), "");
        owner.say("assert h.pread(6, 0) == bytes(6), h.pread(6, 0)", "");
    }
}

/// A truncated file has pages that cannot be accessed, like memory with an uncorrectable error.
#[test]
fn bad_memory_affects_only_the_bad_pages() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    let backing = format!("file:{}", path.display());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let arguments = ["--memory", "32MiB", "--backing", &backing, "--no-lock", "--allocator", &url];
    let beats = std::thread::spawn(move || {
        loop {
            let beat = harness::heartbeat(&listener, "60s");
            if beat["status"]["warnings"].is_array() {
                return beat;
            }
        }
    });
    let daemon = Daemon::start(&arguments);
    let ids = daemon.grant(1, 1, 2);
    let uri = daemon.tcp_uri(&key(1));
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 32M", &uri]);
    // Cuts off the last two pages of the file. They are the end of one of the two regions; which one is not known.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(std::fs::metadata(&path).unwrap().len() - 8192).unwrap();
    let bad = [LEN - 8192, 2 * LEN - 8192].into_iter().find(|bad| {
        // The first access finds the bad pages, which ends the connection.
        let _ = Command::new("qemu-io").args(["-f", "raw", "-c", &format!("read {bad} 8k"), &uri]).output();
        daemon.log().contains(&format!("from byte {bad} to byte {}", bad + 8191))
    });
    let bad = bad.expect("one of them is bad");
    let mut owner = harness::Shell::open(&uri);
    owner.say(&format!("h.pread(4096, {bad})"), "nbd.Error");
    owner.say(&format!("h.pread(8192, {})", bad - 4096), "nbd.Error");
    owner.say(&format!("h.pwrite(b'x', {})", bad + 4096), "nbd.Error");
    owner.say(&format!("h.zero(8192, {bad})"), "nbd.Error");
    owner.say(&format!("assert h.pread(65536, {}) == b'\\x07' * 65536", bad - 65536), "");
    owner.say(&format!("assert h.pread(4096, {}) == b'\\x07' * 4096", (bad + 8192) % (2 * LEN)), "");
    let digest = json!({ "offset": bad & !(LEN - 1), "len": LEN }).to_string();
    let (status, answer) = daemon.raw("POST", &format!("/v1/grants/{:032x}/digests", 1), &digest);
    assert_eq!(status, 503, "{answer}");
    let beat = beats.join().unwrap();
    let line = beat["status"]["warnings"][0].as_str().unwrap();
    assert!(line.contains("`a`") && line.contains(&bad.to_string()), "{line}");
    // The freed regions are cleared, except for the bad one, which is never lent again.
    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 1), "").0, 204);
    daemon.wait("the good region is ready again", |status| status["ready"] == LEN);
    assert_eq!(ids.len(), 2);
    assert_eq!(daemon.get("/v1/status")["grants"], 0);
}

#[test]
fn regions_of_another_size_are_carved_from_the_ready_memory_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = format!("file:{}", directory.path().join("memory").display());
    let sizes = ["--memory", "256MiB", "--ready", "256MiB", "--region-size", "64MiB"];
    let daemon = Daemon::start(&[&sizes, ["--backing", &file].as_slice()].concat());
    let reserve_of = |daemon: &Daemon, count: u32, len: u64| {
        let (status, answer) =
            daemon.raw("POST", "/v1/regions", &daemon.reserve_body(count, len).to_string());
        assert_eq!(status, 200, "{answer}");
        answer
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let small = reserve_of(&daemon, 3, 16 * MIB);
    assert_eq!(daemon.raw("DELETE", &format!("/v1/regions/{}", small[1]), "").0, 204);
    // Smaller ready regions make room for a larger one, too.
    let large = reserve_of(&daemon, 1, 128 * MIB);
    let body = daemon.commit_body(1, 1, &large).to_string();
    assert_eq!(daemon.raw("PUT", &format!("/v1/grants/{:032x}", 1), &body).0, 200);
    let said = run("qemu-io", &["-f", "raw", "-c", "read -P 0 0 128M", &daemon.tcp_uri(&key(1))]);
    assert!(!said.contains("verification failed"), "{said}");
    // Small ready regions do not stand in the way of large ones: four of 64 MiB fit into the 256 MiB.
    let file = format!("file:{}", directory.path().join("other").display());
    let sizes = ["--memory", "256MiB", "--ready", "32MiB", "--region-size", "16MiB"];
    let daemon = Daemon::start(&[&sizes, ["--backing", &file].as_slice()].concat());
    daemon.wait("two are ready", |status| status["ready"] == 32 * MIB);
    reserve_of(&daemon, 1, 64 * MIB);
    reserve_of(&daemon, 3, 64 * MIB);
}

#[test]
fn a_backing_file_that_others_can_reach_is_refused() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let make = |name: &str, mode: u32| {
        std::fs::write(path(name), "").unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let refused = |name: &str, word: &str| {
        let file = format!("file:{}", path(name).display());
        let line = harness::complaint(&["--memory", "16MiB", "--backing", &file]);
        assert!(line.contains(word), "{name}: {line}");
    };
    make("everybody", 0o666);
    refused("everybody", "chmod 600");
    assert_eq!(std::fs::metadata(path("everybody")).unwrap().len(), 0, "nothing is put into it");
    make("target", 0o600);
    symlink(path("target"), path("link")).unwrap();
    refused("link", "symbolic link");
    if rustix::process::geteuid().is_root() {
        make("foreign", 0o600);
        chown(path("foreign"), Some(65534), None).unwrap();
        refused("foreign", "belongs to user 65534");
    }
    make("readable", 0o644);
    let file = format!("file:{}", path("readable").display());
    let daemon = Daemon::start(&["--memory", "16MiB", "--backing", &file]);
    daemon.wait_log("it is 0600 now");
    assert_eq!(std::fs::metadata(path("readable")).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_failed_start_reports_the_reason_in_one_line() {
    let daemon = Daemon::start(&["--memory", "16MiB"]);
    let nbd = daemon.nbd.to_string();
    let shared_state = daemon.directory.path().join("state");
    let sockets = daemon.directory.path().join("run");
    let newer = tempfile::tempdir().unwrap();
    std::fs::write(newer.path().join("appliance.json"), "{\"version\":9}").unwrap();
    let file = newer.path().join("appliance.toml");
    std::fs::write(&file, "allocator = ['http://a:1', 'ftp://x']\n").unwrap();
    for (arguments, word) in [
        (vec!["--memory", "0"], "at least 16MiB"),
        (vec!["--memory", "16MiB", "--nbd", &nbd], nbd.as_str()),
        (vec!["--memory", "16MiB", "--state", shared_state.to_str().unwrap()], "in use by another appliance"),
        (vec!["--memory", "16MiB", "--state", newer.path().to_str().unwrap()], "version 9"),
        (vec!["--memory", "16MiB", "--run-dir", sockets.to_str().unwrap()], "nbd.sock"),
        (vec!["--memory", "16MiB", "--token-file", "/nonexistent"], "/nonexistent"),
        (vec!["--memory", "4000TiB"], "lower --memory"),
        (vec!["--memory", "16MiB", "--config", file.to_str().unwrap()], "ftp://x"),
        (vec!["--memory", "16MiB", "--listen", "0.0.0.0:0"], "--token-file"),
    ] {
        let line = harness::complaint(&arguments);
        assert!(line.contains(word), "{arguments:?}: {line}");
    }
    assert_eq!(daemon.get("/v1/status")["grants"], 0, "the first one is not harmed");
}

#[test]
fn heartbeats_survive_an_absent_allocator() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let url = format!("http://{address}");
    let daemon = Daemon::start(&["--memory", "32MiB", "--allocator", &url, "--name", "box"]);
    daemon.wait_log("does not hear this appliance");
    let listener = std::net::TcpListener::bind(address).unwrap();
    let first = harness::heartbeat(&listener, "60s");
    daemon.wait_log("registered with the allocator");
    assert_eq!(first["info"]["name"], "box");
    assert_eq!(first["info"]["control"], format!("http://{}", daemon.control));
    assert_eq!(first["info"]["endpoints"]["nbd"][0], daemon.nbd.to_string());
    assert_eq!(first["status"]["capacity"], 32 * MIB);
    // The next heartbeat would come in a minute, but a change of grants triggers it.
    daemon.grant(1, 1, 1);
    assert_eq!(harness::heartbeat(&listener, "60s")["status"]["grants"], 1);
}

#[test]
fn a_grant_is_copied_to_another_appliance() {
    let (from, to) = (Daemon::start(&["--memory", "32MiB"]), Daemon::start(&["--memory", "32MiB"]));
    from.grant(1, 1, 2);
    to.grant(2, 2, 2);
    let write = "write -P 7 16M 8M";
    run("qemu-io", &["-f", "raw", "-c", write, "-c", "write -P 9 30M 4k", &from.tcp_uri(&key(1))]);
    let copy = |offset: u64, len: u64, to_key: u64| {
        let order = json!({
            "range": { "offset": offset, "len": len }, "nbd": [to.nbd.to_string()], "key": key(to_key), "to": offset
        });
        from.raw("POST", &format!("/v1/grants/{:032x}/copies", 1), &order.to_string())
    };
    let (status, copied) = copy(16 * MIB, 16 * MIB, 2);
    assert_eq!((status, &copied["data"]), (200, &json!(8 * MIB + 4096)), "{copied}");
    assert_eq!(copied["last"], 30 * MIB, "{copied}");
    let digest = |daemon: &Daemon, grant: u32, offset: u64| {
        let range = json!({ "offset": offset, "len": 16 * MIB }).to_string();
        daemon.raw("POST", &format!("/v1/grants/{grant:032x}/digests"), &range).1["xxh3"].clone()
    };
    assert_eq!(digest(&to, 2, 16 * MIB), copied["xxh3"]);
    assert_eq!(digest(&from, 1, 16 * MIB), copied["xxh3"]);
    assert_ne!(digest(&from, 1, 0), copied["xxh3"], "zeros are something else");
    let said = run(
        "qemu-io",
        &["-f", "raw", "-r", "-c", "read -P 7 16M 8M", "-c", "read -P 9 30M 4k", &to.tcp_uri(&key(2))],
    );
    assert!(!said.contains("verification failed"), "{said}");

    let refused = |(status, answer): (u16, Value), word: &str| {
        assert!(status >= 400 && answer["error"].as_str().unwrap().contains(word), "{status} {answer}");
    };
    refused(copy(0, LEN, 3), "no such export");
    refused(copy(0, 33 * MIB, 2), "within the");
    refused(copy(u64::MAX, 2, 2), "within the");
    assert_eq!(to.raw("DELETE", &format!("/v1/grants/{:032x}", 2), "").0, 204);
    refused(copy(16 * MIB, LEN, 2), "no such export");
}

#[test]
fn a_grant_takes_regions_over_from_another() {
    let daemon = Daemon::start(&["--memory", "64MiB"]);
    let ids = daemon.grant(1, 1, 3);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 48M", &daemon.tcp_uri(&key(1))]);
    let take = |grant: u32, key_number: u64, regions: &[String], from: u32| {
        let mut body = daemon.commit_body(1, key_number, regions);
        body["from"] = json!(format!("{from:032x}"));
        daemon.raw("PUT", &format!("/v1/grants/{grant:032x}"), &body.to_string())
    };
    let kept = [ids[2].clone(), ids[0].clone()];
    assert_eq!(take(2, 2, &kept, 9).1["kind"], "in-use", "only from the one that has them");
    assert_eq!(take(2, 2, &kept, 1).0, 200);
    assert_eq!(take(2, 2, &kept, 1).0, 200, "and again");
    assert_eq!(daemon.get("/v1/status")["granted"], 48 * MIB, "they count once");
    for (uri, at) in
        [(daemon.tcp_uri(&key(1)), "read -P 7 0 48M"), (daemon.tcp_uri(&key(2)), "read -P 7 0 32M")]
    {
        let said = run("qemu-io", &["-f", "raw", "-r", "-c", at, &uri]);
        assert!(!said.contains("verification failed"), "{said}");
    }
    // The grant that took over is deleted again: the regions stay with the first.
    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 2), "").0, 204);
    assert_eq!(take(3, 3, &kept, 1).0, 200);
    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 1), "").0, 204);
    daemon.wait("the region that nobody took is free", |status| status["free"] == 32 * MIB);
    let said = run("qemu-io", &["-f", "raw", "-r", "-c", "read -P 7 0 32M", &daemon.tcp_uri(&key(3))]);
    assert!(!said.contains("verification failed"), "{said}");
    assert_eq!(daemon.raw("DELETE", &format!("/v1/grants/{:032x}", 3), "").0, 204);
    daemon.wait("all memory ready again", |status| status["ready"] == 64 * MIB);
}
