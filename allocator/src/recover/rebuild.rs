//! Records out of what was told.

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

/// Stands for a client that uses an allocation and is not known.
const NOBODY_KNOWN: ClientId = ClientId::from_u128(0);

/// A client may have heard of changes of which no appliance has. So that no number is used for two of them, they go on
/// from the time of the recovery, in seconds since 1970 shifted by this.
const CHANGES_SHIFT: u32 = 20;

impl Told {
    /// Records of what is there, and what is to be said about it, a line each.
    ///
    /// # Errors
    /// When no random number can be had.
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
        // Who was first keeps its name.
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

/// The larger, the newer: a change of owner, then a change of place, then what happens within both. Within one
/// ownership nobody has it first, then whom it was handed to, then the owner with its keys, then nobody.
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

/// What is there, and what was built on it.
struct Site {
    there: BTreeMap<GrantId, Grant>,
    names: BTreeSet<Name>,
    /// By the region, the name of the allocation that has it.
    regions: BTreeMap<RegionId, Name>,
    /// Keys of older metadata, each with the epoch that it is of.
    keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
    lines: Vec<String>,
    unix: u64,
}

impl Site {
    /// The record as it holds now; none where it contradicts another one.
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
        // An open hand-over is committed or rolled back by the client that began it. Where keys have to be made anew, an attach ends it.
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

    /// A record of what only a client describes; none where an appliance did not tell its regions.
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

    /// The grants of a map, if appliances told the regions of all of them.
    fn grants_of(&self, map: &Map) -> Option<Vec<GrantRecord>> {
        let grant = |of: &allocator::Grant| {
            let there = self.there.get(&of.id).filter(|grant| grant.allocation == map.id)?;
            let (id, appliance, key, count) = (of.id, of.appliance, of.key.clone(), of.regions);
            let regions = Some(there.regions.clone()).filter(|all| all.len() == count as usize)?;
            Some(GrantRecord { id, appliance, key, count, regions, from: None })
        };
        map.grants.iter().map(grant).collect()
    }

    /// Of a change that was not over, the side that holds: the one that its owner has, which may not have heard yet
    /// that the other does, and writes to both until then; or else the one that is there.
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
            // Appliances did not hear of the last change.
            (record.size, record.version) = (map.size.0, map.version);
            (record.grants, record.slots) = (grants, map.regions.clone());
        }
        record.changes = record.changes.max(record.version).max(self.unix << CHANGES_SHIFT);
        record.grants.iter_mut().for_each(|grant| grant.from = None);
        record
    }

    /// Whether the other side of a change holds, and as which version of the map. `version` is the owner's.
    fn other_side(
        &self,
        record: &AllocationRecord,
        change: &ChangeRecord,
        version: Option<u64>,
    ) -> Option<u64> {
        let all = |grants: &[GrantRecord]| grants.iter().all(|grant| self.there.contains_key(&grant.id));
        // A side is given back only when the other one holds, whether its owner has heard of that or not.
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

    /// What is missing, and what contradicts itself.
    fn report(&mut self, record: &AllocationRecord, map: Option<&ClientMap>) {
        let name = &record.name;
        let missing: Vec<&GrantRecord> =
            record.grants.iter().filter(|grant| !self.there.contains_key(&grant.id)).collect();
        if !missing.is_empty() {
            let on: BTreeSet<String> = missing.iter().map(|grant| grant.appliance.to_string()).collect();
            let on = Vec::from_iter(on).join(", ");
            let (lost, all) = (missing.len(), record.grants.len());
            self.lines.push(format!(
                "`{name}` lacks {lost} of its {all} grants, which nobody told: that memory is lost unless it is on an \
                 appliance that was not asked ({on})"
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

    /// Who has the keys is the owner; so is whoever is seen to use it, known or not.
    fn find_owner(&mut self, record: &mut AllocationRecord, map: Option<&ClientMap>) {
        let told = map.filter(|of| of.map.epoch == record.epoch);
        let by = match (told.and_then(|of| of.client), &record.owner) {
            (Some(client), Some(owner)) if owner.client == client => return,
            (Some(client), _) => client,
            (None, Some(_)) => return,
            (None, None) if told.is_none() && !self.is_used(record) => return,
            (None, None) => {
                self.lines.push(format!(
                    "`{}` is in use, and nobody told by whom: it is attached or deleted only with force",
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

    /// The keys as the client has them; where it has not, or not of this ownership, new ones for the next.
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
        // Where appliances differ, an owner has keys for some of them only.
        record.keyless = !all && self.epochs(&record.grants).all(|epoch| epoch == record.epoch);
        Ok(())
    }
}

fn random_key(dice: Dice<'_>) -> anyhow::Result<GrantKey> {
    let mut key = [0; 32];
    dice(&mut key).context("no random number can be had")?;
    Ok(GrantKey::from_bytes(key))
}
