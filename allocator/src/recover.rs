//! `xpm-allocator recover`: rebuilds the metadata from what appliances and clients know.
//!
//! An appliance keeps a descriptor with each grant: the allocator's record of the allocation, without keys. A client
//! keeps the maps of the allocations that it uses, with keys. Recovery only reads from both and frees nothing, so
//! allocations in use stay in use. If no client has the keys of an allocation, its owner is asked for them later, or
//! new keys are made at every appliance when the allocation is attached next. A client that is known or seen to use
//! an allocation becomes its owner, so that no other client takes or deletes it by mistake.

mod rebuild;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use xpm_control::client::Client;
use xpm_control::token::Token;
use xpm_protocol::api::allocator::{Map, MetadataState};
use xpm_protocol::api::appliance::{Grant, Status};
use xpm_protocol::{AllocationId, ClientId, Epoch, GrantId, GrantKey};

use crate::store::AllocationRecord;
use crate::store::{Loaded, backup::Backup};

/// Sources of a recovery.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Control interfaces of appliances.
    pub appliances: Vec<String>,
    /// State directories of xpm-blk, or copies of them.
    pub client_state: Vec<PathBuf>,
    /// Whether to go on without the grants of an appliance that does not answer.
    pub partial: bool,
    /// Token that is sent to appliances.
    pub token: Option<Token>,
    /// Keys of grants from older metadata, each with its epoch.
    pub keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
}

/// Result of a recovery.
#[derive(Debug)]
pub struct Recovered {
    /// The metadata.
    pub backup: Backup,
    /// Messages for the operator, a line each.
    pub lines: Vec<String>,
    /// The newest states of the metadata that each appliance has heard of.
    pub heard: Vec<MetadataState>,
}

/// All that the sources reported.
#[derive(Debug, Default)]
pub(crate) struct Told {
    grants: BTreeMap<GrantId, Grant>,
    records: BTreeMap<AllocationId, Vec<AllocationRecord>>,
    maps: BTreeMap<AllocationId, ClientMap>,
    keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
    heard: Vec<MetadataState>,
    lines: Vec<String>,
}

/// A map, and the client that has it; none if the client is unknown.
#[derive(Debug)]
struct ClientMap {
    client: Option<ClientId>,
    map: Map,
}

/// Asks every source and combines the answers.
///
/// # Errors
/// When an appliance does not answer, unless `partial` is set; when a client's directory cannot be read, or there are
/// no random numbers.
pub async fn recover(sources: &Sources, unix: u64) -> anyhow::Result<Recovered> {
    let mut told = Told { keys: sources.keys.clone(), ..Told::default() };
    for url in &sources.appliances {
        match told.ask(url, sources.token.clone()).await {
            Err(error) if sources.partial => {
                told.lines.push(format!("appliance {url} tells nothing: {error}"));
            }
            // Grants that only this appliance knows would count as garbage once it is back, and would be freed.
            Err(error) => bail!(
                "appliance {url} tells nothing: {error}; bring it back, or go on with --partial, without what it has"
            ),
            Ok(()) => {}
        }
    }
    for directory in &sources.client_state {
        told.read(directory)?;
    }
    let heard = std::mem::take(&mut told.heard);
    let (allocations, lines) = told.put_together(unix, &mut xpm_control::random::fill)?;
    let loaded = Loaded { allocations, ..Loaded::default() };
    Ok(Recovered { backup: Backup::new(unix, loaded), lines, heard })
}

impl Told {
    async fn ask(&mut self, url: &str, token: Option<Token>) -> Result<(), String> {
        let client = Client::new(url, token).map_err(|error| error.to_string())?;
        let grants = client.get::<Vec<Grant>>("/v1/grants").await;
        let grants = grants.map_err(|error| xpm_control::error_line(&error))?;
        let status = client.get::<Status>("/v1/status").await;
        self.heard.extend(status.map_err(|error| xpm_control::error_line(&error))?.metadata);
        self.lines.push(format!("appliance {url} has {} grants", grants.len()));
        grants.into_iter().for_each(|grant| self.take(url, grant));
        Ok(())
    }

    /// Takes a grant that the appliance at this URL reported.
    pub(crate) fn take(&mut self, url: &str, grant: Grant) {
        let record = grant.descriptor.as_deref().map(serde_json::from_str::<AllocationRecord>);
        match record {
            Some(Ok(record)) if record.id == grant.allocation => {
                self.records.entry(record.id).or_default().push(record);
            }
            _ => self.lines.push(format!(
                "grant {} of `{}` at {url} does not say what it is part of: without the map of a client it is left alone, and found \
                 again as garbage",
                grant.id, grant.name
            )),
        }
        self.grants.insert(grant.id, grant);
    }

    /// Takes a map that a client has.
    pub(crate) fn take_map(&mut self, client: Option<ClientId>, map: Map) {
        let newer = |known: &ClientMap| (known.map.epoch, known.map.version) >= (map.epoch, map.version);
        if !self.maps.get(&map.id).is_some_and(newer) {
            self.maps.insert(map.id, ClientMap { client, map });
        }
    }

    fn read(&mut self, directory: &Path) -> anyhow::Result<()> {
        let client = self.read_client(directory)?;
        let devices = directory.join("devices");
        let entries =
            std::fs::read_dir(&devices).with_context(|| format!("cannot read {}", devices.display()))?;
        let paths = entries.flatten().map(|entry| entry.path());
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            match serde_json::from_str::<Kept>(&text) {
                Ok(kept) => self.take_map(client, kept.map),
                Err(error) => {
                    self.lines.push(format!("{} is no record of a device: {error}", path.display()));
                }
            }
        }
        Ok(())
    }

    fn read_client(&mut self, directory: &Path) -> anyhow::Result<Option<ClientId>> {
        let path = directory.join("client-id");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.lines.push(format!("{} is not there: whose maps these are is unknown", path.display()));
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let client = text.trim().parse().with_context(|| format!("{} is damaged", path.display()))?;
        Ok(Some(client))
    }
}

/// The fields of an xpm-blk record that recovery needs.
#[derive(Deserialize)]
struct Kept {
    map: Map,
}
