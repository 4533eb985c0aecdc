//! A simulated appliance: it keeps books of regions and grants, and has no memory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Heartbeat;
use xpm_protocol::api::appliance::{self, Commit, Digest, Holder, Region, RegionState, Reserve};
use xpm_protocol::{AllocationId, ByteSize, Epoch, GrantId, GrantKey, Name, RegionId};

use super::super::{Answer, Call, CallError};
use crate::store::ApplianceRecord;
use crate::testing::appliance as an_appliance;

/// State of an appliance, as its interface shows it.
pub(super) struct Appliance {
    pub(super) record: ApplianceRecord,
    pub(super) capacity: u64,
    pub(super) regions: BTreeMap<RegionId, Held>,
    pub(super) grants: BTreeMap<GrantId, Granted>,
    gone: BTreeSet<GrantId>,
    next_region: u128,
    /// Bytes that were given back and are not cleared yet.
    pub(super) clearing: u64,
    /// Whether memory that is given back stays uncleared.
    pub(super) slow: bool,
    pub(super) refusals: u32,
    pub(super) away: bool,
    /// Lives that are connected to any of its grants.
    pub(super) living: Vec<Holder>,
}

pub(super) struct Held {
    pub(super) allocation: AllocationId,
    pub(super) len: u64,
    pub(super) until: Duration,
    pub(super) grant: Option<GrantId>,
    /// Stamp of the last write, which covered the whole region; 0: never written, or zeros.
    pub(super) content: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Granted {
    pub(super) epoch: Epoch,
    pub(super) key: GrantKey,
    pub(super) regions: Vec<RegionId>,
    pub(super) name: Name,
    pub(super) descriptor: Option<String>,
}

impl Appliance {
    pub(super) fn new(number: u128, capacity: u64) -> Appliance {
        Appliance {
            record: an_appliance(number),
            capacity,
            regions: BTreeMap::new(),
            grants: BTreeMap::new(),
            gone: BTreeSet::new(),
            next_region: number << 64,
            clearing: 0,
            slow: false,
            refusals: 0,
            away: false,
            living: Vec::new(),
        }
    }

    pub(super) fn heartbeat(&self) -> Heartbeat {
        let mut status = self.record.status.clone();
        status.id = Some(self.record.info.id);
        status.grants = self.grants.len() as u64;
        status.capacity = ByteSize(self.capacity);
        status.free = ByteSize(self.free());
        status.granted = ByteSize(self.capacity - self.free() - self.clearing);
        Heartbeat { info: self.record.info.clone(), status }
    }

    fn free(&self) -> u64 {
        self.capacity - self.clearing - self.regions.values().map(|region| region.len).sum::<u64>()
    }

    pub(super) fn expire(&mut self, now: Duration) {
        self.regions.retain(|_, region| region.grant.is_some() || region.until > now);
    }

    pub(super) fn carry_out(&mut self, now: Duration, call: &Call) -> Result<Answer, CallError> {
        self.expire(now);
        match call {
            Call::Status => Ok(Answer::Status(Box::new(self.heartbeat().status))),
            Call::Grants => Ok(Answer::Grants(self.list())),
            Call::Reserve(reserve) => self.reserve(now, reserve),
            Call::Commit(id, commit) | Call::Raise(id, commit, _) => self.commit(*id, commit),
            Call::Revoke(id) => {
                self.revoke(*id);
                Ok(Answer::Done)
            }
            Call::Purge(allocation, id) => {
                self.revoke(*id);
                self.regions.retain(|_, region| region.allocation != *allocation);
                Ok(Answer::Done)
            }
            Call::Copy(..) => unreachable!("the world copies"),
            Call::Living(..) => Ok(Answer::Living(self.living.clone())),
            Call::Digest(id, range) => self.digest(*id, range.offset),
        }
    }

