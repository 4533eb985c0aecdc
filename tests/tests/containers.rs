//! Containers in external memory, many times as long as what may be local.

#![allow(unsafe_code)]

use std::ptr::NonNull;

use allocator_api2::alloc::{Allocator as _, Layout};
use allocator_api2::vec::Vec as VecIn;
use xpm_mapping::{Advice, Array, Faults, MapError, Space};
use xpm_tests::Cluster;
use xpm_tests::mapping::{Dice, MIB, PAGE, attached, options};

#[test]
fn containers_in_external_memory() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "256MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(4 * MIB, Faults::Inline, 0)).expect("a space");
    let free = space.free_bytes();
    let heap = space.allocator();
    let mut array: Array<u64> = VecIn::new_in(heap.clone());
    array.extend(0..4_000_000_u64);
    assert!(array.iter().copied().eq(0..4_000_000));
    assert_eq!(array.iter().sum::<u64>(), 4_000_000 * 3_999_999 / 2);
    let mut small: Vec<Array<u8>> = Vec::new();
    for len in 0..2_000_usize {
        let mut one = VecIn::with_capacity_in(len, heap.clone());
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

/// An array that grows to many times the budget does so where it is; where it cannot, its content is not brought into
/// local memory.
fn grows(faults: Faults) {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "128MiB", "--region-size", "128MiB"]);
    let (attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, faults, 0)).expect("a space");
    let mut array: Array<u64> = space.array(1 << 19).expect("4 MiB of addresses");
    assert_eq!(space.stats().resident, PAGE as u64, "addresses only, and the first page");
    let at = array.as_ptr();
    let words = 3 << 19;
    array.extend(0..words);
    assert_eq!(array.as_ptr(), at, "it has grown where it was, from 4 MiB to 16");
    // The addresses behind it are taken.
    let behind = space.carve(16 * MIB).expect("a slab");
    assert_eq!(behind.as_ptr().as_ptr() as usize, at as usize + (16 << 20));
    let before = space.stats();
    array.reserve(2 << 19);
    let after = space.stats();
    assert_ne!(array.as_ptr(), at);
    assert_eq!(after.faults, before.faults, "nothing was touched");
    // 12 MiB were filled; some of it was local, and some fetched ahead while that was looked at.
    assert!(after.resident <= MIB && after.fetched - before.fetched < 1024, "{before:?} {after:?}");
    let at = array.as_ptr();
    array.extend(words..10 << 19);
    assert_eq!(array.as_ptr(), at, "it went to where it can grow");
    assert!(array.iter().copied().eq(0..10 << 19));
    assert!(space.stats().resident <= MIB && space.stats().fetched > 5_000, "{:?}", space.stats());
    // Shorter, in place, too.
    array.truncate(1000);
    let free = space.free_bytes();
    array.shrink_to_fit();
    assert_eq!((array.as_ptr(), space.free_bytes()), (at, free + 64 * MIB - 8192));
    assert!(array.iter().copied().eq(0..1000));
    drop((array, behind));
    assert_eq!(space.free_bytes(), 128 * MIB);
    drop(space);
    attachment.detach().expect("it is given back");
}

#[test]
fn an_array_grows_in_line() {
    grows(Faults::Inline);
}

#[test]
fn an_array_grows_handled() {
    grows(Faults::Handled(1));
}

/// Several arrays that grow, shrink and are written to in any order, against what they should be.
#[test]
fn arrays_are_what_vectors_are() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 0)).expect("a space");
    let heap = space.allocator();
    let mut known: Vec<Vec<u32>> = vec![Vec::new(); 6];
    let mut arrays: Vec<Array<u32>> = (0..6).map(|_| Array::new_in(heap.clone())).collect();
    let mut dice = Dice(3);
    for step in 0..1500_u32 {
        let which = dice.below(6);
        let (known, array) = (&mut known[which], &mut arrays[which]);
        match dice.below(8) {
            0 => {
                let len = dice.below(known.len() + 1);
                known.truncate(len);
                array.truncate(len);
            }
            1 => array.shrink_to_fit(),
            2 if known.len() < 600_000 => array.reserve(1 << dice.below(18)),
            3..=5 if known.len() < 600_000 => {
                let more = 1 << dice.below(16);
                known.extend((0..more).map(|word| word ^ step));
                array.extend((0..more).map(|word| word ^ step));
            }
            _ if !known.is_empty() => {
                let at = dice.below(known.len());
                (known[at], array[at]) = (step, step);
            }
            _ => {}
        }
        assert_eq!(known.len(), array.len());
        if step % 64 == 0 {
            assert!(known.iter().eq(array.iter()), "array {which} in step {step}");
        }
    }
    assert!(known.iter().zip(&arrays).all(|(known, array)| known.iter().eq(array.iter())));
    drop((arrays, heap));
    assert_eq!(space.free_bytes(), 64 * MIB);
    assert_eq!(space.stats().errors, 0);
}

