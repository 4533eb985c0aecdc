//! Files of documents, as values with the lines that they come from.
//!
//! TOML and JSON become the same tree of values, and a tree of lines beside it; what is found out
//! about a value later is told by its key, and the line is looked up then.

use std::collections::BTreeMap;
use std::sync::Arc;

use jsonc_parser::ast;
use jsonc_parser::common::Ranged as _;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};
use serde::de::DeserializeOwned;
use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use xpm_protocol::api::policy::{PolicyFile, PolicyFormat, Problem};
use xpm_protocol::policy::{Content, Kind};

/// Most files at once.
const FILES_MAX: usize = 64;
/// Most bytes of all files together.
const BYTES_MAX: usize = 1 << 20;
/// How deep values may lie in each other. Deeper than any document goes.
const DEPTH_MAX: usize = 48;
/// Most problems that are told at once.
pub(super) const PROBLEMS_MAX: usize = 100;

/// A document of a file.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) content: Content,
    origin: Origin,
}

/// Where a document comes from.
#[derive(Debug, Clone)]
struct Origin {
    file: Arc<File>,
    /// Its key in the file, such as `account[1]`.
    key: String,
    lines: Arc<Lines>,
}

#[derive(Debug)]
struct File {
    name: String,
}

/// The line of a value, and of the values in it.
#[derive(Debug, Default)]
struct Lines {
    line: u64,
    table: BTreeMap<String, Lines>,
    list: Vec<Lines>,
}

impl Document {
    /// A problem with a key of the document, such as `rule[0].when`.
    pub(super) fn problem(&self, key: &str, text: String) -> Problem {
        let Origin { file, key: base, lines } = &self.origin;
        let whole = if key.is_empty() { base.clone() } else { format!("{base}.{key}") };
        Problem { file: file.name.clone(), line: lines.of(key), key: whole, text }
    }
}

impl Lines {
    /// The line of a key below this value; of the innermost part that is there.
    fn of(&self, key: &str) -> u64 {
        let mut here = self;
        for part in
            key.split(['.', '[']).map(|part| part.trim_end_matches(']')).filter(|part| !part.is_empty())
        {
            let next = match part.parse::<usize>() {
                Ok(index) if !here.list.is_empty() => here.list.get(index),
                _ => here.table.get(part),
            };
            match next {
                Some(next) => here = next,
                None => break,
            }
        }
        here.line
    }
}

/// Reads all files. Where there are problems, the documents are not all.
pub(super) fn read(files: &[PolicyFile]) -> (Vec<Document>, Vec<Problem>) {
    let (mut documents, mut problems) = (Vec::new(), Vec::new());
    let bytes: usize = files.iter().map(|file| file.text.len()).sum();
    if files.len() > FILES_MAX || bytes > BYTES_MAX {
        let name = files.first().map(|file| file.name.clone()).unwrap_or_default();
        let text = format!(
            "at most {FILES_MAX} files and {BYTES_MAX} bytes can be applied at once: apply them in parts"
        );
        return (documents, vec![problem(&name, 0, "", text)]);
    }
    for file in files {
        read_file(file, &mut documents, &mut problems);
    }
    problems.truncate(PROBLEMS_MAX);
    (documents, problems)
}

