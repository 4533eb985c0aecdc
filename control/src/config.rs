//! Configuration files: TOML, read into a struct that the daemon defines.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is malformed or has unknown keys.
    #[error("{path}:{line}:{column}: {reason}{at}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The fault, in one line.
        reason: String,
        /// The text of the line, as ` (in `...`)`; empty if the line is.
        at: String,
    },
}

/// Reads the file into `T`, which should `deny_unknown_fields` so that a misspelt key is an error.
/// Blocks.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Like [`load`], for a file that was read already.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| malformed(path, text, &error))
}

fn malformed(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..offset).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let content = text[start..].lines().next().unwrap_or_default().trim();
    let shown: String = content.chars().take(80).collect();
    ConfigError::Malformed {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[start..].chars().count() + 1,
        reason: error.message().replace('\n', "; "),
        at: if shown.is_empty() { String::new() } else { format!(" (in `{shown}`)") },
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        listen: String,
        #[serde(default)]
        queues: u16,
    }

    fn complaint(text: &str) -> String {
        parse::<Sample>(Path::new("/etc/x.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_valid_file_is_read() {
        let sample: Sample = parse(Path::new("x"), "listen = 'a'\nqueues = 3\n").unwrap();
        assert_eq!(sample, Sample { listen: "a".into(), queues: 3 });
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let unknown = complaint("listen = 'a'\nqueue = 3\n");
        assert!(unknown.starts_with("/etc/x.toml:2:1: ") && unknown.contains("`queue`"), "{unknown}");
        let wrong_type = complaint("listen = 'a'\nqueues = 'many'\n");
        assert!(
            wrong_type.starts_with("/etc/x.toml:2:10: ") && wrong_type.contains("queues"),
            "{wrong_type}"
        );
        let range = complaint("queues = 70000\nlisten = 'a'\n");
        assert!(range.starts_with("/etc/x.toml:1:"), "{range}");
        assert!(complaint("queues = 1\n").contains("listen"));
        assert!(complaint("listen = \n").starts_with("/etc/x.toml:1:"));
        assert!(!complaint("[[[").contains('\n'));
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let error = load::<Sample>(Path::new("/nonexistent.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent.toml"));
    }
}
