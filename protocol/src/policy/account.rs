//! The document `account`, to which memory is charged: its limits, hours and lease.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Labels, LinkDemand, Window};
use crate::Name;
use crate::units::{ByteSize, Span};

/// An account, to which memory is charged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Account {
    /// Its name.
    pub name: Name,
    /// A description for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this document replaces; the allocator sets it. With a version, the document is refused if it
    /// was changed meanwhile; without one, the last change wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Labels for conditions of rules.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Priority, 0 to 1000; larger is more important. It orders the requests that wait, and decides which allocation
    /// gives way to which when the pool is short.
    #[serde(default = "priority_default")]
    #[schemars(range(min = 0, max = 1000))]
    pub priority: u16,
    /// Beyond this much memory, allocations are made with a warning and are reclaimable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<ByteSize>,
    /// Beyond this much memory, requests are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard_limit: Option<ByteSize>,
    /// The strategy of requests that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Name>,
    /// Time zone of `hours`, by its IANA name; default: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// When memory may be requested and attached; default: always.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hours: Vec<Window>,
    /// Fate of allocations when the hours end.
    #[serde(default)]
    pub at_close: AtClose,
    /// How long allocations may exist; default: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
    /// The link speed that allocations of this account get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkDemand>,
    /// Whether allocations of this account may be reclaimed, with notice, for requests of a higher
    /// priority.
    #[serde(default)]
    pub reclaimable: bool,
    /// Most requests of this account that wait for their turn at the same time; default: 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_max: Option<u32>,
}

/// Default limit of waiting requests of an account, and their limit for all requests without an account together.
pub const WAITING_MAX_DEFAULT: u32 = 100;

/// Default priority of an account, and priority of requests without an account.
pub const PRIORITY_DEFAULT: u16 = 100;
/// Highest priority.
pub const PRIORITY_MAX: u16 = 1000;

fn priority_default() -> u16 {
    PRIORITY_DEFAULT
}

/// Fate of allocations when the hours of their account end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AtClose {
    /// They stay; no new allocation is made or attached.
    #[default]
    Keep,
    /// They end, as by a lease: with a warning before and a time of grace after.
    End,
}

/// How long an allocation may exist, and how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LeaseTerms {
    /// Time from the creation, or from the last renewal, to the end.
    pub duration: Span,
    /// How long before the end it is announced; default: a tenth of the duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<Span>,
    /// How long after the end the owner may still use it; then the owner is cut off and the memory is freed. Default:
    /// 10 minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Span>,
    /// Longest time including all renewals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_max: Option<Span>,
    /// Whether it can be renewed.
    #[serde(default = "yes")]
    pub renewable: bool,
}

/// Default time of grace of a lease, in seconds.
pub const GRACE_DEFAULT_SECS: u64 = 600;

fn yes() -> bool {
    true
}

impl LeaseTerms {
    /// How long before its end the end is announced, in seconds.
    pub fn warning_secs(&self) -> u64 {
        self.warning.map_or(self.duration.0.as_secs() / 10, |span| span.0.as_secs())
    }

    /// How long after its end the memory is freed, in seconds.
    pub fn grace_secs(&self) -> u64 {
        self.grace.map_or(GRACE_DEFAULT_SECS, |span| span.0.as_secs())
    }
}
