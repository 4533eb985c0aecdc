//! External memory at addresses: what is there is what was written, whatever comes and goes meanwhile.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xpm_client::mapping::{Access, Advice, Budget, Faults, MapError, Mapping, Space, SpaceOptions};
use xpm_client::{AttachOptions, Attachment};
use xpm_protocol::api::blk::TransportKind;
use xpm_tests::Cluster;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

fn attached(
    cluster: &Cluster,
    name: &str,
    transport: Option<TransportKind>,
) -> (Attachment, xpm_client::Volume) {
    let mut options =
        AttachOptions::new(cluster.allocator_url().parse().expect("a URL"), name.parse().expect("a name"));
    options.transport = transport;
    Attachment::attach(&options).expect("it can be attached")
}

fn options(budget: u64, faults: Faults, kept: u64) -> SpaceOptions {
    SpaceOptions { budget: Budget::Fixed(budget), faults, kept }
}

/// The words of a mapping, which several threads may use, each its own.
fn words(mapping: &Mapping) -> &[AtomicU64] {
    // SAFETY: the mapping is mapped for as long as it lives, aligned to pages, and any bits are a u64; it is
    // accessed as atomics only.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().as_ptr().cast::<AtomicU64>(), mapping.len() / 8) }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, range: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % range
    }
}

/// Threads write and read at random and in rows, each words of its own in all pages, and compare with what they
/// know; meanwhile the budget changes, and everything is flushed.
fn against_a_shadow(faults: Faults, transport: TransportKind) {
    const THREADS: usize = 4;
    let cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--stripe", "2"]);
    let (attachment, volume) = attached(&cluster, "v", Some(transport));
    let space = Space::open(volume, &options(4 * MIB, faults, 32 * MIB)).expect("a space");
    let kept = space.map(0..32 * MIB, Access::ReadWrite).expect("a range");
    let slab = space.carve(16 * MIB).expect("a slab");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mappings = [words(&kept), words(&slab)];
                let stop = &stop;
                scope.spawn(move || {
                    let mut shadows: Vec<Vec<u64>> =
                        mappings.iter().map(|words| vec![0; words.len() / THREADS / 8]).collect();
                    let mut dice = Dice(thread as u64 + 1);
                    let mut steps = 0_u64;
                    while !stop.load(Ordering::Relaxed) {
                        let which = dice.below(2);
                        let (words, shadow) = (mappings[which], &mut shadows[which]);
                        let (start, len) = match dice.below(16) {
                            0 => (dice.below(shadow.len()), 2000),
                            _ => (dice.below(shadow.len()), 1),
                        };
                        let write = dice.below(3) == 0;
                        for own in start..(start + len).min(shadow.len()) {
                            let word = &words[own * 8 * THREADS + thread * 8 + own % 8];
                            assert_eq!(word.load(Ordering::Relaxed), shadow[own], "word {own} of {which}");
                            if write {
                                steps += 1;
                                shadow[own] = steps << 8 | thread as u64;
                                word.store(shadow[own], Ordering::Relaxed);
                            }
                        }
                    }
                    shadows
                })
            })
            .collect();
        let began = Instant::now();
        let mut dice = Dice(99);
        while began.elapsed() < Duration::from_secs(6) && workers.iter().all(|worker| !worker.is_finished()) {
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
        stop.store(true, Ordering::Relaxed);
        let shadows: Vec<Vec<Vec<u64>>> = workers
            .into_iter()
            .map(|worker| worker.join().expect("what is there is what was written"))
            .collect();
        for (which, words) in [words(&kept), words(&slab)].into_iter().enumerate() {
            for (thread, shadow) in shadows.iter().enumerate() {
                for (own, known) in shadow[which].iter().enumerate() {
                    let word = &words[own * 8 * THREADS + thread * 8 + own % 8];
                    assert_eq!(word.load(Ordering::Relaxed), *known, "word {own} of {which}");
                }
            }
        }
    });
    let stats = space.stats();
    assert!(stats.written > 100 && stats.fetched > 100 && stats.errors == 0, "{stats:?}");
    drop((kept, slab, space));
    attachment.detach().expect("it is given back");
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
    assert_eq!(space.stats().resident, 0, "it took no room");
    let word = &words(&slab)[5 * MIB as usize / 8 + 20];
    assert_eq!(word.load(Ordering::Relaxed).to_ne_bytes(), bytes[60..68]);
    word.store(42, Ordering::Relaxed);
    slab.get(5 * MIB as usize + 160, &mut back[..8]).expect("get");
    assert_eq!(back[..8], 42_u64.to_ne_bytes());
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

#[test]
fn containers_in_external_memory() {
    use allocator_api2::vec::Vec as Array;
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "256MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(4 * MIB, Faults::Inline, 0)).expect("a space");
    let free = space.free_bytes();
    let heap = space.allocator();
    let mut array: Array<u64, _> = Array::new_in(heap.clone());
    array.extend(0..4_000_000_u64);
    assert!(array.iter().copied().eq(0..4_000_000));
    assert_eq!(array.iter().sum::<u64>(), 4_000_000 * 3_999_999 / 2);
    let mut small: Vec<Array<u8, _>> = Vec::new();
    for len in 0..2_000_usize {
        let mut one = Array::with_capacity_in(len, heap.clone());
        one.resize(len, len as u8);
        small.push(one);
        if len % 3 == 0 {
            small.swap_remove(len / 5 % small.len());
        }
    }
    assert!(small.iter().all(|one| one.iter().all(|byte| *byte == one.len() as u8)));
    drop((array, small));
    assert!(space.free_bytes() > free - 2 * MIB, "all but a pool of each length is back");
    drop(heap);
    assert_eq!(space.free_bytes(), free);
}

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
    assert!(matches!(space.carve(33 * MIB), Err(MapError::Slab(_))));
    assert!(matches!(one.advise(0..2 * MIB as usize, Advice::Random), Err(MapError::Range { .. })));
    drop(one);
    space.map(4096..2 * MIB, Access::ReadWrite).expect("it is free again");
    // Somebody else's.
    let mut other =
        AttachOptions::new(cluster.allocator_url().parse().expect("a URL"), "v".parse().expect("a name"));
    let line = Attachment::attach(&other).err().expect("it is somebody's").to_string();
    assert!(line.contains("force"), "{line}");
    other.client = Some(attachment.client());
    Attachment::attach(&other).expect("it is its own");
}
