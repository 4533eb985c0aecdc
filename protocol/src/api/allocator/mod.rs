//! Messages of the allocator.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `PUT /v1/appliances/{id}` | [`Heartbeat`] | [`HeartbeatAnswer`] |
//! | `GET /v1/appliances` | | list of [`Appliance`] |
//! | `DELETE /v1/appliances/{id}` | | nothing; refused while it holds regions of an allocation |
//! | `POST /v1/appliances/{id}/loss` | | list of [`Allocation`]s that lose memory (1) |
//! | `POST /v1/allocations?request=ID` | [`Create`] | [`Allocation`] (2) |
//! | `GET /v1/allocations` | | list of [`Allocation`] |
//! | `GET /v1/allocations/{name}` | | [`Allocation`] |
//! | `DELETE /v1/allocations/{name}?force=true` | | nothing; refused while attached, unless forced |
//! | `PUT /v1/allocations/{name}/owner` | [`Attach`] | [`Map`] |
//! | `DELETE /v1/allocations/{name}/owner/{client}` | | nothing; also ends the standby of a client that stands by |
//! | `PUT /v1/allocations/{name}/standby` | [`Attach`] | [`Map`] without keys: the client stands by to take it over |
//! | `POST /v1/allocations/{name}/renewal` | [`Renew`] | [`Allocation`] |
//! | `PUT /v1/allocations/{name}/size` | [`Resize`] | [`Allocation`] |
//! | `PUT /v1/allocations/{name}/name` | [`Rename`] | [`Allocation`]; refused while a client uses it |
//! | `POST /v1/allocations/{name}/transfer` | [`Transfer`] | [`Allocation`] |
//! | `POST /v1/handovers` | [`HandOverAll`] | [`Handover`] of all these allocations; on an error, of none |
//! | `GET /v1/handovers` | | list of [`Handover`]s that are not over |
//! | `POST /v1/handovers/{id}/commit` | | [`Handover`]: the old owner ends (3) |
//! | `POST /v1/handovers/{id}/rollback` | | [`Handover`]: the old owner goes on (3) |
//! | `GET /v1/allocations/{name}/orders/{client}?refused=GRANT,GRANT&pool=ID&number=N` | | [`Orders`] (4) |
//! | `POST /v1/allocations/{name}/orders/{client}` | [`Report`] | [`Orders`] |
//! | `PUT /v1/allocations/{name}/slabs/{client}` | [`SlabMap`] | [`SlabMap`] |
//! | `POST /v1/appliances/{id}/drain` | [`Drain`] | [`Appliance`] |
//! | `DELETE /v1/appliances/{id}/drain` | | nothing; regions that have moved stay where they are |
//! | `POST /v1/rebalance` | [`Rebalance`] | [`RebalancePlan`]; nothing is done on a dry run |
//! | `GET /v1/rebalance` | | [`RebalancePlan`] |
//! | `PUT /v1/rebalance` | [`Pause`] | [`RebalancePlan`] |
//! | `DELETE /v1/rebalance` | | nothing; the move under way is finished |
//! | `GET /v1/allocations/{name}/decisions` | | list of [`Decision`](super::decision::Decision), the newest first |
//! | `POST /v1/decisions?all=true` | [`Create`] | [`Decision`](super::decision::Decision) of a dry run (5) |
//! | `GET /v1/metrics` | | text for Prometheus |
//! | `GET /v1/backup` | | all metadata except decisions, with the keys of all grants, for `xpm-allocator restore` |
//! | `GET /v1/garbage` | | list of [`Garbage`] |
//! | `GET /v1/usage` | | list of [`Usage`] |
//! | `PUT /v1/clients/{name}` | [`ClientFacts`] | [`Client`] |
//! | `GET /v1/clients` | | list of [`Client`] |
//! | `GET /v1/events?after=N&wait=true&object=NAME&kind=A,B&limit=N` | | list of [`Event`] (6) |
//! | `GET /v1/policy` | | [`Policy`](super::policy::Policy) |
//! | `POST /v1/policy` | [`Apply`](super::policy::Apply) | [`Applied`](super::policy::Applied) |
//! | `DELETE /v1/policy/{kind}/{name}?version=N` | | nothing; refused while in use, or if its version is another one |
//!
//! 1. The appliance is given up, for good. Refused while it is heard.
//! 2. Repeated with the same [`RequestId`] it is the same request, and a cancelled request stays cancelled.
//! 3. `id` is the hand-over's id, or the name of an allocation in it.
//! 4. `refused`: grants that refuse the owner, whose appliances are asked at once for their grants. `pool` and
//!    `number`: the newest [`MetadataState`] that the owner has heard of.
//! 5. Nothing is made. With `all`, every appliance is named.
//! 6. At most [`EVENTS_PAGE_MAX`]: those with a larger number, the oldest first, or without `after` the newest. Only
//!    events of this object and of these kinds. With `wait`, the answer waits up to 20 s until there is an event.
//!
//! A request of an owner (the paths with `owner`, `orders` and `slabs`) may name the life of its client, by the query
//! `life=`[`Life`]. Only one life owns an allocation at a time. A request of another life of the same client is refused
//! while the owning life is heard, or is connected to an appliance of the allocation.