fn problem(file: &str, line: u64, key: &str, text: impl AsRef<str>) -> Problem {
    Problem { file: file.to_owned(), line, key: key.to_owned(), text: one_line(text.as_ref()) }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn read_file(file: &PolicyFile, documents: &mut Vec<Document>, problems: &mut Vec<Problem>) {
    let parsed = match file.format {
        PolicyFormat::Toml => parse_toml(&file.text),
        PolicyFormat::Json => parse_json(&file.text),
    };
    let (value, mut lines) = match parsed {
        Ok(parsed) => parsed,
        Err((line, text)) => return problems.push(problem(&file.name, line, "", text)),
    };
    let Value::Object(kinds) = value else {
        let text =
            "a file of documents is a table with the keys strategy, account, client and appliance".to_owned();
        return problems.push(problem(&file.name, lines.line, "", text));
    };
    let shared = Arc::new(File { name: file.name.clone() });
    for (key, list) in kinds {
        let at = lines.table.remove(&key).unwrap_or_default();
        let kind = match key.parse::<Kind>() {
            Ok(kind) => kind,
            Err(error) => {
                problems.push(problem(&file.name, at.line, &key, error.to_string()));
                continue;
            }
        };
        let Value::Array(list) = list else {
            let text = format!(
                "{kind} is a list of documents: write [[{kind}]] in TOML, or \"{kind}\": [...] in JSON"
            );
            problems.push(problem(&file.name, at.line, &key, text));
            continue;
        };
        for (index, (value, lines)) in list.into_iter().zip(at.list).enumerate() {
            let origin =
                Origin { file: shared.clone(), key: format!("{kind}[{index}]"), lines: Arc::new(lines) };
            read_document(kind, value, origin, documents, problems);
        }
    }
}

fn read_document(
    kind: Kind,
    value: Value,
    origin: Origin,
    documents: &mut Vec<Document>,
    problems: &mut Vec<Problem>,
) {
    let content = match kind {
        Kind::Strategy => typed(value).map(Content::Strategy),
        Kind::Account => typed(value).map(Content::Account),
        Kind::Client => typed(value).map(Content::Client),
        Kind::Appliance => typed(value).map(Content::Appliance),
    };
    match content {
        Ok(content) => documents.push(Document { content, origin }),
        Err((key, text)) => {
            let line = origin.lines.of(&key);
            let key = if key.is_empty() { origin.key.clone() } else { format!("{}.{key}", origin.key) };
            problems.push(problem(&origin.file.name, line, &key, text));
        }
    }
}

/// The document, or the key of what is wrong with it.
fn typed<T: DeserializeOwned>(value: Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let key = error.path().to_string();
        let key = if key == "." { String::new() } else { key };
        (key, error.into_inner().to_string())
    })
}

type Parsed = Result<(Value, Lines), (u64, String)>;

/// The lines of a text by position.
struct Index(Vec<usize>);

impl Index {
    fn new(text: &str) -> Index {
        Index(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    fn line(&self, at: usize) -> u64 {
        self.0.partition_point(|&end| end < at) as u64 + 1
    }
}

/// Refuses what is nested deeper than any document, before a parser walks into it. Brackets in
/// texts and comments count as well; nobody needs so many of them there.
fn check_depth(text: &str, index: &Index) -> Result<(), (u64, String)> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH_MAX {
            return Err((index.line(at), format!("values lie more than {DEPTH_MAX} deep in each other")));
        }
    }
    Ok(())
}

fn parse_toml(text: &str) -> Parsed {
    let index = Index::new(text);
    check_depth(text, &index)?;
    // A key with many dots is a value deep in others, too.
    if let Some((number, _)) = text.lines().enumerate().find(|(_, line)| dots_before_value(line) > DEPTH_MAX)
    {
        return Err((number as u64 + 1, format!("values lie more than {DEPTH_MAX} deep in each other")));
    }
    let table = DeTable::parse(text).map_err(|error| {
        (
            error.span().map_or(0, |span| index.line(span.start)),
            format!("this is not TOML: {}", error.message()),
        )
    })?;
    let line = index.line(table.span().start);
    from_toml_table(table.get_ref(), line, &index)
}

fn dots_before_value(line: &str) -> usize {
    line.split('=').next().unwrap_or_default().matches('.').count()
}

