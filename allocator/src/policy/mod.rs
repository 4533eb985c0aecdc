//! Documents: rules, limits and profiles that operators set beforehand, as the allocator keeps them.
//!
//! A set of files is read (`read.rs`) and checked as a whole, together with the existing documents (`validate.rs`).
//! The result is either the next [`Policy`] or a list of problems. The parts that decisions use are prepared once
//! (`compiled.rs`, `windows.rs`).

mod compiled;
mod read;
mod validate;
mod windows;

use std::collections::{BTreeMap, HashMap};

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::policy::{ChangeAction, DocumentChange, PolicyFile, Problem, Written};
use xpm_protocol::policy::{ApplianceProfile, ClientProfile, Content, DocumentName, Documents, Kind};
use xpm_protocol::{ByteSize, Name};

use crate::usage::Usage;

pub use compiled::{CompiledAccount, CompiledCondition, CompiledRule, CompiledStrategy, Facts, Miss};
pub use windows::Windows;

use read::Document;

/// Most documents that are kept.
const DOCUMENTS_MAX: usize = 10_000;
/// Most bytes of all documents with their texts.
const BYTES_MAX: usize = 16 << 20;

/// All documents. Cheap enough to copy when an operator changes one.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    revision: u64,
    documents: BTreeMap<DocumentName, Content>,
    /// The texts of documents, for those whose text is of the present version.
    written: BTreeMap<DocumentName, Written>,
    strategies: HashMap<Name, CompiledStrategy>,
    accounts: HashMap<Name, CompiledAccount>,
}

/// The result of applying files.
#[derive(Debug, Default)]
pub struct Plan {
    /// Problems of the files. Nothing may be changed unless this is empty.
    pub problems: Vec<Problem>,
    /// The change to each document of the files.
    pub changes: Vec<DocumentChange>,
    /// The documents afterwards; none if there are problems.
    pub next: Option<Policy>,
    /// The documents that are new or different, with their versions.
    pub documents: Vec<Content>,
    /// Texts that are new or different.
    pub written: Vec<Written>,
}

impl Policy {
    /// The documents of an earlier process, which were valid then.
    pub fn load(revision: u64, documents: Documents, written: Vec<Written>) -> Policy {
        let documents: BTreeMap<DocumentName, Content> =
            documents.into_contents().map(|content| (content.document_name(), content)).collect();
        let current =
            |one: &Written| documents.get(&one.document).and_then(Content::version) == Some(one.version);
        let written = written.into_iter().filter(current).map(|one| (one.document.clone(), one)).collect();
        Policy { revision, documents, written, ..Policy::default() }.compiled()
    }

    fn compiled(mut self) -> Policy {
        (self.strategies, self.accounts) = (HashMap::new(), HashMap::new());
        for content in self.documents.values() {
            match content {
                Content::Strategy(strategy) => {
                    self.strategies.insert(strategy.name.clone(), CompiledStrategy::new(strategy));
                }
                Content::Account(account) => {
                    self.accounts.insert(account.name.clone(), CompiledAccount::new(account));
                }
                Content::Client(_) | Content::Appliance(_) => {}
            }
        }
        self
    }

    /// Number of the present version of all documents; grows with each change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All documents, each with its version.
    pub fn documents(&self) -> Documents {
        self.documents.values().cloned().collect()
    }

    /// The texts of the documents that have one.
    pub fn written(&self) -> Vec<Written> {
        self.written.values().cloned().collect()
    }

    /// Size of all documents, texts included, in bytes.
    fn bytes(&self) -> usize {
        let documents = self.documents.values().map(|one| toml_of(one).len());
        let written = self.written.values().map(|one| one.before.len() + one.text.len() + one.after.len());
        documents.chain(written).sum()
    }

    /// The strategy of this name.
    pub fn strategy(&self, name: &Name) -> Option<&CompiledStrategy> {
        self.strategies.get(name)
    }

    /// The account of this name.
    pub fn account(&self, name: &Name) -> Option<&CompiledAccount> {
        self.accounts.get(name)
    }

    /// The profile of the client of this name.
    pub fn client(&self, name: &Name) -> Option<&ClientProfile> {
        match self.get(Kind::Client, name) {
            Some(Content::Client(profile)) => Some(profile),
            _ => None,
        }
    }

    /// The profile of the appliance of this name.
    pub fn appliance(&self, name: &Name) -> Option<&ApplianceProfile> {
        match self.get(Kind::Appliance, name) {
            Some(Content::Appliance(profile)) => Some(profile),
            _ => None,
        }
    }

    fn get(&self, kind: Kind, name: &Name) -> Option<&Content> {
        self.documents.get(&DocumentName { kind, name: name.clone() })
    }

    /// Soft and hard limit of an account, a client, or a strategy (of its rules that always apply).
    pub fn limits(&self, of: &DocumentName) -> (Option<ByteSize>, Option<ByteSize>) {
        match self.documents.get(of) {
            Some(Content::Account(account)) => (account.soft_limit, account.hard_limit),
            Some(Content::Client(client)) => (client.soft_limit, client.hard_limit),
            Some(Content::Strategy(strategy)) => {
                let always = strategy.rules.iter().filter(|rule| rule.when.is_always());
                let limits: Vec<_> = always.filter_map(|rule| rule.limit).collect();
                let least = |of: fn(&xpm_protocol::policy::LimitRule) -> Option<ByteSize>| {
                    limits.iter().filter_map(of).min()
                };
                (least(|limit| limit.soft), least(|limit| limit.hard))
            }
            _ => (None, None),
        }
    }

