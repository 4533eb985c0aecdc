//! Reads files of documents as values with the lines that they come from.
//!
//! TOML and JSON become the same tree of values, with a tree of lines beside it. A problem names the key of its
//! value, and the line is looked up then.

mod depth;
mod json;
mod lines;
mod toml;
mod written;

use std::collections::HashSet;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;
use xpm_protocol::api::policy::{PolicyFile, PolicyFormat, Problem, Written};
use xpm_protocol::policy::{Content, DocumentName, Kind};

use lines::Lines;
use written::Pieces;

/// Most files at once.
const FILES_MAX: usize = 64;
/// Most bytes of all files together, with their names.
const BYTES_MAX: usize = 1 << 20;
/// Most values in all files together. [`BYTES_MAX`] alone would allow too many: a value in memory is much larger than
/// the shortest one in a text.
const VALUES_MAX: usize = 100_000;
/// Most problems of one document that are reported at once.
const DOCUMENT_PROBLEMS_MAX: usize = 20;
/// Most problems that are reported at once.
pub(super) const PROBLEMS_MAX: usize = 100;
/// Most characters of a file's name, a key or a text in a problem.
const SHOWN_MAX: usize = 400;

/// A document of a file.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) content: Content,
    /// Its text, if the file can be cut into pieces.
    pub(super) written: Option<Written>,
    origin: Origin,
}

/// Origin of a document.
#[derive(Debug, Clone)]
struct Origin {
    file: Arc<str>,
    /// Its key in the file, such as `account[1]`.
    key: String,
    lines: Arc<Lines>,
}

impl Document {
    /// A problem with a key of this document, such as `rule[0].when`.
    pub(super) fn problem(&self, key: &str, text: &str) -> Problem {
        self.origin.problem(key, text)
    }
}

impl Origin {
    fn problem(&self, key: &str, text: &str) -> Problem {
        let whole = if key.is_empty() { self.key.clone() } else { format!("{}.{key}", self.key) };
        problem(&self.file, self.lines.of(key), &whole, text)
    }
}

/// Contents of the files.
#[derive(Default)]
pub(super) struct Read {
    /// The documents that can be read.
    pub(super) documents: Vec<Document>,
    pub(super) problems: Vec<Problem>,
    /// Names of documents that exist in the files and cannot be read.
    pub(super) broken: HashSet<DocumentName>,
    /// Some file cannot be read at all, so any document may be in it.
    pub(super) unknown: bool,
}

/// Reads all files. If there are problems, `documents` is incomplete.
pub(super) fn read(files: &[PolicyFile]) -> Read {
    let bytes: usize = files.iter().map(|file| file.name.len() + file.text.len()).sum();
    if files.len() > FILES_MAX || bytes > BYTES_MAX {
        let name = files.first().map_or("", |file| &file.name);
        let text = format!(
            "at most {FILES_MAX} files and {BYTES_MAX} bytes can be applied at once: apply them in parts"
        );
        return Read { problems: vec![problem(name, 0, "", &text)], unknown: true, ..Read::default() };
    }
    let mut found = Found::default();
    for file in files {
        found.read(file);
    }
    found.read.problems.truncate(PROBLEMS_MAX);
    found.read
}

/// A problem with all files together.
pub(super) fn whole_file(files: &[PolicyFile], text: &str) -> Problem {
    problem(files.first().map_or("", |file| &file.name), 0, "", text)
}

fn problem(file: &str, line: u64, key: &str, text: &str) -> Problem {
    Problem { file: shown(file), line, key: shown(key), text: shown(text) }
}

/// The text as one line of limited length.
fn shown(text: &str) -> String {
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(SHOWN_MAX) {
        line.truncate(end);
        line.push_str("...");
    }
    line
}

type Parsed = Result<(Value, Lines), (u64, String)>;

#[derive(Default)]
struct Found {
    read: Read,
    values: usize,
}

impl Found {
    fn read(&mut self, file: &PolicyFile) {
        let parsed = match file.format {
            PolicyFormat::Toml => toml::parse(&file.text),
            PolicyFormat::Json => json::parse(&file.text),
        };
        match parsed {
            Ok((Value::Object(kinds), lines)) => {
                self.values += kinds.values().map(count).sum::<usize>();
                if self.values > VALUES_MAX {
                    let text =
                        format!("at most {VALUES_MAX} values can be applied at once: apply them in parts");
                    return self.unreadable(problem(&file.name, 0, "", &text));
                }
                self.read_kinds(&file.name, kinds, lines, written::pieces(file));
            }
            Ok((_, lines)) => {
                let text =
                    "a file of documents is a table with the keys strategy, account, client and appliance";
                self.unreadable(problem(&file.name, lines.line, "", text));
            }
            Err((line, text)) => self.unreadable(problem(&file.name, line, "", &text)),
        }
    }

    fn unreadable(&mut self, problem: Problem) {
        self.read.problems.push(problem);
        self.read.unknown = true;
    }

