//! External memory at addresses: what is there is what was written, whatever comes and goes meanwhile.

#![allow(unsafe_code)]

use std::io::Write as _;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xpm_mapping::{
    Access, Advice, Attachment, Cause, Faults, IoError, MapError, Mapping, MappingStats, PageError, Space,
};
use xpm_protocol::api::blk::TransportKind;
use xpm_tests::Cluster;
use xpm_tests::mapping::{Dice, MIB, PAGE, attach_options, attached, in_own_process, options, words};

/// Threads of a test against a shadow.
const THREADS: usize = 4;
/// Of a stripe over two appliances, in bytes.
const UNIT: usize = 64 << 10;

/// The word of a thread: each has its own in every page.
fn own_word(words: &[AtomicU64], thread: usize, own: usize) -> &AtomicU64 {
    &words[own * 8 * THREADS + thread * 8 + own % 8]
}

/// Writes and reads at random and in rows, and compares with what it knows; gives back what that is.
fn write_and_compare(mappings: &[&[AtomicU64]], thread: usize, stop: &AtomicBool) -> Vec<Vec<u64>> {
    let mut shadows: Vec<Vec<u64>> =
        mappings.iter().map(|words| vec![0; words.len() / THREADS / 8]).collect();
    let mut dice = Dice(thread as u64 + 1);
    let mut steps = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let which = dice.below(mappings.len());
        let (words, shadow) = (mappings[which], &mut shadows[which]);
        let len = if dice.below(16) == 0 { 2000 } else { 1 };
        let start = dice.below(shadow.len());
        let write = dice.below(3) == 0;
        for own in start..(start + len).min(shadow.len()) {
            let word = own_word(words, thread, own);
            assert_eq!(word.load(Ordering::Relaxed), shadow[own], "word {own} of {which}");
            if write {
                steps += 1;
                shadow[own] = steps << 8 | thread as u64;
                word.store(shadow[own], Ordering::Relaxed);
            }
        }
    }
    shadows
}

/// Several threads write and compare all the while until `meanwhile` returns; at the end all is compared once more.
fn against_a_shadow_while(mappings: &[&Mapping], meanwhile: impl FnOnce(&dyn Fn() -> bool)) {
    /// Stops those who write also when something is not as it should be.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let words: Vec<&[AtomicU64]> = mappings.iter().map(|mapping| words(mapping)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (words, stop) = (&words, &stop);
                scope.spawn(move || write_and_compare(words, thread, stop))
            })
            .collect();
        let stopping = Stop(&stop);
        meanwhile(&|| workers.iter().all(|worker| !worker.is_finished()));
        drop(stopping);
        for (thread, worker) in workers.into_iter().enumerate() {
            let shadows = worker.join().expect("what is there is what was written");
            for (which, shadow) in shadows.iter().enumerate() {
                for (own, known) in shadow.iter().enumerate() {
                    let word = own_word(words[which], thread, own);
                    assert_eq!(word.load(Ordering::Relaxed), *known, "word {own} of {which}");
                }
            }
        }
    });
}

/// A space with 4 MiB of local memory, what is kept of it, and a slab.
fn ranges(volume: xpm_mapping::Volume, faults: Faults) -> (Space, Mapping, Mapping) {
    let space = Space::open(volume, &options(4 * MIB, faults, 32 * MIB)).expect("a space");
    let kept = space.map(0..32 * MIB, Access::ReadWrite).expect("a range");
    let slab = space.carve(16 * MIB).expect("a slab");
    (space, kept, slab)
}

/// Much has come and gone, and nothing failed.
fn end_well(attachment: Attachment, ranges: (Space, Mapping, Mapping)) {
    let stats = ranges.0.stats();
    assert!(stats.written > 100 && stats.fetched > 100 && stats.errors == 0, "{stats:?}");
    drop((ranges.1, ranges.2, ranges.0));
    attachment.detach().expect("it is given back");
}

