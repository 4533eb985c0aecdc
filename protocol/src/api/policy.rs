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
    /// The texts of the documents that were applied in a form that can be cut into pieces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<Written>,
}

/// A document as its author wrote it. The pieces of a file, joined in the order of their positions, each as `before`,
/// `text` and `after`, give the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// The document.
    #[serde(flatten)]
    pub document: DocumentName,
    /// The version of the document that has this text.
    pub version: u64,
    /// Format of the text.
    pub format: PolicyFormat,
    /// Its position among the documents of its file.
    pub position: u64,
    /// Text between the previous document and this one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub before: String,
    /// Its text, with the comments directly above it.
    pub text: String,
    /// Text after the last document of the file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub after: String,
}

/// Marks a line of TOML that `xpm edit` added: the version that was read. The line is not kept with the text.
pub const EDIT_MARK: &str = "# xpm edit";

/// Applies files of documents: all of them or, if there is any problem, none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The files.
    pub files: Vec<PolicyFile>,
    /// Only report what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// A file of documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// Its name, for messages.
    pub name: String,
    /// Its format.
    pub format: PolicyFormat,
    /// Its content.
    pub text: String,
}

/// Format of a file of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyFormat {
    /// TOML: `[[account]]` and so on.
    Toml,
    /// JSON: `{"account": [{...}]}`.
    Json,
}

/// Result of applying files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The revision now.
    pub revision: u64,
    /// Problems of the files; nothing was changed unless this is empty.
    pub problems: Vec<Problem>,
    /// The changes that were made, or would be made.
    pub changes: Vec<DocumentChange>,
}

/// A problem with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// Its line, from 1; 0 if it concerns the whole file.
    pub line: u64,
    /// Its key, such as `account[2].hours[0].from`; empty if the file cannot be read at all.
    pub key: String,
    /// Description with the remedy, in one line.
    pub text: String,
}

/// The change of one document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentChange {
    /// The document.
    #[serde(flatten)]
    pub document: DocumentName,
    /// The kind of change.
    pub action: ChangeAction,
    /// Its version afterwards.
    pub version: u64,
    /// The document before, in TOML; empty if it is new.
    pub before: String,
    /// The document after, in TOML.
    pub after: String,
}

/// Kind of change of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeAction {
    /// The document is new.
    Created,
    /// The document differs from before.
    Changed,
    /// The document is the same; its version stays.
    Unchanged,
}
