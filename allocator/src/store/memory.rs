//! A store that forgets everything when it is dropped, for tests of the service.

use std::collections::BTreeMap;

use xpm_protocol::{AllocationId, ApplianceId};

use super::{AllocationRecord, ApplianceRecord, Batch, Change, Loaded, MetadataStore, StoreError};

/// Metadata in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    allocations: BTreeMap<AllocationId, AllocationRecord>,
    appliances: BTreeMap<ApplianceId, ApplianceRecord>,
}

impl MetadataStore for MemoryStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded {
            allocations: self.allocations.values().cloned().collect(),
            appliances: self.appliances.values().cloned().collect(),
        })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        for change in batches.iter().flatten() {
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
            }
        }
        Ok(())
    }
}
