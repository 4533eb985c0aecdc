//! Arenas of each backing: content, limits and errors.

use proptest::prelude::*;
use xpm_transport::IoBuf;
use xpm_transport::store::Extent;

use super::*;

const MIB: u64 = 1 << 20;
const LEN: u64 = 16 * MIB;

/// An arena of each kind that this host supports, with the directory that it needs.
fn arenas() -> Vec<(&'static str, Arena, Option<tempfile::TempDir>)> {
    let directory = tempfile::tempdir().unwrap();
    let file = Backing::File(directory.path().join("memory"));
    let mut arenas = vec![
        ("memfd", Arena::new(&Backing::Memfd, 2 * LEN, true).unwrap(), None),
        ("file", Arena::new(&file, 2 * LEN, true).unwrap(), Some(directory)),
    ];
    // Tests run concurrently, so there have to be enough huge pages for all of them.
    match Arena::new(&Backing::HugeMemfd, 16 * LEN, true) {
        Ok(arena) => arenas.push(("huge", arena, None)),
        Err(error) => println!("huge pages are left out: {error}"),
    }
    arenas
}

fn write(memory: &Memory, offset: u64, bytes: &[u8]) {
    memory.at(offset, bytes.len()).copy_from_slice(bytes);
}

#[expect(unsafe_code, reason = "a buffer of this test is the target of a copy")]
fn read(memory: &Memory, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    let start = std::ptr::NonNull::new(bytes.as_mut_ptr()).unwrap();
    // SAFETY: the vector lives longer than the copy, and is not used otherwise meanwhile.
    let target = unsafe { IoBuf::new(start, len) };
    memory.at(offset, len).copy_to(target);
    bytes
}

fn is_zero(memory: &Memory) -> bool {
    (0..memory.len())
        .step_by(MIB as usize)
        .all(|offset| read(memory, offset, MIB as usize) == [0; MIB as usize])
}

#[test]
fn made_and_cleared_regions_are_zeros() {
    for (name, arena, _directory) in arenas() {
        let memory = arena.make(LEN, 0).unwrap();
        assert!(arena.fault_in(&memory, None).unwrap(), "{name}");
        assert!(is_zero(&memory), "{name}");
        for offset in (0..LEN).step_by(MIB as usize) {
            write(&memory, offset, &[7; MIB as usize]);
        }
        memory.clear();
        assert!(is_zero(&memory), "{name}");
        assert!(arena.fault_in(&memory, None).unwrap(), "{name}");
    }
}

#[test]
fn a_part_of_a_file_that_is_lent_again_is_zeros() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    std::fs::write(&path, vec![9; LEN as usize]).unwrap();
    let arena = Arena::new(&Backing::File(path.clone()), LEN, false).unwrap();
    let memory = arena.make(LEN, 0).unwrap();
    assert!(is_zero(&memory), "what the file held before is not lent");
    write(&memory, 5, b"secret");
    assert!(matches!(arena.make(LEN, 0), Err(ArenaError::Fragmented(_))));
    drop(memory);
    assert!(is_zero(&arena.make(LEN, 0).unwrap()));
    let second = Arena::new(&Backing::File(path), LEN, false).err().unwrap().to_string();
    assert!(second.contains("another process uses it"), "{second}");
}

#[test]
fn faulting_in_keeps_the_content_and_resumes_where_it_stopped() {
    let arena = Arena::new(&Backing::Memfd, 64 * MIB, true).unwrap();
    let memory = arena.make(64 * MIB, 0).unwrap();
    write(&memory, 40 * MIB, b"content");
    assert!(!arena.fault_in(&memory, Some(Instant::now())).unwrap());
    assert_eq!(memory.resident(), 4096);
    assert!(arena.fault_in(&memory, None).unwrap());
    assert_eq!(memory.resident(), memory.len());
    assert_eq!(read(&memory, 40 * MIB, 7), b"content");
}

#[test]
fn memory_trimmed_before_it_was_faulted_in_stays_free() {
    let arena = Arena::new(&Backing::Memfd, 64 * MIB, true).unwrap();
    let memory = arena.make(64 * MIB, 0).unwrap();
    assert!(!arena.fault_in(&memory, Some(Instant::now())).unwrap());
    memory.trim(0, 64 * MIB);
    write(&memory, 40 * MIB, b"content");
    assert!(arena.fault_in(&memory, None).unwrap());
    assert_eq!(memory.resident(), 4096, "nobody asked for the rest again");
    memory.clear();
    assert!(arena.fault_in(&memory, None).unwrap());
    assert_eq!(memory.resident(), memory.len(), "it is ready for the next one");
}

