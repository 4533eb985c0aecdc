//! The table of regions with real memory: grants, fences, moves and clearing.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use xpm_protocol::api::appliance::RegionState as ApiState;
use xpm_protocol::units::Span;
use xpm_protocol::{AllocationId, Epoch};

use super::*;
use crate::arena::Backing;
use crate::keep::ReturnedGrant;
use crate::ledger::Grant;

const LEN: u64 = 16 << 20;
const GRANT: GrantId = GrantId::from_u128(1);

/// Counts the calls to close a group, and reports a set number of clients that did not let go.
#[derive(Default)]
struct CountingFence(AtomicUsize, AtomicUsize);

impl Fence for CountingFence {
    fn close_group(&self, group: u128) -> usize {
        assert!((1..3).contains(&group));
        self.0.fetch_add(1, SeqCst);
        self.1.load(SeqCst)
    }

    fn connections(&self, _group: u128) -> usize {
        2
    }
}

fn table_of(backing: &Backing, regions: u64) -> (Table, Arc<CountingFence>) {
    let capacity = regions * LEN;
    let arena = Arena::new(backing, capacity, true).unwrap();
    let table = Table::start(arena, capacity, Stock { region_len: LEN, target: capacity }).unwrap();
    let fence = Arc::new(CountingFence::default());
    table.add_fence(fence.clone());
    (table, fence)
}

fn order(count: u32, len: u64, ttl: Duration) -> Reserve {
    Reserve { allocation: AllocationId::from_u128(1), count, region_len: ByteSize(len), ttl: Span(ttl) }
}

fn commit(epoch: u64, key: u8, regions: Vec<RegionId>) -> Commit {
    Commit {
        allocation: AllocationId::from_u128(1),
        name: "a".parse().unwrap(),
        epoch: Epoch(epoch),
        key: GrantKey::from_bytes([key; 32]),
        regions,
        from: None,
        descriptor: None,
    }
}

fn granted(table: &Table, count: u32) -> Vec<RegionId> {
    let regions = table.reserve(&order(count, LEN, Duration::from_secs(60))).unwrap();
    let ids: Vec<_> = regions.into_iter().map(|region| region.id).collect();
    table.commit(GRANT, &commit(1, 1, ids.clone())).unwrap();
    ids
}

fn open(table: &Table, key: u8) -> Option<Arc<Lease>> {
    table.open(&GrantKey::from_bytes([key; 32]))
}

/// Waits for the table's threads; the test fails after a time limit.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < limit, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn all_ready(table: &Table) -> bool {
    let summary = table.summary();
    summary.totals.ready == summary.capacity
}

#[test]
fn the_stock_is_made_ahead_of_need() {
    let (table, _) = table_of(&Backing::Memfd, 4);
    eventually("four ready regions", || all_ready(&table));
    assert!(
        table.regions().iter().all(|region| region.resident == region.len && region.state == ApiState::Ready)
    );
    let regions = table.reserve(&order(3, LEN, Duration::from_secs(60))).unwrap();
    assert_eq!(regions.len(), 3);
    let summary = table.summary();
    assert_eq!((summary.totals.reserved, summary.free), (3 * LEN, LEN));
}

