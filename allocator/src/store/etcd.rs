//! Metadata in etcd, written by the leader of several allocators.
//!
//! Each transaction compares two keys: the leader's key, which must have been created at the revision at which this
//! term began, and a sequence key, which must have the value that the last transaction gave it. So the write of a
//! deposed leader fails, whenever it arrives, and so does a write that was sent twice because the first answer did
//! not arrive.

mod entries;
mod journal;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, KeyValue, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse, TxnResponse,
};
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::MetadataState;
use xpm_protocol::api::decision::Decision;
use xpm_protocol::policy::Documents;

use self::entries::{
    ALIVE_KEY, ALLOCATIONS, APPLIANCES, DECISIONS, DOCUMENTS, EVENTS, Entries, NUMBER_KEY, POOL_KEY,
    REVISION_KEY, SCHEMA_KEY, SEQUENCE_KEY, WRITTEN, decisions_about, is_since,
};
use super::{Batch, Change, Decisions, Loaded, MetadataStore, SCHEMA, StoreError, new_pool};
use crate::etcd::{Etcd, EtcdError, LEADER_KEY};

/// Time limit of a read or a write, all attempts together.
const LIMIT: Duration = Duration::from_secs(8);
/// Number of keys that one request reads.
const PAGE: i64 = 256;
/// Largest answer that is read, in bytes.
const ANSWER_LEN_MAX: usize = 1 << 30;

/// Metadata in etcd, for the duration of one term. Its methods must not be called by a thread that runs asynchronous
/// tasks.
#[derive(Debug)]
pub struct EtcdStore {
    etcd: Etcd,
    runtime: Handle,
    /// The revision at which the leader's key was created.
    term: i64,
    /// The value of the sequence key; none before the very first write.
    sequence: Option<String>,
    /// Number of writes in this term.
    writes: u64,
    /// Number of batches that were committed, in all terms.
    number: u64,
}

/// Reads decisions beside the writer.
#[derive(Debug)]
struct EtcdDecisions {
    etcd: Etcd,
    runtime: Handle,
}

impl EtcdStore {
    /// Opens the store for the term that began at this revision. Finishes a journal that the last leader left.
    pub fn open(etcd: Etcd, term: i64, runtime: &Handle) -> Result<EtcdStore, StoreError> {
        let mut store =
            EtcdStore { etcd, runtime: runtime.clone(), term, sequence: None, writes: 0, number: 0 };
        runtime.block_on(async {
            store.sequence = text_at(&store.etcd, SEQUENCE_KEY).await?;
            store.settle_schema().await?;
            store.finish_journal().await?;
            store.settle_pool().await
        })?;
        Ok(store)
    }

    /// Refuses a newer schema before anything is written.
    async fn settle_schema(&mut self) -> Result<(), StoreError> {
        let found = text_at(&self.etcd, SCHEMA_KEY).await?;
        match found.map(|text| decode::<u64>(&self.etcd, SCHEMA_KEY, text.as_bytes())).transpose()? {
            Some(found) if found > SCHEMA => {
                Err(StoreError::Newer { path: place(&self.etcd), found, known: SCHEMA })
            }
            Some(SCHEMA) => Ok(()),
            Some(_) | None => {
                self.write(Entries::from([(SCHEMA_KEY.to_owned(), Some(SCHEMA.to_string()))])).await
            }
        }
    }

    /// Gives the metadata an id if they are new or were written by an older program.
    async fn settle_pool(&mut self) -> Result<(), StoreError> {
        let number = text_at(&self.etcd, NUMBER_KEY).await?;
        let number = number.map(|text| decode(&self.etcd, NUMBER_KEY, text.as_bytes())).transpose()?;
        self.number = number.unwrap_or(0);
        if text_at(&self.etcd, POOL_KEY).await?.is_some() {
            return Ok(());
        }
        let pool = new_pool(&place(&self.etcd))?;
        self.write(Entries::from([(POOL_KEY.to_owned(), Some(pool.to_string()))])).await
    }

    /// Writes entries that fit into one transaction.
    async fn write(&mut self, entries: Entries) -> Result<(), StoreError> {
        if entries.is_empty() {
            return Ok(());
        }
        let next = format!("{}-{}", self.term, self.writes + 1);
        let transaction = self.transaction(entries, &next);
        let asked =
            self.etcd.ask(LIMIT, async |mut member: Client| member.txn(transaction.clone()).await).await;
        let answer = asked.map_err(|source| match source.full() {
            Some(why) => StoreError::Full { why },
            None => StoreError::Etcd { doing: "write", source: Box::new(source) },
        })?;
        if !answer.succeeded() && !self.was_written(&answer, &next) {
            return Err(StoreError::Deposed { store: self.etcd.store() });
        }
        self.sequence = Some(next);
        self.writes += 1;
        Ok(())
    }

