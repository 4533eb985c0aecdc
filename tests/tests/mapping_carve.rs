//! Slabs are carved and used with no message to anyone: neither the allocator nor an appliance runs meanwhile.

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::Signal;
use xpm_mapping::{Faults, Mapping, Space};
use xpm_protocol::api::blk::TransportKind;
use xpm_tests::Cluster;
use xpm_tests::mapping::{MIB, PAGE, attached, options, words};

/// A daemon that stands still goes on with it.
struct Frozen<'a>(&'a xpm_tests::Daemon);

impl<'a> Frozen<'a> {
    fn new(daemon: &'a xpm_tests::Daemon) -> Frozen<'a> {
        daemon.freeze();
        Frozen(daemon)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::CONT);
    }
}

/// Slabs of several sizes, in whose first pages something is written.
fn carved(space: &Space) -> Vec<Mapping> {
    let carve = |number: u64| {
        let slab = space.carve((1 + number % 3) * MIB).expect("a slab");
        assert_eq!(words(&slab)[0].swap(number + 1, Ordering::Relaxed), 0);
        slab
    };
    (0..8).map(carve).collect()
}

fn with_nobody_there(faults: Faults, transport: TransportKind) {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let (attachment, volume) = attached(&cluster, "v", Some(transport));
    let space = Space::open(volume, &options(8 * MIB, faults, 0)).expect("a space");
    let nobody = (Frozen::new(&cluster.allocator), Frozen::new(&cluster.appliances[0]));
    let (slabs, carved_ones) = channel();
    let carving = std::thread::spawn({
        let space = space.clone();
        move || slabs.send(carved(&space))
    });
    // A thread that waited for a message would wait for ever.
    let slabs = carved_ones.recv_timeout(Duration::from_secs(10)).expect("it waits for nobody");
    let stats = space.stats();
    assert!(stats.fetched == 0 && stats.written == 0 && stats.faults == 0, "{stats:?}");
    drop(nobody);
    carving.join().expect("it is done").expect("somebody listens");
    // The rest of them is usable, too.
    for (number, slab) in (1..).zip(&slabs) {
        let first_of_each = words(slab).iter().step_by(PAGE / 8);
        assert_eq!(first_of_each.map(|word| word.load(Ordering::Relaxed)).sum::<u64>(), number);
    }
    drop((slabs, space));
    attachment.detach().expect("it is given back");
}

#[test]
fn a_slab_is_carved_and_used_while_nobody_is_there_in_line_over_shared_memory() {
    with_nobody_there(Faults::Inline, TransportKind::Shm);
}

#[test]
fn a_slab_is_carved_and_used_while_nobody_is_there_handled_over_tcp() {
    with_nobody_there(Faults::Handled(1), TransportKind::NbdTcp);
}