/// Meanwhile the budget changes, and everything is flushed.
fn against_a_shadow(faults: Faults, transport: TransportKind) {
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--stripe", "2"]);
    let (attachment, volume) = attached(&cluster, "v", Some(transport));
    let (space, kept, slab) = ranges(volume, faults);
    against_a_shadow_while(&[&kept, &slab], |all_go_on| {
        let began = Instant::now();
        let mut dice = Dice(99);
        while began.elapsed() < Duration::from_secs(6) && all_go_on() {
            match dice.below(3) {
                0 => space.set_budget((1 + dice.below(6) as u64) * MIB).expect("a budget"),
                1 => space.flush().expect("it can be flushed"),
                _ => {
                    let start = dice.below(kept.len() - 256 * PAGE);
                    kept.advise(start..start + 256 * PAGE, Advice::DontNeed).expect("advice");
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    end_well(attachment, (space, kept, slab));
}

/// Where the kernel moves pages, the other tests see that; here are some of them with shared memory behind the window, as before
/// Linux 6.8. Each is a process of its own, for the environment says so.
#[test]
fn the_same_with_shared_memory_behind_the_window() {
    for name in [
        "what_is_there_is_what_was_written_in_line_over_shared_memory",
        "what_is_there_is_what_was_written_handled_over_tcp",
        "what_stays_and_what_does_not",
        "calls_and_accesses_see_the_same",
    ] {
        let me = std::env::current_exe().expect("this program");
        let output = Command::new(me).args([name, "--exact"]).env("XPM_WINDOW", "shared").output();
        let output = output.expect("this program runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{name}: {said}");
    }
}

/// The budget changes, and everything is flushed, until `act` is done.
fn while_budget_and_flush(space: &Space, act: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut dice = Dice(7);
            while !stop.load(Ordering::Relaxed) {
                space.set_budget((1 + dice.below(6) as u64) * MIB).expect("a budget");
                space.flush().expect("it can be flushed");
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        act();
        stop.store(true, Ordering::Relaxed);
        other.join().expect("it can be flushed");
    });
}

/// Appliances are killed one after the other; what they lent is kept for their next lives.
fn killed_under_a_shadow(faults: Faults, transport: TransportKind) {
    let mut cluster = Cluster::start_kept(&[vec![], vec![]]);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--stripe", "2"]);
    let (attachment, volume) = attached(&cluster, "v", Some(transport));
    let (space, kept, slab) = ranges(volume, faults);
    against_a_shadow_while(&[&kept, &slab], |all_go_on| {
        while_budget_and_flush(&space, || {
            for round in 0..6 {
                std::thread::sleep(Duration::from_millis(400));
                cluster.appliances[round % 2].kill();
                std::thread::sleep(Duration::from_millis(200));
                cluster.start_appliance(round % 2);
                assert!(all_go_on());
            }
        });
    });
    end_well(attachment, (space, kept, slab));
}

#[test]
fn appliances_are_killed_under_a_mapping_in_line() {
    killed_under_a_shadow(Faults::Inline, TransportKind::NbdTcp);
}

#[test]
fn appliances_are_killed_under_a_mapping_handled() {
    killed_under_a_shadow(Faults::Handled(2), TransportKind::NbdUnix);
}

/// What the operator orders of an allocation that a program has at addresses: its appliances are emptied one after
/// the other, it grows, and it stays where it is when somebody else is to have it.
fn changed_under_a_shadow(faults: Faults) {
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (attachment, volume) = attached(&cluster, "v", None);
    let (space, kept, slab) = ranges(volume, faults);
    let lies_on = || cluster.json(&["alloc", "show", "v"])["regions"][0]["appliance_name"].to_string();
    against_a_shadow_while(&[&kept, &slab], |all_go_on| {
        while_budget_and_flush(&space, || {
            for _ in 0..3 {
                let before = lies_on();
                let name = before.trim_matches('"');
                cluster.ok(&["appliance", "drain", name]);
                assert_ne!(lies_on(), before);
                cluster.ok(&["appliance", "undrain", name]);
                assert!(all_go_on());
            }
        });
        let resized = cluster.xpm(&["alloc", "resize", "v", "128MiB"]);
        let said = String::from_utf8_lossy(&resized.stderr).into_owned();
        assert!(resized.status.success() && said.contains("opens the allocation again"), "{said}");
        let said = cluster.refused(&["alloc", "resize", "v", "32MiB"]);
        assert!(said.contains("end that program first"), "{said}");
    });
    assert_eq!(space.stats().errors, 0);
    drop((kept, slab, space));
    attachment.detach().expect("it is given back");
}

#[test]
fn regions_move_under_a_mapping_in_line() {
    changed_under_a_shadow(Faults::Inline);
}

#[test]
fn regions_move_under_a_mapping_handled() {
    changed_under_a_shadow(Faults::Handled(1));
}

#[test]
fn what_is_there_is_what_was_written_in_line_over_tcp() {
    against_a_shadow(Faults::Inline, TransportKind::NbdTcp);
}

#[test]
fn what_is_there_is_what_was_written_in_line_over_shared_memory() {
    against_a_shadow(Faults::Inline, TransportKind::Shm);
}

#[test]
fn what_is_there_is_what_was_written_handled_over_tcp() {
    against_a_shadow(Faults::Handled(2), TransportKind::NbdTcp);
}

#[test]
fn what_is_there_is_what_was_written_handled_over_unix() {
    against_a_shadow(Faults::Handled(1), TransportKind::NbdUnix);
}

#[test]
fn what_stays_and_what_does_not() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    for round in 0..2_u64 {
        let (attachment, volume) = attached(&cluster, "v", None);
        let space = Space::open(volume, &options(MIB, Faults::Handled(1), 32 * MIB)).expect("a space");
        let kept = space.map(0..8 * MIB, Access::ReadWrite).expect("a range");
        for (index, word) in words(&kept).iter().enumerate().step_by(512) {
            assert_eq!(word.load(Ordering::Relaxed), round * (index as u64 + 1));
            word.store(index as u64 + 1, Ordering::Relaxed);
        }
        // What a slab holds does not outlive it.
        let slab = space.carve(4 * MIB).expect("a slab");
        for word in words(&slab).iter().step_by(512) {
            assert_eq!(word.swap(7, Ordering::Relaxed), 0);
        }
        drop(slab);
        let again = space.carve(4 * MIB).expect("a slab");
        assert!(words(&again).iter().all(|word| word.load(Ordering::Relaxed) == 0));
        drop((kept, again, space));
        attachment.detach().expect("it is given back");
    }
}

/// Read in a row again and again, what fits is local: nothing leaves to have room for what does not come.
#[test]
fn what_fits_stays() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "128MiB"]);
    let (attachment, volume) = attached(&cluster, "v", Some(TransportKind::NbdTcp));
    let space = Space::open(volume, &options(33 * MIB, Faults::Handled(1), 32 * MIB)).expect("a space");
    let kept = space.map(0..32 * MIB, Access::ReadWrite).expect("a range");
    let slab = space.carve(2 * MIB).expect("a slab");
    assert_eq!(space.stats().zeroed, 1, "the first page of a slab is there before it is touched");
    drop(slab);
    let read =
        || assert!(words(&kept).iter().step_by(PAGE / 8).all(|word| word.load(Ordering::Relaxed) == 0));
    read();
    let first = space.stats();
    assert_eq!((first.fetched, first.resident), (8192, 32 * MIB), "all of it, and nothing else: {first:?}");
    read();
    // Not `touched`: a thread of the library counts the touch of a marked page after it has let the program go on.
    let moved =
        |stats: &MappingStats| (stats.fetched, stats.zeroed, stats.resident, stats.dropped, stats.written);
    assert_eq!(moved(&space.stats()), moved(&first), "nothing came or went");
    drop((kept, space));
    attachment.detach().expect("it is given back");
}