mod change;
mod handover;
mod metadata;
mod slabs;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::appliance::{self, Endpoints};
use super::health::Problem;
use crate::layout::Layout;
use crate::policy::{Access, DocumentName, Labels};
use crate::speed::LinkSpeed;
use crate::text;
use crate::units::{ByteSize, Span};
use crate::{
    AllocationId, ApplianceId, BlockSize, BlockWish, ClientId, Epoch, GrantId, GrantKey, HostId, Life, Name,
    RegionId, RequestId,
};

pub use self::change::{
    ChangeKind, ChangeState, Drain, DrainState, HandOver, LostLender, MapChange, Orders, Pause, PlannedMove,
    Rebalance, RebalancePlan, Rename, Report, Resize, Transfer,
};
pub use self::handover::{
    HANDOVER_NAMES_MAX, HandOverAll, Handover, HandoverPart, HandoverState, Part, Standby,
};
pub use self::metadata::{Behind, MetadataState};
pub use self::slabs::{NAMED_SLAB_LEN_MIN, NAMED_SLABS_MAX, SlabMap, SlabPlace};

/// Sent by an appliance at its start and then regularly. Registration and heartbeat are one message, so that an
/// allocator which lost its state learns everything again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Identity and addresses of the appliance.
    pub info: appliance::Info,
    /// Its memory and activity.
    pub status: appliance::Status,
}

/// Answer of the allocator to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    /// Time until the next heartbeat is expected.
    pub interval: Span,
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
}

/// An appliance as the allocator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appliance {
    /// Identity and addresses of the appliance.
    pub info: appliance::Info,
    /// Its last status.
    pub status: appliance::Status,
    /// Whether it is heard.
    pub state: ApplianceState,
    /// Time since it was heard last; none if it was not heard since the allocator started.
    pub silent: Option<Span>,
    /// Regions of allocations on it, by the allocator's records.
    pub regions: u64,
    /// Present while it is being emptied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainState>,
    /// When it was given up, seconds since 1970: the operator declared its memory lost. It lends nothing before it
    /// has cleared its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<u64>,
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

/// Creates an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Its name; no other allocation may have it.
    pub name: Name,
    /// Its size in bytes; rounded up to whole pages of 4096.
    pub size: ByteSize,
    /// Number of regions to stripe over, on as many appliances as possible; none or 1: linear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stripe: Option<u32>,
    /// Stripe unit in bytes; default 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stripe_unit: Option<ByteSize>,
    /// Size of a region in bytes; by default the allocator chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region_len: Option<ByteSize>,
    /// Account that is charged; default: the client's account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Name>,
    /// The client that is going to use it; its position and link count for locality and link speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Name>,
    /// The strategy; default: the account's, or else the strategy named `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// Labels for conditions of rules.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// How it is going to be used.
    #[serde(default, skip_serializing_if = "Access::is_block")]
    pub access: Access,
    /// It may be reclaimed, with notice, for requests of a higher priority.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reclaimable: bool,
    /// Duration of the lease, if it is to be shorter than that of the strategy or account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Span>,
    /// If the allocation cannot be made now: how long the request waits for its turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Span>,
    /// Logical block size of its devices, in bytes; default 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

