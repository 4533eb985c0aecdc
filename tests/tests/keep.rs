//! Lent memory outlives the appliance's process, or is known to be lost.

#![allow(missing_docs)]

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use xpm_tests::manager::ServiceManager;
use xpm_tests::{Cluster, have, programs, wait_until};

const SIZE: &str = "64MiB";
const TRANSPORTS: [&str; 3] = ["nbd-tcp", "nbd-unix", "shm"];

/// fio that writes and verifies until it is told to end.
fn verified_load(cluster: &Cluster, uri: &str, seconds: u32) -> Child {
    Command::new("fio")
        .current_dir(cluster.dir())
        .args(["--name=v", "--ioengine=nbd", "--rw=randrw", "--bs=16k", "--iodepth=8", "--size=64M"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--verify_state_save=0"])
        .args(["--time_based", &format!("--runtime={seconds}"), &format!("--uri={uri}")])
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

fn qemu_io(uri: &str, command: &str) -> Output {
    Command::new("qemu-io").args(["-f", "raw", uri, "-c", command]).output().unwrap()
}

/// Whether each of these commands goes well.
fn io(uri: &str, command: &str) -> Result<(), String> {
    let output = qemu_io(uri, command);
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let is_good = output.status.success() && !said.contains("failed");
    if is_good { Ok(()) } else { Err(said) }
}

fn state(cluster: &Cluster, name: &str) -> String {
    cluster.json(&["blk", "show", name])["state"].as_str().unwrap_or_default().to_owned()
}

fn errors(cluster: &Cluster, name: &str) -> u64 {
    cluster.json(&["blk", "show", name])["counters"]["errors"].as_u64().unwrap()
}

/// How often a link of the device was made anew.
fn reconnects(cluster: &Cluster, name: &str) -> u64 {
    let links = cluster.json(&["blk", "show", name])["links"].clone();
    links.as_array().unwrap().iter().filter_map(|link| link["reconnects"].as_u64()).sum()
}

/// Has an appliance of which a piece is shown as `kept`, with a pattern in it.
fn with_pattern(options: &[&str], transport: &str) -> (Cluster, String) {
    let cluster = Cluster::start_kept(&[options.to_vec()]);
    let uri = cluster.attach("kept", SIZE, &[], transport);
    io(&uri, "write -P 9 0 64M").unwrap();
    (cluster, uri)
}

fn assert_lost(cluster: &Cluster, uri: &str, line: &str) {
    let said = io(uri, "read -P 9 0 64M").expect_err("zeros or foreign data are never served");
    assert!(said.contains("Input/output error"), "{said}");
    wait_until("the device says so", || state(cluster, "kept") == "lost");
    let log = cluster.appliances[0].log();
    assert_eq!(log.lines().filter(|said| said.contains(line)).count(), 1, "one line says `{line}`:\n{log}");
    // And it serves on.
    let uri = cluster.attach("next", SIZE, &[], "nbd-tcp");
    io(&uri, "write -P 3 0 64M").unwrap();
    io(&uri, "read -P 3 0 64M").unwrap();
}

/// Moments that differ, the same in each run.
fn moments(count: u64) -> impl Iterator<Item = Duration> {
    (1..=count).map(|number| Duration::from_millis(100 + number.wrapping_mul(7919) % 500))
}

#[test]
fn kills_of_an_appliance_lose_nothing() {
    if !have("fio") {
        return;
    }
    let mut cluster = Cluster::start_kept(&[vec![], vec![]]);
    let uris = TRANSPORTS.map(|by| (by, cluster.attach(by, SIZE, &["--stripe", "2"], by)));
    let mut loads: Vec<Child> = uris.iter().map(|(_, uri)| verified_load(&cluster, uri, 12)).collect();
    let (mut kills, mut cut_off) = (0, [0; TRANSPORTS.len()]);
    for (index, moment) in moments(u64::MAX).enumerate() {
        std::thread::sleep(moment);
        if loads.iter_mut().any(|load| load.try_wait().unwrap().is_some()) {
            break;
        }
        for (count, (by, _)) in cut_off.iter_mut().zip(&uris) {
            *count = reconnects(&cluster, by).max(*count);
        }
        cluster.restart_appliance(index % 2);
        kills += 1;
    }
    for ((by, _), load) in uris.iter().zip(&mut loads) {
        assert!(load.wait().unwrap().success(), "fio saw an error over {by}");
        assert_eq!(errors(&cluster, by), 0, "{by}");
    }
    println!("{kills} kills; links made anew: {cut_off:?}");
    assert!(kills > 4 && cut_off.iter().all(|count| *count > 0), "{kills} kills: {cut_off:?}");
    wait_until("the allocator finds nothing wrong", || cluster.xpm(&["fsck"]).status.success());
}

#[test]
fn an_orderly_restart_loses_nothing() {
    if !have("fio") {
        return;
    }
    let mut cluster = Cluster::start_kept(&[vec![]]);
    let uris = TRANSPORTS.map(|by| (by, cluster.attach(by, SIZE, &[], by)));
    let mut loads: Vec<Child> = uris.iter().map(|(_, uri)| verified_load(&cluster, uri, 6)).collect();
    for moment in moments(4) {
        std::thread::sleep(moment);
        cluster.appliances[0].stop();
        assert_eq!(cluster.manager(0).take_said("STOPPING").as_deref(), Some("1"));
        cluster.start_appliance(0);
    }
    for ((by, _), load) in uris.iter().zip(&mut loads) {
        assert!(load.wait().unwrap().success(), "fio saw an error over {by}");
        assert_eq!(errors(&cluster, by), 0, "{by}");
    }
    let log = cluster.appliances[0].log();
    assert_eq!(log.matches("stays with the service manager").count(), 4, "{log}");
    assert_eq!(log.matches("is as it was before the restart").count(), 4, "{log}");
}

#[test]
fn without_the_store_it_is_lost() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "shm");
    cluster.appliances[0].kill();
    cluster.manager(0).forget();
    cluster.start_appliance(0);
    let said = io(&uri, "read -P 9 0 64M").expect_err("zeros are never served");
    assert!(said.contains("Input/output error"), "{said}");
    wait_until("the device says so", || state(&cluster, "kept") == "lost");
}

#[test]
fn a_region_that_is_missing_takes_its_grant_with_it_and_no_other() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    let before = cluster.manager(0).kept().len();
    let other = cluster.attach("other", SIZE, &[], "nbd-unix");
    io(&other, "write -P 5 0 64M").unwrap();
    cluster.appliances[0].kill();
    // The last one that was kept before the second grant: of the first one.
    cluster.manager(0).change_kept(|store| drop(store.remove(before - 1)));
    cluster.start_appliance(0);
    io(&other, "read -P 5 0 64M").unwrap();
    assert_lost(
        &cluster,
        &uri,
        "1 grants of this appliance are lost (that of `kept`: the service manager did not keep",
    );
}

