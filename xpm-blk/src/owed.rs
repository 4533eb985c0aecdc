//! The allocations that this client owes to the allocator: each was detached here and not given back yet,
//! because the allocator did not answer. Stored in the state directory, one file for each, until the
//! allocator has it back.
//!
//! ```text
//! detach:  file `owed/NAME.json` -> record removed -> allocator told -> file removed
//! ```
//!
//! If the process dies in between, the next process of this client continues: a device with both files was
//! removed already.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use xpm_control::state;
use xpm_protocol::api::blk;
use xpm_protocol::{ApplianceId, Name};

use crate::error::{DeviceError, Step};

pub(crate) const DIRECTORY: &str = "owed";

/// An allocation that has to be given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owed {
    name: Name,
    /// Since this time, in seconds since 1970.
    since: u64,
    /// Appliances that the operator gave up here; the allocator has to learn of them before it gets the
    /// allocation back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    given_up: Vec<ApplianceId>,
    /// Why the allocation was not given back yet.
    #[serde(skip)]
    reason: String,
}

/// All owed allocations, as they are on disk.
#[derive(Debug)]
pub(crate) struct Debts {
    directory: PathBuf,
    owed: BTreeMap<Name, Owed>,
}

impl Debts {
    /// The owed allocations in a state directory. An invalid file is left where it is, and logged. Blocks.
    pub(crate) fn load(state: &Path) -> Debts {
        let directory = state.join(DIRECTORY);
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        let mut owed = BTreeMap::new();
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
            let parsed = fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Owed>(&text)?));
            match parsed {
                Ok(one) => drop(owed.insert(one.name.clone(), one)),
                Err(error) => tracing::error!("{}: {error}", path.display()),
            }
        }
        Debts { directory, owed }
    }

    /// An empty set.
    pub(crate) fn none(state: &Path) -> Debts {
        Debts { directory: state.join(DIRECTORY), owed: BTreeMap::new() }
    }

    /// Adds an allocation. Blocks until it is on disk.
    pub(crate) fn add(&mut self, name: &Name, given_up: Vec<ApplianceId>) -> Result<(), DeviceError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let one = Owed { name: name.clone(), since, given_up, reason: String::new() };
        let path = self.path(name);
        let at = || format!("write {}", path.display());
        fs::create_dir_all(&self.directory).at(at())?;
        let text = serde_json::to_vec(&one).map_err(io::Error::from).at(at())?;
        state::write(&path, &text).at(at())?;
        self.owed.insert(name.clone(), one);
        Ok(())
    }

    /// Removes an allocation that the allocator has back, or that is used again. Blocks.
    pub(crate) fn settle(&mut self, name: &Name) {
        if self.owed.remove(name).is_none() {
            return;
        }
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("remove {}: {error}", self.path(name).display());
            }
            _ => {}
        }
    }

    /// Stores why the allocation was not given back; returns whether this is the first reason.
    pub(crate) fn explain(&mut self, name: &Name, reason: String) -> bool {
        let Some(one) = self.owed.get_mut(name) else { return false };
        let is_new = one.reason.is_empty();
        one.reason = reason;
        is_new
    }

    pub(crate) fn names(&self) -> Vec<Name> {
        self.owed.keys().cloned().collect()
    }

    /// Appliances that were given up of an owed allocation.
    pub(crate) fn given_up(&self, name: &Name) -> Vec<ApplianceId> {
        self.owed.get(name).map(|one| one.given_up.clone()).unwrap_or_default()
    }

    pub(crate) fn has(&self, name: &Name) -> bool {
        self.owed.contains_key(name)
    }

    /// The debts as the status shows them.
    pub(crate) fn shown(&self) -> Vec<blk::Owed> {
        let one = |owed: &Owed| blk::Owed {
            allocation: owed.name.clone(),
            since: owed.since,
            reason: owed.reason.clone(),
        };
        self.owed.values().map(one).collect()
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_outlives_the_process_until_it_is_settled() {
        let state = tempfile::tempdir().unwrap();
        let name: Name = "a".parse().unwrap();
        let mut debts = Debts::load(state.path());
        debts.add(&name, vec![ApplianceId::from_u128(7)]).unwrap();
        assert!(debts.explain(&name, "no answer".to_owned()));
        assert!(!debts.explain(&name, "no answer".to_owned()), "it is said once");
        let mut next = Debts::load(state.path());
        assert_eq!(next.names(), std::slice::from_ref(&name));
        assert_eq!(next.given_up(&name), [ApplianceId::from_u128(7)]);
        next.settle(&name);
        next.settle(&name);
        assert!(Debts::load(state.path()).names().is_empty());
    }
}