#[test]
fn private_copies_and_ranges_that_are_only_read() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, Faults::Inline, 16 * MIB)).expect("a space");
    let original = space.map(0..8 * MIB, Access::ReadWrite).expect("a range");
    for (index, word) in words(&original).iter().enumerate() {
        word.store(index as u64, Ordering::Relaxed);
    }
    let copy = space.private_copy(&original).expect("a copy");
    for (index, word) in words(&copy).iter().enumerate().take(MIB as usize) {
        assert_eq!(word.load(Ordering::Relaxed), index as u64);
        if index % 1000 == 0 {
            word.store(u64::MAX, Ordering::Relaxed);
        }
    }
    for (index, word) in words(&original).iter().enumerate() {
        assert_eq!(word.load(Ordering::Relaxed), index as u64, "the original is as it was");
    }
    for (index, word) in words(&copy).iter().enumerate().take(MIB as usize).step_by(1000) {
        assert_eq!(word.load(Ordering::Relaxed), u64::MAX, "word {index} of the copy");
    }
    assert!(matches!(space.private_copy(&copy), Err(MapError::Invalid(_))));
    drop((copy, original));
    let read = space.map(0..8 * MIB, Access::ReadOnly).expect("a range");
    assert!(
        words(&read).iter().enumerate().all(|(index, word)| word.load(Ordering::Relaxed) == index as u64)
    );
    assert!(matches!(read.put(0, &[1]), Err(MapError::Invalid(_))));
}

