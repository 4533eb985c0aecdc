//! Rebuilds records from what appliances and clients reported.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use xpm_protocol::api::allocator::{self, HandoverState, Map, Owner};
use xpm_protocol::api::appliance::Grant;
use xpm_protocol::{ByteSize, ClientId, Epoch, GrantId, GrantKey, Name, RegionId};

use super::{ClientMap, Told};
use crate::store::record::{
    AllocationRecord, ChangeRecord, GrantRecord, HandoverRecord, NextEpoch, Phase, Stage, Terms,
};

/// Fills with random bytes fit for keys.
pub(crate) type Dice<'a> = &'a mut dyn FnMut(&mut [u8]) -> std::io::Result<()>;

/// Stands for an unknown client that uses an allocation.
const NOBODY_KNOWN: ClientId = ClientId::from_u128(0);

/// A client may have heard of changes that no appliance knows. So that no change number is used twice, numbers
/// continue from the time of the recovery, in seconds since 1970, shifted left by this.
const CHANGES_SHIFT: u32 = 20;

impl Told {
    /// Rebuilds the records, and returns messages about them, a line each.
    ///
    /// # Errors
    /// When there are no random numbers.
    pub(crate) fn put_together(
        self,
        unix: u64,
        dice: Dice<'_>,
    ) -> anyhow::Result<(Vec<AllocationRecord>, Vec<String>)> {
        let Told { grants, records, maps, keys, lines, heard: _ } = self;
        let mut site =
            Site { there: grants, names: BTreeSet::new(), regions: BTreeMap::new(), keys, lines, unix };
        let undescribed: Vec<&ClientMap> =
            maps.values().filter(|of| !records.contains_key(&of.map.id)).collect();
        let mut newest: Vec<AllocationRecord> =
            records.into_values().filter_map(|told| told.into_iter().max_by_key(age)).collect();
        newest.extend(undescribed.into_iter().filter_map(|of| site.of_map(&of.map)));
        // Of two allocations with one name, the older one keeps it.
        newest.sort_by_key(|record| (record.created, record.id));
        let mut whole = Vec::with_capacity(newest.len());
        for record in newest {
            let map = maps.get(&record.id);
            whole.extend(site.rebuild(record, map, dice)?);
        }
        site.lines.push("documents are at no appliance: where there are none, apply them again".to_owned());
        Ok((whole, site.lines))
    }
}

/// Order of descriptors by age; the larger is the newer. First the epoch counts, then the number of changes of place,
/// then the steps within both. Within one epoch an allocation first has no owner, then an owner without keys (after a
/// transfer), then an owner with its keys, and then no owner again.
fn age(record: &AllocationRecord) -> (Epoch, u64, u64, bool, u8, u64, u64) {
    let owned = match (&record.owner, record.revealed) {
        (None, false) => 0,
        (Some(_), false) => 1,
        (Some(_), true) => 2,
        (None, true) => 3,
    };
    let ends = record.terms.lease.map_or(0, |lease| lease.ends);
    (record.epoch, record.changes, record.version, record.change.is_none(), owned, record.slabs.number, ends)
}

/// The grants that appliances have, and the records that were built on them.
struct Site {
    there: BTreeMap<GrantId, Grant>,
    names: BTreeSet<Name>,
    /// Name of the allocation that has the region, by region.
    regions: BTreeMap<RegionId, Name>,
    /// Keys from older metadata, each with its epoch.
    keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
    lines: Vec<String>,
    unix: u64,
}

impl Site {
    /// The record as it is valid now; none if it contradicts another one.
    fn rebuild(
        &mut self,
        newest: AllocationRecord,
        map: Option<&ClientMap>,
        dice: Dice<'_>,
    ) -> anyhow::Result<Option<AllocationRecord>> {
        let mut record = self.settle(newest, map);
        if let Some((region, other)) = self.claimed_twice(&record) {
            let line = format!("`{}` is left out: its region {region} is in `{other}` too", record.name);
            self.lines.push(line);
            return Ok(None);
        }
        self.claim(&record);
        self.rename(&mut record);
        self.report(&record, map);
        self.find_owner(&mut record, map);
        self.find_keys(&mut record, map, dice)?;
        // An open hand-over is committed or rolled back by the client that began it. If new keys have to be made, an
        // attach ends it.
        let owner = record.owner.as_ref().map(|owner| owner.client);
        let is_open = |one: &HandoverRecord| one.state == HandoverState::Open && owner == Some(one.to.client);
        record.handover = record.handover.take().filter(|one| record.next.is_none() && is_open(one));
        record.standby = record.standby.take().filter(|standby| owner != Some(standby.client.client));
        let how = match (record.next.is_some(), record.keyless && record.owner.is_some()) {
            (false, _) => "",
            (true, true) => "; its owner is asked for its keys",
            (true, false) => "; its keys are made anew when it is attached",
        };
        self.lines.push(format!("`{}` of {} is recovered{how}", record.name, ByteSize(record.size)));
        Ok(Some(record))
    }

