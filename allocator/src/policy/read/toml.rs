//! Reads TOML as a tree of values with their lines.

use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::depth;
use super::lines::{Index, Lines};
use super::{Parsed, listed};

pub(super) fn parse(text: &str) -> Parsed {
    let index = Index::new(text);
    if let Some(at) = depth::too_deep(text) {
        return Err((index.line(at), super::too_deep_text()));
    }
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(0, |span| index.line(span.start));
        (line, format!("this is not TOML: {}", error.message()))
    })?;
    let line = index.line(table.span().start);
    from_table(table.get_ref(), line, &index)
}

fn from_table(table: &DeTable<'_>, line: u64, index: &Index) -> Parsed {
    let mut values = serde_json::Map::new();
    let mut lines = Lines::at(line);
    for (key, value) in table {
        let (value, mut below) = from_value(value, index)?;
        // The line of a value is that of its key, which may stand before the value.
        below.line = index.line(key.span().start).min(below.line.max(1));
        let name = key.get_ref().to_string();
        lines.table.insert(name.clone(), below);
        values.insert(name, value);
    }
    Ok((Value::Object(values), lines))
}

fn from_value(value: &Spanned<DeValue<'_>>, index: &Index) -> Parsed {
    let line = index.line(value.span().start);
    let leaf = |value: Value| Ok((value, Lines::at(line)));
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
        DeValue::Datetime(moment) => Err((line, format!("no key is a date or a time: write \"{moment}\""))),
        DeValue::Table(table) => from_table(table, line, index),
        DeValue::Array(list) => {
            let both = list.iter().map(|value| from_value(value, index)).collect::<Result<Vec<_>, _>>()?;
            Ok(listed(both, line))
        }
    }
}
