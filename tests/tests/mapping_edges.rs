//! External memory at addresses, at the edges: what is asked for that cannot be, and what a program does to its pages
//! by calls of its own.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use xpm_mapping::{Access, Advice, Attachment, Faults, MapError, Space, SpaceOptions};
use xpm_protocol::api::blk::{Hold, TransportKind};
use xpm_protocol::units::Span;
use xpm_tests::Cluster;
use xpm_tests::mapping::{Dice, MIB, PAGE, attach_options, attached, in_own_process, options, words};

#[test]
fn what_cannot_be() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (attachment, volume) = attached(&cluster, "v", None);
    let refused = |options: SpaceOptions| {
        Space::open(volume.clone(), &options).err().expect("it is refused").to_string()
    };
    let line = refused(options(0, Faults::Inline, 0));
    assert!(line.contains("too small") && line.contains("at least"), "{line}");
    assert!(refused(options(MIB, Faults::Handled(0), 0)).contains("one or more"));
    assert!(refused(options(MIB, Faults::Inline, 65 * MIB)).contains("67108864 bytes"));
    assert!(refused(options(MIB, Faults::Inline, 4096)).contains("2 MiB"));
    let space = Space::open(volume.clone(), &options(MIB, Faults::Inline, 32 * MIB)).expect("a space");
    let one = space.map(0..MIB, Access::ReadWrite).expect("a range");
    let line = space.map(4096..2 * MIB, Access::ReadWrite).err().expect("it overlaps").to_string();
    assert!(line.contains("mapped already"), "{line}");
    let line = space.map(0..33 * MIB, Access::ReadWrite).err().expect("it is too long").to_string();
    assert!(line.contains("larger allocation"), "{line}");
    assert!(matches!(space.map(1..4096, Access::ReadOnly), Err(MapError::Unaligned(1))));
    let line = space.carve(33 * MIB).err().expect("it is too long").to_string();
    assert!(line.contains("free slabs, or resize the allocation"), "{line}");
    let mut slab = space.carve(16 * MIB).expect("half of it");
    let line = slab.resize(64 * MIB).expect_err("it is too long").to_string();
    assert!(line.contains("free slabs, or resize the allocation"), "{line}");
    drop(slab);
    assert!(matches!(one.advise(0..2 * MIB as usize, Advice::Random), Err(MapError::Range { .. })));
    drop(one);
    space.map(4096..2 * MIB, Access::ReadWrite).expect("it is free again");
    // Somebody else's.
    let mut other = attach_options(&cluster.allocator_url(), "v");
    let line = Attachment::attach(&other).err().expect("it is somebody's").to_string();
    assert!(line.contains("force"), "{line}");
    other.client = Some(attachment.client());
    Attachment::attach(&other).expect("it is its own");
}

/// Where userfaultfd(2) is forbidden altogether, as by the seccomp profile of a container, nothing can be mapped, and
/// that is said.
#[test]
fn no_permission_for_userfaultfd() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (mut program, lines) = in_own_process(&cluster, "without_userfaultfd", &[]);
    let lines: Vec<String> = lines.collect();
    assert!(program.wait().expect("it ends").success(), "{lines:?}");
    for faults in ["inline", "handled"] {
        let said = lines.iter().find_map(|line| line.split_once(faults)?.1.strip_prefix(": "));
        let said = said.unwrap_or_else(|| panic!("{lines:?}"));
        assert!(said.starts_with("userfaultfd cannot be used: Operation not permitted"), "{said}");
        for remedy in ["/dev/userfaultfd", "vm.unprivileged_userfaultfd", "seccomp"] {
            assert!(said.contains(remedy), "{said}");
        }
    }
}

#[test]
#[ignore = "is run by another test, in a process of its own"]
fn without_userfaultfd() {
    let Ok(url) = std::env::var("XPM_TEST_ALLOCATOR") else { return };
    forbid_userfaultfd(true).expect("a filter");
    let (_attachment, volume) = Attachment::attach(&attach_options(&url, "v")).expect("it can be attached");
    for (name, faults) in [("inline", Faults::Inline), ("handled", Faults::Handled(1))] {
        let error = Space::open(volume.clone(), &options(MIB, faults, 0)).err().expect("it is forbidden");
        assert!(matches!(error, MapError::Userfaultfd(_)), "{error}");
        println!("{name}: {error}");
    }
}

