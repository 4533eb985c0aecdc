//! Messages of the allocator.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `PUT /v1/appliances/{id}` | [`Heartbeat`] | [`HeartbeatAnswer`] |
//! | `GET /v1/appliances` | | list of [`Appliance`] |
//! | `DELETE /v1/appliances/{id}` | | nothing; refused while it holds regions of an allocation |
//! | `POST /v1/appliances/{id}/loss` | | list of [`Allocation`]s that lose memory: it is given up, for good. Refused while it is heard |
//! | `POST /v1/allocations?request=ID` | [`Create`] | [`Allocation`]; with a [`RequestId`], who asks again asks for the same, and not again for what was taken back |
//! | `GET /v1/allocations` | | list of [`Allocation`] |
//! | `GET /v1/allocations/{name}` | | [`Allocation`] |
//! | `DELETE /v1/allocations/{name}?force=true` | | nothing; refused while attached, unless forced |
//! | `PUT /v1/allocations/{name}/owner` | [`Attach`] | [`Map`] |
//! | `DELETE /v1/allocations/{name}/owner/{client}` | | nothing; a client that stands by does so no more |
//! | `PUT /v1/allocations/{name}/standby` | [`Attach`] | [`Map`] without keys: the client stands by to take it over |
//! | `POST /v1/allocations/{name}/renewal` | [`Renew`] | [`Allocation`] |
//! | `PUT /v1/allocations/{name}/size` | [`Resize`] | [`Allocation`] |
//! | `PUT /v1/allocations/{name}/name` | [`Rename`] | [`Allocation`]; refused while a client uses it |
//! | `POST /v1/allocations/{name}/transfer` | [`Transfer`] | [`Allocation`] |
//! | `POST /v1/handovers` | [`HandOverAll`] | [`Handover`]: the allocations have their new owner, all of them; else none has, and the old one goes on |
//! | `GET /v1/handovers` | | list of [`Handover`]s that are not over |
//! | `POST /v1/handovers/{id}/commit` | | [`Handover`]: the old owner ends. By the id, or by the name of an allocation in it |
//! | `POST /v1/handovers/{id}/rollback` | | [`Handover`]: the old owner has them again, and goes on |
//! | `GET /v1/allocations/{name}/orders/{client}?refused=GRANT,GRANT&pool=ID&number=N` | | [`Orders`]: what the owner is to do; the appliances of grants that refuse the owner are asked at once what they have; `pool` and `number` are the newest [`MetadataState`] that it heard of |
//! | `POST /v1/allocations/{name}/orders/{client}` | [`Report`] | [`Orders`] |
//! | `POST /v1/appliances/{id}/drain` | [`Drain`] | [`Appliance`] |
//! | `DELETE /v1/appliances/{id}/drain` | | nothing; what has moved stays where it is |
//! | `POST /v1/rebalance` | [`Rebalance`] | [`RebalancePlan`]; nothing is done on a dry run |
//! | `GET /v1/rebalance` | | [`RebalancePlan`] |
//! | `PUT /v1/rebalance` | [`Pause`] | [`RebalancePlan`] |
//! | `DELETE /v1/rebalance` | | nothing; the region that is on its way stays where it is |
//! | `GET /v1/allocations/{name}/decisions` | | list of [`Decision`](super::decision::Decision), the newest first |
//! | `POST /v1/decisions?all=true` | [`Create`] | [`Decision`](super::decision::Decision): a dry run, nothing is made; with `all` every appliance is named |
//! | `GET /v1/metrics` | | text for Prometheus |
//! | `GET /v1/backup` | | all metadata but decisions, with the keys of all grants, as `xpm-allocator restore` takes it |
//! | `GET /v1/garbage` | | list of [`Garbage`] |
//! | `GET /v1/usage` | | list of [`Usage`] |
//! | `PUT /v1/clients/{name}` | [`ClientFacts`] | [`Client`] |
//! | `GET /v1/clients` | | list of [`Client`] |
//! | `GET /v1/events?after=N&wait=true&object=NAME&kind=A,B&limit=N` | | list of [`Event`], at most [`EVENTS_PAGE_MAX`]: those with a larger number, the oldest first, or without `after` the newest; of what has the name, of these kinds; with `wait`, up to 20 s until there is one |
//! | `GET /v1/policy` | | [`Policy`](super::policy::Policy) |
//! | `POST /v1/policy` | [`Apply`](super::policy::Apply) | [`Applied`](super::policy::Applied) |
//! | `DELETE /v1/policy/{kind}/{name}?version=N` | | nothing; refused while it is in use or, with a version, when it has another |

//!
//! Whatever an owner asks (the paths with `owner`, `orders` and `slabs`), it may say which life of its client it is, by the query
//! `life=`[`Life`]: one life owns an allocation at a time. What another life of the same client asks is refused while the
//! first one is heard, or connected to an appliance of it.

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
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
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
    /// That it is being emptied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainState>,
    /// Since when it is given up, seconds since 1970: the operator said that its memory is lost. It lends nothing before it
    /// has cleared what it had.
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
    /// Who it is charged to; the client's account where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Name>,
    /// The client that is going to use it: where it is counts for locality and link speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Name>,
    /// The strategy; by default the account's, or else the one named `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// For conditions of rules.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// How it is going to be used.
    #[serde(default, skip_serializing_if = "Access::is_block")]
    pub access: Access,
    /// It may be reclaimed, with notice, for requests of a higher priority.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reclaimable: bool,
    /// A shorter lease than the strategy's or the account's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Span>,
    /// Where it cannot be made now, it waits this long for its turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Span>,
    /// Logical block size of its devices, in bytes; default 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

