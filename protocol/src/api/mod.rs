//! The control plane's messages: JSON over HTTP under `/v1`, one module per daemon.
//!
//! Unknown fields of requests are refused, so that a misspelt option is never ignored. Unknown fields of answers are
//! skipped, so that a newer daemon can send more.

pub mod allocator;
pub mod appliance;
pub mod blk;
pub mod decision;
pub mod event;
pub mod health;
pub mod policy;
pub mod run;
pub mod swapd;

use serde::{Deserialize, Serialize};

/// Prefix of every path.
pub const VERSION: &str = "v1";

/// Body of every answer with a status of 300 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Kind of the refusal, for programs.
    pub kind: ErrorKind,
    /// Message in one line: what, where, and what to do instead.
    #[serde(deserialize_with = "crate::text::line")]
    pub error: String,
}

/// Kinds of refusal, each with its HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request is malformed or contradicts itself (400).
    Invalid,
    /// No or a wrong token (401).
    Unauthorized,
    /// The operator's documents forbid it: a limit, hours, a rule (403).
    Denied,
    /// The named object does not exist (404).
    NotFound,
    /// An object of that name exists already, or changed meanwhile (409).
    Conflict,
    /// The object is in use; the message says by whom and whether force is possible (409).
    InUse,
    /// Not enough memory, or too few appliances (507).
    NoSpace,
    /// This machine lacks a required feature (501).
    Unsupported,
    /// A required part is not reachable now; trying again may help (503).
    Unavailable,
    /// This allocator is not the leader: ask the leader, which the header `Location` names (status 307), or the next
    /// known allocator (503).
    NotLeader,
    /// A fault of the daemon itself (500).
    Internal,
}

impl ErrorKind {
    /// The HTTP status of this kind.
    pub const fn status(self) -> u16 {
        match self {
            ErrorKind::Invalid => 400,
            ErrorKind::Unauthorized => 401,
            ErrorKind::Denied => 403,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::InUse => 409,
            ErrorKind::NoSpace => 507,
            ErrorKind::Unsupported => 501,
            ErrorKind::Unavailable | ErrorKind::NotLeader => 503,
            ErrorKind::Internal => 500,
        }
    }
}
