//! Changes as entries of etcd: keys below the prefix, and the same JSON values as in the file.

use std::collections::BTreeMap;

use serde::Serialize;
use xpm_protocol::Name;

use super::super::{Change, PolicyChange};
use xpm_protocol::policy::Documents;

pub(super) const SCHEMA_KEY: &str = "meta/schema";
pub(super) const REVISION_KEY: &str = "meta/revision";
pub(super) const POOL_KEY: &str = "meta/pool";
pub(super) const NUMBER_KEY: &str = "meta/number";
pub(super) const ALIVE_KEY: &str = "meta/alive";
pub(super) const SEQUENCE_KEY: &str = "meta/sequence";
pub(super) const ALLOCATIONS: &str = "allocations/";
pub(super) const APPLIANCES: &str = "appliances/";
pub(super) const DOCUMENTS: &str = "documents/";
pub(super) const DECISIONS: &str = "decisions/";
pub(super) const WRITTEN: &str = "written/";
pub(super) const EVENTS: &str = "events/";

/// Most entries of one transaction; etcd's default limit is 128 operations.
const ENTRIES_MAX: usize = 120;
/// Most bytes of one transaction's entries; etcd's default limit is 1.5 MiB.
const BYTES_MAX: usize = 1 << 20;
/// Lowest bit of the time in a decision's number.
const MOMENT_SHIFT: u32 = 20;

/// Entries to write: a value for each key, or none if the key is removed. A later change of a key replaces an earlier
/// one, because etcd accepts each key once in a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entries {
    all: BTreeMap<String, Option<String>>,
    bytes: usize,
}

impl Entries {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn put(&mut self, key: String, value: String) {
        self.set(key, Some(value));
    }

    pub(super) fn remove(&mut self, key: String) {
        self.set(key, None);
    }

    fn set(&mut self, key: String, value: Option<String>) {
        let len = |value: &Option<String>| value.as_ref().map_or(0, String::len);
        let (key_len, value_len) = (key.len(), len(&value));
        match self.all.insert(key, value) {
            Some(before) => self.bytes = self.bytes - len(&before) + value_len,
            None => self.bytes += key_len + value_len,
        }
    }

    /// Whether etcd accepts all entries in one transaction. A single entry always counts as fitting.
    pub(super) fn fit(&self) -> bool {
        self.all.len() <= 1 || (self.all.len() <= ENTRIES_MAX && self.bytes <= BYTES_MAX)
    }

    /// Adds `more` if both certainly fit into one transaction; otherwise returns it.
    pub(super) fn join(&mut self, more: Entries) -> Option<Entries> {
        let fit = self.all.len() + more.all.len() <= ENTRIES_MAX && self.bytes + more.bytes <= BYTES_MAX;
        if !fit && !self.is_empty() {
            return Some(more);
        }
        more.all.into_iter().for_each(|(key, value)| self.set(key, value));
        None
    }

    pub(super) fn into_all(self) -> BTreeMap<String, Option<String>> {
        self.all
    }

    /// The entries in parts that each fit into one transaction or one value.
    pub(super) fn into_parts(self) -> Vec<Entries> {
        let mut parts = Vec::new();
        let mut last = Entries::default();
        for (key, value) in self.all {
            if let Some(one) = last.join(Entries::from([(key, value)])) {
                parts.push(std::mem::replace(&mut last, one));
            }
        }
        parts.push(last);
        parts
    }

