//! Grants: which client may use which regions, by which key.

use std::collections::{HashSet, VecDeque};

use subtle::ConstantTimeEq as _;
use xpm_protocol::api::appliance::{Commit, DESCRIPTOR_LEN_MAX};
use xpm_protocol::{AllocationId, Epoch, GrantId, GrantKey, Name, RegionId};

use super::{Ledger, Refusal, Region, State};

/// A grant: the right of an allocation's owner to use regions, with a key.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The allocation that it is part of.
    pub allocation: AllocationId,
    /// The allocation's name.
    pub name: Name,
    /// The epoch of the ownership that it is for.
    pub epoch: Epoch,
    /// The secret key that clients send.
    pub key: GrantKey,
    /// Its regions, in the order of the export's offsets; all of one length.
    pub regions: Vec<RegionId>,
    /// The part of the allocation that it is, as described by the allocator.
    pub descriptor: Option<String>,
    /// Whether its clients are being shut out, so that no client is admitted.
    pub closing: bool,
}

/// Grants that were deleted lately, or whose deletion was ordered before they were made.
#[derive(Debug, Default)]
pub(super) struct Gone {
    known: HashSet<GrantId>,
    /// The oldest first.
    order: VecDeque<GrantId>,
}

impl Gone {
    /// How many are remembered: more than there can be orders in transit.
    const MAX: usize = 1 << 14;

    fn add(&mut self, id: GrantId) {
        if self.known.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > Gone::MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

/// The effect of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The grant is new, and is created now.
    Made,
    /// The same content was committed before.
    Nothing,
    /// The epoch is higher: the grant is closing, and when its clients are shut out, [`Ledger::renew`]
    /// completes the change.
    Renew,
}

impl<M: Clone> Ledger<M> {
    /// A grant.
    pub fn grant(&self, id: GrantId) -> Option<&Grant> {
        self.grants.get(&id)
    }

    /// All grants.
    pub fn grants(&self) -> impl Iterator<Item = (GrantId, &Grant)> {
        self.grants.iter().map(|(id, grant)| (*id, grant))
    }

    /// The grant that has this key and admits clients.
    ///
    /// Each grant's key is compared in full and in constant time, and no match ends the search early, so the
    /// duration reveals nothing about any key. There are few grants, and this runs once per connection.
    pub fn find(&self, key: &GrantKey) -> Option<GrantId> {
        let mut found = None;
        for (id, grant) in &self.grants {
            if bool::from(grant.key.as_bytes().ct_eq(key.as_bytes())) && !grant.closing {
                found = Some(*id);
            }
        }
        found
    }

    /// Turns reserved regions into a grant, or determines the effect of a repeated or newer commit. The grant
    /// must not be closing.
    ///
    /// # Errors
    /// When the commit contradicts itself or the present state.
    pub fn commit(&mut self, id: GrantId, commit: &Commit) -> Result<Change, Refusal> {
        if commit.descriptor.as_ref().is_some_and(|text| text.len() > DESCRIPTOR_LEN_MAX) {
            return Err(Refusal::Invalid(format!("a descriptor is at most {DESCRIPTOR_LEN_MAX} bytes long")));
        }
        match self.grants.get_mut(&id) {
            None if self.gone.known.contains(&id) => Err(Refusal::Conflict(format!(
                "grant {id} was deleted: a grant is not made twice, use another id"
            ))),
            None => self.make_grant(id, commit).map(|()| Change::Made),
            Some(grant) => {
                let change = compare(id, grant, commit)?;
                if change == Change::Nothing && commit.descriptor.is_some() {
                    // The name is for display: it is replaced by the present name when a descriptor is
                    // committed.
                    grant.descriptor = commit.descriptor.clone();
                    grant.name = commit.name.clone();
                }
                if change == Change::Renew {
                    self.check_key(id, commit)?;
                    self.set_closing(id, true);
                }
                Ok(change)
            }
        }
    }

    /// Completes a commit with a higher epoch: its epoch, key and name are valid from now on.
    pub fn renew(&mut self, id: GrantId, commit: &Commit) {
        if let Some(grant) = self.grants.get_mut(&id) {
            grant.epoch = commit.epoch;
            grant.key = commit.key.clone();
            grant.name = commit.name.clone();
            grant.descriptor = commit.descriptor.clone().or(grant.descriptor.take());
            grant.closing = false;
        }
    }

    /// Sets whether the grant is closing and so admits no client.
    pub fn set_closing(&mut self, id: GrantId, closing: bool) {
        if let Some(grant) = self.grants.get_mut(&id) {
            grant.closing = closing;
        }
    }

    /// Removes a grant; its regions are to be cleared unless another grant has them too. The caller has shut
    /// out its clients.
    pub fn delete_grant(&mut self, id: GrantId) {
        self.gone.add(id);
        let Some(grant) = self.grants.remove(&id) else { return };
        for region in grant.regions {
            match self.regions.get(&region).map(|region| region.state) {
                Some(State::Granted { grant, .. }) if grant == id => {}
                // Another grant took the region over.
                _ => continue,
            }
            let state = match self.grants.iter().find(|(_, grant)| grant.regions.contains(&region)) {
                Some((other, grant)) => State::Granted { allocation: grant.allocation, grant: *other },
                None => State::Clearing,
            };
            self.set_state(region, state);
        }
    }

