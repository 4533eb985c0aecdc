//! The document `appliance`: settings of an operator for a machine that lends memory.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Labels;
use crate::Name;
use crate::speed::{LinkSpeed, Percent};
use crate::units::{ByteSize, Span};

/// A machine that lends memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ApplianceProfile {
    /// The name under which it registers. It need not be registered yet.
    pub name: Name,
    /// A description for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The version that this document replaces; see [`super::Account::version`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Labels; `site`, `row`, `rack` and `host` give its position for distances. They override the labels that it
    /// registers with.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Part of its memory that always stays free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_room: Option<Amount>,
    /// Most of its memory that is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<ByteSize>,
    /// The speed of its link, in place of the speed that it detected itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkSpeed>,
    /// Whether it is drained: it serves no new allocations.
    #[serde(default)]
    pub drain: bool,
    /// Time after its first registration during which its score grows to the full value; default: 10 minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp_up: Option<Span>,
}

/// Default time during which the score of a new appliance grows to the full value, in seconds.
pub const RAMP_UP_DEFAULT_SECS: u64 = 600;

/// A number of bytes, or a share of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// A number of bytes.
    Bytes(ByteSize),
    /// A percentage of the whole.
    Share(Percent),
}

impl Amount {
    /// The amount in bytes, out of `whole` bytes.
    pub fn of(self, whole: u64) -> u64 {
        match self {
            Amount::Bytes(size) => size.0,
            Amount::Share(share) => share.of(whole),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Bytes(size) => size.fmt(f),
            Amount::Share(share) => share.fmt(f),
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Amount, String> {
        match text.contains('%') {
            true => text
                .parse()
                .map(Amount::Share)
                .map_err(|error: crate::speed::ParseSpeedError| error.to_string()),
            false => text
                .parse()
                .map(Amount::Bytes)
                .map_err(|error: crate::units::ParseSizeError| error.to_string()),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Amount::Bytes(size) => size.serialize(serializer),
            Amount::Share(share) => share.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Amount, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer) {
            Ok(Form::Number(bytes)) => Ok(Amount::Bytes(ByteSize(bytes))),
            Ok(Form::Text(text)) => text.parse().map_err(de::Error::custom),
            Err(_) => {
                Err(de::Error::custom("an amount is a size such as \"4GiB\" or a share such as \"10%\""))
            }
        }
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "a size like 4GiB, or a share like 10%",
            "type": ["integer", "string"],
            "minimum": 0
        })
    }
}

/// How near two machines are: the narrowest of these labels that they have in common, if all wider labels that both
/// have are the same, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// The same host.
    Host,
    /// The same rack.
    Rack,
    /// The same row.
    Row,
    /// The same site.
    Site,
}

/// The levels from near to far; each is the key of a label.
pub const LEVELS: [Level; 4] = [Level::Host, Level::Rack, Level::Row, Level::Site];

impl Level {
    /// The label's key.
    pub const fn as_str(self) -> &'static str {
        match self {
            Level::Host => "host",
            Level::Rack => "rack",
            Level::Row => "row",
            Level::Site => "site",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
