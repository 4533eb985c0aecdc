//! URLs of the allocators, as an operator writes them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::client::{BaseUrlError, Client};

/// URLs of daemons of which one leads; at least one URL. Written with commas in between, in a configuration file also
/// as a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urls(Vec<String>);

/// The text is no list of URLs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseUrlsError {
    /// Some URL is no URL of a control interface.
    #[error(transparent)]
    Bad(#[from] BaseUrlError),
    /// The list is empty.
    #[error("no URL is given: write http://HOST:PORT, and several with commas in between")]
    Empty,
    /// A URL occurs twice.
    #[error("`{0}` is given twice: give the URL of each allocator once")]
    Twice(String),
}

impl Urls {
    /// The URLs in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    fn checked(urls: impl IntoIterator<Item = String>) -> Result<Urls, ParseUrlsError> {
        let mut known: Vec<String> = Vec::new();
        for url in urls {
            let url = Client::new(&url, None)?.base().to_owned();
            if known.contains(&url) {
                return Err(ParseUrlsError::Twice(url));
            }
            known.push(url);
        }
        if known.is_empty() {
            return Err(ParseUrlsError::Empty);
        }
        Ok(Urls(known))
    }
}

impl FromStr for Urls {
    type Err = ParseUrlsError;

    fn from_str(text: &str) -> Result<Urls, ParseUrlsError> {
        Urls::checked(text.split(',').map(|url| url.trim().to_owned()))
    }
}

impl fmt::Display for Urls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl Serialize for Urls {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The two forms in a file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a URL, or a list of URLs")]
enum Written {
    Text(String),
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for Urls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Urls, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Text(text) => text.parse(),
            Written::List(urls) => Urls::checked(urls),
        }
        .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        allocator: Urls,
    }

    #[test]
    fn one_or_several_urls_are_parsed() {
        for (text, urls) in [
            ("allocator = 'http://a:1'", "http://a:1"),
            ("allocator = 'http://a:1, http://b:1/'", "http://a:1,http://b:1"),
            ("allocator = ['http://a:1', 'unix:/run/b']", "http://a:1,unix:/run/b"),
        ] {
            let file: File = crate::config::parse(Path::new("x"), text).unwrap();
            assert_eq!(file.allocator.to_string(), urls, "{text}");
        }
    }

    #[test]
    fn mistakes_are_reported() {
        for (text, part) in [
            ("allocator = []", "no URL"),
            ("allocator = ['http://a:1', 'http://a:1/']", "twice"),
            ("allocator = 'http://a:1,'", "http://HOST:PORT"),
            ("allocator = 7", "list of URLs"),
        ] {
            let line = crate::config::parse::<File>(Path::new("x"), text).unwrap_err().to_string();
            assert!(line.starts_with("x:1:") && line.contains(part), "{line}");
        }
    }
}
