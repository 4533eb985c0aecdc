//! Conditions of rules, and the kinds of access that they can ask for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Labels, Window};
use crate::Name;
use crate::speed::Percent;
use crate::units::ByteSize;

/// When a rule applies: all given parts of the condition have to hold. An empty condition always holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Condition {
    /// The account is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub account: Vec<Name>,
    /// The client is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client: Vec<Name>,
    /// The request has all these labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The account has all these labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub account_labels: Labels,
    /// The client has all these labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub client_labels: Labels,
    /// The requested size is at least this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_min: Option<ByteSize>,
    /// The requested size is at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_max: Option<ByteSize>,
    /// The allocation is going to be used in one of these ways.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub access: Vec<Access>,
    /// The present time is in one of these windows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub time: Vec<Window>,
    /// Time zone of `time`, by its IANA name; default: UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// At least this share of the pool (the appliances that are up) is in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_used_min: Option<Percent>,
    /// At most this share of the pool is in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_used_max: Option<Percent>,
    /// The account already has at least this much memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account_used_min: Option<ByteSize>,
    /// The account already has at most this much memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account_used_max: Option<ByteSize>,
    /// All of these conditions hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub all: Vec<Condition>,
    /// At least one of these conditions holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub any: Vec<Condition>,
    /// This condition does not hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not: Option<Box<Condition>>,
}

impl Condition {
    /// How deep conditions may nest.
    pub const DEPTH_MAX: usize = 8;

    /// Whether the condition is empty, so that it always holds.
    pub fn is_always(&self) -> bool {
        *self == Condition::default()
    }
}

/// How external memory is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// As a block device.
    #[default]
    Block,
    /// Mapped into a program.
    Mapping,
    /// As memory of a virtual machine.
    Machine,
}

impl Access {
    /// Whether it is the usual access, as a block device.
    pub fn is_block(&self) -> bool {
        *self == Access::Block
    }
}