    /// A record of an allocation that only a client's map describes; none if an appliance did not report its regions.
    fn of_map(&mut self, map: &Map) -> Option<AllocationRecord> {
        let Some(grants) = self.grants_of(map) else {
            let line = format!("a client has `{}`, and not all that it has was told by appliances", map.name);
            self.lines.push(line);
            return None;
        };
        Some(AllocationRecord {
            id: map.id,
            name: map.name.clone(),
            size: map.size.0,
            layout: map.layout,
            region_len: map.region_len.0,
            created: self.unix,
            phase: Phase::Ready,
            epoch: map.epoch,
            owner: None,
            revealed: true,
            next: None,
            grants,
            slots: map.regions.clone(),
            terms: Terms::default(),
            idle_since: self.unix,
            reclaim: None,
            version: map.version,
            changes: map.version,
            change: None,
            slabs: map.slabs.clone(),
            given_up: Default::default(),
            block_size: map.block_size,
            standby: None,
            handover: None,
            keyless: false,
        })
    }

    /// The grants of a map, if appliances reported the regions of all of them.
    fn grants_of(&self, map: &Map) -> Option<Vec<GrantRecord>> {
        let grant = |of: &allocator::Grant| {
            let there = self.there.get(&of.id).filter(|grant| grant.allocation == map.id)?;
            let (id, appliance, key, count) = (of.id, of.appliance, of.key.clone(), of.regions);
            let regions = Some(there.regions.clone()).filter(|all| all.len() == count as usize)?;
            Some(GrantRecord { id, appliance, key, count, regions, from: None })
        };
        map.grants.iter().map(grant).collect()
    }

    /// Settles an unfinished change: keeps the side in the owner's map. The owner may not have heard yet that the
    /// other side holds, and writes to both sides until then. Without such a map, keeps the side whose grants exist.
    fn settle(&self, mut record: AllocationRecord, map: Option<&ClientMap>) -> AllocationRecord {
        record.phase = Phase::Ready;
        record.next = None;
        record.epoch = self.epochs(record.known_grants()).max().unwrap_or(record.epoch).max(record.epoch);
        let version = map.filter(|of| of.map.epoch == record.epoch).map(|of| of.map.version);
        if let Some(change) = record.change.take()
            && let Some(version) = self.other_side(&record, &change, version)
        {
            (record.size, record.version) = (change.size, version);
            (record.grants, record.slots) = (change.grants, change.slots);
        }
        if let Some(map) = map.map(|of| &of.map).filter(|_| version > Some(record.version))
            && let Some(grants) = self.grants_of(map)
        {
            // The appliances did not hear of the last change.
            (record.size, record.version) = (map.size.0, map.version);
            (record.grants, record.slots) = (grants, map.regions.clone());
        }
        record.changes = record.changes.max(record.version).max(self.unix << CHANGES_SHIFT);
        record.grants.iter_mut().for_each(|grant| grant.from = None);
        record
    }

    /// Whether the other side of a change holds, and its version of the map. `version` is that of the owner's map.
    fn other_side(
        &self,
        record: &AllocationRecord,
        change: &ChangeRecord,
        version: Option<u64>,
    ) -> Option<u64> {
        let all = |grants: &[GrantRecord]| grants.iter().all(|grant| self.there.contains_key(&grant.id));
        // A side is given back only once the other one holds, whether the owner has heard of that or not.
        let (here, there) = (all(&record.grants), all(&change.grants));
        match change.stage {
            Stage::Preparing => None,
            Stage::Open => {
                let turned = version.is_some_and(|version| version >= change.number);
                (turned || !here && there).then_some(change.number)
            }
            Stage::Switched => version.filter(|version| *version < change.number && (there || !here)),
        }
    }

