//! A lender that never comes back: the operator gives its memory up, and nothing waits for it any more.

#![allow(unsafe_code)]

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use xpm_mapping::{Access, Advice, Attachment, Cause, Faults, IoError, PageError, Space};
use xpm_protocol::api::blk::TransportKind;
use xpm_tests::mapping::{MIB, PAGE, attach_options, options, own_process, words};
use xpm_tests::{Cluster, have, wait_until};

/// A pattern is read back; other bytes, and errors, are a failure of the program.
fn reads(uri: &str) -> Child {
    Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read -P 0x5a 0 1M", uri])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu-io can be started")
}

fn is_silent(cluster: &Cluster, name: &str) -> bool {
    cluster.json(&["appliance", "show", name])["state"] == "silent"
}

/// Ends within a few seconds, with an error.
fn fails_soon(mut program: Child, since: Instant) {
    while program.try_wait().expect("a child").is_none() {
        assert!(since.elapsed() < Duration::from_secs(10), "it still waits");
        std::thread::sleep(Duration::from_millis(10));
    }
    eprintln!("it ended {:?} after the order", since.elapsed());
    assert!(!program.wait().expect("a child").success(), "it had an answer");
}

#[test]
fn a_lender_that_is_given_up_holds_nobody_up() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let uri = cluster.attach("disk", "32MiB", &["--region-size", "16MiB"], "nbd-tcp");
    let write = ["-f", "raw", "-c", "write -P 0x5a 0 1M", &uri];
    assert!(Command::new("qemu-io").args(write).stdout(Stdio::null()).status().expect("qemu-io").success());
    let shown = cluster.json(&["alloc", "show", "disk"]);
    let name = shown["regions"][0]["appliance_name"].as_str().expect("a name").to_owned();
    let lender = usize::from(name == "a1");
    assert!(cluster.refused(&["appliance", "forget", &name, "--lost", "--yes"]).contains("is heard"));
    cluster.appliances[lender].freeze();
    wait_until("it is silent", || is_silent(&cluster, &name));
    let waits = reads(&uri);
    wait_until("its I/O is held", || cluster.json(&["blk", "show", "disk"])["in_flight"] != 0);
    wait_until("the allocator knows who uses it", || {
        cluster.json(&["alloc", "show", "disk"])["used"]["users"][0] == "1 NBD client"
    });
    // Every refusal on the way names the way out.
    let way_out = format!("xpm appliance forget {name} --lost");
    for refused in [["appliance", "forget", &name], ["alloc", "delete", "disk"], ["blk", "detach", "disk"]] {
        let line = cluster.refused(&refused);
        assert!(line.contains(&way_out), "{refused:?}: {line}");
    }
    let asked = cluster.xpm(&["appliance", "forget", &name, "--lost"]);
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(!asked.status.success() && said.contains("--yes"), "there is nobody to ask: {said}");
    for part in ["disk", "MiB", "disk.sock", "1 NBD client"] {
        assert!(said.contains(part), "who is hit: {part}: {said}");
    }
    let given_up = Instant::now();
    cluster.ok(&["appliance", "forget", &name, "--lost", "--yes"]);
    fails_soon(waits, given_up);
    let lost = format!("lost on {name}");
    wait_until("the device says so", || cluster.ok(&["blk", "list"]).contains(&lost));
    assert!(cluster.ok(&["alloc", "list"]).contains(&lost));
    assert!(cluster.get("/v1/events").contains("lender-lost"));
    assert!(cluster.blk.log().contains(&lost), "{}", cluster.blk.log());
    // It comes back with all that it had, and has to clear that first.
    cluster.appliances[lender].signal(rustix::process::Signal::CONT);
    wait_until("it lends anew", || {
        let shown = cluster.json(&["appliance", "show", &name]);
        shown["state"] == "up" && shown["status"]["granted"] == 0
    });
    fails_soon(reads(&uri), Instant::now());
    cluster.restart_blk();
    wait_until("it is shown again", || cluster.json(&["blk", "show", "disk"])["path"] != "-");
    fails_soon(reads(&uri), Instant::now());
    assert!(cluster.ok(&["blk", "list"]).contains(&lost), "also in the next life");
    cluster.ok(&["blk", "detach", "disk"]);
    let line = cluster.refused(&["blk", "attach", "disk", "--as", "nbd-socket=127.0.0.1:0"]);
    assert!(line.contains(&lost) && line.contains("alloc delete"), "{line}");
    cluster.ok(&["alloc", "delete", "disk"]);
    cluster.ok(&["alloc", "create", "next", "--size", "900MiB"]);
}

