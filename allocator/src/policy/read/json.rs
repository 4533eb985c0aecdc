//! Reads JSON as a tree of values with their lines.

use jsonc_parser::ast;
use jsonc_parser::common::Ranged as _;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};
use serde_json::Value;
use xpm_protocol::policy::Kind;

use super::lines::{Index, Lines};
use super::{Parsed, listed};

pub(super) fn parse(text: &str) -> Parsed {
    // `serde_json` decides what JSON is, and limits the depth; the second parser tells positions.
    serde_json::from_str::<Value>(text)
        .map_err(|error| (error.line() as u64, format!("this is not JSON: {error}")))?;
    let index = Index::new(text);
    let parsed = parse_to_ast(text, &CollectOptions::default(), &ParseOptions::default());
    let tree =
        parsed.map_err(|error| (index.line(error.range().start), format!("this is not JSON: {error}")))?;
    let tree = tree.value.ok_or_else(|| (0, "the file is empty".to_owned()))?;
    from_value(&tree, &index)
}

/// Positions of the documents in a text: kind, first byte and end, in the order of the text.
pub(super) fn spans(text: &str) -> Vec<(Kind, usize, usize)> {
    let parsed = parse_to_ast(text, &CollectOptions::default(), &ParseOptions::default());
    let Some(ast::Value::Object(kinds)) = parsed.ok().and_then(|tree| tree.value) else { return Vec::new() };
    let mut found = Vec::new();
    for property in &kinds.properties {
        if let (Ok(kind), ast::Value::Array(list)) = (property.name.as_str().parse(), &property.value) {
            found.extend(list.elements.iter().map(|one| (kind, one.start(), one.end())));
        }
    }
    found
}

fn from_value(value: &ast::Value<'_>, index: &Index) -> Parsed {
    let line = index.line(value.start());
    let leaf = |value: Value| Ok((value, Lines::at(line)));
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
                list.elements.iter().map(|value| from_value(value, index)).collect::<Result<Vec<_>, _>>()?;
            Ok(listed(both, line))
        }
        ast::Value::Object(object) => from_object(object, line, index),
    }
}

fn from_object(object: &ast::Object<'_>, line: u64, index: &Index) -> Parsed {
    let mut values = serde_json::Map::new();
    let mut lines = Lines::at(line);
    for property in &object.properties {
        let at = index.line(property.start());
        let (value, mut below) = from_value(&property.value, index)?;
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
