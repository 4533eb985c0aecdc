//! Settings of the command and the libraries that are set once for a machine or a user: the URLs of the allocators,
//! and the token file.
//!
//! The first source that has a setting wins, in this order: an option of the call, the environment
//! ([`ALLOCATOR_VARIABLE`], [`TOKEN_VARIABLE`]), the user's file, the machine's file. [`FILE_VARIABLE`] names one
//! file in place of both files.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{self, ConfigError};
use crate::token::{Token, TokenError};
use crate::urls::{ParseUrlsError, Urls};

/// The machine's file.
pub const MACHINE_FILE: &str = "/etc/xpm/xpm.toml";
/// Environment variable with a file that replaces the machine's and the user's file; empty: no file is read.
pub const FILE_VARIABLE: &str = "XPM_CONFIG";
/// Environment variable with the URLs of the allocators, separated by commas.
pub const ALLOCATOR_VARIABLE: &str = "XPM_ALLOCATOR";
/// Environment variable with the path of the token file.
pub const TOKEN_VARIABLE: &str = "XPM_TOKEN_FILE";

/// The keys of the files. All are optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// The allocators, one of which leads.
    pub allocator: Option<Urls>,
    /// File of mode 0600 with the token. A relative path starts at the directory of the settings file.
    pub token_file: Option<PathBuf>,
    /// Form in which the command prints its answers.
    pub output: Option<OutputForm>,
}

/// Form in which the command prints an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OutputForm {
    /// Text for people, tables of at most 80 columns.
    #[default]
    Text,
    /// The same with all columns, however long the lines become.
    Wide,
    /// A JSON value for programs.
    Json,
    /// The same value as YAML.
    Yaml,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A settings file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// [`ALLOCATOR_VARIABLE`] contains no valid URLs.
    #[error("{ALLOCATOR_VARIABLE}: {0}")]
    Allocator(ParseUrlsError),
    /// The token file cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No source names an allocator.
    #[error(
        "no allocator is named: set {ALLOCATOR_VARIABLE} in the environment, or `allocator` in ~/.config/xpm/xpm.toml or \
         {MACHINE_FILE}"
    )]
    NoAllocator,
}

impl Settings {
    /// The settings of the files and of the environment. Blocks.
    ///
    /// # Errors
    /// When an existing file is unreadable or malformed, or the environment names no valid URLs.
    pub fn load() -> Result<Settings, SettingsError> {
        let files = Settings::of_files()?;
        let text = |name: &str| env::var(name).ok().filter(|text| !text.is_empty());
        let allocator = text(ALLOCATOR_VARIABLE).map(|urls| urls.parse()).transpose();
        let environment = Settings {
            allocator: allocator.map_err(SettingsError::Allocator)?,
            token_file: text(TOKEN_VARIABLE).map(PathBuf::from),
            output: None,
        };
        Ok(environment.over(files))
    }

    /// The settings of the files alone. Blocks.
    ///
    /// # Errors
    /// When an existing file is unreadable or malformed, or [`FILE_VARIABLE`] names a missing file.
    pub fn of_files() -> Result<Settings, ConfigError> {
        if let Some(path) = env::var_os(FILE_VARIABLE) {
            return if path.is_empty() { Ok(Settings::default()) } else { Settings::read(Path::new(&path)) };
        }
        let mut settings = Settings::default();
        for path in [Some(PathBuf::from(MACHINE_FILE)), user_file()].into_iter().flatten() {
            match Settings::read(&path) {
                Ok(found) => settings = found.over(settings),
                Err(ConfigError::Unreadable { source, .. }) if is_missing(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(settings)
    }

    fn read(path: &Path) -> Result<Settings, ConfigError> {
        let mut settings: Settings = config::load(path)?;
        if let (Some(file), Some(directory)) = (&settings.token_file, path.parent()) {
            settings.token_file = Some(directory.join(file));
        }
        Ok(settings)
    }

    /// These settings; keys without a value are taken from `below`.
    #[must_use]
    pub fn over(self, below: Settings) -> Settings {
        Settings {
            allocator: self.allocator.or(below.allocator),
            token_file: self.token_file.or(below.token_file),
            output: self.output.or(below.output),
        }
    }

    /// Whether both the allocators and the token file are set.
    pub fn is_whole(&self) -> bool {
        self.allocator.is_some() && self.token_file.is_some()
    }

    /// The token, if a token file is set. Blocks.
    ///
    /// # Errors
    /// When the file cannot be used.
    pub fn token(&self) -> Result<Option<Token>, TokenError> {
        self.token_file.as_deref().map(Token::load).transpose()
    }
}

/// `xpm/xpm.toml` in the user's configuration directory (XDG Base Directory Specification).
fn user_file() -> Option<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let directory = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(directory.join("xpm/xpm.toml"))
}

/// Whether the file is missing, as opposed to unreadable.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn settings(text: &str) -> Result<Settings, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("xpm.toml");
        fs::write(&path, text).unwrap();
        Settings::read(&path)
    }

    #[test]
    fn the_user_file_wins_key_by_key() {
        let machine =
            settings("allocator = 'http://a:1'\ntoken-file = '/etc/xpm/token'\noutput = 'json'").unwrap();
        let user = settings("allocator = ['http://b:1', 'http://c:1']").unwrap();
        let both = user.over(machine);
        assert_eq!(both.allocator.unwrap().to_string(), "http://b:1,http://c:1");
        assert_eq!(both.token_file, Some("/etc/xpm/token".into()));
        assert_eq!(both.output, Some(OutputForm::Json));
    }

    #[test]
    fn a_relative_token_file_is_beside_the_file_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("xpm.toml");
        fs::write(&path, "token-file = 'token'").unwrap();
        assert_eq!(Settings::read(&path).unwrap().token_file, Some(directory.path().join("token")));
    }

    #[test]
    fn mistakes_are_reported_with_file_and_line() {
        for (text, part) in [
            ("allocator = 'http://a:1'\ntoken = 'x'\n", "xpm.toml:2:1: "),
            ("\n\noutput = 'xml'\n", "xpm.toml:3:10: "),
            ("allocator = 'a'\n", "xpm.toml:1:13: "),
        ] {
            let line = settings(text).unwrap_err().to_string();
            assert!(line.contains(part), "{line}");
        }
    }
}
