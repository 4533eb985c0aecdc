//! The hand-over of allocations in use to a client that stands by.

use serde::{Deserialize, Serialize};

use super::Owner;
use crate::{HandoverId, Name};

/// Most allocations of one hand-over: they change owner in one transaction of the store.
pub const HANDOVER_NAMES_MAX: usize = 32;

/// A client that stands by: it has all but the keys of an allocation, and its I/O waits until it is the owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// Who it is, and since when it stands by.
    #[serde(flatten)]
    pub client: Owner,
    /// The present owner has written down that it holds its I/O when the ownership goes: it can be handed over.
    pub noted: bool,
}

/// Hands allocations over to the client that stands by for all of them: either it owns all of them then, or the
/// present owner goes on with all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOverAll {
    /// The allocations; at most [`HANDOVER_NAMES_MAX`], each once.
    pub names: Vec<Name>,
    /// The new owner, which stands by for all of them: a host by its name, a client's id, or the name under which a client
    /// told of itself. Of one host there may be several clients.
    pub to: String,
    /// Also where the present owner has not written down that a client stands by: it is dead, or its I/O may fail.
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
    /// The owner before it; of the first allocation, where several clients of a host are concerned.
    pub from: Owner,
    /// The owner after it, likewise.
    pub to: Owner,
    /// How far it is.
    pub state: HandoverState,
    /// Since when, seconds since 1970.
    pub since: u64,
    /// Why it does not go on, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

/// How far a hand-over is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverState {
    /// The appliances are told of the new owner. Nobody has the new keys yet.
    Raising,
    /// The new owner has them. The old one holds its I/O, until the hand-over is committed or rolled back.
    Open,
    /// The old owner gets them back. Both hold their I/O until every appliance has agreed.
    Returning,
    /// Over: the new owner has them for good.
    Committed,
    /// Over: the old owner has them again, and the new one stands by again.
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

/// That an allocation is part of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverPart {
    /// The hand-over.
    pub id: HandoverId,
    /// How far it is.
    pub state: HandoverState,
    /// The owner before it.
    pub from: Owner,
    /// The owner after it.
    pub to: Owner,
    /// Since when, seconds since 1970.
    pub since: u64,
}

/// What a client has of an allocation that it does not own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// It stands by: its I/O waits until it is the owner.
    StandsBy,
    /// It was the owner, and may be again: its I/O waits until the hand-over is committed or rolled back.
    Holds {
        /// The hand-over.
        handover: HandoverId,
        /// The host of the new owner, for people.
        to: String,
    },
}
