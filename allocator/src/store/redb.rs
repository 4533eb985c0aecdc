//! Metadata in one redb file, `allocator.redb` of the data directory.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError,
    WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Batch, Change, Loaded, MetadataStore, SCHEMA, StoreError};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "allocator.redb";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ALLOCATIONS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("allocations");
const APPLIANCES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("appliances");
/// Key in `META` of the version of the stored form.
const SCHEMA_KEY: &str = "schema";

/// Metadata in a redb file, which it holds locked.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
    path: PathBuf,
}

impl RedbStore {
    /// Opens the store in the directory, and makes both where they are missing: the directory
    /// with mode 0700 and the file, which holds keys, with mode 0600.
    pub fn open(directory: &Path) -> Result<RedbStore, StoreError> {
        let path = directory.join(FILE_NAME);
        let unusable = |source| StoreError::Directory { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(unusable)?;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(unusable)?;
        let opened =
            FileBackend::new(file).and_then(|backend| Database::builder().create_with_backend(backend));
        let database = opened.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path: path.clone() },
            other => {
                StoreError::Database { doing: "open", path: path.clone(), source: Box::new(other.into()) }
            }
        })?;
        let store = RedbStore { database, path };
        store.settle_schema()?;
        Ok(store)
    }

    /// Refuses a newer schema before anything is written; makes the tables of a new file.
    fn settle_schema(&self) -> Result<(), StoreError> {
        match self.schema().map_err(|error| self.failed("read", error))? {
            Some(found) if found > SCHEMA => {
                Err(StoreError::Newer { path: self.path.clone(), found, known: SCHEMA })
            }
            Some(_) => Ok(()),
            None => self.write(create_tables),
        }
    }

    fn schema(&self) -> Result<Option<u64>, redb::Error> {
        let transaction = self.database.begin_read()?;
        match transaction.open_table(META) {
            Ok(table) => Ok(table.get(SCHEMA_KEY)?.map(|value| value.value())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let written = || -> Result<(), redb::Error> {
            // The default durability: commit returns after the data is on disk (fdatasync).
            let transaction = self.database.begin_write()?;
            change(&transaction)?;
            Ok(transaction.commit()?)
        };
        written().map_err(|error| self.failed("write", error))
    }

    fn read<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, u128, &'static [u8]>,
    ) -> Result<Vec<T>, StoreError> {
        let values = || -> Result<Vec<(u128, Vec<u8>)>, redb::Error> {
            let transaction = self.database.begin_read()?;
            let table = transaction.open_table(table)?;
            table
                .iter()?
                .map(|entry| {
                    entry.map(|(key, value)| (key.value(), value.value().to_vec())).map_err(Into::into)
                })
                .collect()
        };
        let values = values().map_err(|error| self.failed("read", error))?;
        values.iter().map(|(key, value)| self.decode(*key, value)).collect()
    }

    fn decode<T: DeserializeOwned>(&self, key: u128, value: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(value).map_err(|error| StoreError::Damaged {
            path: self.path.clone(),
            what: format!("the value of {key:032x} cannot be read: {error}"),
        })
    }

    fn failed(&self, doing: &'static str, error: redb::Error) -> StoreError {
        StoreError::Database { doing, path: self.path.clone(), source: Box::new(error) }
    }
}

impl MetadataStore for RedbStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded { allocations: self.read(ALLOCATIONS)?, appliances: self.read(APPLIANCES)? })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        self.write(|transaction| batches.iter().flatten().try_for_each(|change| apply(transaction, change)))
    }
}

fn create_tables(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA)?;
    transaction.open_table(ALLOCATIONS)?;
    transaction.open_table(APPLIANCES)?;
    Ok(())
}

fn apply(transaction: &WriteTransaction, change: &Change) -> Result<(), redb::Error> {
    let mut allocations = transaction.open_table(ALLOCATIONS)?;
    let mut appliances = transaction.open_table(APPLIANCES)?;
    match change {
        Change::Allocation(record) => {
            allocations.insert(record.id.as_u128(), encode(record)?.as_slice())?;
        }
        Change::AllocationGone(id) => drop(allocations.remove(id.as_u128())?),
        Change::Appliance(record) => {
            appliances.insert(record.info.id.as_u128(), encode(record)?.as_slice())?;
        }
        Change::ApplianceGone(id) => drop(appliances.remove(id.as_u128())?),
    }
    Ok(())
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(io::Error::from(error)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::testing::{allocation, appliance};

    #[test]
    fn what_is_committed_is_there_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("new/data");
        let (first, second) = (allocation(1, "a"), allocation(2, "b"));
        let mut store = RedbStore::open(&data).unwrap();
        assert_eq!(store.load().unwrap(), Loaded::default());
        let batches = [
            vec![Change::Allocation(Box::new(first.clone())), Change::Appliance(Box::new(appliance(9)))],
            vec![Change::Allocation(Box::new(second.clone())), Change::AllocationGone(first.id)],
        ];
        store.commit(&batches).unwrap();
        drop(store);
        let mode = std::fs::metadata(data.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut store = RedbStore::open(&data).unwrap();
        assert_eq!(
            store.load().unwrap(),
            Loaded { allocations: vec![second], appliances: vec![appliance(9)] }
        );
        store.commit(&[vec![Change::ApplianceGone(appliance(9).info.id)]]).unwrap();
        assert!(store.load().unwrap().appliances.is_empty());
    }

    #[test]
    fn only_one_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let _first = RedbStore::open(directory.path()).unwrap();
        let error = RedbStore::open(directory.path()).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let store = RedbStore::open(directory.path()).unwrap();
        store
            .write(|transaction| {
                transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA + 1).map(|_| ()).map_err(Into::into)
            })
            .unwrap();
        drop(store);
        for _ in 0..2 {
            let error = RedbStore::open(directory.path()).unwrap_err();
            assert!(matches!(error, StoreError::Newer { found, .. } if found == SCHEMA + 1), "{error}");
        }
    }

    #[test]
    fn what_is_no_database_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        std::fs::write(&path, "something else, and rather important").unwrap();
        let line = RedbStore::open(directory.path()).unwrap_err().to_string();
        assert!(line.contains("cannot open"), "{line}");
        assert_eq!(std::fs::read(&path).unwrap(), b"something else, and rather important");
        std::fs::remove_file(&path).unwrap();
        let mut store = RedbStore::open(directory.path()).unwrap();
        store
            .write(|transaction| {
                transaction
                    .open_table(ALLOCATIONS)?
                    .insert(1, b"{".as_slice())
                    .map(|_| ())
                    .map_err(Into::into)
            })
            .unwrap();
        assert!(matches!(store.load(), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn a_directory_that_cannot_be_made() {
        let line = RedbStore::open(Path::new("/proc/xpm")).unwrap_err().to_string();
        assert!(line.contains("/proc/xpm") && line.contains("--data"), "{line}");
    }
}
