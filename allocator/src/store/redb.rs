//! Metadata in one redb file, `allocator.redb` of the data directory.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, Key, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition,
    TableError, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xpm_protocol::Name;
use xpm_protocol::api::decision::Decision;
use xpm_protocol::policy::Documents;

use super::{Batch, Change, Decisions, Loaded, MetadataStore, PolicyChange, SCHEMA, StoreError};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "allocator.redb";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ALLOCATIONS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("allocations");
const APPLIANCES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("appliances");
/// By kind and name.
const DOCUMENTS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("documents");
/// Texts of documents, by kind and name. Older programs neither make nor read it.
const WRITTEN: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("written");
/// By name and number.
const DECISIONS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("decisions");
/// By number. A store without it has no events yet: older programs neither make nor read it.
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
/// Memory for the database's pages, in bytes. Everything is read once, at the start, and what is written is
/// small.
const CACHE_LEN: usize = 32 << 20;
/// Key in `META` of the version of the stored form.
const SCHEMA_KEY: &str = "schema";
/// Key in `META` of the revision of the documents.
const REVISION_KEY: &str = "revision";
/// Key in `META` of the moment at which the allocator was there last.
const ALIVE_KEY: &str = "alive";

/// Metadata in a redb file, which it holds locked.
#[derive(Debug)]
pub struct RedbStore {
    database: Arc<Database>,
    path: PathBuf,
}

/// Reads decisions beside the one who writes.
#[derive(Debug)]
struct RedbDecisions {
    database: Arc<Database>,
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
        let opened = FileBackend::new(file)
            .and_then(|backend| Database::builder().set_cache_size(CACHE_LEN).create_with_backend(backend));
        let database = opened.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path: path.clone() },
            other => {
                StoreError::Database { doing: "open", path: path.clone(), source: Box::new(other.into()) }
            }
        })?;
        let store = RedbStore { database: Arc::new(database), path };
        store.settle_schema()?;
        Ok(store)
    }

    /// Refuses a newer schema before anything is written; makes the tables of a new file.
    fn settle_schema(&self) -> Result<(), StoreError> {
        match self.schema().map_err(|error| self.failed("read", error))? {
            Some(found) if found > SCHEMA => {
                Err(StoreError::Newer { path: self.path.clone(), found, known: SCHEMA })
            }
            Some(SCHEMA) => Ok(()),
            // New tables are all that older schemas lack.
            Some(_) | None => self.write(create_tables),
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
        let mut values = Vec::new();
        let mut read = || -> Result<Result<(), StoreError>, redb::Error> {
            let transaction = self.database.begin_read()?;
            for entry in transaction.open_table(table)?.iter()? {
                let (key, value) = entry?;
                match decode(&self.path, &format!("{:032x}", key.value()), value.value()) {
                    Ok(value) => values.push(value),
                    Err(damaged) => return Ok(Err(damaged)),
                }
            }
            Ok(Ok(()))
        };
        read().map_err(|error| self.failed("read", error))??;
        Ok(values)
    }

    /// Values of a table that older programs do not have, without those that cannot be read.
    fn read_beside<K: Key + 'static, T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, K, &'static [u8]>,
    ) -> Result<Vec<T>, StoreError> {
        let read = || -> Result<Vec<T>, redb::Error> {
            let table = match self.database.begin_read()?.open_table(table) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let mut values = Vec::new();
            for entry in table.iter()? {
                values.extend(serde_json::from_slice::<T>(entry?.1.value()));
            }
            Ok(values)
        };
        read().map_err(|error| self.failed("read", error))
    }

    fn read_policy(&self) -> Result<(u64, Documents), StoreError> {
        let read = || -> Result<(u64, Vec<Vec<u8>>), redb::Error> {
            let transaction = self.database.begin_read()?;
            let revision = transaction.open_table(META)?.get(REVISION_KEY)?.map_or(0, |value| value.value());
            let table = transaction.open_table(DOCUMENTS)?;
            let values: Result<_, redb::Error> =
                table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect();
            Ok((revision, values?))
        };
        let (revision, values) = read().map_err(|error| self.failed("read", error))?;
        let mut documents = Documents::default();
        for value in &values {
            documents.extend(decode::<Documents>(&self.path, "document", value)?.into_contents());
        }
        Ok((revision, documents))
    }

    fn read_meta(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let read = || -> Result<Option<u64>, redb::Error> {
            let table = self.database.begin_read()?.open_table(META)?;
            Ok(table.get(key)?.map(|value| value.value()))
        };
        read().map_err(|error| self.failed("read", error))
    }

    fn failed(&self, doing: &'static str, error: redb::Error) -> StoreError {
        failed(&self.path, doing, error)
    }
}

fn failed(path: &Path, doing: &'static str, error: redb::Error) -> StoreError {
    StoreError::Database { doing, path: path.to_owned(), source: Box::new(error) }
}

fn decode<T: DeserializeOwned>(path: &Path, what: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value).map_err(|error| StoreError::Damaged {
        path: path.to_owned(),
        what: format!("the value of {what} cannot be read: {error}"),
    })
}

impl MetadataStore for RedbStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let (revision, documents) = self.read_policy()?;
        Ok(Loaded {
            allocations: self.read(ALLOCATIONS)?,
            appliances: self.read(APPLIANCES)?,
            documents,
            revision,
            alive: self.read_meta(ALIVE_KEY)?,
            written: self.read_beside(WRITTEN)?,
            events: self.read_beside(EVENTS)?,
        })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut tables = Tables::open(transaction)?;
            batches.iter().flatten().try_for_each(|change| tables.apply(change))
        })
    }

    fn decisions(&self) -> Box<dyn Decisions> {
        Box::new(RedbDecisions { database: self.database.clone(), path: self.path.clone() })
    }
}