#[test]
fn a_client_without_its_allocator_gives_up_by_itself() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let uri = cluster.attach("disk", "16MiB", &[], "nbd-tcp");
    assert!(cluster.refused(&["blk", "give-up", "a0", "--yes"]).contains("answers"));
    assert!(cluster.refused(&["blk", "give-up", "a7", "--yes"]).contains("a7"));
    cluster.allocator.kill();
    cluster.appliances[0].freeze();
    let waits = reads(&uri);
    wait_until("its I/O is held", || cluster.json(&["blk", "show", "disk"])["in_flight"] != 0);
    // That it hangs and is not slow is known when its connection is given up.
    cluster.appliances[0].kill();
    wait_until("it is known", || cluster.json(&["blk", "show", "disk"])["state"] == "holding");
    let given_up = Instant::now();
    let said = cluster.ok(&["blk", "give-up", "a0", "--yes"]);
    assert!(said.contains("lost on a0"), "{said}");
    fails_soon(waits, given_up);
    // The allocator hears of it when it is back, also by a life of xpm-blk that only has the record.
    cluster.restart_blk();
    cluster.restart_allocator();
    let lost = |cluster: &Cluster| {
        let status = cluster.status();
        let mut problems = status["problems"].as_array().into_iter().flatten();
        problems.any(|one| one["code"] == "ALLOCATION_LOST" && one["object"] == "allocation/disk")
    };
    wait_until("the allocator has heard", || lost(&cluster));
    assert!(cluster.ok(&["events", "--kind", "lender-lost"]).contains("was given up on"));
    assert!(cluster.ok(&["alloc", "list"]).contains("lost on a0"));
}

#[test]
fn what_was_given_up_is_told_with_the_allocation_that_is_given_back() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start(1);
    cluster.attach("disk", "16MiB", &[], "nbd-tcp");
    cluster.allocator.kill();
    cluster.appliances[0].kill();
    wait_until("it is known", || cluster.json(&["blk", "show", "disk"])["state"] == "holding");
    cluster.ok(&["blk", "give-up", "a0", "--yes"]);
    cluster.ok(&["blk", "detach", "disk"]);
    cluster.restart_allocator();
    let shown = |cluster: &Cluster| cluster.json(&["alloc", "show", "disk"]);
    wait_until("it is given back", || shown(&cluster)["owner"].is_null());
    assert_eq!(shown(&cluster)["lost"][0], "a0", "{}", shown(&cluster));
}

#[test]
#[ignore = "is run by another test, in a process of its own"]
fn in_a_process_of_its_own() {
    let Ok(url) = std::env::var("XPM_TEST_ALLOCATOR") else { return };
    let mut to_attach = attach_options(&url, "v");
    to_attach.transport = Some(TransportKind::NbdTcp);
    let (_attachment, volume) = Attachment::attach(&to_attach).expect("it can be attached");
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 4 * MIB)).expect("a space");
    let range = space.map(0..4 * MIB, Access::ReadWrite).expect("a range");
    let words = words(&range);
    words.iter().for_each(|word| word.store(7, Ordering::Relaxed));
    space.flush().expect("it can be written");
    range.advise(0..range.len(), Advice::DontNeed).expect("it can leave");
    println!("ready");
    std::io::stdin().read_line(&mut String::new()).expect("a line");
    let sum: u64 = words.iter().step_by(PAGE / 8).map(|word| word.load(Ordering::Relaxed)).sum();
    println!("there is {sum}");
}

