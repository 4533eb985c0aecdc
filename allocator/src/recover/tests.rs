//! Tests of recovery: reports of appliances and clients, and the records that follow from them.

use xpm_protocol::api::allocator::{ChangeKind, Map, Owner};
use xpm_protocol::api::appliance::Grant;
use xpm_protocol::{ByteSize, ClientId, Epoch, GrantId, GrantKey, RegionId};

use super::{Sources, Told, recover};
use crate::store::record::{AllocationRecord, ChangeRecord, Phase, Stage};
use crate::testing::allocation;

const NOW: u64 = 1000;
const CLIENT: ClientId = ClientId::from_u128(7);

/// The grant of a record with one grant, as its appliance reports it.
fn grant(record: &AllocationRecord) -> Grant {
    let grant = &record.grants[0];
    Grant {
        id: grant.id,
        allocation: record.id,
        name: record.name.clone(),
        epoch: record.epoch,
        regions: grant.regions.clone(),
        len: ByteSize(record.region_len),
        resident: ByteSize(0),
        connections: 0,
        descriptor: record.descriptor(),
        lost: None,
    }
}

fn map(record: &AllocationRecord) -> Map {
    let shown = crate::testing::appliance(1).info;
    let grants = record.grants.iter().map(|grant| xpm_protocol::api::allocator::Grant {
        id: grant.id,
        appliance: grant.appliance,
        appliance_name: shown.name.clone(),
        endpoints: shown.endpoints.clone(),
        key: grant.key.clone(),
        regions: grant.count,
    });
    Map {
        name: record.name.clone(),
        id: record.id,
        epoch: record.epoch,
        version: record.version,
        size: ByteSize(record.size),
        layout: record.layout,
        region_len: ByteSize(record.region_len),
        grants: grants.collect(),
        regions: record.slots.clone(),
        slabs: record.slabs.clone(),
        block_size: None,
    }
}

fn owner(client: ClientId) -> Option<Owner> {
    Some(Owner { client, host_name: "web1".into(), purpose: "ublk".into(), since: 5, life: None })
}

fn told(grants: Vec<Grant>, maps: Vec<Map>) -> (Vec<AllocationRecord>, String) {
    let mut told = Told::default();
    grants.into_iter().for_each(|grant| told.take("http://a1", grant));
    maps.into_iter().for_each(|map| told.take_map(Some(CLIENT), map));
    let mut dice = |bytes: &mut [u8]| {
        bytes.fill(0x55);
        Ok(())
    };
    let (records, lines) = told.put_together(NOW, &mut dice).unwrap();
    (records, lines.join("\n"))
}

#[test]
fn all_is_as_before_if_the_client_has_its_map() {
    let mut record = AllocationRecord { owner: owner(CLIENT), revealed: true, ..allocation(1, "a") };
    record.terms.reclaimable = true;
    record.terms.account = Some("batch".parse().unwrap());
    let (records, lines) = told(vec![grant(&record)], vec![map(&record)]);
    // No change number is used a second time.
    assert_eq!(records, [AllocationRecord { changes: NOW << 20, ..record }]);
    assert!(lines.contains("`a` of 256MiB is recovered\n"), "{lines}");
}

#[test]
fn a_client_with_the_keys_is_the_owner_though_no_appliance_knows() {
    let record = allocation(1, "a");
    let (records, _) = told(vec![grant(&record)], vec![map(&record)]);
    let by = records[0].owner.as_ref().unwrap();
    assert_eq!((by.client, by.since), (CLIENT, NOW));
    assert_eq!((&records[0].grants[0].key, records[0].revealed), (&record.grants[0].key, true));
    assert_eq!(records[0].next, None);
}

#[test]
fn an_allocation_used_by_an_unknown_client_has_an_owner() {
    let record = allocation(1, "a");
    let used = Grant { connections: 2, ..grant(&record) };
    let (records, lines) = told(vec![used], Vec::new());
    assert_eq!(records[0].owner.as_ref().unwrap().client, ClientId::from_u128(0));
    assert!(lines.contains("only with force"), "{lines}");
    let (records, _) = told(vec![grant(&record)], Vec::new());
    assert_eq!(records[0].owner, None, "nobody is seen to use it");
}

#[test]
fn missing_keys_are_made_anew_for_the_next_epoch() {
    let record = AllocationRecord { owner: owner(CLIENT), revealed: true, ..allocation(1, "a") };
    let old = AllocationRecord { epoch: Epoch(0), ..record.clone() };
    for maps in [Vec::new(), vec![map(&old)]] {
        let (records, lines) = told(vec![grant(&record)], maps.clone());
        let next = records[0].next.as_ref().unwrap();
        assert_eq!((next.epoch, next.keys.len()), (Epoch(2), 1));
        assert_eq!(records[0].owner, record.owner);
        assert_ne!(records[0].grants[0].key, record.grants[0].key);
        assert_eq!(lines.contains("cut off"), !maps.is_empty(), "{lines}");
    }
}