impl Create {
    /// Asks for `size` bytes and leaves everything else open.
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
    /// The hand-over that it is part of, which is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<HandoverPart>,
    /// Its regions in order, by appliance name for people and id for programs.
    pub regions: Vec<RegionPlace>,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Memory that it takes, in bytes: whole rows of whole regions.
    #[serde(default)]
    pub taken: ByteSize,
    /// Who it is charged to.
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
    /// How long it may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// That it is going to end, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
    /// Its place among the requests that wait, or why it was refused after waiting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// That it is being changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<ChangeState>,
    /// What the owner says of the last change that it carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub followed: Option<String>,
    /// Names of the appliances that have lost what it had there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<String>,
    /// What its owner shows it as, and who uses that, as the owner said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<DeviceUse>,
    /// Why the last change was not carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// What the one who asked for it should know, right after it was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Slabs with names, which its owners carved out of it.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Logical block size of its devices, in bytes; none where it was made before there was a choice, and is not known
    /// yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

/// How long an allocation may be used. Moments are seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// When it ends unless it is renewed: from then on nobody can attach it.
    pub ends: u64,
    /// When the memory is freed; whoever uses it then is cut off.
    pub frees: u64,
    /// Whether it can be renewed.
    pub renewable: bool,
}

/// That an allocation is going to end. Moments are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Why.
    pub reason: EndReason,
    /// Since when it is announced.
    pub since: u64,
    /// When the memory is freed; whoever uses it then is cut off.
    pub frees: u64,
    /// In one line, with what can be done.
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

/// A request that waits, or has waited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// How many are served first; none once it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// Priority of its account.
    pub priority: u16,
    /// Since when, seconds since 1970.
    pub since: u64,
    /// Until when at most, seconds since 1970.
    pub until: u64,
    /// Why it cannot be made now, in one line.
    #[serde(deserialize_with = "text::line")]
    pub why: String,
    /// The request, where who asked named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestId>,
}

/// Asks for a longer lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// For this long from now; for the terms' whole duration where it is not given.
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
    /// The name of the allocation that it was of.
    pub name: Name,
    /// Its memory in bytes.
    pub bytes: ByteSize,
    /// Since when it is known, seconds since 1970.
    pub since: u64,
    /// When it is freed unless its record is found, seconds since 1970.
    pub frees: u64,
}

/// What an account, a client or a strategy has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Whose.
    #[serde(flatten)]
    pub of: DocumentName,
    /// Memory that its allocations take, in bytes.
    pub used: ByteSize,
    /// Its allocations.
    pub allocations: u64,
    /// Beyond it, with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<ByteSize>,
    /// Beyond it, refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard_limit: Option<ByteSize>,
}

/// What a client found out about itself.
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
    /// What it said last.
    pub facts: ClientFacts,
    /// When, seconds since 1970.
    pub heard: u64,
}

/// Most events of one answer; who wants more asks again, after the last one.
pub const EVENTS_PAGE_MAX: usize = 500;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number: in order from 1, over restarts and changes of the leader. They begin anew where the metadata were lost.
    pub number: u64,
    /// When, seconds since 1970.
    pub at: u64,
    /// What kind: the text of an [`EventKind`](super::event::EventKind), or one of a newer allocator.
    #[serde(deserialize_with = "text::line")]
    pub kind: String,
    /// The name of what it happened to.
    pub subject: Name,
    /// In one line.
    #[serde(deserialize_with = "text::line")]
    pub text: String,
}

/// Whether an allocation can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllocationState {
    /// Asked for, and not made yet: it waits for its turn.
    Waiting,
    /// Asked for, and refused after it had waited.
    Refused,
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
    #[serde(deserialize_with = "text::line")]
    pub host_name: String,
    /// What it uses it as, for people: `ublk`, `nbd-direct`, ...
    #[serde(deserialize_with = "text::line")]
    pub purpose: String,
    /// Since when, seconds since 1970.
    pub since: u64,
    /// The life of the client that has it; none of a client that does not say so.
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
    /// Who uses it: `swap`, `mounted at /mnt`.
    #[serde(default)]
    pub users: Vec<String>,
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
    #[serde(deserialize_with = "text::line")]
    pub host_name: String,
    /// What it uses the allocation as, for people.
    #[serde(deserialize_with = "text::line")]
    pub purpose: String,
    /// Take it from another owner.
    #[serde(default)]
    pub force: bool,
    /// Where memory was shared with a process of the appliance's host and cannot be moved away from it, take zeros in
    /// its place; without this such a change of owner is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
    /// What the client says about block sizes, where it shows a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockWish>,
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
    /// Number of the change that led to where it lies.
    #[serde(default)]
    pub version: u64,
    /// Its size in bytes.
    pub size: ByteSize,
    /// How its bytes lie over its regions.
    pub layout: Layout,
    /// Size of each region in bytes.
    pub region_len: ByteSize,
    /// One grant or more for each appliance that has regions of it.
    pub grants: Vec<Grant>,
    /// The regions in order: whole rows of the layout.
    pub regions: Vec<RegionSlot>,
    /// Slabs with names, whose content is not to be written over.
    #[serde(default, skip_serializing_if = "SlabMap::is_empty")]
    pub slabs: SlabMap,
    /// Logical block size of its devices, in bytes; none from an allocator of a version that knew of none, and for an
    /// allocation whose size is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
}

/// The answer to a client that owns an allocation now. Clients of before 0.2 read it as the map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owned {
    /// Where the allocation lies.
    #[serde(flatten)]
    pub map: Map,
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
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
    /// What is wrong, or worth knowing, of the pool and of what lies on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// The newest state of its metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
    /// That its metadata are of yesterday: it judges and changes nothing, and refuses every question about one allocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Behind>,
    /// Why its metadata cannot be written now: it answers, and changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<String>,
}
