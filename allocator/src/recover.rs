//! `xpm-allocator recover`: metadata made anew out of what appliances and clients know.
//!
//! An appliance keeps with each grant what it is part of: the allocator's record of it, without keys. A client
//! keeps the maps of what it uses, with keys. Nothing is asked of either but to tell, and nothing is freed:
//! what is in use goes on to be used. Where no client tells the keys of an allocation, its owner is asked
//! for them later, or they are made anew at every appliance when it is attached next. Whoever is known to use an allocation, or is seen to, is its owner, so
//! that nobody takes or deletes it unawares.

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

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Control interfaces of appliances.
    pub appliances: Vec<String>,
    /// State directories of xpm-blk, or copies of them.
    pub client_state: Vec<PathBuf>,
    /// Whether to go on without what some appliance has, because it does not answer.
    pub partial: bool,
    /// Shown to appliances.
    pub token: Option<Token>,
    /// Keys of grants that are known from older metadata, each with the epoch that it is of.
    pub keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
}

/// What was found.
#[derive(Debug)]
pub struct Recovered {
    /// The metadata.
    pub backup: Backup,
    /// What an operator has to know, a line each.
    pub lines: Vec<String>,
    /// The newest states of the metadata that appliances heard of.
    pub heard: Vec<MetadataState>,
}

/// What was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    grants: BTreeMap<GrantId, Grant>,
    records: BTreeMap<AllocationId, Vec<AllocationRecord>>,
    maps: BTreeMap<AllocationId, ClientMap>,
    keys: BTreeMap<GrantId, (Epoch, GrantKey)>,
    heard: Vec<MetadataState>,
    lines: Vec<String>,
}

/// A map, and who has it; none where that cannot be known.
#[derive(Debug)]
struct ClientMap {
    client: Option<ClientId>,
    map: Map,
}

/// Asks every source and puts together what they say.
///
/// # Errors
/// When an appliance does not answer, unless that is accepted; when a client's directory cannot be read, or no random
/// number can be had.
pub async fn recover(sources: &Sources, unix: u64) -> anyhow::Result<Recovered> {
    let mut told = Told { keys: sources.keys.clone(), ..Told::default() };
    for url in &sources.appliances {
        match told.ask(url, sources.token.clone()).await {
            Err(error) if sources.partial => {
                told.lines.push(format!("appliance {url} tells nothing: {error}"));
            }
            // What is on it alone would be taken for garbage when it is back, and freed.
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

    /// Takes what the appliance at this URL says of a grant.
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

/// Of a record of xpm-blk, what is of interest here.
#[derive(Deserialize)]
struct Kept {
    map: Map,
}
