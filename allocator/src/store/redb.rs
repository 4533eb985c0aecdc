//! Metadata in one redb file, `allocator.redb` of the data directory.
//!
//! Each value ends with a checksum over the value, its table and its key: a flipped bit is found when the value is
//! read, and such a value is never used.

mod base;
mod seal;
#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, Key, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition,
    TableError, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xpm_protocol::api::allocator::MetadataState;
use xpm_protocol::api::decision::Decision;
use xpm_protocol::policy::Documents;
use xpm_protocol::{Name, PoolId};

use self::base::Base;
use self::seal::{decision_key, document_key, is_sealed, number_key, seal, unseal};
use super::{
    Batch, Change, Decisions, Loaded, MetadataStore, PolicyChange, SCHEMA, SCHEMA_SEALED, StoreError,
    new_pool,
};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "allocator.redb";
/// Name of the file that marks a directory in which a pool was made. A missing database file in an unmarked directory
/// means a new pool.
pub const MARK_NAME: &str = "allocator.pool";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ALLOCATIONS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("allocations");
const APPLIANCES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("appliances");
/// By kind and name.
const DOCUMENTS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("documents");
/// Texts of documents, by kind and name. Older programs neither make nor read it.
const WRITTEN: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("written");
/// By name and number.
const DECISIONS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("decisions");
/// By number. Older programs neither make nor read this table, so a store may lack it and have no events yet.
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
/// Key in `META` of the version of the stored form.
const SCHEMA_KEY: &str = "schema";
/// Key in `META` of the revision of the documents.
const REVISION_KEY: &str = "revision";
/// Keys in `META` of the pool's id, in two halves, and of the count of batches.
const POOL_KEYS: [&str; 2] = ["pool-high", "pool-low"];
const NUMBER_KEY: &str = "number";
/// Key in `META` of the time at which the allocator was running last.
const ALIVE_KEY: &str = "alive";

/// Metadata in a redb file, which is locked meanwhile.
#[derive(Debug)]
pub struct RedbStore {
    base: Arc<Base>,
    /// Batches that were committed.
    number: u64,
}

/// Reads decisions beside the writer.
#[derive(Debug)]
struct RedbDecisions(Arc<Base>);

impl RedbStore {
    /// Opens the store in the directory. If they are missing, makes the directory with mode 0700 and the file, which
    /// holds keys, with mode 0600.
    ///
    /// # Errors
    /// When the file is damaged, empty, or missing from a directory that had one; when a newer program wrote it; when
    /// it is in use; or when there is no room to make it.
    pub fn open(directory: &Path) -> Result<RedbStore, StoreError> {
        let unusable = |source| StoreError::Directory { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(unusable)?;
        let base = Base::open(directory, |database| write(database, create_tables))?;
        let mut store = RedbStore { base: Arc::new(base), number: 0 };
        store.settle_schema()?;
        store.settle_pool()?;
        store.mark(directory);
        Ok(store)
    }

    /// Refuses a directory whose file another process has open, whatever the file contains.
    ///
    /// # Errors
    /// When the file is in use or cannot be opened.
    pub fn check_unused(directory: &Path) -> Result<(), StoreError> {
        let path = directory.join(FILE_NAME);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|source| StoreError::Directory { path: directory.to_owned(), source })?;
        match FileBackend::new(file) {
            Err(DatabaseError::DatabaseAlreadyOpen) => Err(StoreError::Locked { path }),
            _ => Ok(()),
        }
    }

