//! Descriptors: texts at the appliances that say which allocation a grant belongs to, so that an allocator which lost
//! its metadata can rebuild them.
//!
//! Calls that make a grant or raise its epoch carry the descriptor. Other changes of a record (its first owner, the
//! end of an ownership, a lease, the end of a change) are sent once they are durable, and nothing waits for that
//! call: an appliance that missed it gets the descriptor again when its grants are listed.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use xpm_protocol::api::appliance::{self, Commit};
use xpm_protocol::{AllocationId, ApplianceId};

use super::{Awaited, Call, Service, Work};
use crate::store::record::{AllocationRecord, GrantRecord, Phase, Stage};

/// Most grants of one appliance whose descriptors are repaired after one listing.
const REPAIRS_MAX: usize = 64;

/// Hash of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub(super) fn of(descriptor: Option<&str>) -> Fingerprint {
        let mut hasher = DefaultHasher::new();
        descriptor.hash(&mut hasher);
        Fingerprint(hasher.finish())
    }
}

impl Service {
    /// Sends the appliances of an allocation their descriptors, unless they were sent the same ones last.
    pub(super) fn describe_if_new(&mut self, id: AllocationId) {
        let entry = self.entry(id);
        if !is_settled(&entry.record) {
            return;
        }
        let descriptor = entry.record.descriptor();
        let now = Some(Fingerprint::of(descriptor.as_deref()));
        if std::mem::replace(&mut entry.described, now) == now {
            return;
        }
        let record = entry.record.clone();
        record.grants.iter().for_each(|grant| self.describe(&record, grant, descriptor.clone()));
    }

    fn describe(&mut self, record: &AllocationRecord, grant: &GrantRecord, descriptor: Option<String>) {
        let commit = Commit {
            allocation: record.id,
            name: record.name.clone(),
            epoch: record.epoch,
            key: grant.key.clone(),
            regions: grant.regions.clone(),
            from: None,
            descriptor,
        };
        let control = self.control_of(grant.appliance);
        self.call(grant.appliance, control, Call::Commit(grant.id, commit), Awaited::Ignored);
    }

    /// Sends an appliance again the descriptors that it lacks by its list of grants.
    pub(super) fn repair_descriptors(&mut self, on: ApplianceId, there: &[appliance::Grant]) {
        let mut behind = Vec::new();
        for grant in there {
            let Some(entry) = self.allocations.get_mut(&grant.allocation) else { continue };
            let record = &entry.record;
            let settled = is_settled(record) && matches!(entry.work, Work::Idle);
            let known = record.grants.iter().any(|known| known.id == grant.id && known.appliance == on);
            if !settled || !known || grant.epoch != record.epoch {
                continue;
            }
            let now = entry.described.get_or_insert_with(|| Fingerprint::of(record.descriptor().as_deref()));
            if *now != Fingerprint::of(grant.descriptor.as_deref()) {
                behind.push((grant.allocation, grant.id));
            }
        }
        for (id, grant) in behind.into_iter().take(REPAIRS_MAX) {
            let record = self.entry(id).record.clone();
            let descriptor = record.descriptor();
            let known = record.grants.iter().find(|known| known.id == grant);
            if let (Some(known), Some(descriptor)) = (known, descriptor) {
                self.describe(&record, known, Some(descriptor));
            }
        }
    }
}

/// Whether appliances should know the record as it is: not while it is being changed.
pub(super) fn is_settled(record: &AllocationRecord) -> bool {
    let changing = record.change.as_ref().is_some_and(|change| change.stage != Stage::Switched);
    record.phase == Phase::Ready && record.next.is_none() && !changing
}
