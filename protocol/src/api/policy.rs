//! Messages about documents.

use serde::{Deserialize, Serialize};

use crate::policy::{DocumentName, Documents};

/// All documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Grows with each change of any document.
    pub revision: u64,
    /// The documents, each with its version.
    pub documents: Documents,
    /// Their texts, of those that were applied in a form that can be taken apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<Written>,
}

/// A document as its author wrote it. The pieces of a file, in the order of their positions and each as `before`, `text`
/// and `after`, are the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Which.
    #[serde(flatten)]
    pub document: DocumentName,
    /// The version that this is the text of.
    pub version: u64,
    /// How it is written.
    pub format: PolicyFormat,
    /// Its place among the documents of its file.
    pub position: u64,
    /// What stood between the document before it and this one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub before: String,
    /// Its text, with the comments directly above it.
    pub text: String,
    /// What stood behind the last document of the file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub after: String,
}

/// Ends a line of TOML that `xpm edit` added: the version that was read. It is not kept with the text.
pub const EDIT_MARK: &str = "# xpm edit";

/// Applies files of documents: all of them or, where anything is wrong, none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The files.
    pub files: Vec<PolicyFile>,
    /// Only says what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// One file of documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// What it is called, for messages.
    pub name: String,
    /// How it is written.
    pub format: PolicyFormat,
    /// What is in it.
    pub text: String,
}

/// How a file of documents is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyFormat {
    /// TOML: `[[account]]` and so on.
    Toml,
    /// JSON: `{"account": [{...}]}`.
    Json,
}

/// What came of applying.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The revision now.
    pub revision: u64,
    /// What is wrong with the files; nothing was changed unless this is empty.
    pub problems: Vec<Problem>,
    /// What was changed, or would be.
    pub changes: Vec<DocumentChange>,
}

/// Something that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// The line in it, from 1; 0 where it is about the whole file.
    pub line: u64,
    /// The key, such as `account[2].hours[0].from`; empty where the file cannot be read at all.
    pub key: String,
    /// What is wrong and what to do instead, in one line.
    pub text: String,
}

/// A document that is applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentChange {
    /// Which.
    #[serde(flatten)]
    pub document: DocumentName,
    /// What is done to it.
    pub action: ChangeAction,
    /// Its version afterwards.
    pub version: u64,
    /// As it was, in TOML; empty where it is new.
    pub before: String,
    /// As it is then, in TOML.
    pub after: String,
}

/// What is done to a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeAction {
    /// It is new.
    Created,
    /// It is different.
    Changed,
    /// It is the same; its version stays.
    Unchanged,
}
