//! The stored records. They change only together with [`super::SCHEMA`].

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

/// The record of an allocation. `Debug` shows no keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllocationRecord {
    /// Its id.
    pub id: AllocationId,
    /// Its name. While it is deleted or undone, another allocation may have the same name.
    pub name: Name,
    /// Its size in bytes, whole pages.
    pub size: u64,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Length of each region in bytes.
    pub region_len: u64,
    /// When it was requested, seconds since 1970.
    pub created: u64,
    /// Its phase.
    pub phase: Phase,
    /// Ownership counter, the same at each of its appliances, except while `next` is set.
    pub epoch: Epoch,
    /// The client that uses it.
    pub owner: Option<Owner>,
    /// Whether a client was ever given the keys of this epoch.
    pub revealed: bool,
    /// The next ownership, while some of its appliances have or may have it, and not all.
    pub next: Option<NextEpoch>,
    /// Its grants: one or more on each of its appliances.
    pub grants: Vec<GrantRecord>,
    /// The regions in order, each as a grant (by index) and a slot of that grant.
    pub slots: Vec<RegionSlot>,
    /// The terms on which it was made.
    #[serde(default)]
    pub terms: Terms,
    /// Since when it has no owner, seconds since 1970; meaningless while it has one.
    #[serde(default)]
    pub idle_since: u64,
    /// Set when it gives way to a request of a higher priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim: Option<Reclaim>,
    /// Number of the change that led to its present place; 0: it is where it was made.
    #[serde(default)]
    pub version: u64,
    /// Number of changes that were begun, given-up ones included.
    #[serde(default)]
    pub changes: u64,
    /// A change of its place that is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Box<ChangeRecord>>,
    /// Its named slabs.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Its appliances whose memory the operator has given up.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub given_up: BTreeSet<ApplianceId>,
    /// Logical block size of its devices; none if it was made before block sizes could be chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
    /// The client that stands by to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<Box<Standby>>,
    /// The unfinished hand-over that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<Box<HandoverRecord>>,
    /// Its keys are placeholders: the metadata were recovered without them, and no appliance can have heard of
    /// `next`. Its owner may still report the right keys.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keyless: bool,
}

/// A hand-over of this allocation, and of all others with the same hand-over id, to the client that stood by. Their
/// records change together, in one batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverRecord {
    /// Its id.
    pub id: HandoverId,
    /// Its state; never a state of a finished hand-over.
    pub state: HandoverState,
    /// The owner before it.
    pub from: Owner,
    /// The owner after it.
    pub to: Owner,
    /// When it began, seconds since 1970.
    pub since: u64,
}

/// An unfinished change of an allocation's place. It has two sides: the allocation record's own fields are the side
/// that holds, and this is the other side: until [`Stage::Switched`] the new side, from then on the old one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeRecord {
    /// The version of the map after it.
    pub number: u64,
    /// Its kind.
    pub kind: ChangeKind,
    /// Its stage.
    pub stage: Stage,
    /// When it began, seconds since 1970.
    pub since: u64,
    /// Size of the other side in bytes.
    pub size: u64,
    /// Grants of the other side. A grant may be on both.
    pub grants: Vec<GrantRecord>,
    /// Regions of the other side, in order.
    pub slots: Vec<RegionSlot>,
    /// Indices of the regions that are copied.
    pub moved: Vec<u32>,
    /// Highest rate of copying, in bytes per second.
    pub rate: Option<u64>,
}

/// Stage of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// New grants are being made. A restart gives such a change up.
    Preparing,
    /// All grants exist; the owner carries the change out.
    Open,
    /// The new side holds; the owner may use the old side a moment longer.
    Switched,
}

/// The terms on which an allocation was made. They stay when documents change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Terms {
    /// The account that it is charged to.
    pub account: Option<Name>,
    /// The client that it was made for.
    pub client: Option<Name>,
    /// The strategies whose rules made it, the first one first; it counts for the limits of each of them.
    pub strategies: Vec<Name>,
    /// Its labels.
    pub labels: Labels,
    /// Whether it may be reclaimed.
    pub reclaimable: bool,
    /// Speed that is promised to it on the link of each of its appliances.
    pub link_speed: Option<LinkSpeed>,
    /// How long it may exist.
    pub lease: Option<LeaseRecord>,
}

/// How long an allocation may exist. Moments are seconds since 1970, spans are in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// Whether its lease ends, or the hours of its account.
    pub reason: EndReason,
    /// When it ends.
    pub ends: u64,
    /// How long before its end the end is announced.
    pub warning: u64,
    /// How long after its end the memory is freed.
    pub grace: u64,
    /// Span that a renewal gives.
    pub duration: u64,
    /// Latest end that renewals can give.
    pub total_ends: Option<u64>,
    /// Whether it can be renewed.
    pub renewable: bool,
}