#[test]
fn invalid_orders_are_refused() {
    let (table, _) = table_of(&Backing::Memfd, 1);
    let second = Duration::from_secs(1);
    for bad in [
        order(0, LEN, second),
        order(5000, LEN, second),
        order(1, LEN + 1, second),
        order(1, LEN / 2, second),
        order(1, LEN, Duration::ZERO),
        order(1, LEN, Duration::from_secs(4000)),
    ] {
        assert_eq!(table.reserve(&bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
    }
    assert_eq!(table.reserve(&order(2, LEN, second)).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(table.reserve(&order(4096, 64 << 30, second)).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_reservation_without_a_grant_is_undone() {
    let (table, _) = table_of(&Backing::Memfd, 2);
    let regions = table.reserve(&order(2, LEN, Duration::from_millis(50))).unwrap();
    eventually("all free again", || all_ready(&table));
    let ids = regions.into_iter().map(|region| region.id).collect();
    assert_eq!(table.commit(GRANT, &commit(1, 1, ids)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_failure_to_make_memory_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (table, _) = table_of(&Backing::File(directory.path().join("memory")), 4);
    eventually("four ready regions", || all_ready(&table));
    let regions = table.reserve(&order(4, LEN, Duration::from_secs(60))).unwrap();
    // Two free regions that do not touch: the first and the third of the file, in the order of creation.
    table.delete_region(regions[0].id).unwrap();
    table.delete_region(regions[2].id).unwrap();
    let result = table.reserve(&order(1, 2 * LEN, Duration::from_secs(60)));
    // Whether they touch depends on which thread made which region; the sums are right in either case.
    match result {
        Ok(regions) => assert_eq!(regions[0].len.0, 2 * LEN),
        Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace),
    }
    let Summary { totals, capacity, .. } = table.summary();
    assert!(totals.used() <= capacity);
}

#[test]
fn a_raised_epoch_shuts_the_old_key_out() {
    let (table, fence) = table_of(&Backing::Memfd, 2);
    let ids = granted(&table, 2);
    let old = open(&table, 1).unwrap();
    old.at(0, 4).unwrap().copy_from_slice(b"page");
    assert_eq!(table.commit(GRANT, &commit(1, 1, ids.clone())).unwrap().connections, 2);
    assert_eq!(fence.0.load(SeqCst), 0, "the same again changes nothing");

    assert_eq!(table.commit(GRANT, &commit(3, 3, ids.clone())).unwrap().epoch, Epoch(3));
    assert_eq!(fence.0.load(SeqCst), 1);
    assert!(!old.is_alive() && old.begin_step().is_none());
    assert!(open(&table, 1).is_none());
    assert_eq!(table.commit(GRANT, &commit(2, 2, ids)).unwrap_err().kind(), ErrorKind::Conflict);
    let new = open(&table, 3).unwrap();
    assert!(Arc::ptr_eq(&new.regions()[0], &old.regions()[0]), "memory that nobody else has is not moved");
}

#[test]
fn memory_that_was_shared_is_moved_whether_or_not_the_process_is_still_connected() {
    for remaining in [0, 1] {
        let (table, fence) = table_of(&Backing::Memfd, 2);
        let ids = granted(&table, 2);
        open(&table, 1).unwrap().at(LEN, 4).unwrap().copy_from_slice(b"page");
        let (_, shared) = table.open_shared(&GrantKey::from_bytes([1; 32])).unwrap();
        assert_eq!(shared.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [LEN, LEN]);

        fence.1.store(remaining, SeqCst);
        table.commit(GRANT, &commit(2, 2, ids.clone())).unwrap();
        rustix::io::pwrite(&*shared[1].0, b"late", 0).unwrap();
        let mut found = [0; 4];
        let (_, moved) = table.open_shared(&GrantKey::from_bytes([2; 32])).unwrap();
        rustix::io::pread(&*moved[1].0, &mut found, 0).unwrap();
        assert_eq!(&found, b"page", "a late write landed");
        rustix::io::pread(&*shared[0].0, &mut found, 0).unwrap();
        assert_eq!(found, [0; 4], "and it sees nothing of what comes");
    }
}

/// A client with the other grant's key may have the memory, too.
#[test]
fn a_raised_epoch_closes_other_grants_of_its_regions() {
    let (table, _) = table_of(&Backing::Memfd, 2);
    let ids = granted(&table, 2);
    let heir = GrantId::from_u128(2);
    let take = |epoch| Commit { from: Some(GRANT), ..commit(epoch, 2, ids.clone()) };
    assert_eq!(table.commit(heir, &take(2)).unwrap_err().kind(), ErrorKind::Conflict, "of another epoch");
    table.commit(heir, &take(1)).unwrap();
    let old = table.lease(heir).unwrap();
    table.commit(GRANT, &commit(3, 3, ids)).unwrap();
    assert!(!old.is_alive() && open(&table, 2).is_none() && open(&table, 3).is_some());
}

#[test]
fn shared_memory_is_cleared_and_never_lent_again() {
    let (table, _) = table_of(&Backing::Memfd, 1);
    eventually("one ready region", || all_ready(&table));
    granted(&table, 1);
    let (_, shared) = table.open_shared(&GrantKey::from_bytes([1; 32])).unwrap();
    rustix::io::pwrite(&*shared[0].0, b"secret", 0).unwrap();
    table.delete_grant(GRANT).unwrap();
    eventually("one ready region again", || all_ready(&table));
    let mut found = [1; 6];
    rustix::io::pread(&*shared[0].0, &mut found, 0).unwrap();
    assert_eq!(found, [0; 6], "who still has it sees zeros");
    rustix::io::pwrite(&*shared[0].0, b"poison", 0).unwrap();
    let next = table.reserve(&order(1, LEN, Duration::from_secs(60))).unwrap();
    assert_eq!(
        table.commit(GRANT, &commit(2, 2, vec![next[0].id])).unwrap_err().kind(),
        ErrorKind::Conflict,
        "a grant that was deleted is not made again"
    );
    table.commit(GrantId::from_u128(2), &commit(1, 2, vec![next[0].id])).unwrap();
    let (_, next) = table.open_shared(&GrantKey::from_bytes([2; 32])).unwrap();
    rustix::io::pread(&*next[0].0, &mut found, 0).unwrap();
    assert_eq!(found, [0; 6]);
}

#[test]
fn a_region_that_a_connection_still_holds_is_not_lent() {
    let (table, _) = table_of(&Backing::Memfd, 1);
    granted(&table, 1);
    let held = open(&table, 1).unwrap();
    table.delete_grant(GRANT).unwrap();
    table.delete_grant(GRANT).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(table.summary().totals.clearing, LEN);
    assert_eq!(table.reserve(&order(1, LEN, Duration::from_secs(1))).unwrap_err().kind(), ErrorKind::NoSpace);
    drop(held);
    eventually("ready again", || all_ready(&table));
}

#[test]
fn a_file_is_not_shared() {
    let directory = tempfile::tempdir().unwrap();
    let (table, _) = table_of(&Backing::File(directory.path().join("memory")), 1);
    granted(&table, 1);
    assert!(open(&table, 1).is_some());
    assert!(table.open_shared(&GrantKey::from_bytes([1; 32])).is_none());
}

#[test]
fn regions_of_another_size_take_the_place_of_ready_ones() {
    let (table, _) = table_of(&Backing::Memfd, 8);
    eventually("eight ready regions", || all_ready(&table));
    let regions = table.reserve(&order(2, 4 * LEN, Duration::from_secs(60))).unwrap();
    let ids: Vec<_> = regions.iter().map(|region| region.id).collect();
    table.commit(GRANT, &commit(1, 1, ids)).unwrap();
    assert_eq!(table.shared.lock().ledger.leaving(), 0, "granted before the old ones were gone");
    assert_eq!(table.summary().totals.used(), 8 * LEN);
    eventually("all faulted in", || table.summary().resident == 8 * LEN);
}

/// A process that connected to an earlier life may have the memory mapped, and no connection shows it any
/// more.
#[test]
fn memory_that_was_shared_in_an_earlier_life_is_moved_away() {
    for (shared, moved) in [(true, true), (false, false)] {
        let arena = Arena::new(&Backing::Memfd, 2 * LEN, true).unwrap();
        let before = arena.make(LEN, 0).unwrap();
        before.at(0, 4).copy_from_slice(b"page");
        let descriptor = before.share().try_clone().unwrap();
        let memory = arena.take_back((before.memfd().unwrap(), descriptor), LEN, shared, None).unwrap();
        let region = RegionId::from_u128(5);
        let order = commit(1, 1, vec![region]);
        let grant = Grant {
            allocation: order.allocation,
            name: order.name.clone(),
            epoch: order.epoch,
            key: order.key.clone(),
            regions: order.regions,
            descriptor: None,
            closing: false,
        };
        let memories = vec![(region, Arc::new(memory))];
        let grants = vec![ReturnedGrant { id: GRANT, grant, memories, closed: false, holder: None }];
        let returned = Returned { grants, gone: vec![GrantId::from_u128(9)], ..Returned::default() };
        let stock = Stock { region_len: LEN, target: 0 };
        let table = Table::start_with(arena, 2 * LEN, stock, Keeper::none(), returned).unwrap();
        assert!(table.open(&order.key).is_some(), "the key is known");
        assert!(table.commit(GrantId::from_u128(9), &commit(1, 3, vec![region])).is_err(), "it was deleted");

        table.commit(GRANT, &commit(2, 2, vec![region])).unwrap();
        before.at(0, 4).copy_from_slice(b"late");
        let mut found = [0; 4];
        table.lease(GRANT).unwrap().at(0, 4).unwrap().copy_to_slice(&mut found);
        assert_eq!(&found, if moved { b"page" } else { b"late" });
    }
}