    fn transaction(&self, entries: Entries, next: &str) -> Txn {
        let (leader, sequence) = (self.etcd.key(LEADER_KEY), self.etcd.key(SEQUENCE_KEY));
        let in_order = match &self.sequence {
            Some(last) => Compare::value(sequence.as_str(), CompareOp::Equal, last.as_str()),
            None => Compare::version(sequence.as_str(), CompareOp::Equal, 0),
        };
        let mut operations = vec![TxnOp::put(sequence.as_str(), next, None)];
        operations.extend(entries.into_all().into_iter().map(|(key, value)| match value {
            Some(value) => TxnOp::put(self.etcd.key(&key), value, None),
            None => TxnOp::delete(self.etcd.key(&key), None),
        }));
        Txn::new()
            .when([Compare::create_revision(leader.as_str(), CompareOp::Equal, self.term), in_order])
            .and_then(operations)
            .or_else([TxnOp::get(leader, None), TxnOp::get(sequence, None)])
    }

    /// Whether an earlier attempt of the same transaction was carried out.
    fn was_written(&self, answer: &TxnResponse, next: &str) -> bool {
        let responses = answer.op_responses();
        let [TxnOpResponse::Get(leader), TxnOpResponse::Get(sequence)] = responses.as_slice() else {
            return false;
        };
        let leads = leader.kvs().first().is_some_and(|entry| entry.create_revision() == self.term);
        leads && sequence.kvs().first().is_some_and(|entry| entry.value() == next.as_bytes())
    }

    async fn write_batches(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        let mut gathered = Entries::default();
        for batch in batches {
            if let Some(entries) = gathered.join(self.entries(batch)?) {
                self.write(std::mem::replace(&mut gathered, entries)).await?;
            }
            if !gathered.fit() {
                self.write_by_journal(std::mem::take(&mut gathered)).await?;
            }
            for change in batch {
                if let Change::DecisionsBefore(unix) = change {
                    self.write(std::mem::take(&mut gathered)).await?;
                    self.forget_decisions(*unix).await?;
                }
            }
        }
        self.write(gathered).await
    }

    fn entries(&mut self, batch: &Batch) -> Result<Entries, StoreError> {
        let mut entries = Entries::default();
        self.number += 1;
        entries.put(NUMBER_KEY.to_owned(), self.number.to_string());
        for change in batch {
            if let Change::State(state) = change {
                self.number = state.number;
            }
        }
        batch.iter().try_for_each(|change| entries.add(change)).map_err(|error| StoreError::Damaged {
            path: place(&self.etcd),
            what: format!("a value has no form in JSON: {error}"),
        })?;
        Ok(entries)
    }

    /// Removes old decisions. This need not be atomic: nothing else depends on them.
    async fn forget_decisions(&mut self, unix: u64) -> Result<(), StoreError> {
        let keys = keys_below(&self.etcd, DECISIONS).await?;
        let old = keys.into_iter().filter(|key| !is_since(key, unix));
        for part in Entries::from(old.map(|key| (key, None))).into_parts() {
            self.write(part).await?;
        }
        Ok(())
    }

    async fn read_all(&self) -> Result<Loaded, StoreError> {
        let mut documents = Documents::default();
        for document in read_below::<Documents>(&self.etcd, DOCUMENTS).await? {
            documents.extend(document.into_contents());
        }
        let revision = text_at(&self.etcd, REVISION_KEY).await?;
        let revision = revision.map(|text| decode(&self.etcd, REVISION_KEY, text.as_bytes())).transpose()?;
        let alive = text_at(&self.etcd, ALIVE_KEY).await?;
        let pool = text_at(&self.etcd, POOL_KEY).await?.and_then(|text| text.parse().ok());
        Ok(Loaded {
            allocations: read_below(&self.etcd, ALLOCATIONS).await?,
            appliances: read_below(&self.etcd, APPLIANCES).await?,
            documents,
            revision: revision.unwrap_or(0),
            alive: alive.map(|text| decode(&self.etcd, ALIVE_KEY, text.as_bytes())).transpose()?,
            written: beside(&self.etcd, WRITTEN).await?,
            events: beside(&self.etcd, EVENTS).await?,
            state: pool.map(|pool| MetadataState { pool, number: self.number }),
        })
    }
}

/// Read access to metadata in etcd without being the leader, for a time in which etcd has no room and no leader can
/// be elected.
#[derive(Debug)]
pub struct ReadOnly {
    store: EtcdStore,
    why: String,
}

impl ReadOnly {
    /// Sends nothing yet. `why` is the reason in refusals of changes.
    pub fn new(etcd: Etcd, runtime: &Handle, why: String) -> ReadOnly {
        let store =
            EtcdStore { etcd, runtime: runtime.clone(), term: 0, sequence: None, writes: 0, number: 0 };
        ReadOnly { store, why }
    }
}

impl MetadataStore for ReadOnly {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let runtime = self.store.runtime.clone();
        let number = runtime.block_on(text_at(&self.store.etcd, NUMBER_KEY))?;
        self.store.number = number.and_then(|text| text.parse().ok()).unwrap_or(0);
        self.store.load()
    }

    fn commit(&mut self, _: &[Batch]) -> Result<(), StoreError> {
        Err(StoreError::Full { why: self.why.clone() })
    }

    fn is_read_only(&self) -> Option<String> {
        Some(self.why.clone())
    }

    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError> {
        self.store.all_decisions()
    }

    fn decisions(&self) -> Box<dyn Decisions> {
        self.store.decisions()
    }
}

