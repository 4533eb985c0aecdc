//! Tests that every kind of store has to pass.

use serde_json::json;
use xpm_protocol::api::allocator::{Event, MetadataState};
use xpm_protocol::api::decision::Decision;
use xpm_protocol::policy::{Content, Documents};

use super::{Batch, Change, Loaded, MetadataStore, PolicyChange};
use crate::testing::{allocation, appliance};

/// `open` opens the same store each time; the previous one is dropped by then.
pub(crate) fn committed_changes_are_there_after_reopening<S: MetadataStore>(mut open: impl FnMut() -> S) {
    let (first, second) = (allocation(1, "a"), allocation(2, "b"));
    let mut store = open();
    let made = store.load().unwrap();
    let (first_state, alive) = (made.state.unwrap(), made.alive);
    assert_eq!(made, Loaded { state: Some(first_state), alive, ..Loaded::default() });
    let batches = [
        vec![Change::Allocation(Box::new(first.clone())), Change::Appliance(Box::new(appliance(9)))],
        vec![Change::Allocation(Box::new(second.clone())), Change::AllocationGone(first.id)],
    ];
    store.commit(&batches).unwrap();
    drop(store);
    let mut store = open();
    // Each batch counts, also those of earlier openings.
    let state = MetadataState { number: first_state.number + 2, ..first_state };
    let left = Loaded {
        allocations: vec![second],
        appliances: vec![appliance(9)],
        state: Some(state),
        ..Loaded::default()
    };
    assert_eq!(store.load().unwrap(), left);
    store.commit(&[vec![Change::ApplianceGone(appliance(9).info.id)]]).unwrap();
    assert!(store.load().unwrap().appliances.is_empty());
    drop(store);
    documents_keep_their_revision(&mut open);
    decisions_are_read_newest_first_and_forgotten_by_age(&mut open);
    events_are_kept_and_forgotten_by_number(&mut open);
}

fn events_are_kept_and_forgotten_by_number<S: MetadataStore>(open: &mut impl FnMut() -> S) {
    let event = |number: u64| Event {
        number,
        at: 5,
        kind: "created".into(),
        subject: "a".parse().unwrap(),
        text: "it is there".into(),
    };
    let mut store = open();
    store.commit(&[(1..=3).map(|number| Change::Event(Box::new(event(number)))).collect()]).unwrap();
    store.commit(&[vec![Change::EventGone(1)]]).unwrap();
    drop(store);
    let mut events = open().load().unwrap().events;
    events.sort_by_key(|event| event.number);
    assert_eq!(events, [event(2), event(3)]);
}

fn documents_keep_their_revision<S: MetadataStore>(open: &mut impl FnMut() -> S) {
    let documents = documents(300);
    let mut store = open();
    store.commit(&[policy(1, documents.clone(), Documents::default())]).unwrap();
    drop(store);
    let mut store = open();
    let loaded = store.load().unwrap();
    assert_eq!((loaded.revision, sorted(loaded.documents)), (1, sorted(documents.clone())));
    store.commit(&[policy(2, Documents::default(), documents)]).unwrap();
    let loaded = store.load().unwrap();
    assert_eq!((loaded.revision, loaded.documents), (2, Documents::default()));
}

fn decisions_are_read_newest_first_and_forgotten_by_age<S: MetadataStore>(open: &mut impl FnMut() -> S) {
    let mut store = open();
    let decisions = [("a", 10, 0), ("a", 11, 0), ("a", 11, 1), ("ab", 12, 0)];
    let changes =
        decisions.map(|(name, at, count)| Change::Decision((at << 20) | count, Box::new(decision(name, at))));
    store.commit(&[changes.into()]).unwrap();
    let reader = store.decisions();
    let moments = |name: &str, most| {
        let found = reader.about(&name.parse().unwrap(), most).unwrap();
        found.iter().map(|one| one.at).collect::<Vec<_>>()
    };
    assert_eq!((moments("a", 9), moments("a", 2), moments("b", 9)), (vec![11, 11, 10], vec![11, 11], vec![]));
    store.commit(&[vec![Change::DecisionsBefore(11)]]).unwrap();
    assert_eq!((moments("a", 9), moments("ab", 9)), (vec![11, 11], vec![12]));
}

fn policy(revision: u64, changed: Documents, gone: Documents) -> Batch {
    let gone = gone.into_contents().map(|one| one.document_name()).collect();
    vec![Change::Policy(Box::new(PolicyChange { revision, changed, gone, written: Vec::new() }))]
}

/// Documents: this number of accounts.
fn documents(count: usize) -> Documents {
    let accounts: Vec<_> = (0..count).map(|number| json!({ "name": format!("account{number}") })).collect();
    serde_json::from_value(json!({ "account": accounts })).unwrap()
}

fn decision(name: &str, at: u64) -> Decision {
    serde_json::from_value(json!({
        "at": at, "name": name, "request": "1GiB", "size": 1 << 30, "seed": 1, "revision": 1, "documents": [],
        "rules": [], "demands": [], "limits": [], "appliances_total": 0, "appliances": [], "rejected": [],
        "outcome": { "outcome": "placed", "regions": 4, "region_len": 1 << 28, "appliances": 1 },
    }))
    .unwrap()
}

fn sorted(documents: Documents) -> Vec<Content> {
    let mut contents: Vec<Content> = documents.into_contents().collect();
    contents.sort_by_key(Content::document_name);
    contents
}