fn from_toml_table(table: &DeTable<'_>, line: u64, index: &Index) -> Parsed {
    let mut values = serde_json::Map::new();
    let mut lines = Lines { line, ..Lines::default() };
    for (key, value) in table {
        let (value, mut below) = from_toml(value, index)?;
        // The line of a value is the one of its key, which may stand before it.
        below.line = index.line(key.span().start).min(below.line.max(1));
        let name = key.get_ref().to_string();
        lines.table.insert(name.clone(), below);
        values.insert(name, value);
    }
    Ok((Value::Object(values), lines))
}

fn from_toml(value: &Spanned<DeValue<'_>>, index: &Index) -> Parsed {
    let line = index.line(value.span().start);
    let leaf = |value: Value| Ok((value, Lines { line, ..Lines::default() }));
    match value.get_ref() {
        DeValue::String(text) => leaf(Value::from(text.as_ref())),
        DeValue::Boolean(value) => leaf(Value::from(*value)),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => leaf(Value::from(number)),
            Err(_) => Err((line, format!("`{}` is too large a number", number.as_str()))),
        },
        DeValue::Float(number) => match number.as_str().parse::<f64>() {
            Ok(number) => leaf(Value::from(number)),
            Err(_) => Err((line, format!("`{}` is no number", number.as_str()))),
        },
        DeValue::Datetime(moment) => leaf(Value::from(moment.to_string())),
        DeValue::Table(table) => from_toml_table(table, line, index),
        DeValue::Array(list) => {
            let both = list.iter().map(|value| from_toml(value, index)).collect::<Result<Vec<_>, _>>()?;
            Ok(listed(both, line))
        }
    }
}

fn listed(both: Vec<(Value, Lines)>, line: u64) -> (Value, Lines) {
    let (values, list): (Vec<Value>, Vec<Lines>) = both.into_iter().unzip();
    (Value::Array(values), Lines { line, list, ..Lines::default() })
}

fn parse_json(text: &str) -> Parsed {
    let index = Index::new(text);
    check_depth(text, &index)?;
    // The one parser says what JSON is, the other one where things are.
    serde_json::from_str::<Value>(text)
        .map_err(|error| (error.line() as u64, format!("this is not JSON: {error}")))?;
    let parsed = parse_to_ast(text, &CollectOptions::default(), &ParseOptions::default());
    let tree =
        parsed.map_err(|error| (index.line(error.range().start), format!("this is not JSON: {error}")))?;
    let tree = tree.value.ok_or_else(|| (0, "the file is empty".to_owned()))?;
    from_json(&tree, &index)
}

fn from_json(value: &ast::Value<'_>, index: &Index) -> Parsed {
    let line = index.line(value.start());
    let leaf = |value: Value| Ok((value, Lines { line, ..Lines::default() }));
    match value {
        ast::Value::StringLit(text) => leaf(Value::from(text.value.as_ref())),
        ast::Value::BooleanLit(value) => leaf(Value::from(value.value)),
        ast::Value::NullKeyword(_) => leaf(Value::Null),
        ast::Value::NumberLit(number) => match serde_json::from_str(number.value) {
            Ok(number) => leaf(number),
            Err(_) => Err((line, format!("`{}` is no number", number.value))),
        },
        ast::Value::Array(list) => {
            let both =
                list.elements.iter().map(|value| from_json(value, index)).collect::<Result<Vec<_>, _>>()?;
            Ok(listed(both, line))
        }
        ast::Value::Object(object) => from_json_object(object, line, index),
    }
}

fn from_json_object(object: &ast::Object<'_>, line: u64, index: &Index) -> Parsed {
    let mut values = serde_json::Map::new();
    let mut lines = Lines { line, ..Lines::default() };
    for property in &object.properties {
        let at = index.line(property.start());
        let (value, mut below) = from_json(&property.value, index)?;
        below.line = at;
        let name = property.name.as_str().to_owned();
        if values.contains_key(&name) {
            return Err((at, format!("the key `{name}` is there twice")));
        }
        lines.table.insert(name.clone(), below);
        values.insert(name, value);
    }
    Ok((Value::Object(values), lines))
}
