//! Addresses at which a control interface listens, and the check that an address which other machines can reach has a
//! token.

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::net::{TcpListener, UnixListener};

use crate::handed;

/// Most connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// An address to listen at. Written `ADDRESS:PORT`, `unix:/a/path` or `/a/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A TCP address; port 0 takes any free one.
    Tcp(SocketAddr),
    /// A unix socket, made with mode 0600.
    Unix(PathBuf),
}

/// The text is no address to listen at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no place to listen at: write ADDRESS:PORT (127.0.0.1:7700, [::]:7700) or unix:/ABSOLUTE/PATH"
)]
pub struct ParsePlaceError(String);

/// Why a daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("cannot listen at {0}: it is in use by another process; stop that one, or choose another place")]
    InUse(Place),
    /// The kernel refused it.
    #[error("cannot listen at {place}")]
    Refused {
        /// The address.
        place: Place,
        /// Why.
        source: io::Error,
    },
    /// Every process that can reach the address could give orders.
    #[error(
        "{0} can be reached from other machines, and no token is set, so anybody could give orders: give --token-file \
         FILE, or listen at 127.0.0.1, or accept it with --insecure"
    )]
    Exposed(Place),
}

impl Place {
    /// Refuses an address that other machines can reach if there is no token, unless `insecure`.
    pub fn check_exposure(&self, has_token: bool, insecure: bool) -> Result<(), ListenError> {
        match self {
            Place::Tcp(address) if !address.ip().to_canonical().is_loopback() && !has_token && !insecure => {
                Err(ListenError::Exposed(self.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Starts to listen. If the service manager listens at the address for this process, takes its socket. A stale
    /// unix socket is replaced. Must be called within a tokio runtime.
    pub fn bind(&self) -> Result<Listener, ListenError> {
        match self {
            Place::Tcp(address) => bind_tcp(*address).map(Listener::Tcp),
            Place::Unix(path) => bind_unix(path).map(Listener::Unix),
        }
        .map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse(self.clone()),
            _ => ListenError::Refused { place: self.clone(), source: error },
        })
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    if let Some(listener) = handed::tcp(address) {
        return TcpListener::from_std(listener?);
    }
    // The standard library sets SO_REUSEADDR, so a restart need not wait for old connections.
    let listener = std::net::TcpListener::bind(address)?;
    // The standard library's backlog is 128, which a burst of clients fills; the kernel applies its own limit.
    rustix::net::listen(&listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(listener) = handed::unix(path) {
        return UnixListener::from_std(listener?);
    }
    remove_stale(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Removes the socket of a dead process; anything else is left and reported.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is no socket is there; remove it or choose another path",
        )),
        Ok(_) => match StdUnixStream::connect(path) {
            Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
            Err(error) => Err(error),
        },
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A TCP socket.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// The TCP address, with the actual port if port 0 was requested; none for a unix socket.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(_) => None,
        }
    }
}

impl FromStr for Place {
    type Err = ParsePlaceError;

    fn from_str(text: &str) -> Result<Place, ParsePlaceError> {
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.starts_with('/') {
            return Ok(Place::Unix(path.into()));
        }
        text.parse().map(Place::Tcp).map_err(|_| ParsePlaceError(text.chars().take(120).collect()))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Place, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_parsed_and_printed() {
        for text in ["127.0.0.1:7700", "[::1]:1", "unix:/run/a.sock"] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        }
        assert_eq!("/run/a".parse::<Place>().unwrap(), Place::Unix("/run/a".into()));
        for text in ["", "7700", "localhost:7700", "unix:", "unix:a", "127.0.0.1:70000"] {
            assert!(text.parse::<Place>().unwrap_err().to_string().contains("ADDRESS:PORT"), "{text}");
        }
    }

    #[test]
    fn a_place_for_the_network_requires_a_token() {
        let everywhere: Place = "0.0.0.0:1".parse().unwrap();
        assert!(everywhere.check_exposure(false, false).unwrap_err().to_string().contains("--token-file"));
        assert!(everywhere.check_exposure(true, false).is_ok());
        assert!(everywhere.check_exposure(false, true).is_ok());
        for own in ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "/run/a"] {
            assert!(own.parse::<Place>().unwrap().check_exposure(false, false).is_ok(), "{own}");
        }
    }

    #[tokio::test]
    async fn a_place_in_use_is_named() {
        let any: Place = "127.0.0.1:0".parse().unwrap();
        let listener = any.bind().unwrap();
        let taken = Place::Tcp(listener.address().unwrap());
        let line = taken.bind().unwrap_err().to_string();
        assert!(line.contains(&taken.to_string()) && line.contains("in use"), "{line}");
    }

    #[tokio::test]
    async fn only_a_dead_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let place = Place::Unix(path.clone());
        let listener = place.bind().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(place.bind(), Err(ListenError::InUse(_))));
        drop(listener);
        place.bind().unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(place.bind(), Err(ListenError::Refused { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
