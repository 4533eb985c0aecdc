//! Why an allocation lies where it lies, or could not be made.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::ErrorKind;
use crate::policy::{DocumentName, Level};
use crate::speed::LinkSpeed;
use crate::units::ByteSize;
use crate::{AllocationId, ApplianceId, Name};

/// One decision of the allocator, with all that it was made from. It stays readable after the
/// allocation and the documents are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When, seconds since 1970.
    pub at: u64,
    /// The allocation's name.
    pub name: Name,
    /// Its id, where one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationId>,
    /// What was asked for, in one line.
    pub request: String,
    /// Size that was asked for, in bytes.
    pub size: ByteSize,
    /// Decides between appliances of equal score. The same inputs and seed give the same decision.
    pub seed: u64,
    /// Revision of the documents.
    pub revision: u64,
    /// The documents that took part, each with its version.
    pub documents: Vec<DocumentVersion>,
    /// The strategy that it began with; none where no document is named `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// The rules in the order in which they were looked at.
    pub rules: Vec<RuleTrace>,
    /// What the rules and profiles came to, a line each.
    pub demands: Vec<String>,
    /// The limits that it was measured against.
    pub limits: Vec<LimitCheck>,
    /// How many appliances were looked at.
    pub appliances_total: u64,
    /// The appliances: those that serve, the best of the others, examples of those that cannot. A
    /// dry run shows all.
    pub appliances: Vec<ApplianceTrace>,
    /// How many appliances were rejected, by reason.
    pub rejected: Vec<RejectedCount>,
    /// What it came to.
    pub outcome: DecisionOutcome,
    /// What the one who asked should know although it was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A document as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentVersion {
    /// Which.
    #[serde(flatten)]
    pub document: DocumentName,
    /// Its version.
    pub version: u64,
}

/// One rule that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleTrace {
    /// The strategy that it is of.
    pub strategy: Name,
    /// The rule.
    pub rule: Name,
    /// Whether it applies.
    pub applies: bool,
    /// What it does, or which condition does not hold.
    pub why: String,
}

/// One limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitCheck {
    /// Whose: `account batch`, `client db1`, `strategy default`.
    pub of: String,
    /// What they have already, in bytes.
    pub used: ByteSize,
    /// What this takes, in bytes.
    pub asked: ByteSize,
    /// Beyond it, with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft: Option<ByteSize>,
    /// Beyond it, refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard: Option<ByteSize>,
}

/// One appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplianceTrace {
    /// Its id.
    pub id: ApplianceId,
    /// Its name.
    pub name: Name,
    /// Whether it can serve, and how much it is wanted.
    pub verdict: Verdict,
}

/// Whether an appliance can serve, and how much it is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It cannot.
    Rejected(Rejection),
    /// It can.
    Scored {
        /// Sum of the parts, as a share of what newcomers get.
        score: u64,
        /// What the score comes from.
        parts: Vec<ScorePart>,
        /// Regions that it gets.
        regions: u64,
    },
}

/// Why an appliance cannot serve: the first reason that holds, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Rejection {
    /// It is not heard.
    Silent,
    /// The operator empties it.
    Drained,
    /// It refused this request, or did not answer.
    Failed,
    /// A rule requires something else.
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
        /// What they have in common.
        common: Option<Level>,
        /// What they must have.
        within: Level,
    },
    /// The round trip takes too long, or was not measured.
    TooSlow {
        /// Measured, in nanoseconds.
        round_trip: Option<u64>,
        /// At most, in nanoseconds.
        most: u64,
    },
    /// Its link is not fast enough, or its speed is unknown.
    LinkTooSlow {
        /// Its speed.
        has: Option<LinkSpeed>,
        /// What is asked for.
        asked: LinkSpeed,
    },
    /// Its link is promised to others.
    LinkPromised {
        /// What is not promised.
        left: LinkSpeed,
        /// What is asked for.
        asked: LinkSpeed,
    },
    /// The account has its share of it.
    ShareUsed {
        /// What the account has on it, in bytes.
        used: ByteSize,
        /// What it may have, in bytes.
        most: ByteSize,
    },
    /// What is free there is meant for a request that waits and comes first.
    Held,
    /// It has no room for one region.
    Full {
        /// Memory that it may still give, in bytes: free, less what is promised and its head-room.
        free: ByteSize,
        /// Length of a region in bytes.
        region: ByteSize,
    },
}

/// A part of a score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScorePart {
    /// What it is for: `free`, `load`, `health`, `near`, or the preference's rule.
    pub of: Cow<'static, str>,
    /// How much was got, in thousandths of the weight.
    pub share: u16,
    /// The weight.
    pub weight: u16,
}

/// How many appliances were rejected for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedCount {
    /// The reason, in a few words.
    pub reason: String,
    /// How many.
    pub appliances: u64,
}

/// What a decision came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum DecisionOutcome {
    /// A place was found.
    Placed {
        /// Regions.
        regions: u64,
        /// Length of each in bytes.
        region_len: ByteSize,
        /// Appliances.
        appliances: u64,
    },
    /// No place was found.
    Refused {
        /// What kind of refusal it is.
        kind: ErrorKind,
        /// Why, in one line.
        why: String,
        /// The smallest changes that would make it succeed, each by itself; the smallest first.
        remedies: Vec<String>,
    },
}

/// What it says after the name of the appliance.
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
