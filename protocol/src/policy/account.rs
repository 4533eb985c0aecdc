//! The document of an account: limits of a group of clients.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Labels, LinkDemand, Window};
use crate::Name;
use crate::units::{ByteSize, Span};

/// Who memory is charged to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Account {
    /// Its name.
    pub name: Name,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this replaces; given by the allocator. With it, applying is refused when
    /// somebody else changed the document meanwhile; without it, the last one to apply wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// For conditions of rules.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// 0 to 1000, larger is more important: the order of requests that wait, and who gives way to
    /// whom when the pool is short.
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
    /// Time zone of `hours`, by its IANA name; UTC where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// When memory may be asked for and attached; always where none is given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hours: Vec<Window>,
    /// What becomes of allocations when the hours end.
    #[serde(default)]
    pub at_close: AtClose,
    /// How long allocations may be used; for ever where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
    /// The link speed that allocations of this account get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkDemand>,
    /// Whether allocations of this account may be reclaimed, with notice, for requests of a higher
    /// priority.
    #[serde(default)]
    pub reclaimable: bool,
    /// Most requests of this account that wait for their turn at the same time; 100 where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_max: Option<u32>,
}

/// Most requests of an account that says none, and of all without an account, that wait at the same time.
pub const WAITING_MAX_DEFAULT: u32 = 100;

/// Priority of accounts that say none, and of requests without an account.
pub const PRIORITY_DEFAULT: u16 = 100;
/// Highest priority.
pub const PRIORITY_MAX: u16 = 1000;

fn priority_default() -> u16 {
    PRIORITY_DEFAULT
}

/// What becomes of allocations when the hours of their account end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AtClose {
    /// They stay; nothing new is made or attached.
    #[default]
    Keep,
    /// They end, as a lease does: with warning before and grace after.
    End,
}

/// How long an allocation may be used, and how its end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LeaseTerms {
    /// Time from the making, or the last renewal, to the end.
    pub duration: Span,
    /// The end is announced this long before; a tenth of the duration where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<Span>,
    /// After the end the owner has this long to leave; then it is cut off and the memory is freed.
    /// 10 minutes where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Span>,
    /// With all renewals, no longer than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_max: Option<Span>,
    /// Whether it can be renewed.
    #[serde(default = "yes")]
    pub renewable: bool,
}

/// Grace of a lease that says none, in seconds.
pub const GRACE_DEFAULT_SECS: u64 = 600;

fn yes() -> bool {
    true
}

impl LeaseTerms {
    /// How long before its end it is announced, in seconds.
    pub fn warning_secs(&self) -> u64 {
        self.warning.map_or(self.duration.0.as_secs() / 10, |span| span.0.as_secs())
    }

    /// How long after its end the memory is freed, in seconds.
    pub fn grace_secs(&self) -> u64 {
        self.grace.map_or(GRACE_DEFAULT_SECS, |span| span.0.as_secs())
    }
}
