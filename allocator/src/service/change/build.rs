//! Builds the other side of a change: its grants and regions.

use std::collections::HashMap;

use xpm_control::server::ApiError;
use xpm_protocol::api::allocator::{ChangeKind, RegionSlot};
use xpm_protocol::{AllocationId, ApplianceId, GrantId, GrantKey, RegionId};

use super::super::{AfterStore, ReplyTo, Service, Work};
use crate::store::record::{AllocationRecord, ChangeRecord, GrantRecord, Stage};

/// Placement of a region after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Place {
    /// The region stays where it is.
    Stay,
    /// The region moves to a new region on this appliance.
    Go(ApplianceId),
}

impl Service {
    /// Records a change to these places; regions of the allocation beyond them are removed. Appliances hear of the
    /// change once the record is durable.
    pub(in super::super) fn begin_change(
        &mut self,
        id: AllocationId,
        kind: ChangeKind,
        size: u64,
        places: &[Place],
        rate: Option<u64>,
        reply: Option<ReplyTo>,
    ) -> Result<(), ApiError> {
        let mut record = self.entry(id).record.clone();
        let mut built = build(&record, places);
        self.name_grants(&mut built.grants[built.kept..])?;
        for grant in built.grants[built.kept..].iter().filter(|grant| grant.from.is_none()) {
            self.inventory.promise(id, grant.appliance, record.bytes_of(grant));
        }
        let number = record.changes + 1;
        record.changes = number;
        record.change = Some(Box::new(ChangeRecord {
            number,
            kind,
            stage: Stage::Preparing,
            since: self.now.unix,
            size,
            grants: built.grants,
            slots: built.slots,
            moved: built.moved,
            rate,
        }));
        let entry = self.entry(id);
        let used = entry.side.used.take();
        entry.side = super::Side { reply, used, ..super::Side::default() };
        // The change counts for limits from now on, not only once it is durable.
        self.replace(id, record.clone());
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::ChangePlanned);
        Ok(())
    }
}

/// The other side; new grants have no ids and keys yet.
struct Built {
    /// First the grants that stay as they are, then the new ones.
    grants: Vec<GrantRecord>,
    kept: usize,
    slots: Vec<RegionSlot>,
    moved: Vec<u32>,
}

fn build(record: &AllocationRecord, places: &[Place]) -> Built {
    let stays = |region: usize| places.get(region) == Some(&Place::Stay);
    let mut loses = vec![false; record.grants.len()];
    for (region, slot) in record.slots.iter().enumerate() {
        loses[slot.grant as usize] |= !stays(region);
    }
    let mut built = Built { grants: Vec::new(), kept: 0, slots: Vec::new(), moved: Vec::new() };
    // The numbers of old grants in the new list.
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    for (number, grant) in record.grants.iter().enumerate().filter(|(number, _)| !loses[*number]) {
        numbers.insert(number as u32, built.grants.len() as u32);
        built.grants.push(GrantRecord { from: None, ..grant.clone() });
    }
    built.kept = built.grants.len();
    let mut on: HashMap<ApplianceId, u32> = HashMap::new();
    for (region, place) in places.iter().enumerate() {
        let slot = match (place, record.slots.get(region)) {
            (Place::Stay, Some(slot)) => built.stay(record, *slot, &mut numbers, &loses),
            (Place::Go(appliance), was) => {
                if was.is_some() {
                    built.moved.push(region as u32);
                }
                built.go(*appliance, &mut on)
            }
            (Place::Stay, None) => continue,
        };
        built.slots.push(slot);
    }
    built
}

