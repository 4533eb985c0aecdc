//! The stored values. They change only together with [`super::SCHEMA`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use xpm_protocol::api::allocator::{
    ChangeKind, EndReason, HandoverState, Owner, RegionSlot, SlabMap, Standby,
};
use xpm_protocol::api::appliance;
use xpm_protocol::api::blk::Form;
use xpm_protocol::policy::Labels;
use xpm_protocol::{
    AllocationId, ApplianceId, BlockSize, Epoch, GrantId, GrantKey, HandoverId, Layout, LinkSpeed, Name,
    RegionId,
};

/// An allocation. `Debug` shows no keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllocationRecord {
    /// Its id.
    pub id: AllocationId,
    /// Its name. While it is deleted or undone, another allocation may have the same.
    pub name: Name,
    /// Its size in bytes, whole pages.
    pub size: u64,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Length of each region in bytes.
    pub region_len: u64,
    /// When it was asked for, seconds since 1970.
    pub created: u64,
    /// How far it is.
    pub phase: Phase,
    /// Ownership counter, as every appliance of it has it, except while `next` is set.
    pub epoch: Epoch,
    /// The client that uses it.
    pub owner: Option<Owner>,
    /// Whether any client was ever given the keys of this epoch.
    pub revealed: bool,
    /// The next ownership, while it is or may be known to some appliances and not to all.
    pub next: Option<NextEpoch>,
    /// What is held on each appliance.
    pub grants: Vec<GrantRecord>,
    /// The regions in order, as places in the grants.
    pub slots: Vec<RegionSlot>,
    /// On what terms it was made.
    #[serde(default)]
    pub terms: Terms,
    /// Since when nobody uses it, seconds since 1970; of no meaning while it has an owner.
    #[serde(default)]
    pub idle_since: u64,
    /// That it gives way to a request of a higher priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim: Option<Reclaim>,
    /// Number of the change that led to where it lies; 0: it lies where it was made.
    #[serde(default)]
    pub version: u64,
    /// Changes that were begun, given up ones included.
    #[serde(default)]
    pub changes: u64,
    /// A change of where it lies that is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Box<ChangeRecord>>,
    /// Slabs with names.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Appliances of it whose memory the operator has given up.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub given_up: BTreeSet<ApplianceId>,
    /// Logical block size of its devices; none of one that was made before there was a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
    /// The client that stands by to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<Box<Standby>>,
    /// The hand-over that it is part of, which is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<Box<HandoverRecord>>,
    /// Its keys are made up, because the metadata were recovered and nobody told them, and no appliance can have heard of
    /// `next`: its owner may still tell them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keyless: bool,
}

/// A hand-over of this allocation, and of all others with the same id, to the client that stood by. The records of all of
/// them change together, in one batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverRecord {
    /// Its id.
    pub id: HandoverId,
    /// How far it is; none of the states of what is over.
    pub state: HandoverState,
    /// The owner before it.
    pub from: Owner,
    /// The owner after it.
    pub to: Owner,
    /// Since when, seconds since 1970.
    pub since: u64,
}

/// A change of where an allocation lies, which is not over. It has two sides: what the record says otherwise
/// holds, and this is the other side: what is to come, and from [`Stage::Switched`] on what was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeRecord {
    /// The version of the map after it.
    pub number: u64,
    /// What it is for.
    pub kind: ChangeKind,
    /// How far it is.
    pub stage: Stage,
    /// Since when, seconds since 1970.
    pub since: u64,
    /// Size of the other side in bytes.
    pub size: u64,
    /// Grants of the other side. A grant may be on both.
    pub grants: Vec<GrantRecord>,
    /// Regions of the other side, in order.
    pub slots: Vec<RegionSlot>,
    /// Regions that are copied, by their places.
    pub moved: Vec<u32>,
    /// Most bytes a second to copy with.
    pub rate: Option<u64>,
}

/// How far a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// New grants are being made. Not to be found after a start: it is given up then.
    Preparing,
    /// All grants are there; who owns the allocation carries the change out.
    Open,
    /// It holds; the owner may use the old side a moment longer.
    Switched,
}

/// On what terms an allocation was made. They stay when documents change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Terms {
    /// Who it is charged to.
    pub account: Option<Name>,
    /// The client that it was made for.
    pub client: Option<Name>,
    /// The strategies whose rules made it, the first one first; it counts for the limits of each.
    pub strategies: Vec<Name>,
    /// Its labels.
    pub labels: Labels,
    /// Whether it may be reclaimed.
    pub reclaimable: bool,
    /// What is promised to it of the link of each of its appliances.
    pub link_speed: Option<LinkSpeed>,
    /// How long it may be used.
    pub lease: Option<LeaseRecord>,
}

/// How long an allocation may be used. Moments are seconds since 1970, times are in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// What ends: the lease, or the hours of the account.
    pub reason: EndReason,
    /// When it ends.
    pub ends: u64,
    /// How long before it is announced.
    pub warning: u64,
    /// How long after it the memory is freed.
    pub grace: u64,
    /// What a renewal gives.
    pub duration: u64,
    /// It never ends later than this.
    pub total_ends: Option<u64>,
    /// Whether it can be renewed.
    pub renewable: bool,
}

impl LeaseRecord {
    /// When the memory is freed.
    pub fn frees(&self) -> u64 {
        self.ends.saturating_add(self.grace)
    }

    /// From when the end is announced.
    pub fn warns(&self) -> u64 {
        self.ends.saturating_sub(self.warning)
    }
}