impl LeaseRecord {
    /// When the memory is freed.
    pub fn frees(&self) -> u64 {
        self.ends.saturating_add(self.grace)
    }

    /// When the end is announced.
    pub fn warns(&self) -> u64 {
        self.ends.saturating_sub(self.warning)
    }
}

/// Announcement that an allocation gives way. Moments are seconds since 1970.
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

/// Phase of an allocation.
///
/// ```text
///   create: the intent is durable
///            |
///            v      every grant is committed, and the map is durable
///        Creating -------------------------------------------------> Ready
///            |                                                         |
///            | a step failed, or the                                   | delete, the end of a lease,
///            | allocator restarted                                     | or a reclaim
///            v                                                         v
///         Undoing                                                   Deleting
///            |                                                         |
///            +----> the record is removed when every appliance <-------+
///                   has given the memory back
/// ```
///
/// Each arrow is one write to the store. Appliances are called only after the write before has become durable, so a
/// crash leaves a record that names everything that may exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The intent is recorded: appliances may have reservations or grants of it. A restart undoes such an allocation.
    Creating,
    /// Whole: every grant is committed.
    Ready,
    /// Deleted for its user; some appliance may still have its grant.
    Deleting,
    /// Never was whole; some appliance may still have regions or a grant of it.
    Undoing,
}

/// The memory of an allocation on one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRecord {
    /// Its id.
    pub id: GrantId,
    /// The appliance.
    pub appliance: ApplianceId,
    /// The secret key of the present epoch.
    pub key: GrantKey,
    /// Number of its regions.
    pub count: u32,
    /// The regions, in the order of offsets in the export; empty until all are reserved.
    pub regions: Vec<RegionId>,
    /// During a change, the grant from which it takes its regions over.
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

/// An appliance as of its last change of description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplianceRecord {
    /// Its identity and addresses.
    pub info: appliance::Info,
    /// Its status at that time.
    pub status: appliance::Status,
    /// When it registered first, seconds since 1970.
    #[serde(default)]
    pub since: u64,
    /// Set while it is being emptied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainRecord>,
    /// Since when it is given up, seconds since 1970: its memory has to be cleared before it lends again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<u64>,
}

/// Drain of an appliance: its regions move to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRecord {
    /// When it began, seconds since 1970.
    pub since: u64,
    /// Highest rate of copying for each allocation, in bytes per second.
    pub rate: Option<u64>,
    /// No further move is begun.
    pub paused: bool,
}

impl AllocationRecord {
    /// The logical block size. An allocation from before block sizes could be chosen has the size of the form that
    /// its owner shows.
    pub fn block_size(&self) -> Option<BlockSize> {
        let shown = || self.owner.as_ref()?.purpose.parse::<Form>().ok()?.block_size_of_before();
        self.block_size.or_else(shown)
    }

    /// Bytes of a grant.
    pub fn bytes_of(&self, grant: &GrantRecord) -> u64 {
        u64::from(grant.count) * self.region_len
    }

    /// Bytes that it takes in all; during a change of size, those of the larger side.
    pub fn taken(&self) -> u64 {
        let other = self.change.as_ref().map_or(0, |change| change.slots.len());
        self.slots.len().max(other) as u64 * self.region_len
    }

    /// Indices of its regions on an appliance.
    pub fn regions_on(&self, appliance: ApplianceId) -> Vec<usize> {
        let on = |slot: &RegionSlot| self.grants[slot.grant as usize].appliance == appliance;
        self.slots.iter().enumerate().filter(|(_, slot)| on(slot)).map(|(region, _)| region).collect()
    }

    /// Bytes that its regions can hold.
    pub fn room(&self) -> u64 {
        self.slots.len() as u64 * self.region_len
    }

    /// Every grant of it that appliances may have.
    pub fn known_grants(&self) -> impl Iterator<Item = &GrantRecord> + Clone {
        let other = self.change.iter().flat_map(|change| &change.grants);
        let new = other.filter(|grant| self.grants.iter().all(|known| known.id != grant.id));
        self.grants.iter().chain(new)
    }

    /// Every grant with memory of its own, that is, without grants that take over regions of an existing one.
    pub fn memory_grants(&self) -> impl Iterator<Item = &GrantRecord> + Clone {
        self.known_grants()
            .filter(|grant| grant.from.is_none_or(|from| self.known_grants().all(|other| other.id != from)))
    }

    /// The appliances that may have memory of it.
    pub fn appliances(&self) -> BTreeSet<ApplianceId> {
        self.known_grants().map(|grant| grant.appliance).collect()
    }

    /// The descriptor that appliances keep, for an allocator that lost its metadata: everything but keys. None if it
    /// is too long.
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

    /// Ends the allocation: it has no owner, and every grant that appliances may have is in `grants`.
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

    /// Whether it holds its name, so that no other allocation may have the name.
    pub fn holds_name(&self) -> bool {
        matches!(self.phase, Phase::Creating | Phase::Ready)
    }
}
