//! Messages about changes of an allocation's place and size, about emptying and rebalancing appliances, and about the
//! owner's part in them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DeviceUse, Endpoints, Map, MetadataState, Part};
use crate::units::{ByteSize, Span};
use crate::{ApplianceId, ClientId, Epoch, GrantId, GrantKey, Name};

/// Progress of emptying an appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainState {
    /// When it began, seconds since 1970.
    pub since: u64,
    /// Highest rate of copying for each allocation, in bytes per second; none: without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<ByteSize>,
    /// No further move is begun.
    pub paused: bool,
    /// Memory of allocations on the appliance that is still to move, in bytes.
    pub left: ByteSize,
    /// How long the rest takes at the present speed, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<Span>,
    /// Why it stands still, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

/// Gives an allocation another name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// The new name.
    pub to: Name,
}

/// Empties an appliance: its regions move to others, while they are in use. When it is repeated with other settings,
/// these apply from the next allocation on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// Highest rate of copying for each allocation, in bytes per second; 64 KiB or more.
    pub rate: Option<ByteSize>,
    /// Begin no further move, until the request is repeated without this flag.
    pub paused: bool,
}

/// Moves regions from full appliances to empty ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rebalance {
    /// Only report what would be moved.
    pub dry_run: bool,
    /// Highest rate of copying for each allocation, in bytes per second; 64 KiB or more.
    pub rate: Option<ByteSize>,
}

/// Pauses a rebalancing, or lets it go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    /// Begin no further move.
    pub paused: bool,
}

/// The plan of a rebalancing. It lasts as long as the allocator's process: after a restart, moves under way are
/// finished, and no further one is begun.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalancePlan {
    /// Moves that are still to be made, in this order.
    pub moves: Vec<PlannedMove>,
    /// Bytes that were moved already.
    pub moved: ByteSize,
    /// No further move is begun.
    pub paused: bool,
    /// How long the rest takes at the present speed, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<Span>,
}

/// Regions of one allocation that move from one appliance to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// The allocation.
    pub allocation: Name,
    /// The appliance that the regions leave.
    pub from: Name,
    /// The appliance that they move to.
    pub to: Name,
    /// Size of the regions, in bytes.
    pub bytes: ByteSize,
}

/// Resizes an allocation, in use or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new size in bytes; rounded up to whole pages of 4096.
    pub size: ByteSize,
}

/// Hands an allocation over to another client; its data stay where they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The new owner: a client's id, or the name under which it reported itself.
    pub to: String,
    /// How long the present owner may take to write back its data and let go; default 30 s, at most 50 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// Do not ask the present owner, and ignore its refusal: it is dead, or is to be cut off.
    #[serde(default)]
    pub force: bool,
    /// If memory was shared with a process on the appliance's host and cannot be moved away from it, the new owner
    /// gets zeros in place of that memory; without this flag such a transfer is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
}

/// Orders to the owner of an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Version of the valid map. An owner that has an older one, and no change to carry out, has to attach again to
    /// get the new map.
    pub version: u64,
    /// A change of the allocation's place that the owner has to carry out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<MapChange>,
    /// The owner is asked to let go, because the allocation goes to another client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hand_over: Option<HandOver>,
    /// The valid ownership counter. None: the allocator is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// Grants that their appliances do not have any more: the data there are lost. None: the allocator is older than
    /// this field, and does not report lost grants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Vec<GrantId>>,
    /// Present addresses of each grant of the map, for an owner whose map has older ones.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: BTreeMap<GrantId, Endpoints>,
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
    /// Appliances whose memory the operator has given up: I/O to them fails, for good, even if the appliance comes
    /// back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<LostLender>,
    /// The role of the client that asks, if it is not the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// Another client stands by, or may have to give the allocation back. Therefore a refusal by an appliance does
    /// not prove that an ownership has ended; only the allocator's word does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contested: bool,
    /// The metadata were recovered without the keys of this ownership: the owner has to report them
    /// ([`Report::Keys`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wants_keys: bool,
}

/// An appliance whose memory was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostLender {
    /// Its id.
    pub appliance: ApplianceId,
    /// Its name.
    pub name: Name,
}

/// A change of an allocation's place, which its owner carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapChange {
    /// Number of the change among the changes of the allocation; also the version of the map after it.
    pub number: u64,
    /// Its kind.
    pub kind: ChangeKind,
    /// The map after the change.
    pub next: Map,
    /// Regions that have to be copied to their new place, by their indices in the allocation.
    pub moved: Vec<u32>,
    /// Control interfaces of the appliances of the copied regions, by grants of both maps.
    pub control: BTreeMap<GrantId, String>,
    /// Highest rate of copying, in bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<ByteSize>,
    /// The change is recorded as done: the new map is valid, and the owner has to confirm that it uses nothing else.
    pub switched: bool,
}

/// Kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// The allocation becomes larger.
    Grow,
    /// The allocation becomes smaller.
    Shrink,
    /// Regions move to other appliances.
    Move,
}

/// An allocation goes to another client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The new owner.
    pub to: ClientId,
    /// When the present owner is cut off if it has not let go, seconds since 1970.
    pub until: u64,
}

/// A report of the owner about its orders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// Progress of copying.
    Copied {
        /// The change.
        number: u64,
        /// Bytes copied so far.
        bytes: u64,
    },
    /// All regions are copied, and writes go to both places: the new map may become valid.
    Ready {
        /// The change.
        number: u64,
    },
    /// Nothing uses the old map any more.
    Done {
        /// The change.
        number: u64,
        /// How the device followed the change, in one line, if there is anything to report.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        how: Option<String>,
    },
    /// The change cannot be carried out here.
    Refused {
        /// The change.
        number: u64,
        /// Why, in one line, with the remedy.
        why: String,
    },
    /// The device that the allocation is shown as, and its users. Sent now and then, for the operator.
    Used(DeviceUse),
    /// The keys of this ownership, for an allocator that asked for them. They are ignored unless the epoch is the
    /// valid one and all grants of the map are included.
    Keys {
        /// The ownership.
        epoch: Epoch,
        /// The key of each grant.
        keys: BTreeMap<GrantId, GrantKey>,
    },
    /// The operator of this client has given up an appliance here: I/O to it has failed since, for good.
    GaveUp {
        /// The appliance.
        appliance: ApplianceId,
    },
    /// All data are written back, and nothing uses the allocation any more.
    HandedOver,
    /// The owner has written down that the allocation is contested ([`Orders::contested`]): from now on, when
    /// appliances refuse it, it holds its I/O until the allocator says who the owner is.
    Holds,
    /// The allocation is in use and cannot be handed over.
    Kept {
        /// Why, in one line, with the remedy.
        why: String,
    },
}

/// Progress of a change of an allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeState {
    /// Its kind.
    pub kind: ChangeKind,
    /// When it began, seconds since 1970.
    pub since: u64,
    /// The size after it, in bytes.
    pub size: ByteSize,
    /// Bytes that have to be copied.
    pub bytes: ByteSize,
    /// Bytes that are copied so far.
    pub copied: ByteSize,
    /// Its present stage, in one line.
    pub text: String,
}