/// That an allocation gives way. Moments are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The request that needs the memory.
    pub for_name: Name,
    /// When it was announced.
    pub since: u64,
    /// When the memory is freed.
    pub frees: u64,
}

/// How far an allocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The intent: appliances may hold reservations or grants of it. Not to be found after a
    /// start: it is undone then.
    Creating,
    /// Whole: every grant is committed.
    Ready,
    /// Deleted for its user; some appliance may still have its grant.
    Deleting,
    /// Never was whole; some appliance may still have regions or a grant of it.
    Undoing,
}

/// What is held on one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRecord {
    /// Its id.
    pub id: GrantId,
    /// The appliance.
    pub appliance: ApplianceId,
    /// The secret of the present epoch.
    pub key: GrantKey,
    /// How many regions it has.
    pub count: u32,
    /// The regions in the order of the export's offsets; empty before all are reserved.
    pub regions: Vec<RegionId>,
    /// The grant whose regions it takes over, while a change is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<GrantId>,
}

/// An ownership that is being established at the appliances. Its keys are unknown to clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextEpoch {
    /// Its number.
    pub epoch: Epoch,
    /// Its keys, in the order of the grants.
    pub keys: Vec<GrantKey>,
}

/// An appliance as it was heard when its description changed last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplianceRecord {
    /// Who it is and where it is reached.
    pub info: appliance::Info,
    /// What it had then.
    pub status: appliance::Status,
    /// When it registered first, seconds since 1970.
    #[serde(default)]
    pub since: u64,
    /// That it is being emptied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainRecord>,
    /// Since when it is given up, seconds since 1970: what it has is to be cleared before it lends again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<u64>,
}

/// That an appliance is being emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRecord {
    /// Since when, seconds since 1970.
    pub since: u64,
    /// Most bytes a second that one allocation's data is copied with.
    pub rate: Option<u64>,
    /// Nothing new is begun.
    pub paused: bool,
}

impl AllocationRecord {
    /// The logical block size, also of one that was made before there was a choice: it has the size of the form that its
    /// owner shows.
    pub fn block_size(&self) -> Option<BlockSize> {
        let shown = || self.owner.as_ref()?.purpose.parse::<Form>().ok()?.block_size_of_before();
        self.block_size.or_else(shown)
    }

    /// Bytes that its grant takes on an appliance.
    pub fn bytes_of(&self, grant: &GrantRecord) -> u64 {
        u64::from(grant.count) * self.region_len
    }

    /// Bytes that it takes in all; while it grows or shrinks, of the larger side.
    pub fn taken(&self) -> u64 {
        let other = self.change.as_ref().map_or(0, |change| change.slots.len());
        self.slots.len().max(other) as u64 * self.region_len
    }

    /// The places of its regions on an appliance.
    pub fn regions_on(&self, appliance: ApplianceId) -> Vec<usize> {
        let on = |slot: &RegionSlot| self.grants[slot.grant as usize].appliance == appliance;
        self.slots.iter().enumerate().filter(|(_, slot)| on(slot)).map(|(region, _)| region).collect()
    }

    /// Bytes that its regions hold.
    pub fn room(&self) -> u64 {
        self.slots.len() as u64 * self.region_len
    }

    /// Every grant that appliances may have of it.
    pub fn known_grants(&self) -> impl Iterator<Item = &GrantRecord> + Clone {
        let other = self.change.iter().flat_map(|change| &change.grants);
        let new = other.filter(|grant| self.grants.iter().all(|known| known.id != grant.id));
        self.grants.iter().chain(new)
    }

    /// Every grant with memory of its own: without those that take regions over from one that is there.
    pub fn memory_grants(&self) -> impl Iterator<Item = &GrantRecord> + Clone {
        self.known_grants()
            .filter(|grant| grant.from.is_none_or(|from| self.known_grants().all(|other| other.id != from)))
    }

    /// The appliances that may have something of it.
    pub fn appliances(&self) -> BTreeSet<ApplianceId> {
        self.known_grants().map(|grant| grant.appliance).collect()
    }

    /// What appliances keep of it for an allocator that lost its metadata: everything but keys. None where that is too
    /// long.
    pub fn descriptor(&self) -> Option<String> {
        let hide = |grants: &mut Vec<GrantRecord>| {
            grants.iter_mut().for_each(|grant| grant.key = GrantKey::from_bytes([0; 32]));
        };
        let mut record = AllocationRecord { next: None, reclaim: None, keyless: false, ..self.clone() };
        hide(&mut record.grants);
        if let Some(change) = &mut record.change {
            hide(&mut change.grants);
        }
        let text = serde_json::to_string(&record).ok()?;
        (text.len() <= appliance::DESCRIPTOR_LEN_MAX).then_some(text)
    }

    /// It is to end: nobody owns it, and all that appliances may have of it is in its grants.
    pub fn end(&mut self) {
        self.phase = Phase::Deleting;
        self.owner = None;
        self.grants = self.known_grants().cloned().collect();
        self.change = None;
        self.standby = None;
        self.handover = None;
    }

    /// A grant of it on the appliance.
    pub fn grant_on(&self, appliance: ApplianceId) -> Option<&GrantRecord> {
        self.known_grants().find(|grant| grant.appliance == appliance)
    }

    /// Whether its name is taken by it: nobody else may have it.
    pub fn holds_name(&self) -> bool {
        matches!(self.phase, Phase::Creating | Phase::Ready)
    }
}