    /// The result that applying the files would have.
    pub fn plan(&self, files: &[PolicyFile], usage: &Usage) -> Plan {
        let found = read::read(files);
        // Documents that cannot be read may be ones that others name, so such names are not reported as missing.
        let mut problems = validate::validate(self, &found, usage);
        let read::Read { documents, problems: unread, .. } = found;
        problems.extend(unread);
        let is_new = |one: &&Document| !self.documents.contains_key(&one.content.document_name());
        let count = self.documents.len() + documents.iter().filter(is_new).count();
        if problems.is_empty() && count > DOCUMENTS_MAX {
            let text = format!(
                "there would be {count} documents, and at most {DOCUMENTS_MAX} are kept: delete some first"
            );
            problems.push(read::whole_file(files, &text));
        }
        if problems.is_empty() {
            let plan = self.changed(documents);
            match plan.next.as_ref().and_then(Policy::too_much) {
                None => return plan,
                Some(text) => problems.push(read::whole_file(files, &text)),
            }
        }
        problems.truncate(read::PROBLEMS_MAX);
        problems.sort_by(|a, b| (&a.file, a.line, &a.key).cmp(&(&b.file, b.line, &b.key)));
        Plan { problems, ..Plan::default() }
    }

    fn changed(&self, documents: Vec<Document>) -> Plan {
        let revision = self.revision + 1;
        let mut plan = Plan::default();
        let mut next = self.clone();
        let alone = documents.len() == 1;
        for Document { content, written, .. } in documents {
            let name = content.document_name();
            let before = self.documents.get(&name);
            let same = before.is_some_and(|before| {
                before.clone().with_version(None) == content.clone().with_version(None)
            });
            let action = match (before, same) {
                (None, _) => ChangeAction::Created,
                (Some(_), true) => ChangeAction::Unchanged,
                (Some(_), false) => ChangeAction::Changed,
            };
            let version = before.filter(|_| same).and_then(Content::version).unwrap_or(revision);
            plan.changes.push(DocumentChange {
                document: name.clone(),
                action,
                version,
                before: before.map(toml_of).unwrap_or_default(),
                after: toml_of(&content),
            });
            // A document that is applied alone was edited, and keeps its position in its file.
            let place = self.written.get(&name).filter(|_| alone).map(|one| one.position);
            let written =
                written.map(|one| Written { version, position: place.unwrap_or(one.position), ..one });
            match written {
                Some(one) if self.written.get(&name) != Some(&one) => {
                    next.written.insert(name.clone(), one.clone());
                    plan.written.push(one);
                }
                Some(_) => {}
                // The old text contradicts the new document, unless only the form changed.
                None if !same => drop(next.written.remove(&name)),
                None => {}
            }
            if !same {
                let content = content.with_version(Some(version));
                next.documents.insert(name, content.clone());
                plan.documents.push(content);
            }
        }
        if !plan.documents.is_empty() {
            next.revision = revision;
        }
        plan.next = Some(next.compiled());
        plan
    }

    /// Why these documents exceed the limit, if they do.
    fn too_much(&self) -> Option<String> {
        let bytes = self.bytes();
        (bytes > BYTES_MAX).then(|| {
            let (bytes, most) = (ByteSize(bytes as u64), ByteSize(BYTES_MAX as u64));
            format!("all documents would take {bytes}, and at most {most} are kept: delete some first, or shorten them")
        })
    }

    /// The documents without `name`. `used` describes its users other than documents, if any.
    pub fn remove(
        &self,
        name: &DocumentName,
        version: Option<u64>,
        used: Option<String>,
    ) -> Result<Policy, ApiError> {
        let refuse = |kind, line: String| Err(ApiError(kind, line));
        let Some(content) = self.documents.get(name) else {
            return refuse(
                ErrorKind::NotFound,
                format!("there is no {name}: `xpm get {}` shows those that are there", name.kind),
            );
        };
        if let Some(asked) = version.filter(|&version| content.version() != Some(version)) {
            let has = content.version().unwrap_or_default();
            return refuse(
                ErrorKind::Conflict,
                format!("{name} has version {has} now, not {asked}: look at it again"),
            );
        }
        if let Some(by) = self.documents.values().find(|other| names(other, name)) {
            return refuse(
                ErrorKind::InUse,
                format!("{name} is named by {}: change that first", by.document_name()),
            );
        }
        if let Some(used) = used {
            return refuse(ErrorKind::InUse, format!("{name} is in use: {used}; delete these first"));
        }
        let mut next = self.clone();
        next.documents.remove(name);
        next.written.remove(name);
        next.revision += 1;
        Ok(next.compiled())
    }
}

/// Whether a document names another.
fn names(content: &Content, other: &DocumentName) -> bool {
    let is = |kind: Kind, name: &Option<Name>| other.kind == kind && name.as_ref() == Some(&other.name);
    match content {
        Content::Strategy(strategy) => strategy.rules.iter().any(|rule| {
            is(Kind::Strategy, &rule.use_strategy)
                || (other.kind == Kind::Account && names_account(&rule.when, &other.name))
        }),
        Content::Account(account) => is(Kind::Strategy, &account.strategy),
        Content::Client(client) => is(Kind::Account, &client.account),
        Content::Appliance(_) => false,
    }
}

fn names_account(condition: &xpm_protocol::policy::Condition, name: &Name) -> bool {
    let inner = condition.all.iter().chain(&condition.any).chain(condition.not.as_deref());
    condition.account.contains(name) || inner.into_iter().any(|one| names_account(one, name))
}

/// A document as a file that can be applied, without its version.
fn toml_of(content: &Content) -> String {
    let documents = Documents::from_iter([content.clone().with_version(None)]);
    // Documents consist of values that TOML can express, so this cannot fail.
    toml::to_string_pretty(&documents).unwrap_or_default()
}

#[cfg(test)]
mod tests;