/// From now on this thread, and those that it starts, get EPERM for the call and for the request to
/// `/dev/userfaultfd`, or for what is more than user mode only.
fn forbid_userfaultfd(all: bool) -> std::io::Result<()> {
    const NEW: u32 = 0xaa00;
    const USER_MODE_ONLY: u32 = 1;
    let one = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |offset: u32| one(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0);
    let is = |value: u32, jt: u8, jf: u8| one(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, jt, jf);
    let has = |bit: u32, jt: u8, jf: u8| one(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bit, jt, jf);
    let end = |value: u32| one(libc::BPF_RET | libc::BPF_K, value, 0, 0);
    // The number of the call, and its first two arguments, of struct seccomp_data.
    let mut filter = [
        load(0),
        is(libc::SYS_userfaultfd as u32, 3, 0),
        is(libc::SYS_ioctl as u32, 0, 5),
        load(24),
        is(NEW, 2, 3),
        load(16),
        has(USER_MODE_ONLY, if all { 0 } else { 1 }, 0),
        end(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the filter.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if set { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Nor does a program get external memory by `xpm run` that could not give it to system calls.
#[test]
fn no_permission_for_programs() {
    let cluster = Cluster::start(1);
    for (all, remedy) in [(true, "seccomp profile"), (false, "set vm.unprivileged_userfaultfd to 1")] {
        let mut run = cluster.command(&["run", "--size", "32MiB", "--local", "1MiB", "--", "/bin/true"]);
        // SAFETY: two system calls, between fork and exec.
        unsafe { run.pre_exec(move || forbid_userfaultfd(all)) };
        let output = run.output().expect("it can be started");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("/dev/userfaultfd") && said.contains(remedy), "{said}");
    }
}

/// Pages that the program has locked by mlock(2) leave the window all the same before they are looked at.
#[test]
fn pages_that_are_locked_lose_nothing() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 32 * MIB)).expect("a space");
    let range = space.map(0..8 * MIB, Access::ReadWrite).expect("a range");
    words(&range).iter().step_by(512).for_each(|word| word.store(1, Ordering::Relaxed));
    // SAFETY: addresses of the mapping.
    let locked = unsafe { libc::mlock(range.as_ptr().as_ptr().cast(), 16 * PAGE) };
    assert_eq!(locked, 0, "{}", std::io::Error::last_os_error());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 1;
            while !stop.load(Ordering::Relaxed) {
                for page in 0..16 {
                    let before = words(&range)[page * 512].swap(round + 1, Ordering::Relaxed);
                    assert_eq!(before, round, "page {page}");
                }
                round += 1;
            }
        });
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) && !writer.is_finished() {
            assert!(
                words(&range)[64 * 512..].iter().step_by(512).all(|word| word.load(Ordering::Relaxed) == 1)
            );
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("nothing is lost");
    });
}

/// Whether pages are moved, and not mapped twice.
fn moves_pages() -> bool {
    let shared = std::env::var("XPM_WINDOW").is_ok_and(|window| window == "shared");
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let moves = !shared && (numbers.next(), numbers.next()) >= (Some(6), Some(8));
    if !moves {
        eprintln!("skipped: pages are not moved");
    }
    moves
}

/// A device's write to a page arrives, also where the page is locked, and so is not moved like others.
#[test]
fn pages_that_are_pinned_stay_where_they_are() {
    if !moves_pages() {
        return;
    }
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "16MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 16 * MIB)).expect("a space");
    let range = space.map(0..16 * MIB, Access::ReadWrite).expect("a range");
    let at = range.as_ptr().as_ptr();
    words(&range)[..8 * 512].iter().step_by(512).for_each(|word| word.store(1, Ordering::Relaxed));
    // SAFETY: addresses of the mapping.
    let locked = unsafe { libc::mlock(at.cast(), 4 * PAGE) };
    assert_eq!(locked, 0, "{}", std::io::Error::last_os_error());
    let mut ring = IoUring::new(4).expect("a ring");
    let buffers = [libc::iovec { iov_base: at.cast(), iov_len: 8 * PAGE }];
    // SAFETY: the range is there for longer than the ring.
    unsafe { ring.submitter().register_buffers(&buffers) }.expect("they are pinned");
    // All is asked to leave, and pushed out by other pages.
    range.advise(0..range.len(), Advice::DontNeed).expect("what can leaves");
    for _ in 0..2 {
        words(&range)[8 * 512..].iter().step_by(512).for_each(|word| word.store(2, Ordering::Relaxed));
    }
    let file =
        File::from(rustix::fs::memfd_create("bytes", rustix::fs::MemfdFlags::CLOEXEC).expect("a file"));
    (&file).write_all(&[0xab; 8 * PAGE]).expect("it holds them");
    let read = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), at, (8 * PAGE) as u32, 0).build();
    // SAFETY: the buffer is registered, and nobody else uses it.
    unsafe { ring.submission().push(&read) }.expect("there is a place");
    ring.submit_and_wait(1).expect("it ends");
    assert_eq!(ring.completion().next().expect("it ended").result(), 8 * PAGE as i32);
    for (index, word) in words(&range)[..8 * 512].iter().enumerate() {
        assert_eq!(word.load(Ordering::Relaxed), 0xabab_abab_abab_abab, "word {index}");
    }
    // When nobody has them any more, they leave with what they hold.
    drop(ring);
    // SAFETY: addresses of the mapping.
    assert_eq!(unsafe { libc::munlock(at.cast(), 4 * PAGE) }, 0);
    xpm_tests::wait_until("they have left", || {
        range.advise(0..range.len(), Advice::DontNeed).expect("they leave");
        space.stats().resident == 0
    });
    assert!(
        words(&range)[..8 * 512].iter().all(|word| word.load(Ordering::Relaxed) == 0xabab_abab_abab_abab)
    );
}

