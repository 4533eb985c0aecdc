//! Texts: values that JSON and TOML represent as text, and texts of other parties that are shown, logged or kept.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};

/// `text` as one printable line: any white space becomes one space, and unprintable characters (control characters,
/// marks that change the direction of text, invisible characters) become `?`. So a text of another party cannot steer
/// a terminal or forge a line of a log, and looks like what it is.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for word in text.split(|c: char| c.is_whitespace()).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word.chars().map(|c| if is_printed(c) { c } else { '?' }));
    }
    line
}

/// The same for a text that usually is one printable line already.
pub fn into_line(text: String) -> String {
    let is_line = text.chars().all(|c| is_printed(c) && (c == ' ' || !c.is_whitespace()));
    if is_line { text } else { one_line(&text) }
}

/// The same, cut after `most` characters.
pub fn short_line(text: &str, most: usize) -> String {
    let line = one_line(text);
    match line.char_indices().nth(most) {
        Some((end, _)) => line[..end].to_owned(),
        None => line,
    }
}

/// Whether a character is visible and has no effect on the text around it.
fn is_printed(c: char) -> bool {
    let invisible = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}');
    !c.is_control() && !invisible
}

/// Reads a text for people as one printable line; for `#[serde(deserialize_with)]`.
pub fn line<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| one_line(&text))
}

/// The same for an optional text.
pub fn maybe_line<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(|text| one_line(&text)))
}

/// Reads an optional path. A path with unprintable characters is refused, because it would be shown as a different
/// path.
pub fn maybe_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = Option::<PathBuf>::deserialize(deserializer)?;
    match &path {
        Some(path) if !path.to_string_lossy().chars().all(is_printed) => Err(de::Error::custom(format!(
            "the path `{}` has characters that are not printed",
            one_line(&path.to_string_lossy())
        ))),
        _ => Ok(path),
    }
}

/// Serde for types by their `Display` and `FromStr`.
macro_rules! serde_as_text {
    ($($name:ident),+) => {$(
        impl ::serde::Serialize for $name {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $name {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                let text = <String as ::serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(::serde::de::Error::custom)
            }
        }
    )+};
}

pub(crate) use serde_as_text;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_other_parties_becomes_one_printable_line() {
        assert_eq!(one_line("a\nb\t c\x1b[31m\r\n"), "a b c?[31m");
        assert_eq!(one_line("web\u{2028} INFO forged\u{202e}"), "web INFO forged?");
        assert_eq!(one_line("Zürich 東京 🙂"), "Zürich 東京 🙂");
        assert_eq!(one_line(""), "");
        assert_eq!(short_line("a  böse", 3), "a b");
        assert_eq!(short_line("short", 500), "short");
    }

    #[derive(Debug, Deserialize)]
    struct Told {
        #[serde(deserialize_with = "line")]
        text: String,
        #[serde(default, deserialize_with = "maybe_path")]
        path: Option<PathBuf>,
    }

    #[test]
    fn deserialized_text_is_printable() {
        let told: Told = serde_json::from_str(r#"{"text":"a\n INFO b","path":"/run/x"}"#).unwrap();
        assert_eq!((told.text.as_str(), told.path), ("a INFO b", Some("/run/x".into())));
        assert!(serde_json::from_str::<Told>(r#"{"text":"","path":"/run/\u001b[2J"}"#).is_err());
        assert!(serde_json::from_str::<Told>(r#"{"text":""}"#).unwrap().path.is_none());
    }
}