impl MetadataStore for EtcdStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        self.runtime.block_on(self.read_all())
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        let (runtime, number) = (self.runtime.clone(), self.number);
        let written = runtime.block_on(self.write_batches(batches));
        if written.is_err() {
            // The same batches may be committed again, and count once.
            self.number = number;
        }
        written
    }

    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError> {
        let runtime = self.runtime.clone();
        let found = runtime.block_on(entries_below(&self.etcd, DECISIONS, GetOptions::new()))?;
        let decision = |entry: &KeyValue| {
            let number = entry.key_str().ok().and_then(|key| key.rsplit('/').next());
            let number = number.and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0);
            Ok((number, decode_entry(&self.etcd, entry)?))
        };
        found.iter().map(decision).collect()
    }

    fn decisions(&self) -> Box<dyn Decisions> {
        Box::new(EtcdDecisions { etcd: self.etcd.clone(), runtime: self.runtime.clone() })
    }
}

impl Decisions for EtcdDecisions {
    fn about(&self, name: &Name, most: usize) -> Result<Vec<Decision>, StoreError> {
        let key = self.etcd.key(&decisions_about(name));
        let options = GetOptions::new()
            .with_prefix()
            .with_limit(i64::try_from(most).unwrap_or(i64::MAX))
            .with_sort(SortTarget::Key, SortOrder::Descend);
        let found = self.runtime.block_on(get(&self.etcd, &key, options))?;
        found.kvs().iter().map(|entry| decode_entry(&self.etcd, entry)).collect()
    }
}

async fn get(etcd: &Etcd, key: &str, options: GetOptions) -> Result<GetResponse, StoreError> {
    let asked = etcd.ask(LIMIT, async |member: Client| {
        member.kv_client().max_decoding_message_size(ANSWER_LEN_MAX).get(key, Some(options.clone())).await
    });
    asked.await.map_err(|source: EtcdError| StoreError::Etcd { doing: "read", source: Box::new(source) })
}

async fn text_at(etcd: &Etcd, name: &str) -> Result<Option<String>, StoreError> {
    let found = get(etcd, &etcd.key(name), GetOptions::new()).await?;
    Ok(found.kvs().first().map(|entry| String::from_utf8_lossy(entry.value()).into_owned()))
}

/// Every entry whose key begins with the prefix, read page by page. Only this leader could write meanwhile.
async fn entries_below(etcd: &Etcd, name: &str, options: GetOptions) -> Result<Vec<KeyValue>, StoreError> {
    let mut from = etcd.key(name).into_bytes();
    let end = after(&from);
    let mut all = Vec::new();
    loop {
        let page = options.clone().with_range(end.clone()).with_limit(PAGE);
        let key = String::from_utf8_lossy(&from).into_owned();
        let mut found = get(etcd, &key, page).await?;
        let entries = found.take_kvs();
        if let Some(last) = entries.last() {
            from = [last.key(), b"\0"].concat();
        }
        let is_last = entries.len() < PAGE as usize;
        all.extend(entries);
        if is_last {
            return Ok(all);
        }
    }
}

/// The first key after all keys with this prefix, which ends with a slash.
fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// The keys below a name, without the allocator's prefix.
async fn keys_below(etcd: &Etcd, name: &str) -> Result<Vec<String>, StoreError> {
    let entries = entries_below(etcd, name, GetOptions::new().with_keys_only()).await?;
    let prefix = etcd.key("");
    let key = |entry: &KeyValue| Some(entry.key_str().ok()?.strip_prefix(&prefix)?.to_owned());
    Ok(entries.iter().filter_map(key).collect())
}

async fn read_below<T: DeserializeOwned>(etcd: &Etcd, name: &str) -> Result<Vec<T>, StoreError> {
    let entries = entries_below(etcd, name, GetOptions::new()).await?;
    entries.iter().map(|entry| decode_entry(etcd, entry)).collect()
}

/// The readable values below a name: nothing depends on the others.
async fn beside<T: DeserializeOwned>(etcd: &Etcd, name: &str) -> Result<Vec<T>, StoreError> {
    let entries = entries_below(etcd, name, GetOptions::new()).await?;
    Ok(entries.iter().filter_map(|entry| serde_json::from_slice(entry.value()).ok()).collect())
}

fn decode_entry<T: DeserializeOwned>(etcd: &Etcd, entry: &KeyValue) -> Result<T, StoreError> {
    decode(etcd, &String::from_utf8_lossy(entry.key()), entry.value())
}

fn decode<T: DeserializeOwned>(etcd: &Etcd, what: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value).map_err(|error| StoreError::Damaged {
        path: place(etcd),
        what: format!("the value of {what} cannot be read: {error}"),
    })
}

fn place(etcd: &Etcd) -> PathBuf {
    etcd.store().into()
}