/// Pages ahead of a slab that is written to in a row come early, and must not be taken for those of a copy that is made
/// there.
#[test]
fn a_copy_where_pages_came_ahead_of_need() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(32 * MIB, Faults::Handled(1), 16 * MIB)).expect("a space");
    let original = space.map(0..3 * MIB, Access::ReadWrite).expect("a range");
    for (index, word) in words(&original).iter().enumerate() {
        word.store(index as u64 + 1, Ordering::Relaxed);
    }
    let row = space.carve(2 * MIB).expect("a slab");
    words(&row).iter().step_by(512).for_each(|word| word.store(1, Ordering::Relaxed));
    std::thread::sleep(Duration::from_millis(100));
    let copy = space.private_copy(&original).expect("a copy");
    drop(original);
    let behind = 3 * MIB as usize / 8;
    assert!(
        words(&copy)[..behind]
            .iter()
            .enumerate()
            .all(|(i, word)| word.load(Ordering::Relaxed) == i as u64 + 1)
    );
    assert!(words(&copy)[behind..].iter().all(|word| word.load(Ordering::Relaxed) == 0));
    drop(copy);
    let next = space.carve(4 * MIB).expect("a slab");
    assert!(words(&next).iter().all(|word| word.load(Ordering::Relaxed) == 0));
}

/// What an earlier life left in a slab is nothing, in a copy either.
#[test]
fn a_copy_of_a_slab_that_was_somebody_elses() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    {
        let (attachment, volume) = attached(&cluster, "v", None);
        let space = Space::open(volume, &options(32 * MIB, Faults::Handled(1), 16 * MIB)).expect("a space");
        let slab = space.carve(2 * MIB).expect("a slab");
        words(&slab).iter().for_each(|word| word.store(0xdead, Ordering::Relaxed));
        slab.flush().expect("it can be flushed");
        // As a crash would.
        std::mem::forget(slab);
        attachment.detach().expect("it is given back");
    }
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(32 * MIB, Faults::Handled(1), 16 * MIB)).expect("a space");
    let slab = space.carve(2 * MIB).expect("a slab");
    let copy = space.private_copy(&slab).expect("a copy");
    for words in [words(&slab), words(&copy)] {
        assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}