#[test]
fn the_newest_descriptor_counts() {
    let made = allocation(1, "a");
    let owned = AllocationRecord { owner: owner(CLIENT), revealed: true, ..made.clone() };
    let left = AllocationRecord { owner: None, ..owned.clone() };
    let raised = AllocationRecord { epoch: Epoch(2), ..owned.clone() };
    let ages = [made, owned, left, raised];
    for newest in 1..ages.len() {
        let mut grants: Vec<Grant> = ages[..=newest].iter().map(grant).collect();
        grants.iter_mut().for_each(|grant| grant.epoch = ages[newest].epoch);
        for _ in 0..2 {
            grants.reverse();
            let (records, _) = told(grants.clone(), Vec::new());
            assert_eq!((records[0].epoch, &records[0].owner), (ages[newest].epoch, &ages[newest].owner));
        }
    }
}

#[test]
fn an_unfinished_change_of_owner_is_reported_and_ends_with_the_next() {
    let mut record = allocation(1, "a");
    let mut second = record.grants[0].clone();
    (second.id, second.regions) = (GrantId::from_u128(2), vec![RegionId::from_u128(2)]);
    record.grants.push(second.clone());
    let raised = AllocationRecord { epoch: Epoch(2), owner: owner(CLIENT), ..record.clone() };
    let late = Grant { id: second.id, regions: second.regions, ..grant(&record) };
    let (records, lines) = told(vec![grant(&raised), late], vec![map(&record)]);
    assert!(lines.contains("on its way to another owner") && lines.contains("cut off"), "{lines}");
    assert_eq!(records[0].epoch, Epoch(2));
    assert_eq!(records[0].next.as_ref().map(|next| next.epoch), Some(Epoch(3)));
}

#[test]
fn missing_grants_are_reported_and_stay_in_the_record() {
    let mut record = allocation(1, "a");
    let mut second = record.grants[0].clone();
    (second.id, second.regions) = (GrantId::from_u128(2), vec![RegionId::from_u128(2)]);
    record.grants.push(second);
    let (records, lines) = told(vec![grant(&record)], Vec::new());
    assert_eq!(records[0].grants.len(), 2);
    assert!(lines.contains("lacks 1 of its 2 grants"), "{lines}");
}

#[test]
fn a_region_claimed_twice_belongs_to_the_older_allocation() {
    let first = allocation(1, "a");
    let mut second = AllocationRecord { created: 2, ..allocation(2, "b") };
    second.grants[0].regions = first.grants[0].regions.clone();
    let (records, lines) = told(vec![grant(&second), grant(&first)], Vec::new());
    assert_eq!(records.iter().map(|one| one.id).collect::<Vec<_>>(), [first.id]);
    assert!(lines.contains("`b` is left out") && lines.contains("is in `a` too"), "{lines}");
}

#[test]
fn the_older_of_two_allocations_keeps_the_name() {
    let second = AllocationRecord { created: 2, ..allocation(1, "a") };
    let (records, lines) = told(vec![grant(&second), grant(&allocation(2, "a"))], Vec::new());
    let names: Vec<_> = records.iter().map(|one| (one.id.as_u128(), one.name.to_string())).collect();
    assert_eq!(names, [(2, "a".to_owned()), (1, "a-2".to_owned())]);
    assert!(lines.contains("two allocations are named `a`"), "{lines}");
}

#[test]
fn a_client_map_replaces_missing_descriptors() {
    let record = allocation(1, "a");
    let silent = Grant { descriptor: None, ..grant(&record) };
    let (records, _) = told(vec![silent.clone()], vec![map(&record)]);
    assert_eq!((&records[0].grants, &records[0].slots), (&record.grants, &record.slots));
    assert_eq!((records[0].size, records[0].next.is_none()), (record.size, true));
    let (records, lines) = told(Vec::new(), vec![map(&record)]);
    assert!(records.is_empty() && lines.contains("not all that it has was told"), "{lines}");
    for strange in [None, Some("{}".to_owned()), allocation(2, "b").descriptor()] {
        let (records, lines) = told(vec![Grant { descriptor: strange, ..silent.clone() }], Vec::new());
        assert!(records.is_empty() && lines.contains("found again as garbage"), "{lines}");
    }
}

