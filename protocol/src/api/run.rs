//! What `xpm run` and the library in its program say to each other.
//!
//! `xpm run` listens at an abstract unix socket. A process that wants external memory connects, and sends one line: the
//! secret, a space, and what it asks for ([`MEMORY`], or [`FELL`] with an address). `xpm run` answers [`MEMORY`] by one byte,
//! [`YES`] or [`NO`]. With [`YES`] come two descriptors: a file with a [`Run`] as JSON, and where messages for people go.
//! The process has the memory until it closes the connection, which the kernel does when the process ends or calls
//! execve(2). Until then it sends an [`Account`] as one line of JSON whenever something has changed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::allocator::Map;
use super::blk::TransportKind;
use crate::policy::Amount;
use crate::{ByteSize, ClientId};

/// Environment variable with a [`Place`].
pub const VARIABLE: &str = "XPM_RUN";
/// Asks for the memory.
pub const MEMORY: &str = "memory";
/// A child of fork(2) touched memory of its parent, at an address that follows in hexadecimal digits.
pub const FELL: &str = "fell";
/// The memory is for the one who asked.
pub const YES: u8 = b'Y';
/// Another process has the memory, or nobody can have it just now.
pub const NO: u8 = b'N';

/// Where to ask, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the abstract socket, without the leading zero byte.
    pub socket: String,
    /// What shows that the one who asks was started by this `xpm run`.
    pub secret: String,
    /// Bytes; what is shorter stays local, and is no reason to ask.
    pub threshold: u64,
}

impl Place {
    /// As the value of the environment variable.
    pub fn to_text(&self) -> String {
        format!("{}:{}:{}", self.socket, self.secret, self.threshold)
    }

    /// From the value of the environment variable; none where it is not well-formed.
    pub fn parse(text: &str) -> Option<Place> {
        let mut words = text.split(':');
        let (socket, secret) = (words.next()?, words.next()?);
        let threshold = words.next()?.parse().ok()?;
        let whole = words.next().is_none() && !socket.is_empty() && !secret.is_empty();
        whole.then(|| Place { socket: socket.to_owned(), secret: secret.to_owned(), threshold })
    }
}

/// External memory for one process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// The allocation, with its keys.
    pub map: Map,
    /// Who owns it.
    pub client: ClientId,
    /// URLs of the allocators, with commas between them.
    pub allocator: String,
    /// File with the secret of the control plane.
    pub token_file: Option<PathBuf>,
    /// Local memory that may be used as cache; a share is one of what is free, and follows it.
    pub local: Amount,
    /// What is shorter stays local.
    pub threshold: ByteSize,
    /// Threads that bring pages.
    pub threads: usize,
    /// Whether it is said at the end what was used.
    pub verbose: bool,
    /// The only transport to use; none: the best for each appliance.
    #[serde(default)]
    pub transport: Option<TransportKind>,
}

/// What a process has used so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Account {
    /// Name of the program.
    pub program: String,
    /// Most bytes that were external at one time.
    pub external: u64,
    /// The same and more, for people.
    pub line: String,
    /// Why it cannot use external memory, where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_comes_back_from_its_text() {
        let place = Place { socket: "xpm-run-1".into(), secret: "00ff".into(), threshold: 1 << 20 };
        assert_eq!(Place::parse(&place.to_text()), Some(place));
        for text in ["", "a", "a:b", "a:b:c", ":b:1", "a::1", "a:b:1:2"] {
            assert_eq!(Place::parse(text), None, "{text}");
        }
    }
}