/// A page that the program threw away by madvise(2), which it must not do, is an error of calls and a SIGBUS of
/// accesses. No thread waits for it for ever, and no thread sees zeros.
#[test]
fn a_page_that_was_thrown_away_is_an_error_and_a_signal() {
    if !moves_pages() {
        return;
    }
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    for (faults, call) in [("inline", "flush"), ("handled", "put"), ("inline", "none"), ("handled", "none")] {
        let environment = [("XPM_TEST_FAULTS", faults), ("XPM_TEST_CALL", call)];
        let (mut program, lines) = in_own_process(&cluster, "throws_a_page_away", &environment);
        let lines: Vec<String> = lines.collect();
        let ended = program.wait().expect("it ends");
        assert_eq!(ended.signal(), Some(libc::SIGBUS), "{faults} {call}: {ended} {lines:?}");
        assert!(lines.iter().any(|line| line.ends_with("until here")), "{faults} {call}: {lines:?}");
    }
}

#[test]
#[ignore = "is run by another test, in a process of its own"]
fn throws_a_page_away() {
    let Ok(url) = std::env::var("XPM_TEST_ALLOCATOR") else { return };
    let inline = std::env::var("XPM_TEST_FAULTS").is_ok_and(|faults| faults == "inline");
    let faults = if inline { Faults::Inline } else { Faults::Handled(1) };
    let mut to_attach = attach_options(&url, "v");
    // The threads before it ended without giving it back.
    to_attach.force = true;
    let (_attachment, volume) = Attachment::attach(&to_attach).expect("it can be attached");
    let space = Space::open(volume, &options(MIB, faults, 0)).expect("a space");
    let slab = space.carve(MIB).expect("a slab");
    let word = &words(&slab)[512];
    words(&slab)[..3 * 512]
        .iter()
        .chain(&words(&slab)[20 * 512..22 * 512])
        .for_each(|word| word.store(1, Ordering::Relaxed));
    let throw_away = || {
        // SAFETY: a page of the slab, about whose content Rust knows nothing.
        let thrown = unsafe { libc::madvise(word.as_ptr().cast(), PAGE, libc::MADV_DONTNEED) };
        assert_eq!(thrown, 0);
    };
    // SAFETY: whoever waits longer than the alarm is killed by it.
    unsafe { libc::alarm(20) };
    throw_away();
    let done = match std::env::var("XPM_TEST_CALL").as_deref() {
        Ok("put") => slab.put(PAGE, &[1]),
        Ok("flush") => slab.flush(),
        _ => Err(MapError::Gone(1)),
    };
    let error = done.expect_err("it is gone");
    assert!(error.to_string().contains("use the advice of the library"), "{error}");
    if !matches!(std::env::var("XPM_TEST_CALL").as_deref(), Ok("none")) {
        for again in [slab.get(PAGE, &mut [0]), slab.put(PAGE + 1, &[1]), slab.flush()] {
            assert!(matches!(again, Err(MapError::Gone(1))), "{again:?}");
        }
        assert!(slab.advise(PAGE..2 * PAGE, Advice::Pin).is_err());
        slab.get(2 * PAGE, &mut [0]).expect("others are there");
        // Of two that are gone in one call, both are known to be.
        // SAFETY: as above.
        let thrown = unsafe {
            libc::madvise(slab.as_ptr().add(20 * PAGE).as_ptr().cast(), 2 * PAGE, libc::MADV_DONTNEED)
        };
        assert_eq!(thrown, 0);
        for first in [20, 21] {
            let gone = slab.get(first * PAGE, &mut vec![0; (22 - first) * PAGE]);
            assert!(matches!(gone, Err(MapError::Gone(page)) if page == first as u32), "{gone:?}");
        }
        slab.clear(20 * PAGE..22 * PAGE).expect("they are zeros again");
        slab.clear(PAGE..2 * PAGE).expect("it is zeros again");
        assert_eq!(word.swap(1, Ordering::Relaxed), 0);
        slab.flush().expect("it can be written");
        throw_away();
    }
    println!("until here");
    println!("there is {}", word.load(Ordering::Relaxed));
}

