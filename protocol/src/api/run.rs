//! The protocol between `xpm run` and the library in the program that it started.
//!
//! `xpm run` listens at an abstract unix socket. A process that wants external memory connects, and sends one line:
//! the secret, a space, and the request ([`MEMORY`], or [`FELL`] with an address). `xpm run` answers [`MEMORY`] with
//! one byte, [`YES`] or [`NO`]. With [`YES`] come two descriptors: a file with a [`Run`] as JSON, and a descriptor
//! for messages to people. The process has the memory until it closes the connection, which the kernel does when the
//! process ends or calls execve(2). Until then the process sends an [`Account`] as one line of JSON after each change
//! of its figures.

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
/// A child of fork(2) touched its parent's memory, at the address that follows in hexadecimal digits.
pub const FELL: &str = "fell";
/// The memory goes to the process that asked.
pub const YES: u8 = b'Y';
/// Another process has the memory, or no process can have it now.
pub const NO: u8 = b'N';

/// The socket to ask for memory, and the size from which on to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the abstract socket, without the leading zero byte.
    pub socket: String,
    /// Proves that the asking process was started by this `xpm run`.
    pub secret: String,
    /// In bytes; shorter pieces of memory stay local, and are no reason to ask.
    pub threshold: u64,
}

impl Place {
    /// Writes the place as the value of the environment variable.
    pub fn to_text(&self) -> String {
        format!("{}:{}:{}", self.socket, self.secret, self.threshold)
    }

    /// Reads the value of the environment variable; none if it is malformed.
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
    /// The client that owns it.
    pub client: ClientId,
    /// URLs of the allocators, separated by commas.
    pub allocator: String,
    /// File with the secret of the control plane.
    pub token_file: Option<PathBuf>,
    /// Local memory that may be used as cache; a percentage refers to free memory, and follows it.
    pub local: Amount,
    /// Shorter pieces of memory stay local.
    pub threshold: ByteSize,
    /// Number of threads that fetch pages.
    pub threads: usize,
    /// Whether to print at the end what was used.
    pub verbose: bool,
    /// The only transport to use; none: the best one for each appliance.
    #[serde(default)]
    pub transport: Option<TransportKind>,
}

/// Memory that a process has used so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Account {
    /// Name of the program.
    pub program: String,
    /// Most bytes that were external at the same time.
    pub external: u64,
    /// A summary with more figures, for people.
    pub line: String,
    /// Why it cannot use external memory, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_its_text_form() {
        let place = Place { socket: "xpm-run-1".into(), secret: "00ff".into(), threshold: 1 << 20 };
        assert_eq!(Place::parse(&place.to_text()), Some(place));
        for text in ["", "a", "a:b", "a:b:c", ":b:1", "a::1", "a:b:1:2"] {
            assert_eq!(Place::parse(text), None, "{text}");
        }
    }
}
