//! `xpm-allocator recover`: metadata made anew out of what appliances and clients know.
//!
//! An appliance keeps with each grant what it is part of: the allocator's record of it, without keys. A client
//! keeps the maps of what it uses, with keys. Nothing is asked of either but to tell, and nothing is freed:
//! what is in use goes on to be used. Where no client tells the keys of an allocation, they are made anew at
//! every appliance when it is attached next.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Deserialize;
use xpm_control::client::Client;
use xpm_control::token::Token;
use xpm_protocol::api::allocator::Map;
use xpm_protocol::api::appliance::Grant;
use xpm_protocol::{AllocationId, GrantId, GrantKey, Name, RegionId};

use crate::store::record::{AllocationRecord, NextEpoch, Phase};
use crate::store::{Loaded, backup::Backup};

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Control interfaces of appliances.
    pub appliances: Vec<String>,
    /// State directories of xpm-blk, or copies of them.
    pub client_state: Vec<PathBuf>,
    /// Shown to appliances.
    pub token: Option<Token>,
}

/// What was found.
#[derive(Debug)]
pub struct Recovered {
    /// The metadata.
    pub backup: Backup,
    /// What an operator has to know, a line each.
    pub lines: Vec<String>,
}

/// What was told.
#[derive(Debug, Default)]
struct Told {
    grants: BTreeMap<GrantId, Grant>,
    records: BTreeMap<AllocationId, Vec<AllocationRecord>>,
    maps: BTreeMap<AllocationId, Map>,
    lines: Vec<String>,
}

/// Asks every source and puts together what they say.
///
/// # Errors
/// When a client's directory cannot be read, or no random number can be had.
pub async fn recover(sources: &Sources, unix: u64) -> anyhow::Result<Recovered> {
    let mut told = Told::default();
    for url in &sources.appliances {
        told.ask(url, sources.token.clone()).await;
    }
    for directory in &sources.client_state {
        told.read(directory)?;
    }
    let (allocations, lines) = put_together(told, &mut xpm_control::random::fill)?;
    let loaded = Loaded { allocations, ..Loaded::default() };
    Ok(Recovered { backup: Backup::new(unix, loaded), lines })
}

impl Told {
    async fn ask(&mut self, url: &str, token: Option<Token>) {
        let client = Client::new(url, token).map_err(|error| error.to_string());
        let grants: Result<Vec<Grant>, String> = match client {
            Ok(client) => client.get("/v1/grants").await.map_err(|error| xpm_control::error_line(&error)),
            Err(error) => Err(error),
        };
        match grants {
            Ok(grants) => {
                self.lines.push(format!("appliance {url} has {} grants", grants.len()));
                grants.into_iter().for_each(|grant| self.take(url, grant));
            }
            Err(error) => self.lines.push(format!("appliance {url} tells nothing: {error}")),
        }
    }

    fn take(&mut self, url: &str, grant: Grant) {
        let record = grant.descriptor.as_deref().map(serde_json::from_str::<AllocationRecord>);
        match record {
            Some(Ok(record)) if record.id == grant.allocation => {
                self.records.entry(record.id).or_default().push(record);
            }
            _ => self.lines.push(format!(
                "grant {} of `{}` at {url} does not say what it is part of: it is left alone, and found again as garbage",
                grant.id, grant.name
            )),
        }
        self.grants.insert(grant.id, grant);
    }