#[test]
fn what_a_block_grows_by_is_zeros() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(MIB, Faults::Handled(1), 0)).expect("a space");
    let heap = space.allocator();
    let layout = |len: usize| Layout::from_size_align(len, 8).expect("a layout");
    let bytes = |block: NonNull<[u8]>| {
        // SAFETY: of a block that is there, and nobody else uses.
        unsafe { &mut *block.as_ptr() }
    };
    let mut block = heap.allocate_zeroed(layout(100)).expect("a piece");
    bytes(block)[..100].fill(1);
    for (from, to) in [(100, 1000), (1000, 5000), (5000, 100_000), (100_000, 4 << 20)] {
        // SAFETY: the block is of this allocator, and that is its layout.
        block = unsafe { heap.grow_zeroed(block.cast(), layout(from), layout(to)) }.expect("it grows");
        assert!(block.len() >= to);
        assert!(bytes(block)[..from].iter().all(|byte| *byte == 1));
        assert!(bytes(block)[from..to].iter().all(|byte| *byte == 0), "{from} to {to}");
        bytes(block)[..to].fill(1);
    }
    // A part that is cut off and added again is zeros.
    // SAFETY: as above.
    let short = unsafe { heap.shrink(block.cast(), layout(4 << 20), layout(1 << 20)) }.expect("it shrinks");
    // SAFETY: as above.
    let long = unsafe { heap.grow_zeroed(short.cast(), layout(1 << 20), layout(2 << 20)) }.expect("it grows");
    assert!(bytes(long)[..1 << 20].iter().all(|byte| *byte == 1));
    assert!(bytes(long)[1 << 20..].iter().all(|byte| *byte == 0));
    // SAFETY: as above.
    unsafe { heap.deallocate(long.cast(), layout(2 << 20)) };
}

#[test]
fn what_arrays_cannot_be_told() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (_attachment, volume) = attached(&cluster, "v", None);
    let space = Space::open(volume, &options(2 * MIB, Faults::Inline, 0)).expect("a space");
    for capacity in [16 << 20, usize::MAX] {
        let error = space.array::<u64>(capacity).expect_err("there is less").to_string();
        assert!(error.contains("free slabs, or resize the allocation"), "{error}");
    }
    #[repr(align(8192))]
    struct Wide(#[allow(dead_code, reason = "it is there for its length")] u8);
    let error = space.array::<Wide>(1).err().expect("no page is aligned like that").to_string();
    assert!(error.contains("no more than 4096"), "{error}");
    let mut array: Array<u64> = space.array(0).expect("nothing");
    array.extend(0..1 << 18);
    assert!(array.try_reserve(16 << 20).is_err());
    assert!(array.iter().copied().eq(0..1 << 18), "it is as it was");
    array.allocator().advise(&array[..1024], Advice::Pin).expect("two pages can be pinned");
    let error = array.allocator().advise(&array, Advice::Pin).expect_err("more than half").to_string();
    assert!(error.contains("raise the budget"), "{error}");
    array.allocator().flush(&array).expect("it can be written");
    array.allocator().advise(&array, Advice::DontNeed).expect("it can leave");
    // Pinned pages stay, and pages of zeros that were prefetched are behind the array.
    assert!((2 * 4096..64 * 4096).contains(&space.stats().resident), "{:?}", space.stats());
    let faults = space.stats().faults;
    assert!(array[..1024].iter().copied().eq(0..1024));
    assert_eq!(space.stats().faults, faults);
    let elsewhere = [1_u64; 4];
    for other in [
        &elsewhere[..],
        &space
            .array::<u64>(4)
            .map(|mut one| {
                one.push(1);
                one
            })
            .expect("another"),
    ] {
        let error = array.allocator().advise(other, Advice::Random).expect_err("it is not its own");
        assert!(matches!(error, MapError::Invalid(_)), "{error}");
    }
    array.allocator().flush::<u64>(&[]).expect("nothing to do");
}
