//! The stored values. They change only together with [`super::SCHEMA`].

use serde::{Deserialize, Serialize};
use xpm_protocol::api::allocator::{Owner, RegionSlot};
use xpm_protocol::api::appliance;
use xpm_protocol::{AllocationId, ApplianceId, Epoch, GrantId, GrantKey, Layout, Name, RegionId};

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
}

impl AllocationRecord {
    /// Bytes that its grant takes on an appliance.
    pub fn bytes_of(&self, grant: &GrantRecord) -> u64 {
        u64::from(grant.count) * self.region_len
    }

    /// Its grant on the appliance.
    pub fn grant_on(&self, appliance: ApplianceId) -> Option<&GrantRecord> {
        self.grants.iter().find(|grant| grant.appliance == appliance)
    }

    /// Whether its name is taken by it: nobody else may have it.
    pub fn holds_name(&self) -> bool {
        matches!(self.phase, Phase::Creating | Phase::Ready)
    }
}