impl Decisions for RedbDecisions {
    fn about(&self, name: &Name, most: usize) -> Result<Vec<Decision>, StoreError> {
        let read = || -> Result<Vec<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(DECISIONS)?;
            let found = table.range((name.as_str(), 0)..=(name.as_str(), u64::MAX))?.rev().take(most);
            found.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        };
        let values = read().map_err(|error| failed(&self.path, "read", error))?;
        values.iter().map(|value| decode(&self.path, &format!("decision about {name}"), value)).collect()
    }
}

fn create_tables(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA)?;
    Tables::open(transaction).map(drop)
}

/// The tables of one transaction.
struct Tables<'t> {
    meta: Table<'t, &'static str, u64>,
    allocations: Table<'t, u128, &'static [u8]>,
    appliances: Table<'t, u128, &'static [u8]>,
    documents: Table<'t, (&'static str, &'static str), &'static [u8]>,
    decisions: Table<'t, (&'static str, u64), &'static [u8]>,
    written: Table<'t, (&'static str, &'static str), &'static [u8]>,
    events: Table<'t, u64, &'static [u8]>,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Tables<'t>, redb::Error> {
        Ok(Tables {
            meta: transaction.open_table(META)?,
            allocations: transaction.open_table(ALLOCATIONS)?,
            appliances: transaction.open_table(APPLIANCES)?,
            documents: transaction.open_table(DOCUMENTS)?,
            decisions: transaction.open_table(DECISIONS)?,
            written: transaction.open_table(WRITTEN)?,
            events: transaction.open_table(EVENTS)?,
        })
    }

    fn apply(&mut self, change: &Change) -> Result<(), redb::Error> {
        match change {
            Change::Allocation(record) => {
                self.allocations.insert(record.id.as_u128(), encode(record)?.as_slice())?;
            }
            Change::AllocationGone(id) => drop(self.allocations.remove(id.as_u128())?),
            Change::Appliance(record) => {
                self.appliances.insert(record.info.id.as_u128(), encode(record)?.as_slice())?;
            }
            Change::ApplianceGone(id) => drop(self.appliances.remove(id.as_u128())?),
            Change::Policy(change) => self.apply_policy(change)?,
            Change::Decision(number, decision) => {
                self.decisions.insert((decision.name.as_str(), *number), encode(decision)?.as_slice())?;
            }
            Change::Alive(unix) => drop(self.meta.insert(ALIVE_KEY, unix)?),
            Change::Event(event) => drop(self.events.insert(event.number, encode(event)?.as_slice())?),
            Change::EventGone(number) => drop(self.events.remove(number)?),
            Change::DecisionsBefore(unix) => self.decisions.retain(|_, value| is_since(value, *unix))?,
        }
        Ok(())
    }

    fn apply_policy(&mut self, change: &PolicyChange) -> Result<(), redb::Error> {
        self.meta.insert(REVISION_KEY, change.revision)?;
        for content in change.changed.clone().into_contents() {
            let name = content.document_name();
            let value = encode(&Documents::from_iter([content]))?;
            self.documents.insert((name.kind.as_str(), name.name.as_str()), value.as_slice())?;
        }
        for written in &change.written {
            let name = &written.document;
            self.written.insert((name.kind.as_str(), name.name.as_str()), encode(written)?.as_slice())?;
        }
        for name in &change.gone {
            self.written.remove((name.kind.as_str(), name.name.as_str()))?;
            self.documents.remove((name.kind.as_str(), name.name.as_str()))?;
        }
        Ok(())
    }
}

/// Whether a stored decision was made at this moment or later; one that cannot be read goes.
fn is_since(value: &[u8], unix: u64) -> bool {
    serde_json::from_slice::<Decision>(value).is_ok_and(|decision| decision.at >= unix)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(io::Error::from(error)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::store::{AllocationRecord, suite};
    use crate::testing::allocation;

    #[test]
    fn what_is_committed_is_there_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("new/data");
        suite::what_is_committed_is_there_after_reopening(|| RedbStore::open(&data).unwrap());
        let mode = std::fs::metadata(data.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
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

    /// An allocation as schema 1 has it.
    const FIRST_ALLOCATION: &str = r#"{"id":"00000000000000000000000000000001","name":"a","size":268435456,
        "layout":{"kind":"linear"},"region_len":268435456,"created":1,"phase":"ready","epoch":1,"owner":null,
        "revealed":false,"next":null,"grants":[{"id":"00000000000000000000000000000001",
        "appliance":"00000000000000000000000000000001",
        "key":"0707070707070707070707070707070707070707070707070707070707070707","count":1,
        "regions":["00000000000000000000000000000001"]}],"slots":[{"grant":0,"slot":0}]}"#;

    #[test]
    fn a_store_of_schema_1_is_taken_over() {
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
        let known = AllocationRecord { idle_since: 0, ..allocation(1, "a") };
        assert_eq!((loaded.allocations, loaded.revision), (vec![known], 0));
        assert_eq!(store.schema().unwrap(), Some(SCHEMA));
        assert_eq!(store.decisions().about(&"a".parse().unwrap(), 1).unwrap(), []);
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