#[test]
fn calls_and_accesses_see_the_same() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(2 * MIB, Faults::Handled(1), 0)).expect("a space");
    let slab = space.carve(16 * MIB).expect("a slab");
    let bytes: Vec<u8> = (0..3 * PAGE).map(|byte| byte as u8).collect();
    slab.put(5 * MIB as usize + 100, &bytes).expect("put");
    let mut back = vec![1; bytes.len() + 200];
    slab.get(5 * MIB as usize, &mut back).expect("get");
    assert_eq!(back[100..100 + bytes.len()], bytes);
    assert!(back[..100].iter().chain(&back[100 + bytes.len()..]).all(|byte| *byte == 0));
    assert_eq!(space.stats().resident, PAGE as u64, "it took no room besides the first page");
    let word = &words(&slab)[5 * MIB as usize / 8 + 20];
    assert_eq!(word.load(Ordering::Relaxed).to_ne_bytes(), bytes[60..68]);
    word.store(42, Ordering::Relaxed);
    slab.get(5 * MIB as usize + 160, &mut back[..8]).expect("get");
    assert_eq!(back[..8], 42_u64.to_ne_bytes());
    // SAFETY: a page of the slab, as bytes that nobody else uses now.
    let own = unsafe { std::slice::from_raw_parts(slab.as_ptr().as_ptr(), PAGE) };
    assert!(matches!(slab.put(PAGE, own), Err(MapError::Invalid(_))), "a buffer that is external itself");
    cluster.ok(&["alloc", "create", "w", "--size", "64MiB"]);
    let (_other_attachment, other_volume) = attached(&cluster, "w", None);
    let other = Space::open(other_volume, &options(2 * MIB, Faults::Inline, 0)).expect("another space");
    assert!(
        matches!(other.carve(MIB).expect("a slab").put(PAGE, own), Err(MapError::Invalid(_))),
        "of another space"
    );
    drop(other);
    // Pinned pages are there, and stay.
    slab.advise(0..256 * PAGE, Advice::Pin).expect("a quarter can be pinned");
    for word in words(&slab).iter().step_by(512) {
        word.store(1, Ordering::Relaxed);
    }
    let before = space.stats().faults;
    assert!(space.stats().zeroed > 3000, "much more was there than fits");
    for word in words(&slab)[..256 * 512].iter().step_by(512) {
        assert_eq!(word.load(Ordering::Relaxed), 1);
    }
    assert_eq!(space.stats().faults, before);
    assert!(matches!(slab.advise(0..2 * MIB as usize, Advice::Pin), Err(MapError::Invalid(_))));
    assert!(matches!(space.set_budget(MIB), Err(MapError::Invalid(_))));
}

/// Bytes that are moved by calls, in pieces of up to half a MiB at any offset, and by accesses, while much more of them is elsewhere than
/// is local. One half of the calls have a buffer that transports use as it is.
#[test]
fn long_calls_and_accesses_see_the_same() {
    const LEN: usize = 8 << 20;
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--stripe", "2"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(2 * MIB, Faults::Handled(1), 0)).expect("a space");
    let slab = space.carve(LEN as u64).expect("a slab");
    let mut buffer = space.buffer(LEN / 16).expect("a buffer");
    let (mut shadow, mut dice) = (vec![0_u8; LEN], Dice(11));
    let mut plain = vec![0_u8; LEN / 16];
    for round in 0..600 {
        let start = dice.below(LEN);
        let longest = if dice.below(4) == 0 { 64 } else { LEN / 16 };
        let len = (1 + dice.below(longest - 1)).min(LEN - start);
        let place = if dice.below(2) == 0 { &mut buffer[..len] } else { &mut plain[..len] };
        match dice.below(5) {
            0 | 1 => {
                place.iter_mut().enumerate().for_each(|(at, byte)| *byte = (round + at / 7) as u8);
                slab.put(start, place).expect("put");
                shadow[start..start + len].copy_from_slice(place);
            }
            2 | 3 => {
                slab.get(start, place).expect("get");
                assert!(*place == shadow[start..start + len], "round {round}: {len} bytes at {start}");
            }
            _ => {
                let words = &words(&slab)[start / 8..(start + len) / 8];
                for (at, word) in words.iter().enumerate() {
                    let known = &mut shadow[(start / 8 + at) * 8..][..8];
                    assert_eq!(word.load(Ordering::Relaxed).to_ne_bytes(), known, "round {round}");
                    word.store(round as u64, Ordering::Relaxed);
                    known.copy_from_slice(&(round as u64).to_ne_bytes());
                }
            }
        }
    }
    let mut all = vec![1; LEN];
    slab.get(0, &mut all).expect("get");
    assert!(all == shadow);
    // A copy of it reads the same, out of the pages of the other one.
    let copy = space.private_copy(&slab).expect("a copy");
    copy.get(0, &mut all).expect("get");
    assert!(all == shadow);
    copy.put(PAGE, &plain).expect("put");
    shadow[PAGE..PAGE + plain.len()].copy_from_slice(&plain);
    copy.get(0, &mut all).expect("get");
    assert!(all == shadow);
    assert!(matches!(space.buffer(0), Err(MapError::Invalid(_))));
    assert!(matches!(space.buffer(usize::MAX), Err(MapError::System { .. })));
    drop((buffer, copy));
    assert_eq!(space.buffer(LEN / 16).expect("it is there already").len(), LEN / 16);
}