#[test]
fn a_program_whose_lender_is_given_up_is_told_why_it_ends() {
    let mut cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "16MiB"]);
    let log = cluster.dir().join("program.log");
    let enter = ["sh", "-c", &format!("exec \"$@\" 2>{}", log.display()), "sh"].map(str::to_owned);
    let (mut program, mut lines) = own_process(&cluster, "in_a_process_of_its_own", &enter, &[]);
    lines.find(|line| line.ends_with("ready")).expect("it comes so far");
    cluster.appliances[0].kill();
    wait_until("it is silent", || is_silent(&cluster, "a0"));
    writeln!(program.stdin.take().expect("its input")).expect("it reads");
    let given_up = Instant::now();
    cluster.ok(&["appliance", "forget", "a0", "--lost", "--yes"]);
    let rest: Vec<String> = lines.collect();
    let ended = program.wait().expect("it ends");
    assert!(given_up.elapsed() < Duration::from_secs(10), "{:?}", given_up.elapsed());
    assert_eq!(ended.signal(), Some(libc::SIGBUS), "{rest:?}");
    let said = std::fs::read_to_string(&log).expect("its log");
    assert!(said.contains("lost on a0"), "{said}");
}

static SPACE: OnceLock<Space> = OnceLock::new();

/// A program's own handler of SIGBUS: ends the program, with a status that says whether it learned the cause.
extern "C" fn on_sigbus(_: i32) {
    let why = SPACE.get().and_then(Space::last_error);
    let known = why == Some(PageError { offset: MIB, cause: Cause::Io(IoError::BadMemory) });
    // SAFETY: it ends the process, and nothing else.
    unsafe { libc::_exit(if known { 42 } else { 43 }) };
}

/// Puts an empty file in the place of the appliance's memory.
fn break_shared_memory() {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("the maps of this process");
    let shared = |line: &&str| line.contains("/memfd:") && line.contains("rw-s");
    let file = tempfile::tempfile().expect("a file");
    let mut broken = 0;
    for line in maps.lines().filter(shared) {
        let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let at = |text| usize::from_str_radix(text, 16).expect("an address");
        let (start, len) = (at(start), at(end) - at(start));
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: no reference to the appliance's memory exists.
        unsafe { mmap(start as *mut std::ffi::c_void, len, access, flags, &file, 0) }.expect("it is mapped");
        broken += 1;
    }
    assert!(broken > 0, "no memory of an appliance is mapped: {maps}");
}

#[test]
#[ignore = "is run by another test, in a process of its own"]
fn with_memory_that_cannot_be_accessed() {
    let Ok(url) = std::env::var("XPM_TEST_ALLOCATOR") else { return };
    let in_line = std::env::var_os("XPM_TEST_INLINE").is_some();
    let faults = if in_line { Faults::Inline } else { Faults::Handled(1) };
    // SAFETY: the handler reads atomics and ends the process.
    unsafe { libc::signal(libc::SIGBUS, on_sigbus as *const () as usize) };
    let mut to_attach = attach_options(&url, if in_line { "inline" } else { "handled" });
    to_attach.transport = Some(TransportKind::Shm);
    let (_attachment, volume) = Attachment::attach(&to_attach).expect("it can be attached");
    let space = Space::open(volume, &options(MIB, faults, 4 * MIB)).expect("a space");
    let space = SPACE.get_or_init(|| space);
    let range = space.map(0..4 * MIB, Access::ReadWrite).expect("a range");
    let words = words(&range);
    words.iter().for_each(|word| word.store(7, Ordering::Relaxed));
    range.advise(0..range.len(), Advice::DontNeed).expect("it can leave");
    break_shared_memory();
    let refused = range.get(2 * MIB as usize, &mut [0; PAGE]).expect_err("it cannot be read");
    println!("refused: {refused}");
    println!("there is {}", words[MIB as usize / 8].load(Ordering::Relaxed));
}

#[test]
fn memory_of_an_appliance_that_cannot_be_accessed_is_an_error() {
    let cluster = Cluster::start(1);
    for (name, environment) in [("handled", &[][..]), ("inline", &[("XPM_TEST_INLINE", "1")])] {
        cluster.ok(&["alloc", "create", name, "--size", "16MiB"]);
        let (mut program, lines) =
            own_process(&cluster, "with_memory_that_cannot_be_accessed", &[], environment);
        let said: Vec<String> = lines.collect();
        let ended = program.wait().expect("it ends");
        assert_eq!(ended.code(), Some(42), "{name}: {ended}, {said:?}");
        assert!(said.iter().any(|line| line.starts_with("refused: ") && line.contains("cannot be accessed")));
    }
}
