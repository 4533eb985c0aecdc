//! A store in memory, for tests of the service. It is lost when it is dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use xpm_protocol::api::allocator::{Event, MetadataState};
use xpm_protocol::api::decision::Decision;
use xpm_protocol::api::policy::Written;
use xpm_protocol::policy::{Content, DocumentName};
use xpm_protocol::{AllocationId, ApplianceId, Name, PoolId};

use super::{
    AllocationRecord, ApplianceRecord, Batch, Change, Decisions, Loaded, MetadataStore, PolicyChange,
    StoreError,
};

/// Metadata in memory.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    allocations: BTreeMap<AllocationId, AllocationRecord>,
    appliances: BTreeMap<ApplianceId, ApplianceRecord>,
    documents: BTreeMap<DocumentName, Content>,
    revision: u64,
    alive: Option<u64>,
    written: BTreeMap<DocumentName, Written>,
    events: BTreeMap<u64, Event>,
    state: MetadataState,
    decisions: MemoryDecisions,
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore {
            allocations: BTreeMap::new(),
            appliances: BTreeMap::new(),
            documents: BTreeMap::new(),
            revision: 0,
            alive: None,
            written: BTreeMap::new(),
            events: BTreeMap::new(),
            state: MetadataState { pool: PoolId::from_u128(1), number: 0 },
            decisions: MemoryDecisions::default(),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct MemoryDecisions(Arc<Mutex<BTreeMap<(Name, u64), Decision>>>);

impl MetadataStore for MemoryStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded {
            allocations: self.allocations.values().cloned().collect(),
            appliances: self.appliances.values().cloned().collect(),
            documents: self.documents.values().cloned().collect(),
            revision: self.revision,
            alive: self.alive,
            written: self.written.values().cloned().collect(),
            events: self.events.values().cloned().collect(),
            state: Some(self.state),
        })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        self.state.number += batches.len() as u64;
        for change in batches.iter().flatten() {
            self.apply(change);
        }
        Ok(())
    }

    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError> {
        Ok(self.decisions.with(|all| all.iter().map(|((_, number), one)| (*number, one.clone())).collect()))
    }

    fn decisions(&self) -> Box<dyn Decisions> {
        Box::new(self.decisions.clone())
    }
}

impl MemoryStore {
    /// A store with this content.
    #[cfg(test)]
    pub(crate) fn of(loaded: Loaded) -> MemoryStore {
        let mut store = MemoryStore::default();
        let backup = super::backup::Backup::new(0, loaded);
        backup.restore(&mut store).expect("it is empty");
        store
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Allocation(record) => {
                self.allocations.insert(record.id, record.as_ref().clone());
            }
            Change::AllocationGone(id) => {
                self.allocations.remove(id);
            }
            Change::Appliance(record) => {
                self.appliances.insert(record.info.id, record.as_ref().clone());
            }
            Change::ApplianceGone(id) => {
                self.appliances.remove(id);
            }
            Change::Policy(change) => self.apply_policy(change),
            Change::Decision(number, decision) => self.decisions.with(|all| {
                all.insert((decision.name.clone(), *number), decision.as_ref().clone());
            }),
            Change::Alive(unix) => self.alive = Some(*unix),
            Change::Event(event) => {
                self.events.insert(event.number, event.as_ref().clone());
            }
            Change::EventGone(number) => {
                self.events.remove(number);
            }
            Change::State(state) => self.state = *state,
            Change::DecisionsBefore(unix) => self.decisions.with(|all| all.retain(|_, one| one.at >= *unix)),
        }
    }

    fn apply_policy(&mut self, change: &PolicyChange) {
        self.revision = change.revision;
        for content in change.changed.clone().into_contents() {
            self.documents.insert(content.document_name(), content);
        }
        for written in &change.written {
            self.written.insert(written.document.clone(), written.clone());
        }
        for name in &change.gone {
            self.written.remove(name);
            self.documents.remove(name);
        }
    }
}

impl MemoryDecisions {
    fn with<T>(&self, work: impl FnOnce(&mut BTreeMap<(Name, u64), Decision>) -> T) -> T {
        // A panic of another test thread leaves the map consistent.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Decisions for MemoryDecisions {
    fn about(&self, name: &Name, most: usize) -> Result<Vec<Decision>, StoreError> {
        let range = (name.clone(), 0)..=(name.clone(), u64::MAX);
        Ok(self.with(|all| all.range(range).rev().take(most).map(|(_, one)| one.clone()).collect()))
    }
}
