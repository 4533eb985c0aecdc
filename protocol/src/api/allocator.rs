//! Messages of the allocator.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `PUT /v1/appliances/{id}` | [`Heartbeat`] | [`HeartbeatAnswer`] |
//! | `GET /v1/appliances` | | list of [`Appliance`] |
//! | `DELETE /v1/appliances/{id}` | | nothing; refused while it holds regions of an allocation |
//! | `POST /v1/allocations` | [`Create`] | [`Allocation`] |
//! | `GET /v1/allocations` | | list of [`Allocation`] |
//! | `GET /v1/allocations/{name}` | | [`Allocation`] |
//! | `DELETE /v1/allocations/{name}?force=true` | | nothing; refused while attached, unless forced |
//! | `PUT /v1/allocations/{name}/owner` | [`Attach`] | [`Map`] |
//! | `DELETE /v1/allocations/{name}/owner/{client}` | | nothing |

use serde::{Deserialize, Serialize};

use super::appliance::{self, Endpoints};
use crate::layout::Layout;
use crate::units::{ByteSize, Span};
use crate::{AllocationId, ApplianceId, ClientId, Epoch, GrantId, GrantKey, HostId, Name, RegionId};

/// What an appliance sends at first and then regularly: registration and heartbeat are one, so
/// that an allocator which forgot everything learns it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who it is.
    pub info: appliance::Info,
    /// What it has.
    pub status: appliance::Status,
}

/// How the allocator answers a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    /// When the next one is expected.
    pub interval: Span,
}

/// An appliance as the allocator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appliance {
    /// Who it is.
    pub info: appliance::Info,
    /// What it said last.
    pub status: appliance::Status,
    /// Whether it is heard.
    pub state: ApplianceState,
    /// Time since it was heard last; none after a restart of the allocator until it is.
    pub silent: Option<Span>,
    /// Regions of allocations on it, by the allocator's record.
    pub regions: u64,
}

/// Whether an appliance is heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ApplianceState {
    /// Heard within three heartbeat intervals.
    Up,
    /// Not heard for longer; it serves no new allocation until it is heard again.
    Silent,
}

/// Asks for an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Its name; no other allocation may have it.
    pub name: Name,
    /// Its size in bytes; rounded up to whole pages of 4096.
    pub size: ByteSize,
    /// Stripe over this many regions, on as many appliances as there are; none or 1: linear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stripe: Option<u32>,
    /// Stripe unit in bytes; default 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stripe_unit: Option<ByteSize>,
    /// Size of a region in bytes; by default the allocator chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region_len: Option<ByteSize>,
}

/// An allocation, without its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub id: AllocationId,
    /// Its size in bytes.
    pub size: ByteSize,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Size of each region in bytes.
    pub region_len: ByteSize,
    /// Ownership counter.
    pub epoch: Epoch,
    /// Whether it can be used.
    pub state: AllocationState,
    /// The client that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Its regions in order, by appliance name for people and id for programs.
    pub regions: Vec<RegionPlace>,
    /// When it was made, seconds since 1970.
    pub created: u64,
}

/// Whether an allocation can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllocationState {
    /// Being made: reserved, not yet committed everywhere.
    Creating,
    /// Whole.
    Ready,
    /// Being deleted: some appliance has not confirmed yet.
    Deleting,
}

/// Where one region of an allocation lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPlace {
    /// The region.
    pub region: RegionId,
    /// The appliance that has it.
    pub appliance: ApplianceId,
    /// That appliance's name.
    pub appliance_name: Name,
}

/// Who uses an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The client.
    pub client: ClientId,
    /// Its host's name, for people.
    pub host_name: String,
    /// What it uses it as, for people: `ublk`, `nbd-direct`, ...
    pub purpose: String,
    /// Since when, seconds since 1970.
    pub since: u64,
}

/// A client asks to be the owner of an allocation. Refused while another client is, unless
/// `force` is set: then the epoch is raised at every appliance first, which cuts the other off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The client.
    pub client: ClientId,
    /// The kernel that it runs on.
    pub host: HostId,
    /// Its host's name, for people.
    pub host_name: String,
    /// What it uses the allocation as, for people.
    pub purpose: String,
    /// Take it from another owner.
    #[serde(default)]
    pub force: bool,
}

/// All that a client needs to use an allocation with no more help of the allocator. Holds keys:
/// kept in files of mode 0600 only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// The allocation's name.
    pub name: Name,
    /// Its id.
    pub id: AllocationId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its size in bytes.
    pub size: ByteSize,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Size of each region in bytes.
    pub region_len: ByteSize,
    /// One grant for each appliance that has regions of it.
    pub grants: Vec<Grant>,
    /// The regions in order: whole rows of the layout.
    pub regions: Vec<RegionSlot>,
}

/// What the client holds on one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its id.
    pub id: GrantId,
    /// The appliance.
    pub appliance: ApplianceId,
    /// Its name.
    pub appliance_name: Name,
    /// Where it is reached.
    pub endpoints: Endpoints,
    /// The secret to show.
    pub key: GrantKey,
    /// Regions in the grant.
    pub regions: u32,
}

/// One region of an allocation, as a place in a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSlot {
    /// Index into [`Map::grants`].
    pub grant: u32,
    /// Index of the region within the grant: its bytes start at `slot * region_len` of the export.
    pub slot: u32,
}

/// What the allocator is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Time since it started.
    pub uptime: Span,
    /// Appliances that are up.
    pub appliances_up: u64,
    /// Appliances that are silent.
    pub appliances_silent: u64,
    /// Allocations.
    pub allocations: u64,
    /// Memory of all appliances that are up, in bytes.
    pub capacity: ByteSize,
    /// What of it is free, in bytes.
    pub free: ByteSize,
}
