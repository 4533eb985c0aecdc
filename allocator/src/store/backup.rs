//! Backups: all stored metadata except decisions, in one file.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use xpm_protocol::api::allocator::MetadataState;
use xpm_protocol::api::policy::Written;
use xpm_protocol::policy::Documents;

use super::{AllocationRecord, ApplianceRecord, Batch, Change, Loaded, MetadataStore, PolicyChange, SCHEMA};

/// Version of the file format.
const FORMAT: u32 = 1;

/// A backup. Serialized it holds the keys of all grants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// Version of the file format; 1.
    pub format: u32,
    /// Schema of the records.
    pub schema: u64,
    /// When it was made, seconds since 1970.
    pub made: u64,
    /// Every allocation, including those being made or deleted.
    pub allocations: Vec<AllocationRecord>,
    /// Every appliance.
    pub appliances: Vec<ApplianceRecord>,
    /// Every document.
    pub documents: Documents,
    /// The revision of the documents.
    pub revision: u64,
    /// Texts of documents.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<Written>,
    /// Id and state of the metadata; unknown if an older program made the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
}

#[derive(Deserialize)]
struct AnyBackup {
    format: u32,
    schema: u64,
}

impl Backup {
    /// A backup of the loaded metadata.
    pub fn new(made: u64, loaded: Loaded) -> Backup {
        let Loaded { allocations, appliances, documents, revision, written, alive: _, events: _, state } =
            loaded;
        Backup {
            format: FORMAT,
            schema: SCHEMA,
            made,
            allocations,
            appliances,
            documents,
            revision,
            written,
            metadata: state,
        }
    }

    /// Reads a backup file.
    ///
    /// # Errors
    /// When the file is no backup, or was written by a newer program.
    pub fn read(path: &Path) -> anyhow::Result<Backup> {
        let what = || format!("{} is no backup of an allocator", path.display());
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let any: AnyBackup = serde_json::from_str(&text).with_context(what)?;
        if any.format > FORMAT || any.schema > SCHEMA {
            bail!(
                "{} was made by a newer xpm-allocator (schema {}, this one knows {SCHEMA}): restore it with that one",
                path.display(),
                any.schema
            );
        }
        serde_json::from_str(&text).with_context(what)
    }

    /// Writes a new file, of mode 0600.
    ///
    /// # Errors
    /// When the file exists already, or cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let what = || format!("cannot write {}", path.display());
        let mut open = std::fs::OpenOptions::new();
        let mut file = open.write(true).create_new(true).mode(0o600).open(path).with_context(what)?;
        file.write_all(&serde_json::to_vec_pretty(self)?).with_context(what)?;
        file.sync_all().with_context(what)
    }

    /// Writes the backup into a store, which has to be empty.
    ///
    /// # Errors
    /// When the store is not empty, or cannot be written; then nothing has changed.
    pub fn restore<S: MetadataStore + ?Sized>(self, store: &mut S) -> anyhow::Result<()> {
        let there = store.load()?;
        let empty = there.allocations.is_empty() && there.appliances.is_empty() && there.revision == 0;
        ensure!(
            empty,
            "there are metadata already, and nothing was changed: name an empty directory, or another prefix of etcd"
        );
        Ok(store.commit(&[self.into_batch()])?)
    }

    /// The whole content as changes.
    pub fn into_batch(self) -> Batch {
        let mut batch: Vec<Change> = Vec::new();
        batch.extend(self.allocations.into_iter().map(|record| Change::Allocation(Box::new(record))));
        batch.extend(self.appliances.into_iter().map(|record| Change::Appliance(Box::new(record))));
        let policy = PolicyChange {
            revision: self.revision,
            changed: self.documents,
            gone: Vec::new(),
            written: self.written,
        };
        batch.push(Change::Policy(Box::new(policy)));
        // Time after the backup counts as absence of the allocator.
        batch.extend((self.made > 0).then_some(Change::Alive(self.made)));
        batch.extend(self.metadata.map(Change::State));
        batch
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::testing::{allocation, appliance};

    #[test]
    fn a_backup_is_restored_only_into_an_empty_store() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backup");
        let loaded = Loaded {
            allocations: vec![allocation(1, "a"), allocation(2, "b")],
            appliances: vec![appliance(1)],
            revision: 7,
            ..Loaded::default()
        };
        let backup = Backup::new(5, loaded.clone());
        backup.write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(backup.write(&path).is_err(), "an older backup is not written over");
        let mut store = MemoryStore::default();
        let state = MetadataState { number: 1, ..store.load().unwrap().state.unwrap() };
        Backup::read(&path).unwrap().restore(&mut store).unwrap();
        assert_eq!(store.load().unwrap(), Loaded { alive: Some(5), state: Some(state), ..loaded });
        let error = backup.restore(&mut store).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        std::fs::write(&path, "{\"format\":1,\"schema\":99}").unwrap();
        assert!(Backup::read(&path).unwrap_err().to_string().contains("newer"));
        std::fs::write(&path, "[]").unwrap();
        assert!(Backup::read(&path).unwrap_err().to_string().contains("no backup"));
    }
}