    fn epochs<'a>(&self, grants: impl IntoIterator<Item = &'a GrantRecord>) -> impl Iterator<Item = Epoch> {
        grants.into_iter().filter_map(|grant| Some(self.there.get(&grant.id)?.epoch))
    }

    fn claimed_twice(&self, record: &AllocationRecord) -> Option<(RegionId, &Name)> {
        let mut regions = record.grants.iter().flat_map(|grant| &grant.regions);
        regions.find_map(|region| Some((*region, self.regions.get(region)?)))
    }

    fn claim(&mut self, record: &AllocationRecord) {
        let regions = record.grants.iter().flat_map(|grant| &grant.regions);
        self.regions.extend(regions.map(|region| (*region, record.name.clone())));
    }

    fn rename(&mut self, record: &mut AllocationRecord) {
        let old = record.name.clone();
        let mut number = 2;
        while !self.names.insert(record.name.clone()) {
            let short: String = old.as_str().chars().take(50).collect();
            match format!("{short}-{number}").parse() {
                Ok(name) => record.name = name,
                Err(_) => return,
            }
            number += 1;
        }
        if record.name != old {
            let line = format!("two allocations are named `{old}`: the later one is `{}` now", record.name);
            self.lines.push(line);
        }
    }

    /// Reports missing grants and contradictions.
    fn report(&mut self, record: &AllocationRecord, map: Option<&ClientMap>) {
        let name = &record.name;
        let missing: Vec<&GrantRecord> =
            record.grants.iter().filter(|grant| !self.there.contains_key(&grant.id)).collect();
        if !missing.is_empty() {
            let on: BTreeSet<String> = missing.iter().map(|grant| grant.appliance.to_string()).collect();
            let on = Vec::from_iter(on).join(", ");
            let (lost, all) = (missing.len(), record.grants.len());
            self.lines.push(format!(
                "`{name}` lacks {lost} of its {all} grants, which no appliance reported: that memory is lost unless it is on \
                 an appliance that was not asked ({on})"
            ));
        }
        if self.epochs(&record.grants).any(|epoch| epoch != record.epoch) {
            self.lines.push(format!(
                "`{name}` was on its way to another owner: some appliances are at epoch {}, others are not",
                record.epoch
            ));
        }
        if let Some(of) = map.filter(|of| of.map.epoch != record.epoch) {
            self.lines.push(format!(
                "a client has `{name}` at epoch {}, and appliances are at {}: that client was cut off",
                of.map.epoch, record.epoch
            ));
        }
    }

    /// The client that has the keys is the owner; so is any client that is seen to use the allocation, known or not.
    fn find_owner(&mut self, record: &mut AllocationRecord, map: Option<&ClientMap>) {
        let told = map.filter(|of| of.map.epoch == record.epoch);
        let by = match (told.and_then(|of| of.client), &record.owner) {
            (Some(client), Some(owner)) if owner.client == client => return,
            (Some(client), _) => client,
            (None, Some(_)) => return,
            (None, None) if told.is_none() && !self.is_used(record) => return,
            (None, None) => {
                self.lines.push(format!(
                    "`{}` is in use by an unknown client: it is attached or deleted only with force",
                    record.name
                ));
                NOBODY_KNOWN
            }
        };
        let (host_name, purpose) = ("an unknown host".to_owned(), "found by a recovery".to_owned());
        record.owner = Some(Owner { client: by, host_name, purpose, since: self.unix, life: None });
    }

    fn is_used(&self, record: &AllocationRecord) -> bool {
        let mut there = record.grants.iter().filter_map(|grant| self.there.get(&grant.id));
        there.any(|grant| grant.connections > 0)
    }

    /// Takes the keys from the client's map. If there is none, or it is of another epoch, makes new keys for the next
    /// epoch.
    fn find_keys(
        &self,
        record: &mut AllocationRecord,
        map: Option<&ClientMap>,
        dice: Dice<'_>,
    ) -> anyhow::Result<()> {
        let told = map.filter(|of| of.map.epoch == record.epoch);
        let older = self.keys.iter().filter(|(_, (epoch, _))| *epoch == record.epoch);
        let mut known: BTreeMap<GrantId, &GrantKey> = older.map(|(id, (_, key))| (*id, key)).collect();
        known.extend(told.iter().flat_map(|of| &of.map.grants).map(|grant| (grant.id, &grant.key)));
        let all = record.grants.iter().all(|grant| known.contains_key(&grant.id))
            && self.epochs(&record.grants).all(|epoch| epoch == record.epoch);
        record.revealed = true;
        for grant in &mut record.grants {
            grant.key = match known.get(&grant.id) {
                Some(key) => (*key).clone(),
                None => random_key(dice)?,
            };
        }
        if !all {
            let keys = record.grants.iter().map(|_| random_key(dice)).collect::<anyhow::Result<_>>()?;
            record.next = Some(NextEpoch { epoch: record.epoch.next(), keys });
        }
        // If the appliances are at different epochs, an owner has keys for some of them only.
        record.keyless = !all && self.epochs(&record.grants).all(|epoch| epoch == record.epoch);
        Ok(())
    }
}

fn random_key(dice: Dice<'_>) -> anyhow::Result<GrantKey> {
    let mut key = [0; 32];
    dice(&mut key).context("no random number can be had")?;
    Ok(GrantKey::from_bytes(key))
}
