//! Recorded decisions: why an allocation lies where it lies, or could not be made.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::ErrorKind;
use crate::policy::{DocumentName, Level};
use crate::speed::LinkSpeed;
use crate::units::ByteSize;
use crate::{AllocationId, ApplianceId, Name};

/// A decision of the allocator, with all its inputs. It stays readable after the allocation and the documents are
/// gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Time, seconds since 1970.
    pub at: u64,
    /// The allocation's name.
    pub name: Name,
    /// Id of the allocation, if one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationId>,
    /// The request in one line.
    pub request: String,
    /// Requested size, in bytes.
    pub size: ByteSize,
    /// Seed that decides between appliances of equal score. The same inputs and seed give the same decision.
    pub seed: u64,
    /// Revision of the documents.
    pub revision: u64,
    /// The documents that took part, each with its version.
    pub documents: Vec<DocumentVersion>,
    /// The first strategy; none if neither request nor account names one and no document is named `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// The rules in the order in which they were evaluated.
    pub rules: Vec<RuleTrace>,
    /// Combined demands of rules and profiles, a line each.
    pub demands: Vec<String>,
    /// The limits that the request was measured against.
    pub limits: Vec<LimitCheck>,
    /// Number of appliances that were considered.
    pub appliances_total: u64,
    /// The appliances: those that serve, the best of the other usable ones, and examples of those that cannot serve.
    /// A dry run shows all.
    pub appliances: Vec<ApplianceTrace>,
    /// Number of rejected appliances, by reason.
    pub rejected: Vec<RejectedCount>,
    /// The result.
    pub outcome: DecisionOutcome,
    /// Warnings for the requester of an allocation that was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A document at the time of the decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentVersion {
    /// The document.
    #[serde(flatten)]
    pub document: DocumentName,
    /// Its version.
    pub version: u64,
}

/// A rule that was evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleTrace {
    /// The strategy that it belongs to.
    pub strategy: Name,
    /// The rule.
    pub rule: Name,
    /// Whether it applies.
    pub applies: bool,
    /// Its effect, or the condition that does not hold.
    pub why: String,
}

/// A limit that the request was measured against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitCheck {
    /// The limited document: `account batch`, `client db1`, `strategy default`.
    pub of: String,
    /// Its present usage, in bytes.
    pub used: ByteSize,
    /// Size of this request, in bytes.
    pub asked: ByteSize,
    /// Beyond this limit, requests are served with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft: Option<ByteSize>,
    /// Beyond this limit, requests are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard: Option<ByteSize>,
}

/// The verdict on one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplianceTrace {
    /// Its id.
    pub id: ApplianceId,
    /// Its name.
    pub name: Name,
    /// Whether it can serve, and its score.
    pub verdict: Verdict,
}

/// Whether an appliance can serve, and its score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It cannot serve.
    Rejected(Rejection),
    /// It can serve.
    Scored {
        /// Sum of the parts, reduced for a newcomer.
        score: u64,
        /// Parts of the score.
        parts: Vec<ScorePart>,
        /// Regions that it gets.
        regions: u64,
    },
}

/// Why an appliance cannot serve: the first reason that holds, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Rejection {
    /// It is silent.
    Silent,
    /// The operator is emptying it.
    Drained,
    /// It refused this request, or did not answer.
    Failed,
    /// A rule's requirement is not met.
    NotRequired {
        /// The rule.
        rule: String,
    },
    /// A rule forbids it.
    Forbidden {
        /// The rule.
        rule: String,
    },
    /// It is too far away.
    TooFar {
        /// Nearest level at which it and the client have the same label.
        common: Option<Level>,
        /// They must have the same label at this level or at a nearer one.
        within: Level,
    },
    /// The round trip takes too long, or was not measured.
    TooSlow {
        /// Measured time, in nanoseconds.
        round_trip: Option<u64>,
        /// Longest allowed time, in nanoseconds.
        most: u64,
    },
    /// Its link is not fast enough, or its speed is unknown.
    LinkTooSlow {
        /// Speed of its link.
        has: Option<LinkSpeed>,
        /// Demanded speed.
        asked: LinkSpeed,
    },
    /// The speed of its link is promised to other allocations.
    LinkPromised {
        /// Speed that is not promised.
        left: LinkSpeed,
        /// Demanded speed.
        asked: LinkSpeed,
    },
    /// The account has used up its share of the appliance.
    ShareUsed {
        /// Memory of the account on it, in bytes.
        used: ByteSize,
        /// Memory that the account may have on it, in bytes.
        most: ByteSize,
    },
    /// Its free memory is kept for a waiting request that comes first.
    Held,
    /// It has no room for a single region.
    Full {
        /// Memory that it can still give, in bytes: free memory less promises and head-room.
        free: ByteSize,
        /// Length of a region in bytes.
        region: ByteSize,
    },
}

/// A part of a score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScorePart {
    /// Its subject: `free`, `load`, `health`, `near`, or the preference's rule.
    pub of: Cow<'static, str>,
    /// Achieved share of the weight, in thousandths.
    pub share: u16,
    /// The weight.
    pub weight: u16,
}

/// Number of appliances rejected for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedCount {
    /// The reason, in a few words.
    pub reason: String,
    /// Number of appliances.
    pub appliances: u64,
}

/// Result of a decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum DecisionOutcome {
    /// A placement was found.
    Placed {
        /// Number of regions.
        regions: u64,
        /// Length of each region in bytes.
        region_len: ByteSize,
        /// Number of appliances.
        appliances: u64,
    },
    /// No placement was found.
    Refused {
        /// Kind of the refusal.
        kind: ErrorKind,
        /// Why, in one line.
        why: String,
        /// The smallest changes that would each let the request succeed; the smallest first.
        remedies: Vec<String>,
    },
}

/// The reason as a predicate, to follow the name of the appliance.
impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |nanos: &u64| nanos.div_ceil(1000);
        match self {
            Rejection::Silent => f.write_str("is silent"),
            Rejection::Drained => f.write_str("is drained"),
            Rejection::Failed => f.write_str("refused or did not answer"),
            Rejection::NotRequired { rule } => write!(f, "is not what rule {rule} requires"),
            Rejection::Forbidden { rule } => write!(f, "is forbidden by rule {rule}"),
            Rejection::TooFar { common: None, within } => {
                write!(f, "is too far away: not in the same {within}")
            }
            Rejection::TooFar { common: Some(common), within } => {
                write!(f, "is too far away: in the same {common}, and the same {within} is asked")
            }
            Rejection::TooSlow { round_trip: None, most } => {
                write!(f, "has no measured round trip, and at most {} us is asked", micros(most))
            }
            Rejection::TooSlow { round_trip: Some(time), most } => {
                write!(f, "answers in {} us, and at most {} us is asked", micros(time), micros(most))
            }
            Rejection::LinkTooSlow { has: None, asked } => {
                write!(f, "has a link of unknown speed, and {asked} is asked")
            }
            Rejection::LinkTooSlow { has: Some(has), asked } => {
                write!(f, "has a link of {has}, and {asked} is asked")
            }
            Rejection::LinkPromised { left, asked } => {
                write!(f, "has {left} of its link left, and {asked} is asked")
            }
            Rejection::ShareUsed { used, most } => {
                write!(f, "has given the account {used} of the {most} that it may have of it")
            }
            Rejection::Held => f.write_str("is held for a request that comes first"),
            Rejection::Full { free, region } => write!(f, "has {free} free, a region takes {region}"),
        }
    }
}
