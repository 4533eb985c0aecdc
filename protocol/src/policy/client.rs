//! The document `client`: settings of an operator for a machine that uses external memory.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Labels, LinkDemand};
use crate::Name;
use crate::speed::LinkSpeed;
use crate::units::ByteSize;

/// A machine that uses external memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ClientProfile {
    /// The name under which it reports itself; by default its host's name.
    pub name: Name,
    /// A description for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this document replaces; see [`super::Account::version`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Labels; `site`, `row`, `rack` and `host` give its position for distances.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The account of its requests that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Name>,
    /// The speed of its link, in place of the speed that it detected itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_link_speed: Option<LinkSpeed>,
    /// The link speed that its allocations get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkDemand>,
    /// Beyond this much memory, allocations are made with a warning and are reclaimable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<ByteSize>,
    /// Beyond this much memory, requests are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard_limit: Option<ByteSize>,
}