impl Create {
    /// Requests `size` bytes and leaves everything else to the defaults.
    pub fn new(name: Name, size: ByteSize) -> Create {
        Create {
            name,
            size,
            stripe: None,
            stripe_unit: None,
            region_len: None,
            account: None,
            client: None,
            strategy: None,
            labels: Labels::new(),
            access: Access::default(),
            reclaimable: false,
            lease: None,
            wait: None,
            block_size: None,
        }
    }
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
    /// The client that stands by to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<Standby>,
    /// The unfinished hand-over that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<HandoverPart>,
    /// Its regions in order, by appliance name for people and id for programs.
    pub regions: Vec<RegionPlace>,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Memory that it takes, in bytes: whole rows of whole regions.
    #[serde(default)]
    pub taken: ByteSize,
    /// Account that is charged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Name>,
    /// The client that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Name>,
    /// The strategy by which it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// Its labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Whether it may be reclaimed, with notice, for requests of a higher priority.
    #[serde(default)]
    pub reclaimable: bool,
    /// Link speed that is promised to it on each of its appliances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkSpeed>,
    /// How long it may exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// Its announced end, and the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
    /// Its place among the waiting requests, or why it was refused after waiting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// The change that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<ChangeState>,
    /// The owner's report on the last change that it carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub followed: Option<String>,
    /// Names of the appliances that have lost its memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<String>,
    /// The device that its owner shows it as, with the users, by the owner's last report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<DeviceUse>,
    /// Why the last change was not carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Warnings for the requester, right after the creation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Named slabs, which its owners carved out of it.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Logical block size of its devices, in bytes; none if it was made before block sizes could be chosen, and its
    /// size is not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

/// How long an allocation may exist. Moments are seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// When it ends unless it is renewed: from then on no new client can attach.
    pub ends: u64,
    /// When the memory is freed; a client that uses it then is cut off.
    pub frees: u64,
    /// Whether it can be renewed.
    pub renewable: bool,
}

/// The announced end of an allocation. Moments are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The reason.
    pub reason: EndReason,
    /// When it was announced.
    pub since: u64,
    /// When the memory is freed; a client that uses it then is cut off.
    pub frees: u64,
    /// Explanation in one line, with the remedy.
    pub text: String,
}

/// Why an allocation is going to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// Its lease is going to end, or has ended.
    Lease,
    /// The hours of its account are going to end, or have ended.
    Hours,
    /// A request of a higher priority needs its memory.
    Reclaim,
}

/// A request that waits, or was refused after it had waited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Number of requests that are served before it; none once it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// Priority of its account.
    pub priority: u16,
    /// When it began to wait, seconds since 1970.
    pub since: u64,
    /// Until when it waits at most, seconds since 1970.
    pub until: u64,
    /// Why it cannot be made now, in one line.
    #[serde(deserialize_with = "text::line")]
    pub why: String,
    /// Id of the request, if the requester gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestId>,
}

/// Renews a lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// Duration from now; default: the whole duration of the terms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Span>,
}

/// Memory that an appliance has granted and that no record of the allocator knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// The appliance.
    pub appliance: ApplianceId,
    /// Its name.
    pub appliance_name: String,
    /// The grant.
    pub grant: GrantId,
    /// Name of the allocation that the grant was part of.
    pub name: Name,
    /// Its memory in bytes.
    pub bytes: ByteSize,
    /// Since when the grant is known, seconds since 1970.
    pub since: u64,
    /// When it is freed unless its record is found, seconds since 1970.
    pub frees: u64,
}

/// Usage of an account, a client or a strategy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The account, client or strategy.
    #[serde(flatten)]
    pub of: DocumentName,
    /// Memory that its allocations take, in bytes.
    pub used: ByteSize,
    /// Its allocations.
    pub allocations: u64,
    /// Beyond this limit, requests are served with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<ByteSize>,
    /// Beyond this limit, requests are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard_limit: Option<ByteSize>,
}

/// Facts that a client reports about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientFacts {
    /// The kernel that it runs on.
    pub host: HostId,
    /// Its id, if it can own allocations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientId>,
    /// Speed of its link, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkSpeed>,
    /// Round-trip times to appliances, as measured, in nanoseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub round_trips: BTreeMap<ApplianceId, u64>,
}

/// A client as the allocator knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    /// Its name.
    pub name: Name,
    /// The facts of its last report.
    pub facts: ClientFacts,
    /// Time of its last report, seconds since 1970.
    pub heard: u64,
}

/// Most events of one answer. A client that wants more asks again, after the last one.
pub const EVENTS_PAGE_MAX: usize = 500;

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number: counted from 1, across restarts and changes of the leader. Numbers begin anew if the metadata were
    /// lost.
    pub number: u64,
    /// Time, seconds since 1970.
    pub at: u64,
    /// Its kind: the text of an [`EventKind`](super::event::EventKind), or a kind of a newer allocator.
    #[serde(deserialize_with = "text::line")]
    pub kind: String,
    /// The name of its object.
    pub subject: Name,
    /// Description in one line.
    #[serde(deserialize_with = "text::line")]
    pub text: String,
}