#[test]
fn a_record_that_is_missing_takes_all_with_it() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    cluster.appliances[0].kill();
    cluster.manager(0).change_kept(|store| store.retain(|(name, _)| !name.starts_with("ledger")));
    cluster.start_appliance(0);
    assert_lost(&cluster, &uri, "64MiB is lost that the service manager kept");
}

/// Bits in all parts of the record: its head, the lengths, the digests, keys and places.
#[test]
fn a_bit_that_is_flipped_in_the_record_costs_no_grant() {
    use std::os::unix::fs::FileExt as _;
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    let other = cluster.attach("other", SIZE, &[], "nbd-unix");
    io(&other, "write -P 5 0 64M").unwrap();
    for place in [20, 49, 54, 75, 200, 400] {
        cluster.appliances[0].kill();
        cluster.manager(0).change_kept(|store| {
            let ledgers = store.iter().filter(|(name, _)| name.starts_with("ledger"));
            let files = ledgers.map(|(_, ledger)| std::fs::File::from(ledger.try_clone().unwrap()));
            let record = files.max_by_key(|file| file.metadata().unwrap().len()).unwrap();
            let mut byte = [0];
            record.read_exact_at(&mut byte, place).unwrap();
            record.write_all_at(&[byte[0] ^ 4], place).unwrap();
        });
        cluster.start_appliance(0);
        io(&uri, "read -P 9 0 64M").unwrap_or_else(|said| panic!("byte {place}: {said}"));
        io(&other, "read -P 5 0 64M").unwrap_or_else(|said| panic!("byte {place}: {said}"));
    }
}

