//! The document of a strategy: rules about placement, limits, leases and layout.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, Labels, LeaseTerms, Level};
use crate::Name;
use crate::api::appliance::Medium;
use crate::speed::{LinkSpeed, Percent};
use crate::text::serde_as_text;
use crate::units::{ByteSize, Span};

/// How requests are answered: an ordered list of rules.
///
/// Every rule whose condition holds applies, in order. What rules require, forbid, prefer and limit
/// adds up: no rule undoes an earlier one. Of what can be only once (layout, link speed, locality,
/// lease, weights, reclaimable) each value comes from the first rule that says it. A rule with `last` ends the
/// list; one with `use` goes on with another strategy instead of the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Strategy {
    /// Its name. The one named `default` is used where nothing names another.
    pub name: Name,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this replaces; see [`super::Account::version`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// The rules in order.
    #[serde(default, rename = "rule", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// One rule: a condition, and what follows where it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Its name, for explanations; unique in its strategy.
    pub name: Name,
    /// When it applies; always where nothing is said.
    #[serde(default, skip_serializing_if = "Condition::is_always")]
    pub when: Condition,
    /// The request is refused with this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refuse: Option<String>,
    /// Only appliances that fit this serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require: Option<Selector>,
    /// Appliances that fit one of these do not serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forbid: Vec<Selector>,
    /// Appliances that fit these are wanted more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefer: Vec<Preference>,
    /// How much may be asked for and held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<LimitRule>,
    /// The layout of requests that leave it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<LayoutRule>,
    /// The link speed that appliances must have, and have free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkDemand>,
    /// How near to the client appliances must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<Locality>,
    /// What counts how much among the appliances that can serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// How long the allocation may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
    /// Whether the allocation may be reclaimed, with notice, for requests of a higher priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaimable: Option<bool>,
    /// Goes on with this strategy instead of the rest.
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    pub use_strategy: Option<Name>,
    /// Where it applies, no later rule does.
    #[serde(default, skip_serializing_if = "is_false")]
    pub last: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Which appliances: those that fit everything that is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Selector {
    /// It is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub appliances: Vec<Name>,
    /// It has all these labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Its memory lies on one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub medium: Vec<Medium>,
    /// Its link is at least this fast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_speed_min: Option<LinkSpeed>,
    /// It can be reached by RDMA, or cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma: Option<bool>,
}

/// Appliances that are wanted more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Preference {
    /// Which.
    #[serde(default)]
    pub select: Selector,
    /// How much more, 1 to 1000: points that they get in full.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u16,
}

/// How much may be asked for and held under a strategy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LimitRule {
    /// Largest single allocation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_max: Option<ByteSize>,
    /// All allocations of the strategy together: beyond it, with a warning and reclaimable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft: Option<ByteSize>,
    /// All allocations of the strategy together: beyond it, refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard: Option<ByteSize>,
    /// One account's share of one appliance's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub appliance_share: Option<Percent>,
}

/// The layout of requests that leave it open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LayoutRule {
    /// Stripe over this many regions; 1: linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe: Option<u32>,
    /// Stripe unit, a power of two from 4 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe_unit: Option<ByteSize>,
    /// Size of a region, a power of two from 16 MiB to 64 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_size: Option<ByteSize>,
    /// Whether the regions of a linear allocation go to as many appliances as there are, rather than to one that holds
    /// all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<bool>,
}

/// A link speed that appliances must have and have free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkDemand {
    /// This much.
    Speed(LinkSpeed),
    /// As much as the client's own link has.
    Client,
}

impl fmt::Display for LinkDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinkDemand::Speed(speed) => speed.fmt(f),
            LinkDemand::Client => f.pad("client"),
        }
    }
}

impl FromStr for LinkDemand {
    type Err = String;

    fn from_str(text: &str) -> Result<LinkDemand, String> {
        match text {
            "client" => Ok(LinkDemand::Client),
            speed => speed
                .parse()
                .map(LinkDemand::Speed)
                .map_err(|error| format!("{error}, or `client` for the client's own")),
        }
    }
}

serde_as_text!(LinkDemand);

impl JsonSchema for LinkDemand {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "LinkDemand".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "a link speed like 10Gbps, or `client` for as much as the client's own link has",
            "type": "string"
        })
    }
}

/// How near to the client appliances must be. An appliance or a client without the labels counts as
/// far away, one whose round-trip time was not measured as too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Locality {
    /// At least in the same host, rack, row or site as the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Level>,
    /// At most this round-trip time, as the client measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_max: Option<Span>,
}

/// What counts how much among the appliances that can serve; each 0 to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Weights {
    /// Free memory, against the one that has most.
    pub free: u16,
    /// Little traffic, against the speed of its link.
    pub load: u16,
    /// No errors lately.
    pub health: u16,
    /// Nearness to the client.
    pub near: u16,
}

impl Default for Weights {
    fn default() -> Weights {
        Weights { free: 100, load: 20, health: 50, near: 50 }
    }
}

/// Largest weight.
pub const WEIGHT_MAX: u16 = 1000;
