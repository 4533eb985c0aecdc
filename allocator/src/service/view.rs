//! Views of the state for the API.

use std::collections::HashMap;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Allocation, AllocationState, Appliance, ApplianceState, DeviceUse, Lease, RegionPlace, Status,
};
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Name, RegionId, Span};

use super::{Entry, Service, Work, lease};
use crate::inventory::whole_millis;
use crate::store::Loaded;
use crate::store::backup::Backup;
use crate::store::record::{AllocationRecord, Phase};

/// The error for a name that no allocation has.
pub(super) fn unknown(name: &Name) -> ApiError {
    ApiError(
        ErrorKind::NotFound,
        format!("no allocation is named `{name}`: `xpm alloc list` shows those that are"),
    )
}

impl Service {
    pub(super) fn status(&self) -> Status {
        let appliances = self.list_appliances();
        let up: Vec<&Appliance> = appliances.iter().filter(|one| one.state == ApplianceState::Up).collect();
        // The same numbers as in the list of appliances.
        let free = up.iter().map(|one| one.status.free.0).sum();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: Span(whole_millis(self.now.at)),
            appliances_up: up.len() as u64,
            appliances_silent: (appliances.len() - up.len()) as u64,
            allocations: self.allocations.len() as u64,
            capacity: ByteSize(up.iter().map(|one| one.status.capacity.0).sum()),
            free: ByteSize(free),
            problems: self.problems(&appliances),
            metadata: self.state,
            behind: self.behind.clone(),
            read_only: self.read_only.clone(),
        }
    }

    /// Everything that is stored, except decisions; with keys.
    pub(super) fn backup(&self) -> Backup {
        let loaded = Loaded {
            allocations: self.allocations.values().map(|entry| entry.record.clone()).collect(),
            appliances: self.inventory.records(),
            documents: self.policy.documents(),
            revision: self.policy.revision(),
            alive: None,
            written: self.policy.written(),
            events: Vec::new(),
            state: self.state,
        };
        Backup::new(self.now.unix, loaded)
    }

    pub(super) fn list_appliances(&self) -> Vec<Appliance> {
        let mut regions: HashMap<ApplianceId, u64> = HashMap::new();
        for grant in self.allocations.values().flat_map(|entry| entry.record.memory_grants()) {
            *regions.entry(grant.appliance).or_default() += u64::from(grant.count);
        }
        let mut list = self.inventory.list(self.now.at, &regions);
        // An appliance that was given up is listed as long as allocations have lost regions with it.
        list.retain(|one| one.given_up.is_none() || one.regions > 0);
        for appliance in &mut list {
            appliance.drain = self.drain_state(appliance.info.id);
        }
        list
    }

    pub(super) fn list_allocations(&self) -> Vec<Allocation> {
        let mut list: Vec<Allocation> = self.allocations.keys().map(|&id| self.view(id)).collect();
        list.extend(self.list_waiting());
        list.sort_by(|a, b| (&a.name, a.created, a.id).cmp(&(&b.name, b.created, b.id)));
        list
    }

    /// The allocation that holds the name, or else one that held it and is not yet gone.
    pub(super) fn show(&self, name: &Name) -> Result<Allocation, ApiError> {
        let gone = || {
            self.allocations.values().find(|entry| entry.record.name == *name).map(|entry| entry.record.id)
        };
        if let Some(&id) = self.names.get(name) {
            return Ok(self.view(id));
        }
        let waiting = self.show_waiting(name);
        waiting.or_else(|| gone().map(|id| self.view(id))).ok_or_else(|| unknown(name))
    }

    pub(super) fn view(&self, id: AllocationId) -> Allocation {
        let Entry { record, work, .. } = &self.allocations[&id];
        let state = match (record.phase, work) {
            (Phase::Creating, _) => AllocationState::Creating,
            (Phase::Deleting | Phase::Undoing, _) | (_, Work::Purging(_)) => AllocationState::Deleting,
            (Phase::Ready, _) => AllocationState::Ready,
        };
        Allocation {
            name: record.name.clone(),
            id,
            size: ByteSize(record.size),
            layout: record.layout,
            region_len: ByteSize(record.region_len),
            epoch: record.epoch,
            state,
            owner: record.owner.clone(),
            standby: record.standby.as_deref().cloned(),
            handover: self.view_handover(record),
            regions: self.places(record),
            created: record.created,
            taken: ByteSize(record.taken()),
            account: record.terms.account.clone(),
            client: record.terms.client.clone(),
            strategy: record.terms.strategies.first().cloned(),
            labels: record.terms.labels.clone(),
            reclaimable: record.terms.reclaimable,
            link_speed: record.terms.link_speed,
            lease: record.terms.lease.map(|lease| Lease {
                ends: lease.ends,
                frees: lease.frees(),
                renewable: lease.renewable,
            }),
            ending: lease::ending(record, self.now.unix),
            waiting: None,
            change: self.view_change(id),
            lost: self.lost_on(id),
            used: self.used(id),
            followed: self.allocations[&id].side.followed.clone(),
            refused: self.allocations[&id].side.refused.clone(),
            warnings: Vec::new(),
            slabs: record.slabs.clone(),
            block_size: record.block_size(),
        }
    }

    /// Names of the appliances on which the allocation lost memory.
    fn lost_on(&self, id: AllocationId) -> Vec<String> {
        let Entry { record, lost, .. } = &self.allocations[&id];
        record.given_up.union(&lost.on).map(|one| self.inventory.name(*one)).collect()
    }

    /// The device that the present owner reported, if it has reported one.
    fn used(&self, id: AllocationId) -> Option<DeviceUse> {
        let Entry { record, side, .. } = &self.allocations[&id];
        let (client, used) = side.used.as_ref()?;
        (record.owner.as_ref()?.client == *client).then(|| used.clone())
    }

    fn places(&self, record: &AllocationRecord) -> Vec<RegionPlace> {
        let place = |slot: &xpm_protocol::api::allocator::RegionSlot| {
            let grant = &record.grants[slot.grant as usize];
            let region: RegionId = *grant.regions.get(slot.slot as usize)?;
            let appliance_name = match self.inventory.info(grant.appliance) {
                Some(info) => info.name.clone(),
                // An id is always a valid name.
                None => grant.appliance.to_string().parse().ok()?,
            };
            Some(RegionPlace { region, appliance: grant.appliance, appliance_name })
        };
        record.slots.iter().filter_map(place).collect()
    }

    /// Why an appliance cannot be forgotten: an allocation has memory on it, or it is up and still has grants to give
    /// back.
    pub(super) fn reason_to_keep(&self, id: ApplianceId) -> Option<String> {
        let up = self.inventory.state(id, self.now.at) == Some(ApplianceState::Up);
        let on_it = |entry: &&Entry| entry.record.grant_on(id).is_some() && (entry.record.holds_name() || up);
        let record = &self.allocations.values().find(on_it)?.record;
        let name = self.inventory.name(id);
        Some(match record.holds_name() {
            true => {
                let advice = self.advice_for_silent_one(id);
                format!(
                    "appliance {name} has regions of allocation `{}`: delete that one first{advice}",
                    record.name
                )
            }
            false => format!("appliance {name} is giving back `{}`: try again soon", record.name),
        })
    }
}