    pub(super) fn list(&self) -> Vec<appliance::Grant> {
        let shown = |(id, grant): (&GrantId, &Granted)| appliance::Grant {
            id: *id,
            allocation: self.regions[&grant.regions[0]].allocation,
            name: grant.name.clone(),
            epoch: grant.epoch,
            regions: grant.regions.clone(),
            len: ByteSize(grant.regions.iter().map(|region| self.regions[region].len).sum()),
            resident: ByteSize(0),
            connections: 0,
            descriptor: grant.descriptor.clone(),
            lost: None,
        };
        self.grants.iter().map(shown).collect()
    }

    fn digest(&self, id: GrantId, offset: u64) -> Result<Answer, CallError> {
        let content = self.region_at(id, offset).map(|region| self.regions[&region].content);
        let content = content.ok_or(CallError::Refused(ErrorKind::Invalid, "no such grant".into()))?;
        let data = ByteSize(if content == 0 { 0 } else { 4096 });
        Ok(Answer::Digest(Digest { xxh3: content.to_string(), data, last: None }))
    }

    /// The region at an offset of a grant.
    pub(super) fn region_at(&self, id: GrantId, offset: u64) -> Option<RegionId> {
        let grant = self.grants.get(&id)?;
        let len = self.regions[&grant.regions[0]].len;
        grant.regions.get((offset / len) as usize).copied()
    }

    fn reserve(&mut self, now: Duration, reserve: &Reserve) -> Result<Answer, CallError> {
        let len = reserve.region_len.0;
        if u64::from(reserve.count) * len > self.free() {
            self.refusals += 1;
            return Err(CallError::Refused(ErrorKind::NoSpace, "no room".into()));
        }
        let made = |_| {
            self.next_region += 1;
            let id = RegionId::from_u128(self.next_region);
            let held = Held {
                allocation: reserve.allocation,
                len,
                until: now + reserve.ttl.0,
                grant: None,
                content: 0,
            };
            self.regions.insert(id, held);
            Region {
                id,
                len: ByteSize(len),
                state: RegionState::Reserved,
                allocation: None,
                grant: None,
                resident: ByteSize(0),
            }
        };
        Ok(Answer::Regions((0..reserve.count).map(made).collect()))
    }

    fn commit(&mut self, id: GrantId, commit: &Commit) -> Result<Answer, CallError> {
        let refused = |line: &str| Err(CallError::Refused(ErrorKind::Conflict, line.into()));
        let mut wanted = Granted {
            epoch: commit.epoch,
            key: commit.key.clone(),
            regions: commit.regions.clone(),
            name: commit.name.clone(),
            descriptor: commit.descriptor.clone(),
        };
        if let Some(grant) = self.grants.get_mut(&id) {
            if commit.epoch < grant.epoch || commit.regions != grant.regions {
                return refused("an older epoch, or other regions");
            }
            let same = grant.key == wanted.key;
            assert!(commit.epoch > grant.epoch || same, "one epoch has one key");
            wanted.descriptor = wanted.descriptor.or(grant.descriptor.take());
            *grant = wanted;
            return Ok(Answer::Done);
        }
        if self.gone.contains(&id) {
            return refused("it was revoked");
        }
        let free = |region: &RegionId| {
            self.regions.get(region).is_some_and(|held| {
                (held.grant.is_none() || held.grant == commit.from) && held.allocation == commit.allocation
            })
        };
        if !commit.regions.iter().all(free) {
            return refused("the reservation is over");
        }
        for region in &commit.regions {
            self.regions.get_mut(region).unwrap().grant = Some(id);
        }
        self.grants.insert(id, wanted);
        Ok(Answer::Done)
    }

    fn revoke(&mut self, id: GrantId) {
        self.gone.insert(id);
        self.grants.remove(&id);
        for (region, held) in self.regions.iter_mut().filter(|(_, held)| held.grant == Some(id)) {
            let heir = self.grants.iter().find(|(_, grant)| grant.regions.contains(region));
            held.grant = heir.map(|(id, _)| *id).or(held.grant);
        }
        let freed: Vec<Held> =
            self.regions.extract_if(.., |_, region| region.grant == Some(id)).map(|(_, held)| held).collect();
        if self.slow {
            self.clearing += freed.iter().map(|region| region.len).sum::<u64>();
        }
    }
}
