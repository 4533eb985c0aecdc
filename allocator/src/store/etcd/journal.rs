//! Batches that are too large for one transaction.
//!
//! Their entries are first written to a journal, one part per transaction. The key that states the number of parts
//! makes the batch durable. Then the parts are carried out, and the journal is removed. A new leader carries out a
//! complete journal, and drops an incomplete one.

use std::collections::BTreeMap;

use super::entries::Entries;
use super::{EtcdStore, decode, entries_below, keys_below, text_at};
use crate::store::StoreError;
use etcd_client::GetOptions;

/// Key of the number of parts of a complete journal.
pub(super) const COMPLETE_KEY: &str = "journal-complete";
/// Prefix of the keys of the parts.
pub(super) const PARTS: &str = "journal/";

impl EtcdStore {
    /// Writes entries that do not fit into one transaction, all or none.
    pub(super) async fn write_by_journal(&mut self, entries: Entries) -> Result<(), StoreError> {
        let parts = entries.into_parts();
        for (number, part) in parts.iter().enumerate() {
            let text =
                serde_json::to_string(&part.clone().into_all()).map_err(|error| StoreError::Damaged {
                    path: super::place(&self.etcd),
                    what: format!("a batch has no form in JSON: {error}"),
                })?;
            self.write(Entries::from([(format!("{PARTS}{number:08}"), Some(text))])).await?;
        }
        self.write(Entries::from([(COMPLETE_KEY.to_owned(), Some(parts.len().to_string()))])).await?;
        self.carry_out(parts).await
    }

    /// Carries out a complete journal of the last leader, and drops an incomplete one.
    pub(super) async fn finish_journal(&mut self) -> Result<(), StoreError> {
        let Some(count) = text_at(&self.etcd, COMPLETE_KEY).await? else {
            return self.drop_parts().await;
        };
        let mut parts = Vec::new();
        for entry in entries_below(&self.etcd, PARTS, GetOptions::new()).await? {
            let part: BTreeMap<String, Option<String>> = super::decode_entry(&self.etcd, &entry)?;
            parts.push(Entries::from(part));
        }
        if decode::<usize>(&self.etcd, COMPLETE_KEY, count.as_bytes())? != parts.len() {
            let what = format!("its journal has {} parts and not {count}", parts.len());
            return Err(StoreError::Damaged { path: super::place(&self.etcd), what });
        }
        self.carry_out(parts).await
    }

    async fn carry_out(&mut self, parts: Vec<Entries>) -> Result<(), StoreError> {
        for part in parts {
            self.write(part).await?;
        }
        self.write(Entries::from([(COMPLETE_KEY.to_owned(), None)])).await?;
        self.drop_parts().await
    }

    async fn drop_parts(&mut self) -> Result<(), StoreError> {
        let keys = keys_below(&self.etcd, PARTS).await?;
        for part in Entries::from(keys.into_iter().map(|key| (key, None))).into_parts() {
            self.write(part).await?;
        }
        Ok(())
    }
}
