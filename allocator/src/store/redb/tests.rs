//! Tests of the store in a file.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::store::{AllocationRecord, suite};
use crate::testing::allocation;

#[test]
fn committed_changes_are_there_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("new/data");
    suite::committed_changes_are_there_after_reopening(|| RedbStore::open(&data).unwrap());
    let mode = std::fs::metadata(data.join(FILE_NAME)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

fn change(store: &RedbStore, change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>) {
    store.base.write(|database| write(database, change)).unwrap();
}

#[test]
fn a_file_that_is_empty_or_gone_is_no_new_pool() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    std::fs::write(&path, "").unwrap();
    let line = RedbStore::open(directory.path()).unwrap_err().to_string();
    assert!(line.contains("empty") && line.contains("recover --from-network"), "{line}");
    RedbStore::clear(directory.path()).unwrap();
    drop(RedbStore::open(directory.path()).unwrap());
    std::fs::remove_file(&path).unwrap();
    let line = RedbStore::open(directory.path()).unwrap_err().to_string();
    assert!(line.contains("gone") && line.contains("recover --from-network"), "{line}");
    RedbStore::clear(directory.path()).unwrap();
    RedbStore::open(directory.path()).unwrap();
}

#[test]
fn only_one_process_has_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let _first = RedbStore::open(directory.path()).unwrap();
    let error = RedbStore::open(directory.path()).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let store = RedbStore::open(directory.path()).unwrap();
    change(&store, |transaction| {
        transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA + 1)?;
        Ok(())
    });
    drop(store);
    for _ in 0..2 {
        let error = RedbStore::open(directory.path()).unwrap_err();
        assert!(matches!(error, StoreError::Newer { found, .. } if found == SCHEMA + 1), "{error}");
    }
}

/// An allocation in the form of schema 1.
const FIRST_ALLOCATION: &str = r#"{"id":"00000000000000000000000000000001","name":"a","size":268435456,
    "layout":{"kind":"linear"},"region_len":268435456,"created":1,"phase":"ready","epoch":1,"owner":null,
    "revealed":false,"next":null,"grants":[{"id":"00000000000000000000000000000001",
    "appliance":"00000000000000000000000000000001",
    "key":"0707070707070707070707070707070707070707070707070707070707070707","count":1,
    "regions":["00000000000000000000000000000001"]}],"slots":[{"grant":0,"slot":0}]}"#;

#[test]
fn a_store_of_schema_1_is_updated() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(META).unwrap().insert(SCHEMA_KEY, 1).unwrap();
    let mut table = transaction.open_table(ALLOCATIONS).unwrap();
    table.insert(1, FIRST_ALLOCATION.as_bytes()).unwrap();
    drop(table);
    transaction.open_table(APPLIANCES).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let mut store = RedbStore::open(directory.path()).unwrap();
    let loaded = store.load().unwrap();
    let known = AllocationRecord { idle_since: 0, block_size: None, ..allocation(1, "a") };
    assert_eq!((loaded.allocations, loaded.revision), (vec![known], 0));
    assert_eq!(store.base.read(schema).unwrap(), Some(SCHEMA));
    assert_eq!(store.decisions().about(&"a".parse().unwrap(), 1).unwrap(), []);
}

#[test]
fn a_file_that_is_no_database_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    std::fs::write(&path, "something else, and rather important").unwrap();
    let line = RedbStore::open(directory.path()).unwrap_err().to_string();
    assert!(line.contains("cannot open"), "{line}");
    assert_eq!(std::fs::read(&path).unwrap(), b"something else, and rather important");
    std::fs::remove_file(&path).unwrap();
    let mut store = RedbStore::open(directory.path()).unwrap();
    change(&store, |transaction| {
        transaction.open_table(ALLOCATIONS)?.insert(1, b"{".as_slice())?;
        Ok(())
    });
    assert!(matches!(store.load(), Err(StoreError::Damaged { .. })));
}

#[test]
fn an_impossible_directory_is_an_error() {
    let line = RedbStore::open(Path::new("/proc/xpm")).unwrap_err().to_string();
    assert!(line.contains("/proc/xpm") && line.contains("--data"), "{line}");
}
