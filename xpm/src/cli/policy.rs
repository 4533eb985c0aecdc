//! `xpm apply`, `get`, `edit`, `delete`.

use std::path::PathBuf;

use clap::Args;
use xpm_protocol::Name;
use xpm_protocol::policy::Kind;

use crate::complete::any_document;

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Files of documents, in TOML or, where the name ends with .json, in JSON; `-` is standard input.
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Only says what would change.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The kind of documents: strategy, account, client or appliance.
    #[arg(value_parser = kind, required_unless_present = "file")]
    pub(crate) kind: Option<Kind>,
    /// The document's name; all of the kind when it is left out.
    #[arg(add = any_document())]
    pub(crate) name: Option<Name>,
    /// The documents that this file names, as the allocator has them: the file itself, while nothing was changed
    /// since it was applied.
    #[arg(long, short, value_name = "FILE", conflicts_with = "kind")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    /// The kind of document: strategy, account, client or appliance.
    #[arg(value_parser = kind)]
    pub(crate) kind: Kind,
    /// The document's name.
    #[arg(add = any_document())]
    pub(crate) name: Name,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The kind of document: strategy, account, client or appliance.
    #[arg(value_parser = kind)]
    pub(crate) kind: Kind,
    /// The document's name.
    #[arg(add = any_document())]
    pub(crate) name: Name,
    /// Only if it has this version.
    #[arg(long, value_name = "N")]
    pub(crate) version: Option<u64>,
}

/// Singular and plural.
fn kind(text: &str) -> Result<Kind, String> {
    let singular = match text {
        "strategies" => "strategy",
        other => other.strip_suffix('s').unwrap_or(other),
    };
    singular.parse().map_err(|error: xpm_protocol::policy::ParseKindError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_in_singular_and_plural() {
        assert_eq!(kind("strategies"), Ok(Kind::Strategy));
        assert_eq!(kind("accounts"), Ok(Kind::Account));
        assert_eq!(kind("client"), Ok(Kind::Client));
        assert!(kind("node").unwrap_err().contains("strategy, account, client and appliance"));
    }
}