/// Whether an allocation can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllocationState {
    /// Requested, and not made yet: it waits for its turn.
    Waiting,
    /// Requested, and refused after it had waited.
    Refused,
    /// Being made: reserved, not yet committed everywhere.
    Creating,
    /// Whole.
    Ready,
    /// Being deleted: some appliance has not confirmed yet.
    Deleting,
}

/// Place of one region of an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPlace {
    /// The region.
    pub region: RegionId,
    /// The appliance that has it.
    pub appliance: ApplianceId,
    /// That appliance's name.
    pub appliance_name: Name,
}

/// The client that uses an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The client.
    pub client: ClientId,
    /// Its host's name, for people.
    #[serde(deserialize_with = "text::line")]
    pub host_name: String,
    /// Form of its use: `ublk`, `nbd-direct`, ... It gives the block size of an allocation that has none of its own.
    #[serde(deserialize_with = "text::line")]
    pub purpose: String,
    /// When it became the owner, seconds since 1970.
    pub since: u64,
    /// The life of the client that owns it; none for a client that sends no life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<Life>,
}

impl Owner {
    /// The host, with the machine and the life if they are known, for people.
    pub fn shown(&self) -> String {
        match &self.life {
            Some(life) => format!("{} ({})", self.host_name, life.shown()),
            None => self.host_name.clone(),
        }
    }
}

/// The device that an owner shows an allocation as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceUse {
    /// Its node, or its socket.
    pub device: String,
    /// Its users: `swap`, `mounted at /mnt`.
    #[serde(default)]
    pub users: Vec<String>,
}

/// Makes a client the owner of an allocation. Refused while another client is the owner, unless `force` is set: then
/// the epoch is raised at every appliance first, which cuts the other client off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The client.
    pub client: ClientId,
    /// The kernel that it runs on.
    pub host: HostId,
    /// Its host's name, for people.
    #[serde(deserialize_with = "text::line")]
    pub host_name: String,
    /// Form of its use, as in [`Owner::purpose`].
    #[serde(deserialize_with = "text::line")]
    pub purpose: String,
    /// Take it from another owner.
    #[serde(default)]
    pub force: bool,
    /// If memory was shared with a process on the appliance's host and cannot be moved away from it, take zeros in
    /// its place; without this flag such a change of owner is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
    /// The client's wish for a block size, if it shows a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockWish>,
}

/// All that a client needs to use an allocation without further help of the allocator. A map contains keys: it is
/// kept only in files of mode 0600.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// The allocation's name.
    pub name: Name,
    /// Its id.
    pub id: AllocationId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Number of the change that led to its present place.
    #[serde(default)]
    pub version: u64,
    /// Its size in bytes.
    pub size: ByteSize,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Size of each region in bytes.
    pub region_len: ByteSize,
    /// At least one grant for each appliance that has regions of it.
    pub grants: Vec<Grant>,
    /// The regions in order: whole rows of the layout.
    pub regions: Vec<RegionSlot>,
    /// Named slabs, whose content must not be overwritten.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Logical block size of its devices, in bytes; none from an allocator of a version without block sizes, and for
    /// an allocation whose block size is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

/// Answer to a client that owns an allocation now. Clients of versions before 0.2 read it as the map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owned {
    /// The allocation's map.
    #[serde(flatten)]
    pub map: Map,
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
}

/// The client's grant on one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its id.
    pub id: GrantId,
    /// The appliance.
    pub appliance: ApplianceId,
    /// Its name.
    pub appliance_name: Name,
    /// Addresses of its data plane.
    pub endpoints: Endpoints,
    /// The secret that the client shows to the appliance.
    pub key: GrantKey,
    /// Number of regions in the grant.
    pub regions: u32,
}

/// Place of one region of an allocation: a slot of a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSlot {
    /// Index into [`Map::grants`].
    pub grant: u32,
    /// Index of the region within the grant: its bytes start at `slot * region_len` of the export.
    pub slot: u32,
}

/// Status of the allocator.
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
    /// Number of allocations.
    pub allocations: u64,
    /// Memory of all appliances that are up, in bytes.
    pub capacity: ByteSize,
    /// Free memory of these appliances, in bytes.
    pub free: ByteSize,
    /// Problems and notes about the pool and its allocations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// The newest state of its metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
    /// Set if its metadata are outdated: it judges and changes nothing, and refuses every question about a single
    /// allocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Behind>,
    /// Set while its metadata cannot be written: the reason. The allocator answers, and changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<String>,
}