#[test]
fn foreign_descriptors_are_let_go() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    cluster.appliances[0].kill();
    let memfd = |name: &str, len: u64| -> OwnedFd {
        let memfd = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, len).unwrap();
        memfd
    };
    let manager = cluster.manager(0);
    let file = std::fs::File::open("/dev/null").unwrap();
    manager.keep("x", file.into());
    manager.keep("ledger-0", memfd("xpm-other", 100));
    manager.keep("r7f", memfd(&format!("xpm-region-{:032x}", 7), 16 << 20));
    // A region's name, which stays that of the region.
    let taken = manager.kept().into_iter().find(|name| name.starts_with('r')).unwrap();
    manager.keep(&taken, memfd("nothing", 1));
    let before = manager.kept();
    cluster.start_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
    let log = cluster.appliances[0].log();
    assert_eq!(log.matches("that are no memory of an appliance's").count(), 1, "{log}");
    wait_until("they are let go", || {
        let kept = cluster.manager(0).kept();
        !kept.contains(&"x".to_owned()) && !kept.contains(&"r7f".to_owned()) && kept.len() < before.len()
    });
    cluster.restart_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
}

#[test]
fn memory_of_the_wrong_size_is_lost() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    cluster.appliances[0].kill();
    cluster.manager(0).change_kept(|store| {
        let (name, descriptor) = store.iter_mut().find(|(name, _)| name.starts_with('r')).unwrap();
        let link =
            std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(descriptor)));
        let link = link.unwrap().display().to_string();
        let called = link.trim_start_matches("/memfd:").trim_end_matches(" (deleted)").to_owned();
        assert!(called.starts_with("xpm-region-"), "{name}: {link}");
        *descriptor = memfd_create(called, MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&*descriptor, 4096).unwrap();
    });
    cluster.start_appliance(0);
    assert_lost(&cluster, &uri, "a memfd that was kept has 4KiB in place of 64MiB");
}

#[test]
fn memory_that_is_given_back_is_let_go() {
    let mut cluster = Cluster::start_kept(&[vec![]]);
    let empty = cluster.manager(0).kept().len();
    for round in 0..3 {
        cluster.ok(&["alloc", "create", "brief", "--size", "128MiB"]);
        wait_until("it is kept", || cluster.manager(0).kept().len() > empty);
        cluster.ok(&["alloc", "delete", "brief"]);
        wait_until("it is let go", || cluster.manager(0).kept().len() == empty);
        assert!(cluster.appliances.iter_mut().all(xpm_tests::Daemon::is_alive), "round {round}");
    }
}

#[test]
fn less_memory_in_the_next_life_takes_nothing_from_clients() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "nbd-tcp");
    let set = |size: &str| {
        let size = size.to_owned();
        move |words: &mut Vec<String>| {
            let at = words.iter().position(|word| word == "--memory").unwrap();
            words[at + 1] = size;
        }
    };
    cluster.change_appliance(0, set("32MiB"));
    cluster.restart_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
    assert!(cluster.appliances[0].log().contains("64MiB is lent already, and --memory is 32MiB"));
    let line = cluster.refused(&["alloc", "create", "more", "--size", "16MiB"]);
    assert!(line.contains("fit"), "{line}");
    cluster.change_appliance(0, set("256MiB"));
    cluster.restart_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
    wait_until("there is more", || {
        cluster.xpm(&["alloc", "create", "more", "--size", "128MiB"]).status.success()
    });
}

#[test]
fn an_old_owner_of_an_earlier_life_is_shut_out() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri) = with_pattern(&[], "shm");
    // It has the memory mapped, and does not see that the appliance ends.
    cluster.blk.signal(rustix::process::Signal::STOP);
    cluster.restart_appliance(0);
    let second = cluster.second_client();
    let socket = cluster.dir().join("moved.sock");
    let form = format!("nbd-socket={}", socket.display());
    let attached = cluster.xpm_of_second(&["blk", "attach", "kept", "--as", &form, "--force"]);
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    let new = format!("nbd+unix:///kept?socket={}", socket.display());
    io(&new, "read -P 9 0 64M").unwrap();
    io(&new, "write -P 4 0 64M").unwrap();
    // Writes of the old owner into its mapping reach no other owner.
    let mut late =
        Command::new("qemu-io").args(["-f", "raw", &uri, "-c", "write -P 1 0 64M"]).spawn().unwrap();
    cluster.blk.signal(rustix::process::Signal::CONT);
    assert!(late.wait().is_ok());
    io(&new, "read -P 4 0 64M").unwrap();
    cluster.restart_appliance(0);
    io(&new, "read -P 4 0 64M").unwrap();
    drop(second);
}

#[test]
fn it_says_that_it_lives() {
    let cluster = Cluster::start_kept(&[vec![]]);
    wait_until("it says so again and again", || cluster.manager(0).pings() > 3);
    assert!(cluster.manager(0).take_said("STATUS").is_some_and(|status| status.contains("512MiB")));
    cluster.appliances[0].signal(rustix::process::Signal::STOP);
    std::thread::sleep(Duration::from_millis(500));
    let before = cluster.manager(0).pings();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.manager(0).pings(), before, "who does not live does not say so");
    cluster.appliances[0].signal(rustix::process::Signal::CONT);
}