    fn read_kinds(
        &mut self,
        file: &str,
        kinds: serde_json::Map<String, Value>,
        mut lines: Lines,
        mut pieces: Pieces,
    ) {
        let name: Arc<str> = file.into();
        for (key, value) in kinds {
            let at = lines.table.remove(&key).unwrap_or_default();
            match (key.parse::<Kind>(), value) {
                (Ok(kind), Value::Array(list)) => self.read_list(&name, kind, list, at, &mut pieces),
                (Ok(kind), _) => {
                    let text = format!(
                        "{kind} is a list of documents: write [[{kind}]] in TOML, or \"{kind}\": [...] in JSON"
                    );
                    self.unreadable(problem(file, at.line, &key, &text));
                }
                (Err(error), _) => self.unreadable(problem(file, at.line, &key, &error.to_string())),
            }
        }
    }

    fn read_list(
        &mut self,
        file: &Arc<str>,
        kind: Kind,
        list: Vec<Value>,
        lines: Lines,
        pieces: &mut Pieces,
    ) {
        for (index, (value, lines)) in list.into_iter().zip(lines.list).enumerate() {
            let key = format!("{kind}[{index}]");
            let origin = Origin { file: file.clone(), key, lines: Arc::new(lines) };
            let named = value.get("name").and_then(Value::as_str).and_then(|name| name.parse().ok());
            match document(kind, value.clone()) {
                Ok(content) => {
                    let written = pieces.remove(&(kind, index)).and_then(|piece| piece.of(&content));
                    self.read.documents.push(Document { content, written, origin });
                }
                Err(first) => {
                    match named {
                        Some(name) => drop(self.read.broken.insert(DocumentName { kind, name })),
                        None => self.read.unknown = true,
                    }
                    let problems = all_problems(kind, value, first);
                    self.read.problems.extend(problems.iter().map(|(key, text)| origin.problem(key, text)));
                }
            }
        }
    }
}

/// All problems of a document: each value with a problem is removed, and the rest is read again.
fn all_problems(kind: Kind, mut value: Value, first: (String, String)) -> Vec<(String, String)> {
    let mut problems = vec![first];
    while problems.len() < DOCUMENT_PROBLEMS_MAX {
        let key = &problems[problems.len() - 1].0;
        if key.is_empty() || !take_out(&mut value, key) {
            break;
        }
        match document(kind, value.clone()) {
            // A field may be missing because it was removed here.
            Err((key, text))
                if !text.starts_with("missing field") && !problems.iter().any(|(known, _)| *known == key) =>
            {
                problems.push((key, text));
            }
            _ => break,
        }
    }
    problems
}

/// Removes the value of a key such as `rule[0].when.size-min`. Returns whether it existed and no other value moved.
fn take_out(value: &mut Value, key: &str) -> bool {
    let pointer = key.replace(['.', '['], "/").replace(']', "");
    let (above, last) =
        pointer.rsplit_once('/').map_or(("", pointer.as_str()), |(above, last)| (above, last));
    let above = if above.is_empty() { String::new() } else { format!("/{above}") };
    match value.pointer_mut(&above) {
        Some(Value::Object(table)) => table.remove(last).is_some(),
        // Only the last value of a list: the others have to keep their indices, which problems refer to.
        Some(Value::Array(list)) if last.parse().is_ok_and(|index: usize| index + 1 == list.len()) => {
            list.pop().is_some()
        }
        _ => false,
    }
}

/// The document, or the key and the reason of its first problem.
fn document(kind: Kind, value: Value) -> Result<Content, (String, String)> {
    if depth_of(&value) > depth::DEPTH_MAX {
        return Err((String::new(), too_deep_text()));
    }
    match kind {
        Kind::Strategy => typed(value).map(Content::Strategy),
        Kind::Account => typed(value).map(Content::Account),
        Kind::Client => typed(value).map(Content::Client),
        Kind::Appliance => typed(value).map(Content::Appliance),
    }
}

/// Nesting depth of the value, itself included.
fn depth_of(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(depth_of).max().unwrap_or(0),
        Value::Object(table) => table.values().map(depth_of).max().unwrap_or(0),
        _ => 0,
    }
}

fn too_deep_text() -> String {
    format!("values lie more than {} deep in each other: no document needs that", depth::DEPTH_MAX)
}

fn count(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(count).sum::<usize>(),
        Value::Object(table) => 1 + table.values().map(count).sum::<usize>(),
        _ => 1,
    }
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, (String, String)> {
    if value.is_array() {
        // The deserializer would take a list as the values of all keys in order.
        return Err((String::new(), "a document is a table of keys, not a list".to_owned()));
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let key = error.path().to_string();
        let key = if key == "." { String::new() } else { key };
        (key, error.into_inner().to_string())
    })
}

fn listed(both: Vec<(Value, Lines)>, line: u64) -> (Value, Lines) {
    let (values, list): (Vec<Value>, Vec<Lines>) = both.into_iter().unzip();
    (Value::Array(values), Lines { list, ..Lines::at(line) })
}