/// What a program sees when one of two appliances lost its memory: calls fail, and an access is a SIGBUS, which goes to the
/// handler that was there before, and which learns why. What lies on the other one is there, although all of local memory was of what is lost and changed.
fn program_whose_memory_is_lost(url: &str, faults: Faults) {
    static SPACE: OnceLock<Space> = OnceLock::new();
    extern "C" fn on_sigbus(_: i32) {
        let why = SPACE.get().and_then(Space::last_error);
        let known = why == Some(PageError { offset: 0, cause: Cause::Io(IoError::Lost) });
        // SAFETY: it ends the process, and nothing else.
        unsafe { libc::_exit(if known { 42 } else { 43 }) };
    }
    // SAFETY: the handler reads atomics and ends the process.
    unsafe { libc::signal(libc::SIGBUS, on_sigbus as *const () as usize) };
    let mut to_attach = attach_options(url, "v");
    // In memory that is shared with it, what a killed appliance had is there until that is noticed.
    to_attach.transport = Some(TransportKind::NbdTcp);
    let (_attachment, volume) = Attachment::attach(&to_attach).expect("it can be attached");
    let space = Space::open(volume, &options(4 * MIB, faults, 16 * MIB)).expect("a space");
    let space = SPACE.get_or_init(|| space);
    let range = space.map(0..16 * MIB, Access::ReadWrite).expect("a range");
    let words = words(&range);
    words.iter().for_each(|word| word.store(7, Ordering::Relaxed));
    range.advise(0..range.len(), Advice::DontNeed).expect("it can be written");
    assert_eq!((space.last_error(), space.stats().causes.of(Cause::Io(IoError::Lost))), (None, 0));
    // Every other unit of the stripe lies on the appliance that is lost: what is local is of those, and changed.
    let units = |first| words.chunks(UNIT / 8).skip(first).step_by(2).flatten().step_by(PAGE / 8);
    units(0).for_each(|word| word.store(8, Ordering::Relaxed));
    println!("ready");
    std::io::stdin().read_line(&mut String::new()).expect("a line");
    // The first of them have left.
    let refused = range.get(0, &mut [0; 8]).expect_err("it is lost");
    assert!(matches!(refused, MapError::Io(_)), "{refused}");
    assert_eq!(space.last_error().map(|error| error.cause), Some(Cause::Io(IoError::Lost)));
    assert!(space.stats().causes.of(Cause::Io(IoError::Lost)) > 0);
    let unwritten = space.flush().expect_err("what is changed cannot be written");
    println!("refused: {refused}, {unwritten}");
    assert!(
        units(1).all(|word| word.load(Ordering::Relaxed) == 7),
        "of the one that is well nothing is lost"
    );
    // Nor is it zeros what was written after the loss, and could not be kept.
    let fresh = space.carve(8 * MIB).expect("a slab");
    xpm_tests::mapping::words(&fresh)
        .iter()
        .step_by(PAGE / 8)
        .for_each(|word| word.store(9, Ordering::Relaxed));
    let mut page = [0; 8];
    for unit in (0..fresh.len()).step_by(2 * UNIT) {
        assert!(fresh.get(unit, &mut page).is_err() || page == 9_u64.to_ne_bytes(), "{page:?} at {unit}");
    }
    println!("the others are whole");
    let word = words[0].load(Ordering::Relaxed);
    println!("there is {word}");
}