#[test]
fn the_allocator_and_xpm_blk_say_that_they_live() {
    let directory = tempfile::tempdir().unwrap();
    let under = |name: &str| directory.path().join(name).display().to_string();
    let config = directory.path().join("blk.toml");
    let keys = [("control", under("blk.sock")), ("state", under("blk"))];
    let text = keys.map(|(key, value)| format!("{key} = \"{value}\"\n")).concat();
    std::fs::write(&config, text).unwrap();
    let listen = format!("unix:{}", under("allocator.sock"));
    let daemons = [
        ("xpm-allocator", vec!["--listen".to_owned(), listen, "--data".to_owned(), under("allocator")]),
        ("xpm-blk", vec!["--config".to_owned(), config.display().to_string()]),
    ];
    for (program, arguments) in daemons {
        let manager = ServiceManager::start(directory.path().join(format!("{program}-notify")));
        let silent = |command: &mut Command| {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        };
        let mut child = manager.spawn(&programs().join(program), &arguments, silent);
        wait_until(&format!("{program} is ready"), || manager.take_said("READY").is_some());
        assert!(manager.take_said("STATUS").is_some(), "{program}");
        wait_until(&format!("{program} lives"), || manager.pings() > 3);
        assert_eq!(manager.take_said("STOPPING"), None, "{program}");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success(), "{program}");
        wait_until(&format!("{program} says that it ends"), || manager.take_said("STOPPING").is_some());
    }
}

/// A cluster without service managers whose appliance lends a file.
fn with_file() -> (Cluster, String, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let backing = format!("file:{}", directory.path().join("memory").display());
    let cluster = Cluster::start_pool(&[vec!["--backing", &backing]], false);
    let uri = cluster.attach("kept", SIZE, &[], "nbd-tcp");
    io(&uri, "write -P 9 0 64M").unwrap();
    (cluster, uri, directory)
}

/// Has the superblock of a file say that another kernel left it so.
fn of_another_boot(directory: &tempfile::TempDir) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(directory.path().join("memory")).unwrap();
    let mut superblock = [0; 56];
    file.read_exact_at(&mut superblock, 0).unwrap();
    assert_eq!(superblock[32], 1, "in use");
    superblock[40] ^= 1;
    file.write_all_at(&superblock, 0).unwrap();
    file.write_all_at(&xxhash_rust::xxh3::xxh3_64(&superblock).to_le_bytes(), 56).unwrap();
}

#[test]
fn a_file_outlives_a_kill_in_the_same_boot() {
    if !have("fio") || !have("qemu-io") {
        return;
    }
    let (mut cluster, uri, _directory) = with_file();
    cluster.restart_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
    let mut load = verified_load(&cluster, &uri, 5);
    for moment in moments(6) {
        std::thread::sleep(moment);
        cluster.restart_appliance(0);
    }
    assert!(load.wait().unwrap().success(), "fio saw an error");
    assert_eq!(errors(&cluster, "kept"), 0);
}

#[test]
fn a_file_that_was_closed_outlives_the_machine() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri, directory) = with_file();
    cluster.appliances[0].stop();
    let head = std::fs::read(directory.path().join("memory")).unwrap()[..64].to_vec();
    assert_eq!(head[32], 2, "closed");
    cluster.start_appliance(0);
    io(&uri, "read -P 9 0 64M").unwrap();
    // And is in use from then on.
    cluster.appliances[0].kill();
    of_another_boot(&directory);
    cluster.start_appliance(0);
    assert_lost(&cluster, &uri, "is lost: it was not closed before this machine was restarted");
}

#[test]
fn a_file_with_the_record_of_another_time_is_lost() {
    if !have("qemu-io") {
        return;
    }
    let (mut cluster, uri, _directory) = with_file();
    let record = |name: &str| cluster.dir().join("appliance0-state").join(name);
    let [first, second] = ["grants-0", "grants-1"].map(record);
    let old = [&first, &second].map(|path| std::fs::read(path).unwrap());
    cluster.ok(&["alloc", "create", "later", "--size", "16MiB"]);
    cluster.appliances[0].stop();
    for (path, bytes) in [first, second].iter().zip(old) {
        std::fs::write(path, bytes).unwrap();
    }
    cluster.start_appliance(0);
    assert_lost(&cluster, &uri, "is lost: the record of whose it is is not of this content");
}
