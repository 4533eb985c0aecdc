//! Slabs with names: they stay when their program ends, and nothing else comes to where they are.

use std::sync::atomic::Ordering;

use xpm_mapping::{Access, Faults, Mapping, NamedSlabs, Space};
use xpm_tests::Cluster;
use xpm_tests::mapping::{MIB, attached, options, words};

fn space_of(volume: xpm_mapping::Volume, faults: Faults) -> Space {
    Space::open(volume, &options(32 * MIB, faults, 0)).expect("a space")
}

fn fill(mapping: &Mapping, seed: u64) {
    words(mapping).iter().enumerate().for_each(|(at, word)| word.store(seed ^ at as u64, Ordering::Relaxed));
}

fn holds(mapping: &Mapping, seed: u64) -> bool {
    words(mapping).iter().enumerate().all(|(at, word)| word.load(Ordering::Relaxed) == seed ^ at as u64)
}

/// Slabs with names outlive their program and the allocator's metadata; others are carved beside them.
#[test]
fn slabs_with_names_stay() {
    let mut cluster = Cluster::start(2);
    cluster.ok(&["alloc", "create", "v", "--size", "256MiB", "--region-size", "16MiB"]);
    let name = |text: &str| text.parse::<xpm_protocol::Name>().expect("a name");
    for faults in [Faults::Inline, Faults::Handled(1)] {
        let (attachment, volume) = attached(&cluster, "v", None);
        let space = space_of(volume, faults);
        let named = NamedSlabs::open(&attachment, &space).expect("none so far");
        assert_eq!(named.list(), []);
        // Where something was before: what a name is given to holds zeros.
        let before = space.carve(64 * MIB).expect("a slab");
        fill(&before, 9);
        drop(before);
        let first = named.create(&name("first"), 40 * MIB).expect("a slab with a name");
        assert_eq!(first.len() as u64, 64 * MIB);
        assert!(words(&first).iter().all(|word| word.load(Ordering::Relaxed) == 0));
        let second = named.create(&name("second"), 1).expect("another one");
        assert_eq!(second.len() as u64, 2 * MIB, "whole chunks");
        fill(&first, 1);
        fill(&second, 2);
        let error = named.create(&name("second"), 1).err().expect("it is there").to_string();
        assert!(error.contains("there is a slab `second` already"), "{error}");
        let error = named.get(&name("first"), Access::ReadOnly).err().expect("it is mapped").to_string();
        assert!(error.contains("is mapped already"), "{error}");
        let error = named.remove(&name("first")).expect_err("it is in use").to_string();
        assert!(error.contains("drop its mapping first"), "{error}");
        let error = named.get(&name("third"), Access::ReadOnly).err().expect("there is none").to_string();
        assert!(error.contains("no slab `third`"), "{error}");
        drop((first, second, named, space));
        attachment.detach().expect("it is given back");
        cluster.wait_told_unowned("v");

        // The allocator's metadata are lost; the appliances know.
        let controls = cluster.json(&["appliance", "list"]);
        let controls: Vec<String> = controls
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|one| one["info"]["control"].as_str().map(str::to_owned))
            .collect();
        let mut task = vec!["recover", "--from-network"];
        task.extend(controls.iter().map(String::as_str));
        cluster.replace_metadata(&task);
        let shown = cluster.json(&["alloc", "show", "v"]);
        assert_eq!(shown["slabs"]["slabs"]["first"]["len"], 64 << 20, "{shown}");
        assert!(cluster.ok(&["alloc", "show", "v"]).contains("second"));

        // Another client, to whom nobody told a thing.
        let (attachment, volume) = attached(&cluster, "v", None);
        let space = space_of(volume, faults);
        let mut others = Vec::new();
        while let Ok(other) = space.carve(16 * MIB) {
            fill(&other, 7);
            others.push(other);
        }
        assert_eq!(others.len(), (256 - 64 - 16) / 16, "nothing is carved where they are");
        let named = NamedSlabs::open(&attachment, &space).expect("both");
        assert_eq!(named.list(), [(name("first"), 64 * MIB), (name("second"), 2 * MIB)]);
        let first = named.get(&name("first"), Access::ReadOnly).expect("the first");
        assert!(holds(&first, 1));
        let second = named.get(&name("second"), Access::ReadWrite).expect("the second");
        assert!(holds(&second, 2));
        assert!(others.iter().all(|other| holds(other, 7)));
        drop((first, second));
        named.remove(&name("first")).expect("it is removed");
        named.remove(&name("second")).expect("it is removed");
        let fresh = space.carve(64 * MIB).expect("its place is free");
        assert!(words(&fresh).iter().all(|word| word.load(Ordering::Relaxed) == 0));
        drop((fresh, others, named, space));
        attachment.detach().expect("it is given back");
    }
}

#[test]
fn slabs_with_names_are_in_the_way() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB", "--region-size", "16MiB"]);
    let (attachment, volume) = attached(&cluster, "v", None);
    let space = space_of(volume, Faults::Inline);
    let named = NamedSlabs::open(&attachment, &space).expect("none so far");
    let name = "all".parse().expect("a name");
    fill(&named.create(&name, 64 * MIB).expect("all of it"), 3);
    let error = named.create(&"more".parse().expect("a name"), 1).err().expect("nothing is left").to_string();
    assert!(error.contains("no free run"), "{error}");
    drop((named, space));
    attachment.detach().expect("it is given back");
    // Not by a device, not by what is kept, not by an end that is before theirs.
    let socket = format!("nbd-socket={}", cluster.dir().join("v.sock").display());
    let said = cluster.refused(&["blk", "attach", "v", "--as", &socket]);
    assert!(said.contains("slabs with names, such as `all`"), "{said}");
    let said = cluster.refused(&["alloc", "resize", "v", "32MiB"]);
    assert!(said.contains("slab `all` of `v` ends at 64MiB"), "{said}");
    let (attachment, volume) = attached(&cluster, "v", None);
    let error = Space::open(volume.clone(), &options(16 * MIB, Faults::Inline, 4 * MIB)).err();
    let error = error.expect("its place is kept for ranges").to_string();
    assert!(error.contains("`all` of 64MiB at 0B has no place"), "{error}");
    let space = space_of(volume, Faults::Inline);
    let named = NamedSlabs::open(&attachment, &space).expect("one");
    assert!(holds(&named.get(&name, Access::ReadOnly).expect("it is there"), 3));
    drop((named, space));
    attachment.detach().expect("it is given back");
    assert!(cluster.xpm(&["fsck"]).status.success());
}