#[test]
#[ignore = "is run by other tests, in a process of its own"]
fn in_a_process_of_its_own() {
    let Ok(url) = std::env::var("XPM_TEST_ALLOCATOR") else { return };
    let faults =
        if std::env::var_os("XPM_TEST_INLINE").is_some() { Faults::Inline } else { Faults::Handled(1) };
    program_whose_memory_is_lost(&url, faults);
}

fn loses_its_memory(inline: bool) {
    let mut cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--stripe", "2", "--stripe-unit", "64KiB"]);
    let lost = cluster.json(&["alloc", "show", "v"])["regions"][0]["appliance_name"].to_string();
    let faults: &[_] = if inline { &[("XPM_TEST_INLINE", "1")] } else { &[] };
    let (mut program, mut lines) = in_own_process(&cluster, "in_a_process_of_its_own", faults);
    lines.find(|line| line.ends_with("ready")).expect("it comes so far");
    cluster.restart_appliance(usize::from(lost.contains("a1")));
    cluster.wait_up();
    writeln!(program.stdin.take().expect("its input")).expect("it reads");
    let rest: Vec<String> = lines.collect();
    let ended = program.wait().expect("it ends");
    assert!(rest.iter().any(|line| line.starts_with("refused: ")), "{rest:?}");
    assert!(rest.iter().any(|line| line == "the others are whole"), "{rest:?}");
    assert!(!rest.iter().any(|line| line.starts_with("there is")), "never zeros, or anything else: {rest:?}");
    assert_eq!(ended.code(), Some(42), "the handler that was there before learns why: {rest:?}");
}

#[test]
fn lost_memory_is_an_error_and_a_signal_in_line() {
    loses_its_memory(true);
}

#[test]
fn lost_memory_is_an_error_and_a_signal_handled() {
    loses_its_memory(false);
}

/// A handler of the program that touched external memory on a thread of the library would wait for that very thread.
#[test]
fn threads_of_the_library_take_no_signals_of_the_program() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(32 * MIB, Faults::Handled(2), 0)).expect("a space");
    let tasks = || -> Vec<(String, String)> {
        let entries = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        let of = |entry: &std::fs::DirEntry, file: &str| {
            std::fs::read_to_string(entry.path().join(file)).unwrap_or_default()
        };
        entries.map(|entry| (of(&entry, "comm").trim().to_owned(), of(&entry, "status"))).collect()
    };
    // A thread names itself.
    for known in ["xpm-connect", "xpm-orders", "xpm-tend", "xpm-evict", "xpm-fetch-0", "xpm-fetch-1"] {
        xpm_tests::wait_until(known, || tasks().iter().any(|(name, _)| name == known));
    }
    for (name, status) in tasks().iter().filter(|(name, _)| name.starts_with("xpm-")) {
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask");
        let blocked = u64::from_str_radix(blocked.trim(), 16).expect("a number");
        for signal in [libc::SIGUSR1, libc::SIGINT, libc::SIGCHLD, libc::SIGALRM] {
            assert!(blocked >> (signal - 1) & 1 == 1, "{name} takes signal {signal}");
        }
    }
    drop(space);
    attachment.detach().expect("it is given back");
}