    /// Adds a change. Deleting old decisions adds nothing, because their keys are not known here.
    pub(super) fn add(&mut self, change: &Change) -> Result<(), serde_json::Error> {
        match change {
            Change::Allocation(record) => self.put(allocation_key(record.id.as_u128()), encode(record)?),
            Change::AllocationGone(id) => self.remove(allocation_key(id.as_u128())),
            Change::Appliance(record) => self.put(appliance_key(record.info.id.as_u128()), encode(record)?),
            Change::ApplianceGone(id) => self.remove(appliance_key(id.as_u128())),
            Change::Policy(change) => self.add_policy(change)?,
            Change::Decision(number, decision) => {
                self.put(format!("{}{number:016x}", decisions_about(&decision.name)), encode(decision)?);
            }
            Change::Alive(unix) => self.put(ALIVE_KEY.to_owned(), unix.to_string()),
            Change::Event(event) => self.put(event_key(event.number), encode(event)?),
            Change::EventGone(number) => self.remove(event_key(*number)),
            Change::State(state) => {
                self.put(POOL_KEY.to_owned(), state.pool.to_string());
                self.put(NUMBER_KEY.to_owned(), state.number.to_string());
            }
            Change::DecisionsBefore(_) => {}
        }
        Ok(())
    }

    fn add_policy(&mut self, change: &PolicyChange) -> Result<(), serde_json::Error> {
        self.put(REVISION_KEY.to_owned(), change.revision.to_string());
        for content in change.changed.clone().into_contents() {
            let name = content.document_name();
            let key = format!("{DOCUMENTS}{}/{}", name.kind.as_str(), name.name);
            self.put(key, encode(&Documents::from_iter([content]))?);
        }
        for written in &change.written {
            let name = &written.document;
            self.put(format!("{WRITTEN}{}/{}", name.kind.as_str(), name.name), encode(written)?);
        }
        for name in &change.gone {
            self.remove(format!("{WRITTEN}{}/{}", name.kind.as_str(), name.name));
            self.remove(format!("{DOCUMENTS}{}/{}", name.kind.as_str(), name.name));
        }
        Ok(())
    }
}

impl<T: IntoIterator<Item = (String, Option<String>)>> From<T> for Entries {
    fn from(entries: T) -> Entries {
        let mut all = Entries::default();
        entries.into_iter().for_each(|(key, value)| all.set(key, value));
        all
    }
}

fn allocation_key(id: u128) -> String {
    format!("{ALLOCATIONS}{id:032x}")
}

fn appliance_key(id: u128) -> String {
    format!("{APPLIANCES}{id:032x}")
}

fn event_key(number: u64) -> String {
    format!("{EVENTS}{number:016x}")
}

/// Prefix of the keys of all decisions about a name.
pub(super) fn decisions_about(name: &Name) -> String {
    format!("{DECISIONS}{name}/")
}

/// Whether the decision of this key was made at this moment or later; a key without a number counts as old.
pub(super) fn is_since(key: &str, unix: u64) -> bool {
    let number = key.rsplit('/').next().and_then(|number| u64::from_str_radix(number, 16).ok());
    number.is_some_and(|number| number >> MOMENT_SHIFT >= unix)
}

fn encode<T: Serialize>(value: &T) -> Result<String, serde_json::Error> {
    serde_json::to_string(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::allocation;

    #[test]
    fn a_later_change_replaces_an_earlier_one() {
        let record = allocation(1, "a");
        let mut entries = Entries::default();
        entries.add(&Change::Allocation(Box::new(record.clone()))).unwrap();
        assert!(entries.bytes > 100);
        entries.add(&Change::AllocationGone(record.id)).unwrap();
        let key = format!("{ALLOCATIONS}{:032x}", 1);
        assert_eq!((entries.bytes, entries), (key.len(), Entries::from([(key, None)])));
    }

    #[test]
    fn entries_beyond_one_transaction_are_split_in_order() {
        let many = Entries::from((0..301).map(|number| (format!("{number:03}"), Some(String::new()))));
        assert!(!many.fit());
        let parts = many.into_parts();
        assert_eq!(parts.iter().map(|part| part.all.len()).collect::<Vec<_>>(), [120, 120, 61]);
        let large = Entries::from((0..3).map(|number| (number.to_string(), Some("x".repeat(600 << 10)))));
        assert_eq!(large.into_parts().len(), 3);
    }

    #[test]
    fn the_number_of_a_decision_contains_its_time() {
        let key = format!("decisions/a/{:016x}", (1000_u64 << 20) | 7);
        assert!(is_since(&key, 1000) && !is_since(&key, 1001) && !is_since("decisions/a/x", 0));
    }
}
