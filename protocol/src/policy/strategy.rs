//! The document `strategy`: rules by which requests are answered, and their parts.

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

/// A strategy: how requests are answered, as an ordered list of rules.
///
/// Every rule whose condition holds applies, in order. The requirements, prohibitions, preferences and limits of all
/// applied rules count together: no rule undoes an earlier one. A single value (layout, link speed, locality, lease,
/// weights, reclaimable) comes from the first applied rule that sets it. A rule with `last` ends the list; a rule
/// with `use` continues with another strategy instead of the remaining rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Strategy {
    /// Its name. The strategy named `default` is used if nothing names another one.
    pub name: Name,
    /// A description for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this document replaces; see [`super::Account::version`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// The rules in order.
    #[serde(default, rename = "rule", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// A rule: a condition, and its effects when the condition holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Its name, for explanations; unique in its strategy.
    pub name: Name,
    /// When the rule applies; default: always.
    #[serde(default, skip_serializing_if = "Condition::is_always")]
    pub when: Condition,
    /// Refuses the request with this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refuse: Option<String>,
    /// Only appliances that fit this selector serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require: Option<Selector>,
    /// Appliances that fit one of these selectors do not serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forbid: Vec<Selector>,
    /// Appliances that fit these selectors get a higher score.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefer: Vec<Preference>,
    /// Limits on the size of requests and on the memory of all allocations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<LimitRule>,
    /// The layout of requests that leave it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<LayoutRule>,
    /// The link speed that appliances must have, and must have free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkDemand>,
    /// How near to the client appliances must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<Locality>,
    /// Weights of the parts of a score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// How long the allocation may exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
    /// Whether the allocation may be reclaimed, with notice, for requests of a higher priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaimable: Option<bool>,
    /// Continues with this strategy instead of the remaining rules.
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    pub use_strategy: Option<Name>,
    /// If this rule applies, no later rule does.
    #[serde(default, skip_serializing_if = "is_false")]
    pub last: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Selects appliances that fit all given parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Selector {
    /// The appliance is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub appliances: Vec<Name>,
    /// The appliance has all these labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Its memory has one of these media.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub medium: Vec<Medium>,
    /// Its link is at least this fast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_speed_min: Option<LinkSpeed>,
    /// Whether it must be reachable by RDMA, or must not be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma: Option<bool>,
}

/// Appliances that get a higher score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Preference {
    /// The selected appliances.
    #[serde(default)]
    pub select: Selector,
    /// Weight of the preference, 1 to 1000: points that these appliances get.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u16,
}

/// Limits under a strategy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LimitRule {
    /// Largest single allocation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_max: Option<ByteSize>,
    /// Sum over all allocations of the strategy: beyond this, allocations are made with a warning and are
    /// reclaimable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft: Option<ByteSize>,
    /// Sum over all allocations of the strategy: beyond this, requests are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard: Option<ByteSize>,
    /// Largest share of one appliance's memory for one account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub appliance_share: Option<Percent>,
}

/// The layout of requests that leave it open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LayoutRule {
    /// Number of regions to stripe over; 1: linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe: Option<u32>,
    /// Stripe unit, a power of two from 4 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe_unit: Option<ByteSize>,
    /// Size of a region, a power of two from 16 MiB to 64 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_size: Option<ByteSize>,
    /// Whether the regions of a linear allocation go to as many appliances as possible, rather than to one appliance
    /// that holds all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<bool>,
}

/// A link speed that appliances must have, and must have free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkDemand {
    /// This speed.
    Speed(LinkSpeed),
    /// The speed of the client's own link.
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

/// How near to the client appliances must be. An appliance or a client without position labels counts as far away; an
/// appliance whose round-trip time was not measured counts as too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Locality {
    /// Appliance and client must have the same label at this level or at a nearer one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Level>,
    /// Longest round-trip time, as measured by the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_max: Option<Span>,
}

/// Weights of the parts of a score; each 0 to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Weights {
    /// Free memory, relative to the appliance that has most.
    pub free: u16,
    /// Idle share of its link.
    pub load: u16,
    /// Few recent errors.
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