    /// Removes an unreadable file, and the mark that a pool was made here.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn clear(directory: &Path) -> io::Result<()> {
        for name in [FILE_NAME, MARK_NAME] {
            match std::fs::remove_file(directory.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Marks the directory as one in which a pool was made. If there is no room for the mark, the next start makes
    /// it.
    fn mark(&self, directory: &Path) {
        let path = directory.join(MARK_NAME);
        if path.exists() {
            return;
        }
        let Ok(Some(state)) = self.read_state() else { return };
        let line = format!(
            "{FILE_NAME} beside this file has the metadata of pool {}. If it is gone, `xpm-allocator recover --from-network` makes \
             it anew. Remove this file only where a new pool is to begin.\n",
            state.pool
        );
        if let Err(error) = std::fs::write(&path, line) {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    /// Refuses a newer schema before anything is written, and updates an older one.
    fn settle_schema(&self) -> Result<(), StoreError> {
        match self.base.read(schema)? {
            Some(found) if found > SCHEMA => {
                Err(StoreError::Newer { path: self.base.path().to_owned(), found, known: SCHEMA })
            }
            Some(SCHEMA) => Ok(()),
            Some(found) => self.base.write(|database| {
                write(database, |transaction| {
                    create_tables(transaction)?;
                    if found < SCHEMA_SEALED { seal_all(transaction) } else { Ok(()) }
                })
            }),
            // A new file has a version from the start.
            None => {
                let what = "it has no version".to_owned();
                Err(StoreError::Damaged { path: self.base.path().to_owned(), what })
            }
        }
    }

    /// The readable values of a table that older programs do not have.
    fn read_beside<K: Key + 'static, T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, K, &'static [u8]>,
    ) -> Result<Vec<T>, StoreError> {
        self.base.read(|database| {
            let table = match database.begin_read()?.open_table(table) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let mut values = Vec::new();
            for entry in table.iter()? {
                values.extend(serde_json::from_slice::<T>(entry?.1.value()));
            }
            Ok(values)
        })
    }

    /// Gives the metadata an id if they are new or were written by an older program.
    fn settle_pool(&mut self) -> Result<(), StoreError> {
        self.number = self.read_meta(NUMBER_KEY)?.unwrap_or(0);
        if self.read_meta(POOL_KEYS[0])?.is_some() {
            return Ok(());
        }
        let pool = new_pool(self.base.path())?;
        self.base.write(|database| {
            write(database, |transaction| put_pool(&mut transaction.open_table(META)?, pool))
        })
    }

    fn read_state(&self) -> Result<Option<MetadataState>, StoreError> {
        let [high, low] = POOL_KEYS.map(|key| self.read_meta(key));
        let (Some(high), Some(low)) = (high?, low?) else { return Ok(None) };
        let pool = PoolId::from_u128(u128::from(high) << 64 | u128::from(low));
        Ok(Some(MetadataState { pool, number: self.number }))
    }

    fn read_meta(&self, key: &str) -> Result<Option<u64>, StoreError> {
        self.base.read(|database| {
            let table = database.begin_read()?.open_table(META)?;
            Ok(table.get(key)?.map(|value| value.value()))
        })
    }

    fn read_records<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, u128, &'static [u8]>,
        name: &str,
    ) -> Result<Vec<T>, StoreError> {
        let values = self.base.read(|database| {
            let table = database.begin_read()?.open_table(table)?;
            let values = table.iter()?.map(|entry| {
                let (key, value) = entry?;
                Ok((key.value(), value.value().to_vec()))
            });
            values.collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let path = self.base.path();
        values.iter().map(|(key, value)| decode(path, name, &number_key(*key), value)).collect()
    }

    fn read_policy(&self) -> Result<Documents, StoreError> {
        let values = self.base.read(|database| {
            let table = database.begin_read()?.open_table(DOCUMENTS)?;
            let values = table.iter()?.map(|entry| {
                let (key, value) = entry?;
                Ok((document_key(key.value()), value.value().to_vec()))
            });
            values.collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let mut documents = Documents::default();
        for (key, value) in &values {
            let document: Documents = decode(self.base.path(), "documents", key, value)?;
            documents.extend(document.into_contents());
        }
        Ok(documents)
    }
}

impl MetadataStore for RedbStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded {
            allocations: self.read_records(ALLOCATIONS, "allocations")?,
            appliances: self.read_records(APPLIANCES, "appliances")?,
            documents: self.read_policy()?,
            revision: self.read_meta(REVISION_KEY)?.unwrap_or(0),
            alive: self.read_meta(ALIVE_KEY)?,
            written: self.read_beside(WRITTEN)?,
            events: self.read_beside(EVENTS)?,
            state: self.read_state()?,
        })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        let mut number = self.number + batches.len() as u64;
        for change in batches.iter().flatten() {
            if let Change::State(state) = change {
                number = state.number;
            }
        }
        self.base.write(|database| {
            write(database, |transaction| {
                let mut tables = Tables::open(transaction)?;
                batches.iter().flatten().try_for_each(|change| tables.apply(change))?;
                tables.meta.insert(NUMBER_KEY, number)?;
                Ok(())
            })
        })?;
        self.number = number;
        Ok(())
    }

    fn is_read_only(&self) -> Option<String> {
        self.base.is_copy()
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        self.base.reopen()
    }

    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError> {
        let values = self.base.read(|database| {
            let table = database.begin_read()?.open_table(DECISIONS)?;
            let values = table.iter()?.map(|entry| {
                let (key, value) = entry?;
                Ok((decision_key(key.value()), key.value().1, value.value().to_vec()))
            });
            values.collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let path = self.base.path();
        let decoded = |(key, number, value): &(Vec<u8>, u64, Vec<u8>)| {
            Ok((*number, decode(path, "decisions", key, value)?))
        };
        values.iter().map(decoded).collect()
    }

    fn decisions(&self) -> Box<dyn Decisions> {
        Box::new(RedbDecisions(Arc::clone(&self.base)))
    }
}

impl Decisions for RedbDecisions {
    fn about(&self, name: &Name, most: usize) -> Result<Vec<Decision>, StoreError> {
        let values = self.0.read(|database| {
            let table = database.begin_read()?.open_table(DECISIONS)?;
            let found = table.range((name.as_str(), 0)..=(name.as_str(), u64::MAX))?.rev().take(most);
            let values = found.map(|entry| {
                let (key, value) = entry?;
                Ok((decision_key(key.value()), value.value().to_vec()))
            });
            values.collect::<Result<Vec<_>, redb::Error>>()
        })?;
        values.iter().map(|(key, value)| decode(self.0.path(), "decisions", key, value)).collect()
    }
}

fn schema(database: &Database) -> Result<Option<u64>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(META) {
        Ok(table) => Ok(table.get(SCHEMA_KEY)?.map(|value| value.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The number of batches, if it can be read.
fn number_in(database: &Database) -> Result<Option<u64>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(META) {
        Ok(table) => Ok(table.get(NUMBER_KEY)?.map(|value| value.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Commits with redb's default durability: returns after the data are on disk (fdatasync).
fn write(
    database: &Database,
    change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    change(&transaction)?;
    Ok(transaction.commit()?)
}

fn decode<T: DeserializeOwned>(path: &Path, table: &str, key: &[u8], value: &[u8]) -> Result<T, StoreError> {
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let shown = String::from_utf8_lossy(key).replace('\0', " ");
    let value = unseal(table, key, value)
        .ok_or_else(|| damaged(format!("the checksum of `{shown}` in {table} is wrong")))?;
    serde_json::from_slice(value)
        .map_err(|error| damaged(format!("the value of `{shown}` in {table} cannot be read: {error}")))
}

fn put_pool(meta: &mut Table<'_, &'static str, u64>, pool: PoolId) -> Result<(), redb::Error> {
    meta.insert(POOL_KEYS[0], (pool.as_u128() >> 64) as u64)?;
    meta.insert(POOL_KEYS[1], pool.as_u128() as u64)?;
    Ok(())
}

/// Adds a checksum to every value; values of older schemas lack it.
fn seal_all(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    for (table, name) in [(ALLOCATIONS, "allocations"), (APPLIANCES, "appliances")] {
        let mut table = transaction.open_table(table)?;
        let values = table.iter()?.map(|entry| {
            let (key, value) = entry?;
            Ok((key.value(), value.value().to_vec()))
        });
        for (key, value) in values.collect::<Result<Vec<_>, redb::Error>>()? {
            table.insert(key, seal(name, &number_key(key), value).as_slice())?;
        }
    }
    let mut table = transaction.open_table(DOCUMENTS)?;
    let values = table.iter()?.map(|entry| {
        let (key, value) = entry?;
        let (kind, name) = key.value();
        Ok((kind.to_owned(), name.to_owned(), value.value().to_vec()))
    });
    for (kind, name, value) in values.collect::<Result<Vec<_>, redb::Error>>()? {
        let key = (kind.as_str(), name.as_str());
        table.insert(key, seal("documents", &document_key(key), value).as_slice())?;
    }
    let mut table = transaction.open_table(DECISIONS)?;
    let values = table.iter()?.map(|entry| {
        let (key, value) = entry?;
        let (name, number) = key.value();
        Ok((name.to_owned(), number, value.value().to_vec()))
    });
    for (name, number, value) in values.collect::<Result<Vec<_>, redb::Error>>()? {
        let key = (name.as_str(), number);
        table.insert(key, seal("decisions", &decision_key(key), value).as_slice())?;
    }
    Ok(())
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
                let (key, value) = (record.id.as_u128(), encode(record)?);
                self.allocations.insert(key, seal("allocations", &number_key(key), value).as_slice())?;
            }
            Change::AllocationGone(id) => drop(self.allocations.remove(id.as_u128())?),
            Change::Appliance(record) => {
                let (key, value) = (record.info.id.as_u128(), encode(record)?);
                self.appliances.insert(key, seal("appliances", &number_key(key), value).as_slice())?;
            }
            Change::ApplianceGone(id) => drop(self.appliances.remove(id.as_u128())?),
            Change::Policy(change) => self.apply_policy(change)?,
            Change::Decision(number, decision) => {
                let key = (decision.name.as_str(), *number);
                self.decisions
                    .insert(key, seal("decisions", &decision_key(key), encode(decision)?).as_slice())?;
            }
            Change::Alive(unix) => drop(self.meta.insert(ALIVE_KEY, unix)?),
            Change::Event(event) => drop(self.events.insert(event.number, encode(event)?.as_slice())?),
            Change::EventGone(number) => drop(self.events.remove(number)?),
            Change::State(state) => put_pool(&mut self.meta, state.pool)?,
            Change::DecisionsBefore(unix) => self.decisions.retain(|_, value| is_since(value, *unix))?,
        }
        Ok(())
    }

    fn apply_policy(&mut self, change: &PolicyChange) -> Result<(), redb::Error> {
        self.meta.insert(REVISION_KEY, change.revision)?;
        for content in change.changed.clone().into_contents() {
            let name = content.document_name();
            let value = encode(&Documents::from_iter([content]))?;
            let key = (name.kind.as_str(), name.name.as_str());
            self.documents.insert(key, seal("documents", &document_key(key), value).as_slice())?;
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

/// Whether a stored decision was made at this moment or later; an unreadable decision counts as old.
fn is_since(value: &[u8], unix: u64) -> bool {
    let value = if is_sealed(value) { &value[..value.len() - seal::LEN] } else { value };
    serde_json::from_slice::<Decision>(value).is_ok_and(|decision| decision.at >= unix)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(io::Error::from(error)))
}
