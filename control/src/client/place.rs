//! Addresses of daemons: one, or several of which one leads.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::Uri;

/// The text is no base URL of a control interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{base}` is no address of a control interface ({reason}): write http://HOST:PORT or unix:/ABSOLUTE/PATH"
)]
pub struct BaseUrlError {
    base: String,
    reason: &'static str,
}

/// Address of one daemon.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) base: String,
    pub(super) way: Way,
}

#[derive(Debug)]
pub(super) enum Way {
    Tcp { host: String, port: u16, authority: String },
    Unix(PathBuf),
}

impl Place {
    pub(super) fn parse(base: &str) -> Result<Place, BaseUrlError> {
        let way = parse_base(base)
            .map_err(|reason| BaseUrlError { base: base.chars().take(200).collect(), reason })?;
        Ok(Place { base: base.trim_end_matches('/').to_owned(), way })
    }

    /// Value of the header `Host`.
    pub(super) fn host(&self) -> &str {
        match &self.way {
            Way::Tcp { authority, .. } => authority,
            Way::Unix(_) => "localhost",
        }
    }

    /// Whether a URL points to this daemon.
    fn leads_to(&self, url: &str) -> bool {
        url.strip_prefix(&self.base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// The known daemons, one or several, and which of them is asked first. Never empty.
#[derive(Debug)]
pub(super) struct Places {
    all: Vec<Place>,
    preferred: AtomicUsize,
}

impl Places {
    /// None if `all` is empty.
    pub(super) fn new(all: Vec<Place>) -> Option<Places> {
        (!all.is_empty()).then_some(Places { all, preferred: AtomicUsize::new(0) })
    }

    pub(super) fn all(&self) -> &[Place] {
        &self.all
    }

    /// Index of the daemon that is asked first.
    pub(super) fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed) % self.all.len()
    }

    pub(super) fn prefer(&self, place: usize) {
        self.preferred.store(place, Ordering::Relaxed);
    }

    /// Indices of the daemons in the order in which they are asked.
    pub(super) fn in_order(&self) -> Vec<usize> {
        let first = self.preferred();
        (0..self.all.len()).map(|place| (first + place) % self.all.len()).collect()
    }

    /// Index of the daemon that a URL points to, if it is one of these.
    pub(super) fn find(&self, url: &str) -> Option<usize> {
        self.all.iter().position(|place| place.leads_to(url))
    }
}

fn parse_base(base: &str) -> Result<Way, &'static str> {
    if let Some(path) = base.strip_prefix("unix:") {
        return if path.starts_with('/') {
            Ok(Way::Unix(path.into()))
        } else {
            Err("the path is not absolute")
        };
    }
    let uri: Uri = base.parse().map_err(|_| "it is no URL")?;
    if uri.scheme_str() != Some("http") {
        return Err("it does not start with http:// or unix:");
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err("a path follows the port");
    }
    let authority = uri
        .authority()
        .filter(|authority| !authority.as_str().contains('@') && !authority.host().is_empty())
        .ok_or("it has no plain host")?;
    let port = authority.port_u16().ok_or("it has no port")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Way::Tcp { host, port, authority: authority.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_are_parsed() {
        for good in ["http://127.0.0.1:7700", "http://[::1]:7700/", "http://host.example:80", "unix:/run/x"] {
            assert!(Place::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:7700",
            "https://a:1",
            "http://a",
            "http://a:1/v1",
            "http://u@a:1",
            "unix:x",
            "http://:1",
        ] {
            let line = Place::parse(bad).unwrap_err().to_string();
            assert!(line.contains("http://HOST:PORT"), "{line}");
        }
    }

    #[test]
    fn a_redirect_leads_only_to_a_known_place() {
        let places = ["http://a:1", "http://b:1"].map(|base| Place::parse(base).unwrap());
        let places = Places::new(places.into()).unwrap();
        assert_eq!(places.find("http://b:1/v1/status"), Some(1));
        for foreign in ["http://b:12/v1/status", "http://b", "http://c:1/", "https://b:1/", "http://b:1@c/"] {
            assert_eq!(places.find(foreign), None, "{foreign}");
        }
        places.prefer(1);
        assert_eq!(places.in_order(), [1, 0]);
    }
}