impl Built {
    /// Keeps a region: in its grant, or in a new grant that takes the region over.
    fn stay(
        &mut self,
        record: &AllocationRecord,
        slot: RegionSlot,
        numbers: &mut HashMap<u32, u32>,
        loses: &[bool],
    ) -> RegionSlot {
        let old = &record.grants[slot.grant as usize];
        if !loses[slot.grant as usize] {
            return RegionSlot { grant: numbers[&slot.grant], slot: slot.slot };
        }
        let number = *numbers.entry(slot.grant).or_insert_with(|| {
            self.grants.push(unnamed(old.appliance, Some(old.id)));
            self.grants.len() as u32 - 1
        });
        let grant = &mut self.grants[number as usize];
        let region: RegionId = old.regions[slot.slot as usize];
        grant.regions.push(region);
        grant.count += 1;
        RegionSlot { grant: number, slot: grant.count - 1 }
    }

    fn go(&mut self, appliance: ApplianceId, on: &mut HashMap<ApplianceId, u32>) -> RegionSlot {
        let number = *on.entry(appliance).or_insert_with(|| {
            self.grants.push(unnamed(appliance, None));
            self.grants.len() as u32 - 1
        });
        let grant = &mut self.grants[number as usize];
        grant.count += 1;
        RegionSlot { grant: number, slot: grant.count - 1 }
    }
}

fn unnamed(appliance: ApplianceId, from: Option<GrantId>) -> GrantRecord {
    let (id, key) = (GrantId::from_u128(0), GrantKey::from_bytes([0; 32]));
    GrantRecord { id, appliance, key, count: 0, regions: Vec::new(), from }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::allocation;

    fn appliance(number: u128) -> ApplianceId {
        ApplianceId::from_u128(number)
    }

    /// Six regions that alternate between two appliances.
    fn record() -> AllocationRecord {
        let mut record = allocation(1, "a");
        let grant = |number: u128| GrantRecord {
            id: GrantId::from_u128(number),
            count: 3,
            regions: (0..3).map(|slot| RegionId::from_u128(number * 10 + slot)).collect(),
            ..unnamed(appliance(number), None)
        };
        record.grants = vec![grant(1), grant(2)];
        record.slots = (0..6).map(|region| RegionSlot { grant: region % 2, slot: region / 2 }).collect();
        record
    }

    fn at(grant: u32, slot: u32) -> RegionSlot {
        RegionSlot { grant, slot }
    }

    #[test]
    fn a_grant_that_keeps_all_regions_stays() {
        let mut places = vec![Place::Stay; 6];
        places.extend([Place::Go(appliance(2)), Place::Go(appliance(3)), Place::Go(appliance(2))]);
        let built = build(&record(), &places);
        assert_eq!((built.kept, built.grants.len(), built.moved.len()), (2, 4, 0));
        assert_eq!(built.slots[..6], record().slots[..]);
        assert_eq!(built.slots[6..], [at(2, 0), at(3, 0), at(2, 1)]);
        assert_eq!((built.grants[2].appliance, built.grants[2].count), (appliance(2), 2));
    }

    #[test]
    fn a_grant_that_loses_regions_is_replaced() {
        let built = build(&record(), &[Place::Stay; 3]);
        assert_eq!((built.kept, built.moved.len()), (0, 0));
        let from: Vec<_> = built.grants.iter().map(|grant| grant.from.unwrap().as_u128()).collect();
        assert_eq!(from, [1, 2]);
        assert_eq!(built.grants[0].regions, [RegionId::from_u128(10), RegionId::from_u128(11)]);
        assert_eq!(built.grants[1].regions, [RegionId::from_u128(20)]);
        assert_eq!(built.slots, [at(0, 0), at(1, 0), at(0, 1)]);
    }

    #[test]
    fn moved_regions_are_listed() {
        let mut places = vec![Place::Stay; 6];
        (places[1], places[3], places[5]) =
            (Place::Go(appliance(3)), Place::Go(appliance(3)), Place::Go(appliance(3)));
        let built = build(&record(), &places);
        assert_eq!((built.kept, built.grants.len()), (1, 2), "a grant that loses all has no heir");
        assert_eq!(built.moved, [1, 3, 5]);
        assert_eq!(built.slots, [at(0, 0), at(1, 0), at(0, 1), at(1, 1), at(0, 2), at(1, 2)]);
    }
}