/// A page that is cleared while others write to it then holds either zeros or the written bytes, and keeps them.
#[test]
fn what_is_cleared_while_it_is_written_to_stays_what_it_is() {
    // A few times as many pages as can be local: they leave, and come back, while the rest of the slab takes its time.
    const USED: usize = 256;
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "256MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", Some(TransportKind::NbdTcp));
    let space = Space::open(volume, &options(MIB / 4, Faults::Handled(1), 0)).expect("a space");
    let slab = space.carve(256 * MIB).expect("a slab");
    let one_of_each = || words(&slab)[..USED * 512].iter().step_by(512);
    let known = || one_of_each().map(|word| word.load(Ordering::Relaxed)).collect::<Vec<u64>>();
    let began = Instant::now();
    for round in 1.. {
        one_of_each().for_each(|word| word.store(round, Ordering::Relaxed));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (slab, stop) = (&slab, &stop);
                scope.spawn(move || {
                    let mut dice = Dice(round * 2 + thread);
                    while !stop.load(Ordering::Relaxed) {
                        let word = &words(slab)[dice.below(USED) * 512];
                        word.store(round << 32, Ordering::Relaxed);
                    }
                });
            }
            slab.clear(0..slab.len()).expect("it is a slab");
            stop.store(true, Ordering::Relaxed);
        });
        let seen = known();
        slab.advise(0..USED * PAGE, Advice::DontNeed).expect("it can be written");
        for (page, (before, after)) in seen.iter().zip(known()).enumerate() {
            assert_eq!(*before, after, "page {page} in round {round}");
            assert!([0, round << 32].contains(&after), "page {page} in round {round}: {after:x}");
        }
        if began.elapsed() > Duration::from_secs(6) {
            break;
        }
    }
}

/// A page whose access failed, since its appliance was away for longer than I/O is held, is accessible again after a
/// call that fetched it.
#[test]
fn a_call_that_has_a_page_mends_it_for_accesses() {
    let mut cluster = Cluster::start_kept(&[vec![]]);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let mut to_attach = attach_options(&cluster.allocator_url(), "v");
    to_attach.transport = Some(TransportKind::NbdTcp);
    to_attach.hold = Hold::For(Span(Duration::from_secs(1)));
    let (_attachment, volume) = Attachment::attach(&to_attach).expect("it can be attached");
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 32 * MIB)).expect("a space");
    if !space.serves_system_calls() {
        return eprintln!("skipped: system calls are not served");
    }
    let range = space.map(0..MIB, Access::ReadWrite).expect("a range");
    words(&range).iter().for_each(|word| word.store(7, Ordering::Relaxed));
    range.advise(0..range.len(), Advice::DontNeed).expect("it can be written");
    cluster.appliances[0].kill();
    let (reader, writer): (PipeReader, PipeWriter) = std::io::pipe().expect("a pipe");
    // An access by the kernel, which is told so rather than by a signal.
    let access = |page: usize| {
        let from = words(&range)[page * 512..].as_ptr();
        // SAFETY: a word of the range.
        let written = unsafe { libc::write(writer.as_raw_fd(), from.cast(), 8) };
        if written == 8 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error()) }
    };
    for page in [3, 5] {
        assert_eq!(access(page), Err(Some(libc::EFAULT)), "page {page}");
    }
    cluster.start_appliance(0);
    xpm_tests::wait_until("the appliance is heard again", || range.get(0, &mut [0]).is_ok());
    let mut others = 8..range.len() / PAGE;
    xpm_tests::wait_until("accesses hear it, too", || access(others.next().expect("one more")) == Ok(()));
    drop(reader);
    range.advise(3 * PAGE..4 * PAGE, Advice::Pin).expect("it is there");
    range.put(5 * PAGE, &[8]).expect("it is there");
    assert_eq!(words(&range)[3 * 512].load(Ordering::Relaxed), 7);
    assert_eq!(words(&range)[5 * 512].load(Ordering::Relaxed), 8);
    assert_eq!(words(&range)[5 * 512 + 1].load(Ordering::Relaxed), 7);
    range.advise(0..range.len(), Advice::Unpin).expect("it need not stay");
    range.advise(0..range.len(), Advice::DontNeed).expect("it leaves");
    assert!(words(&range)[3 * 512..4 * 512].iter().all(|word| word.load(Ordering::Relaxed) == 7));
}
