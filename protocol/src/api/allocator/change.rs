//! Changes of where an allocation lies, and what its owner is told to do for them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DeviceUse, Endpoints, Map, MetadataState, Part};
use crate::units::{ByteSize, Span};
use crate::{ApplianceId, ClientId, Epoch, GrantId, GrantKey, Name};

/// How far the emptying of an appliance is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainState {
    /// Since when, seconds since 1970.
    pub since: u64,
    /// Most bytes a second that one allocation's data is copied with; none: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<ByteSize>,
    /// Nothing new is begun.
    pub paused: bool,
    /// Memory of allocations on it that is still to move, in bytes.
    pub left: ByteSize,
    /// How long the rest takes at the speed of late, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<Span>,
    /// Why it does not go on, if it does not.
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

/// Empties an appliance: its regions move to others, while they are used. Again with other settings: they hold
/// from the next allocation on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// Most bytes a second that one allocation's data is copied with; 64 KiB or more.
    pub rate: Option<ByteSize>,
    /// Begin nothing new until this is said again without.
    pub paused: bool,
}

/// Moves regions from full appliances to empty ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rebalance {
    /// Only say what would be moved.
    pub dry_run: bool,
    /// Most bytes a second that data is copied with; 64 KiB or more.
    pub rate: Option<ByteSize>,
}

/// Holds a rebalancing up, or lets it go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    /// Begin nothing new.
    pub paused: bool,
}

/// What a rebalancing moves. It lives as long as the allocator's process: what is on its way is finished after
/// a restart, and nothing new is begun.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalancePlan {
    /// What is to be moved still, in this order.
    pub moves: Vec<PlannedMove>,
    /// Bytes that were moved already.
    pub moved: ByteSize,
    /// Nothing new is begun.
    pub paused: bool,
    /// How long the rest takes at the speed of late, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<Span>,
}

/// Regions of one allocation that move from one appliance to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// The allocation.
    pub allocation: Name,
    /// From where.
    pub from: Name,
    /// To where.
    pub to: Name,
    /// Bytes.
    pub bytes: ByteSize,
}

/// Asks for another size of an allocation, in use or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new size in bytes; rounded up to whole pages of 4096.
    pub size: ByteSize,
}

/// Hands an allocation over to another client; its data stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The new owner: a client's id, or the name under which it told of itself.
    pub to: String,
    /// How long the present owner has to write back what it holds and to agree; default 30 s, at most 50 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// Do not ask the present owner, and do not mind what it says: it is dead, or is to be cut off.
    #[serde(default)]
    pub force: bool,
    /// Where memory was shared with a process of the appliance's host and cannot be moved away from it, the new owner
    /// gets zeros in its place; without this such a transfer is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
}

/// What the owner of an allocation is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Version of the map that holds. An owner that has an older one, and no change to carry out, has to attach
    /// again to get it.
    pub version: u64,
    /// Where the allocation lies is to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<MapChange>,
    /// The allocation goes to another client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hand_over: Option<HandOver>,
    /// The ownership counter that holds. None: the allocator is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// Grants that their appliances do not have any more: what lay there is lost. None: the allocator is older than
    /// this field, and does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Vec<GrantId>>,
    /// Where each grant of the map is reached now, for an owner whose map has an older address.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: BTreeMap<GrantId, Endpoints>,
    /// The newest state of the allocator's metadata that is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
    /// Appliances whose memory the operator has given up: I/O to it ends with an error, for good, also if the appliance
    /// comes back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<LostLender>,
    /// What the one who asks has of it; none: it is the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// Another client stands by, or may have to give it back: no refusal of an appliance proves that an ownership has
    /// ended, only the allocator's word does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contested: bool,
    /// The metadata were recovered without the keys of this ownership: the owner is to say them ([`Report::Keys`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wants_keys: bool,
}

/// An appliance that does not come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostLender {
    /// Which one.
    pub appliance: ApplianceId,
    /// Its name.
    pub name: Name,
}

/// A change of where an allocation lies, which its owner carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapChange {
    /// Counts the changes of the allocation; the version of the map after it.
    pub number: u64,
    /// What it is for.
    pub kind: ChangeKind,
    /// The map after it.
    pub next: Map,
    /// Regions that have to be copied to where they lie in the new map, by their places in the allocation.
    pub moved: Vec<u32>,
    /// Control interfaces of the appliances that the copied regions are on, by grants of both maps.
    pub control: BTreeMap<GrantId, String>,
    /// Most bytes a second to copy with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<ByteSize>,
    /// It is recorded as done: the new map holds, and the owner has to confirm that it uses nothing else.
    pub switched: bool,
}

/// What a change is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// The allocation becomes larger.
    Grow,
    /// It becomes smaller.
    Shrink,
    /// Regions move to other appliances.
    Move,
}

/// That an allocation goes to another client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The new owner.
    pub to: ClientId,
    /// When the present owner is cut off whatever it does, seconds since 1970.
    pub until: u64,
}

/// What the owner of an allocation says to its orders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// So many bytes of those that are to be copied are.
    Copied {
        /// The change.
        number: u64,
        /// Bytes so far.
        bytes: u64,
    },
    /// All is copied and written to both places: the new map may hold.
    Ready {
        /// The change.
        number: u64,
    },
    /// Nothing uses the old map any more.
    Done {
        /// The change.
        number: u64,
        /// What became of the device, in one line, where there is something to say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        how: Option<String>,
    },
    /// The change cannot be carried out here.
    Refused {
        /// The change.
        number: u64,
        /// Why, in one line, with what to do.
        why: String,
    },
    /// What the allocation is shown as, and who uses that. Said now and then, for the operator.
    Used(DeviceUse),
    /// The keys of this ownership, for an allocator that asked for them. Not counted unless the epoch holds and all grants
    /// of the map are there.
    Keys {
        /// The ownership.
        epoch: Epoch,
        /// The key of each grant.
        keys: BTreeMap<GrantId, GrantKey>,
    },
    /// The operator of this client gave an appliance up here: I/O to what lay there has failed since, for good.
    GaveUp {
        /// Which one.
        appliance: ApplianceId,
    },
    /// Everything is written back, and nothing uses the allocation any more.
    HandedOver,
    /// The owner has written down that the allocation is contested ([`Orders::contested`]): from now on it holds its I/O
    /// until the allocator says whose it is.
    Holds,
    /// The allocation is in use and cannot be handed over.
    Kept {
        /// Why, in one line, with what to do.
        why: String,
    },
}

/// How far a change of an allocation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeState {
    /// What it is for.
    pub kind: ChangeKind,
    /// Since when, seconds since 1970.
    pub since: u64,
    /// The size after it, in bytes.
    pub size: ByteSize,
    /// Bytes that have to be copied.
    pub bytes: ByteSize,
    /// Bytes that are.
    pub copied: ByteSize,
    /// Where it is, in one line.
    pub text: String,
}
