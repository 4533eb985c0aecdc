//! The error of an operation: the failure, its place, and the remedy.

use std::fmt;
use std::io;

use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::api::ErrorKind;

/// An error, as one line for display and a kind for programs.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    line: String,
    nothing_done: bool,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, line: impl Into<String>) -> Error {
        Error { kind, line: line.into(), nothing_done: false }
    }

    pub(crate) fn conflict(line: impl Into<String>) -> Error {
        Error::new(ErrorKind::Conflict, line)
    }

    pub(crate) fn internal(line: impl Into<String>) -> Error {
        Error::new(ErrorKind::Internal, line)
    }

    /// The kind of the error.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether a smaller request might be granted.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self.kind, ErrorKind::NoSpace | ErrorKind::Denied)
    }

    /// Whether it is certain that the request was not begun.
    pub(crate) const fn nothing_done(&self) -> bool {
        self.nothing_done
    }

    /// A daemon's refusal, or the failure to reach it.
    pub(crate) fn of(who: &str, error: &ClientError) -> Error {
        let nothing_done = matches!(error, ClientError::Refused(_) | ClientError::Unreachable { .. });
        Error { nothing_done, ..Error::new(error.kind(), format!("{who}: {}", error_line(error))) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Error {}

/// Adds the failed step to an error of the system.
pub(crate) trait Step {
    /// The resulting type.
    type Output;

    /// `what` names the operation and its object, like `open /dev/ublkb0`.
    fn at(self, what: impl fmt::Display) -> Self::Output;
}

impl Step for io::Error {
    type Output = Error;

    fn at(self, what: impl fmt::Display) -> Error {
        let kind = match self.kind() {
            io::ErrorKind::PermissionDenied => ErrorKind::Unsupported,
            io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        Error::new(kind, format!("{what}: {self}"))
    }
}

impl<T> Step for io::Result<T> {
    type Output = Result<T, Error>;

    fn at(self, what: impl fmt::Display) -> Result<T, Error> {
        self.map_err(|error| error.at(what))
    }
}