#[test]
fn trim_gives_memory_back_and_shows_holes() {
    let arena = Arena::new(&Backing::Memfd, LEN, true).unwrap();
    let memory = arena.make(LEN, 0).unwrap();
    arena.fault_in(&memory, None).unwrap();
    assert_eq!(memory.resident(), LEN);
    memory.trim(4 * MIB, 8 * MIB);
    assert_eq!(memory.resident(), LEN - 8 * MIB);
    assert_eq!(memory.extent(0, LEN), Extent { len: 4 * MIB, hole: false });
    assert_eq!(memory.extent(4 * MIB, LEN), Extent { len: 8 * MIB, hole: true });
    assert_eq!(memory.extent(5 * MIB, 4096), Extent { len: 4096, hole: true });
    assert_eq!(memory.extent(12 * MIB, LEN), Extent { len: 4 * MIB, hole: false });
    memory.clear();
    assert_eq!(memory.resident(), 0);
    assert_eq!(memory.extent(0, LEN), Extent { len: LEN, hole: true });
}

#[test]
fn reading_takes_no_memory() {
    for (name, arena, _directory) in arenas() {
        let memory = arena.make(LEN, 0).unwrap();
        write(&memory, 3 * MIB - 2, b"data");
        let held = memory.resident();
        let mut bytes = vec![1; 2 * MIB as usize];
        for start in (0..LEN).step_by(bytes.len()) {
            memory.read(start, &mut bytes).unwrap();
            if start == 2 * MIB {
                let at = MIB as usize - 2;
                assert_eq!(&bytes[at - 1..at + 5], b"\0data\0", "{name}");
            } else {
                assert!(bytes.iter().all(|byte| *byte == 0), "{name}");
            }
        }
        assert_eq!(memory.resident(), held, "{name}");
        bytes.fill(1);
        memory.read(LEN - 4096, &mut bytes).unwrap();
        assert!(
            bytes[..4096].iter().all(|byte| *byte == 0) && bytes[4096..].iter().all(|byte| *byte == 1),
            "{name}"
        );
    }
}

#[test]
fn relocated_memory_is_out_of_reach_of_the_old_mapping() {
    for (name, arena, _directory) in arenas() {
        let old = arena.make(LEN, 0).unwrap();
        write(&old, 3 * MIB, b"page");
        let new = arena.relocate(&old).unwrap();
        assert!(is_zero(&old), "{name}");
        write(&old, 3 * MIB, b"late");
        assert_eq!(read(&new, 3 * MIB, 4), b"page", "{name}");
        if name == "memfd" {
            assert!(new.resident() < LEN, "holes stay holes");
        }
    }
}

#[test]
fn promised_memory_that_is_not_resident_is_counted() {
    let arena = Arena::new(&Backing::Memfd, 2 * LEN, true).unwrap();
    let promised = || arena.promised.load(Relaxed);
    let (first, second) = (arena.make(LEN, 0).unwrap(), arena.make(LEN, 0).unwrap());
    assert_eq!(promised(), 2 * LEN);
    arena.fault_in(&first, None).unwrap();
    assert_eq!(promised(), LEN);
    first.clear();
    assert_eq!(promised(), 2 * LEN);
    drop(first);
    let moved = arena.relocate(&second).unwrap();
    drop(second);
    assert_eq!(promised(), 0, "what holds nothing needs nothing");
    drop(moved);
    assert_eq!(promised(), 0);
}

#[test]
fn a_passed_descriptor_cannot_be_truncated() {
    let arena = Arena::new(&Backing::Memfd, LEN, true).unwrap();
    let memory = arena.make(LEN, 0).unwrap();
    assert!(!memory.is_shared());
    let fd = memory.share();
    assert!(memory.is_shared());
    for len in [0, 2 * LEN] {
        assert_eq!(rustix::fs::ftruncate(&*fd, len), Err(Errno::PERM));
    }
}

#[test]
fn too_much_is_refused_with_a_remedy() {
    let all = 1 << 50;
    let line = |backing| Arena::new(&backing, all, true).err().unwrap().to_string();
    assert!(line(Backing::Memfd).contains("lower --memory"));
    assert!(line(Backing::HugeMemfd).contains("vm.nr_hugepages"));
    let directory = tempfile::tempdir().unwrap();
    assert!(line(Backing::File(directory.path().join("x"))).contains("cannot use"));
    assert!(line(Backing::File(directory.path().into())).contains("cannot use"));
    assert!(line(Backing::File("/dev/null".into())).contains("no DAX device"));
    assert!(Arena::new(&Backing::Memfd, LEN, true).unwrap().make(1 << 62, 0).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Trims and zero writes of any alignment, compared with a plain vector.
    #[test]
    fn trims_and_zeros_touch_what_they_should(
        ranges in prop::collection::vec((any::<bool>(), 0_u64..40_000, 0_u64..20_000), 1..12),
    ) {
        for (name, arena, _directory) in arenas() {
            let memory = arena.make(LEN, 0).unwrap();
            let mut model = vec![3_u8; 64 << 10];
            write(&memory, 0, &model);
            for (trim, offset, len) in &ranges {
                if *trim { memory.trim(*offset, *len) } else { memory.zero(*offset, *len) }
                model[*offset as usize..(offset + len) as usize].fill(0);
                prop_assert!(read(&memory, 0, model.len()) == model, "{name}: trim {trim} {offset}+{len}");
            }
        }
    }
}