    /// Takes back a grant of an earlier life, with its regions. If several grants have a region, the last one
    /// that is taken back is the one that took the region over.
    pub fn take_back(&mut self, id: GrantId, grant: Grant, memories: Vec<(RegionId, u64, M)>) {
        let state = State::Granted { allocation: grant.allocation, grant: id };
        for (region, len, memory) in memories {
            self.remove(region);
            self.insert(region, Region { len, memory: Some(memory), state });
        }
        self.grants.insert(id, grant);
    }

    /// Remembers grants that an earlier life deleted.
    pub fn remember_gone(&mut self, ids: impl IntoIterator<Item = GrantId>) {
        ids.into_iter().for_each(|id| self.gone.add(id));
    }

    /// The grants that have at least one of these regions.
    pub fn sharing(&self, regions: &[RegionId]) -> Vec<GrantId> {
        let wanted: HashSet<&RegionId> = regions.iter().collect();
        let has = |grant: &Grant| grant.regions.iter().any(|region| wanted.contains(region));
        self.grants().filter(|(_, grant)| has(grant)).map(|(id, _)| id).collect()
    }

    /// Replaces the memory of a granted region.
    pub fn replace_memory(&mut self, id: RegionId, memory: M) {
        if let Some(region) = self.regions.get_mut(&id) {
            region.memory = Some(memory);
        }
    }

    fn make_grant(&mut self, id: GrantId, commit: &Commit) -> Result<(), Refusal> {
        self.check_regions(commit)?;
        self.check_key(id, commit)?;
        for region in &commit.regions {
            self.set_state(*region, State::Granted { allocation: commit.allocation, grant: id });
        }
        let grant = Grant {
            allocation: commit.allocation,
            name: commit.name.clone(),
            epoch: commit.epoch,
            key: commit.key.clone(),
            regions: commit.regions.clone(),
            descriptor: commit.descriptor.clone(),
            closing: false,
        };
        self.grants.insert(id, grant);
        Ok(())
    }

    fn check_regions(&self, commit: &Commit) -> Result<(), Refusal> {
        let mut sorted = commit.regions.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if commit.regions.is_empty() || sorted.len() != commit.regions.len() {
            return Err(Refusal::Invalid("a grant has one region or more, each of them once".into()));
        }
        let mut lens = Vec::with_capacity(commit.regions.len());
        for id in &commit.regions {
            let region = self.regions.get(id).ok_or(Refusal::UnknownRegion(*id))?;
            match region.state {
                State::Reserved { allocation, .. } if allocation == commit.allocation => {
                    lens.push(region.len);
                }
                State::Reserved { allocation, .. } => {
                    return Err(Refusal::Conflict(format!(
                        "region {id} is reserved for allocation {allocation}"
                    )));
                }
                State::Granted { grant, allocation }
                    if commit.from == Some(grant) && allocation == commit.allocation =>
                {
                    // A client of one grant may have the other's memory mapped.
                    if self.grants.get(&grant).is_some_and(|from| from.epoch != commit.epoch) {
                        return Err(Refusal::Conflict(format!(
                            "grant {grant} is of another epoch: its regions are taken over by a grant of the same one"
                        )));
                    }
                    lens.push(region.len);
                }
                State::Granted { grant, .. } => return Err(Refusal::InGrant { region: *id, grant }),
                State::Ready | State::Clearing => return Err(Refusal::UnknownRegion(*id)),
            }
        }
        if lens.iter().any(|len| *len != lens[0]) {
            return Err(Refusal::Invalid("the regions of a grant are all of one size".into()));
        }
        Ok(())
    }

    /// If two grants had the same key, it would lead to either.
    fn check_key(&self, id: GrantId, commit: &Commit) -> Result<(), Refusal> {
        let same = |grant: &Grant| bool::from(grant.key.as_bytes().ct_eq(commit.key.as_bytes()));
        match self.grants.iter().any(|(other, grant)| *other != id && same(grant)) {
            true => {
                Err(Refusal::Conflict("another grant has this key: make a random one for each grant".into()))
            }
            false => Ok(()),
        }
    }
}

fn compare(id: GrantId, grant: &Grant, commit: &Commit) -> Result<Change, Refusal> {
    if grant.allocation != commit.allocation || grant.regions != commit.regions {
        return Err(Refusal::Conflict(format!(
            "grant {id} is of allocation {} with other regions: use another grant id",
            grant.allocation
        )));
    }
    if commit.epoch < grant.epoch {
        return Err(Refusal::Conflict(format!(
            "epoch {} is over: grant {id} is at epoch {}",
            commit.epoch, grant.epoch
        )));
    }
    let same_key = bool::from(grant.key.as_bytes().ct_eq(commit.key.as_bytes()));
    match commit.epoch > grant.epoch {
        true if same_key => Err(Refusal::Conflict(
            "a higher epoch needs another key, or the old owner would be admitted".into(),
        )),
        true => Ok(Change::Renew),
        false if same_key => Ok(Change::Nothing),
        false => Err(Refusal::Conflict(format!(
            "grant {id} has another key at epoch {}: raise the epoch",
            grant.epoch
        ))),
    }
}
