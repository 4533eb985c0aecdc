//! Documents, which operators set beforehand: strategies, accounts, and profiles of clients and appliances.
//!
//! Documents are written in TOML or JSON, applied to the allocator, versioned there, read back and edited. A file
//! holds any number of them ([`Documents`]). The types here define the keys and the range of each single value. The
//! allocator checks the documents against each other (names that exist, contradictions, time zones) when they are
//! applied.

mod account;
mod appliance;
mod client;
mod condition;
mod content;
mod hours;
mod strategy;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::Name;

pub use account::{
    Account, AtClose, GRACE_DEFAULT_SECS, LeaseTerms, PRIORITY_DEFAULT, PRIORITY_MAX, WAITING_MAX_DEFAULT,
};
pub use appliance::{Amount, ApplianceProfile, LEVELS, Level, RAMP_UP_DEFAULT_SECS};
pub use client::ClientProfile;
pub use condition::{Access, Condition};
pub use content::Content;
pub use hours::{Day, TimeOfDay, Window};
pub use strategy::{
    LayoutRule, LimitRule, LinkDemand, Locality, Preference, Rule, Selector, Strategy, WEIGHT_MAX, Weights,
};

/// Labels: properties that an operator gives to an object. `site`, `row`, `rack` and `host` give its position.
pub type Labels = BTreeMap<Name, Name>;

/// Most labels of an appliance or of a request.
pub const LABELS_MAX: usize = 64;

/// A label, written `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The property.
    pub key: Name,
    /// Its value.
    pub value: Name,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Label, String> {
        let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE, like rack=r1")?;
        let name = |text: &str| text.parse::<Name>().map_err(|error| error.to_string());
        Ok(Label { key: name(key)?, value: name(value)? })
    }
}

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Label, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl FromIterator<Label> for Labels {
    fn from_iter<T: IntoIterator<Item = Label>>(labels: T) -> Labels {
        labels.into_iter().map(|label| (label.key, label.value)).collect()
    }
}

/// The documents of a file, or all documents of the allocator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Documents {
    /// Strategies: how requests are answered.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strategy: Vec<Strategy>,
    /// Accounts, to which memory is charged.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub account: Vec<Account>,
    /// Machines that use external memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client: Vec<ClientProfile>,
    /// Machines that lend memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub appliance: Vec<ApplianceProfile>,
}

/// JSON Schema of a file of documents.
pub fn schema() -> String {
    let schema = schemars::schema_for!(Documents);
    // A schema consists of values that JSON can express, so this cannot fail.
    serde_json::to_string_pretty(&schema).unwrap_or_default()
}

/// Kinds of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// [`Strategy`].
    Strategy,
    /// [`Account`].
    Account,
    /// [`ClientProfile`].
    Client,
    /// [`ApplianceProfile`].
    Appliance,
}

impl Kind {
    /// All kinds, in the order in which they are listed.
    pub const ALL: [Kind; 4] = [Kind::Strategy, Kind::Account, Kind::Client, Kind::Appliance];

    /// Its name in files, paths and commands.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Strategy => "strategy",
            Kind::Account => "account",
            Kind::Client => "client",
            Kind::Appliance => "appliance",
        }
    }
}

impl Documents {
    /// Whether there are no documents.
    pub fn is_empty(&self) -> bool {
        *self == Documents::default()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The text is no kind of document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no kind of document: there are strategy, account, client and appliance")]
pub struct ParseKindError(String);

impl FromStr for Kind {
    type Err = ParseKindError;

    fn from_str(text: &str) -> Result<Kind, ParseKindError> {
        let known = Kind::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| ParseKindError(text.chars().take(80).collect()))
    }
}

/// Kind and name of a document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DocumentName {
    /// Its kind.
    pub kind: Kind,
    /// Its name; unique within its kind.
    pub name: Name,
}

impl fmt::Display for DocumentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.name)
    }
}