/// A record with a change to another grant, and the grants of both sides as the appliance reports them.
fn changing(stage: Stage) -> (AllocationRecord, Grant, Grant) {
    let mut record = AllocationRecord { changes: 1, ..allocation(1, "a") };
    let mut other = record.grants[0].clone();
    (other.id, other.regions, other.key) =
        (GrantId::from_u128(2), vec![RegionId::from_u128(2)], GrantKey::from_bytes([8; 32]));
    record.change = Some(Box::new(ChangeRecord {
        number: 1,
        kind: ChangeKind::Move,
        stage,
        since: 1,
        size: record.size,
        grants: vec![other],
        slots: record.slots.clone(),
        moved: vec![0],
        rate: None,
    }));
    let now = grant(&record);
    let regions = vec![RegionId::from_u128(2)];
    let other = Grant { id: GrantId::from_u128(2), regions, ..now.clone() };
    (record, now, other)
}

fn grant_of(told: &(Vec<AllocationRecord>, String)) -> u128 {
    assert_eq!((told.0[0].phase, &told.0[0].change), (Phase::Ready, &None));
    told.0[0].grants[0].id.as_u128()
}

#[test]
fn a_change_keeps_the_side_of_the_client_map_or_of_existing_grants() {
    let (record, now, other) = changing(Stage::Open);
    assert_eq!(grant_of(&told(vec![now.clone(), other.clone()], Vec::new())), 1);
    assert_eq!(grant_of(&told(vec![other.clone()], Vec::new())), 2, "what was before is given back already");
    assert_eq!(grant_of(&told(vec![now.clone(), other.clone()], vec![map(&record)])), 1);
    let unheard = told(vec![other.clone()], vec![map(&record)]);
    assert_eq!(grant_of(&unheard), 2, "though its owner has not heard of that");
    let newer = Map { version: 1, ..map(&record) };
    assert_eq!(grant_of(&told(vec![now, other], vec![newer])), 2);
}

#[test]
fn a_switched_change_is_reverted_only_for_an_owner_that_has_not_heard() {
    let (mut record, now, other) = changing(Stage::Switched);
    let old = map(&record);
    record.version = 1;
    let now = Grant { descriptor: record.descriptor(), ..now };
    let other = Grant { descriptor: None, ..other };
    let both = || vec![now.clone(), other.clone()];
    assert_eq!(grant_of(&told(both(), vec![map(&record)])), 1);
    assert_eq!(grant_of(&told(both(), Vec::new())), 1);
    let (records, _) = told(both(), vec![old.clone()]);
    assert_eq!(records[0].version, 0, "the owner writes to both places until it hears");
    assert_eq!(records[0].grants[0].id, other.id);
    assert_eq!(
        grant_of(&told(vec![now.clone()], vec![old.clone()])),
        1,
        "what was before is given back already"
    );
    let cut_off = Map { epoch: Epoch(0), ..old };
    assert_eq!(grant_of(&told(both(), vec![cut_off])), 1);
}

#[test]
fn a_change_that_was_not_ready_is_given_up() {
    let (_, now, other) = changing(Stage::Preparing);
    assert_eq!(grant_of(&told(vec![now, other], Vec::new())), 1);
}

#[tokio::test]
async fn a_silent_appliance_is_left_out_only_with_partial() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|one| one.local_addr()).unwrap();
    let mut sources = Sources { appliances: vec![format!("http://{closed}")], ..Sources::default() };
    let error = recover(&sources, NOW).await.unwrap_err().to_string();
    assert!(error.contains("tells nothing") && error.contains("--partial"), "{error}");
    sources.partial = true;
    let recovered = recover(&sources, NOW).await.unwrap();
    assert!(recovered.lines[0].contains("tells nothing"), "{:?}", recovered.lines);
}

#[tokio::test]
async fn the_state_directory_of_a_client_has_its_id() {
    let record = allocation(1, "a");
    let directory = tempfile::tempdir().unwrap();
    let devices = directory.path().join("devices");
    std::fs::create_dir(&devices).unwrap();
    let kept = serde_json::json!({ "version": 2, "map": map(&record), "more": 1 });
    std::fs::write(devices.join("a.json"), kept.to_string()).unwrap();
    std::fs::write(devices.join("a.new"), "half").unwrap();
    std::fs::write(devices.join("b.json"), "{").unwrap();
    let mut told = Told::default();
    told.read(directory.path()).unwrap();
    assert!(
        told.lines.iter().any(|line| line.contains("whose maps these are is unknown")),
        "{:?}",
        told.lines
    );
    assert_eq!(told.lines.iter().filter(|line| line.contains("no record of a device")).count(), 1);
    assert_eq!(told.maps[&record.id].client, None);
    std::fs::write(directory.path().join("client-id"), format!("{CLIENT}\n")).unwrap();
    let mut told = Told::default();
    told.read(directory.path()).unwrap();
    assert_eq!(told.maps[&record.id].client, Some(CLIENT));
    std::fs::write(directory.path().join("client-id"), "x").unwrap();
    assert!(format!("{:#}", told.read(directory.path()).unwrap_err()).contains("damaged"));
    assert!(told.read(&devices).is_err(), "it is no state directory");
}
