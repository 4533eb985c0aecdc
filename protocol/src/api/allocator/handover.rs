//! Messages about handing allocations in use over to a client that stands by.

use serde::{Deserialize, Serialize};

use super::Owner;
use crate::{HandoverId, Name};

/// Most allocations of one hand-over: they change owner in one transaction of the store.
pub const HANDOVER_NAMES_MAX: usize = 32;

/// A client that stands by: it has all of an allocation except the keys, and its I/O waits until it is the owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// The client, and since when it stands by.
    #[serde(flatten)]
    pub client: Owner,
    /// The present owner has written down that it has to hold its I/O when it loses the ownership: the allocation can
    /// be handed over.
    pub noted: bool,
}

/// Hands allocations over to the client that stands by for all of them: it becomes the owner of all of them, or else
/// the present owner goes on with all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOverAll {
    /// The allocations; at most [`HANDOVER_NAMES_MAX`], each once.
    pub names: Vec<Name>,
    /// The new owner, which stands by for all of them: a host by its name, a client's id, or the name under which a
    /// client reported itself. A host may have several clients.
    pub to: String,
    /// Do it even if the present owner has not written down that a client stands by: the owner is dead, or its I/O
    /// may fail.
    #[serde(default)]
    pub force: bool,
}

/// A hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Its id.
    pub id: HandoverId,
    /// The allocations.
    pub names: Vec<Name>,
    /// The owner before it; if several clients of a host are involved, that of the first allocation.
    pub from: Owner,
    /// The owner after it; if several clients of a host are involved, that of the first allocation.
    pub to: Owner,
    /// Its state.
    pub state: HandoverState,
    /// When it began, seconds since 1970.
    pub since: u64,
    /// Why it stands still, in one line, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

/// State of a hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverState {
    /// The appliances are being told of the new epoch. No client has the new keys yet.
    Raising,
    /// The new owner has the keys. The old owner holds its I/O until the hand-over is committed or rolled back.
    Open,
    /// The old owner gets the allocations back. Both hold their I/O until every appliance has the next epoch.
    Returning,
    /// Over: the new owner has the allocations for good.
    Committed,
    /// Over: the old owner has the allocations again, and the other client stands by again.
    Returned,
}

impl HandoverState {
    /// Its name in JSON and in text.
    pub const fn as_str(self) -> &'static str {
        match self {
            HandoverState::Raising => "raising",
            HandoverState::Open => "open",
            HandoverState::Returning => "returning",
            HandoverState::Committed => "committed",
            HandoverState::Returned => "returned",
        }
    }
}

/// The hand-over that an allocation is part of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverPart {
    /// The hand-over.
    pub id: HandoverId,
    /// Its state.
    pub state: HandoverState,
    /// The owner before it.
    pub from: Owner,
    /// The owner after it.
    pub to: Owner,
    /// When it began, seconds since 1970.
    pub since: u64,
}

/// The role of a client in an allocation that it does not own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// It stands by: its I/O waits until it is the owner.
    StandsBy,
    /// It was the owner, and may become the owner again: its I/O waits until the hand-over is committed or rolled
    /// back.
    Holds {
        /// The hand-over.
        handover: HandoverId,
        /// The host of the new owner, for people.
        to: String,
    },
}