    fn read(&mut self, directory: &Path) -> anyhow::Result<()> {
        /// Of a record of xpm-blk, what is of interest here.
        #[derive(Deserialize)]
        struct Kept {
            map: Map,
        }
        let devices = directory.join("devices");
        let entries =
            std::fs::read_dir(&devices).with_context(|| format!("cannot read {}", devices.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            match serde_json::from_str::<Kept>(&text) {
                Ok(kept) => {
                    let map = kept.map;
                    let newer = |known: &Map| (known.epoch, known.version) >= (map.epoch, map.version);
                    if !self.maps.get(&map.id).is_some_and(newer) {
                        self.maps.insert(map.id, map);
                    }
                }
                Err(error) => {
                    self.lines.push(format!("{} is no record of a device: {error}", path.display()));
                }
            }
        }
        Ok(())
    }
}

type Dice<'a> = &'a mut dyn FnMut(&mut [u8]) -> std::io::Result<()>;

/// Records of what is there, and what is to be said about it.
fn put_together(told: Told, dice: Dice<'_>) -> anyhow::Result<(Vec<AllocationRecord>, Vec<String>)> {
    let Told { grants, records, maps, mut lines } = told;
    let (mut names, mut regions) = (BTreeSet::new(), BTreeSet::new());
    let mut whole = Vec::new();
    for versions in records.into_values() {
        // Of an older ownership, or of before a change, is what was not told of the newer one.
        let Some(newest) = versions.into_iter().max_by_key(|one| (one.epoch, one.changes, one.version))
        else {
            continue;
        };
        let map = maps.get(&newest.id);
        let mut record = settled(newest, map, &grants);
        if let Some(taken) = claims_twice(&record, &mut regions) {
            lines.push(format!("`{}` is left out: region {taken} is in another allocation too", record.name));
            continue;
        }
        rename(&mut record, &mut names, &mut lines);
        let missing = record.grants.iter().filter(|grant| !grants.contains_key(&grant.id)).count();
        if missing > 0 {
            let line = format!(
                "`{}` has lost memory: {missing} of its {} grants were told by nobody",
                record.name,
                record.grants.len()
            );
            lines.push(line);
        }
        find_keys(&mut record, map, &grants, dice)?;
        let how = if record.next.is_some() { "; its keys are made anew when it is attached" } else { "" };
        lines.push(format!("`{}` of {} is recovered{how}", record.name, xpm_protocol::ByteSize(record.size)));
        whole.push(record);
    }
    lines.push("documents are at no appliance: apply them again".to_owned());
    Ok((whole, lines))
}

/// Of a change that was not over, the side that holds: the one that the client has, or else the one that is there.
fn settled(
    mut record: AllocationRecord,
    map: Option<&Map>,
    there: &BTreeMap<GrantId, Grant>,
) -> AllocationRecord {
    record.phase = Phase::Ready;
    if let Some(change) = record.change.take() {
        let all = |grants: &[crate::store::record::GrantRecord]| {
            grants.iter().all(|grant| there.contains_key(&grant.id))
        };
        let holds = match map {
            Some(map) => map.version >= change.number,
            None => !all(&record.grants) && all(&change.grants),
        };
        if holds {
            (record.size, record.version) = (change.size, change.number);
            (record.grants, record.slots) = (change.grants, change.slots);
        }
    }
    record.grants.iter_mut().for_each(|grant| grant.from = None);
    let epochs = record.grants.iter().filter_map(|grant| Some(there.get(&grant.id)?.epoch));
    record.epoch = epochs.max().unwrap_or(record.epoch).max(record.epoch);
    record
}

fn claims_twice(record: &AllocationRecord, regions: &mut BTreeSet<RegionId>) -> Option<RegionId> {
    let all = || record.grants.iter().flat_map(|grant| grant.regions.iter().copied());
    if let Some(taken) = all().find(|region| regions.contains(region)) {
        return Some(taken);
    }
    regions.extend(all());
    None
}

fn rename(record: &mut AllocationRecord, names: &mut BTreeSet<Name>, lines: &mut Vec<String>) {
    let old = record.name.clone();
    let mut number = 2;
    while !names.insert(record.name.clone()) {
        let short: String = old.as_str().chars().take(50).collect();
        match format!("{short}-{number}").parse() {
            Ok(name) => record.name = name,
            Err(_) => return,
        }
        number += 1;
    }
    if record.name != old {
        lines.push(format!("two allocations are named `{old}`: one of them is `{}` now", record.name));
    }
}

/// The keys as the client has them; where it has not, or not of this ownership, new ones for the next.
fn find_keys(
    record: &mut AllocationRecord,
    map: Option<&Map>,
    there: &BTreeMap<GrantId, Grant>,
    dice: Dice<'_>,
) -> anyhow::Result<()> {
    let known: BTreeMap<GrantId, GrantKey> = match map {
        Some(map) if map.epoch == record.epoch => {
            map.grants.iter().map(|grant| (grant.id, grant.key.clone())).collect()
        }
        _ => BTreeMap::new(),
    };
    let at_epoch = |id: &GrantId| there.get(id).is_none_or(|grant| grant.epoch == record.epoch);
    let all = record.grants.iter().all(|grant| known.contains_key(&grant.id) && at_epoch(&grant.id));
    record.revealed = true;
    record.next = None;
    for grant in &mut record.grants {
        grant.key = match known.get(&grant.id) {
            Some(key) => key.clone(),
            None => random_key(dice)?,
        };
    }
    if !all {
        let keys = record.grants.iter().map(|_| random_key(dice)).collect::<anyhow::Result<_>>()?;
        record.next = Some(NextEpoch { epoch: record.epoch.next(), keys });
    }
    Ok(())
}

fn random_key(dice: Dice<'_>) -> anyhow::Result<GrantKey> {
    let mut key = [0; 32];
    dice(&mut key).context("no random number can be had")?;
    Ok(GrantKey::from_bytes(key))
}
