//! The error of an operation on a device: the failed operation, its place, and the remedy.

use std::fmt;
use std::io;

use xpm_protocol::api::ErrorKind;

/// An error of a device, as one line for display and a kind for programs.
#[derive(Debug)]
pub struct DeviceError {
    kind: ErrorKind,
    what: String,
    source: Option<io::Error>,
    remedy: Option<&'static str>,
}

impl DeviceError {
    /// An error of this kind; `what` describes the failure and the remedy.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> DeviceError {
        DeviceError { kind, what: what.into(), source: None, remedy: None }
    }

    /// This machine lacks a feature; `remedy` says how to get it.
    pub fn unsupported(what: impl Into<String>, remedy: &'static str) -> DeviceError {
        DeviceError { kind: ErrorKind::Unsupported, what: what.into(), source: None, remedy: Some(remedy) }
    }

    /// The kind of the error.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with another kind.
    #[must_use]
    pub fn with_kind(self, kind: ErrorKind) -> DeviceError {
        DeviceError { kind, ..self }
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        if let Some(remedy) = self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

// `Display` includes the source, so `source` does not return it again.
impl std::error::Error for DeviceError {}

/// Adds the failed step to an error of the system.
pub(crate) trait Step {
    /// The resulting type.
    type Output;

    /// `what` names the operation and its object, like `open /dev/ublkc0`.
    fn at(self, what: impl Into<String>) -> Self::Output;
}

impl Step for io::Error {
    type Output = DeviceError;

    fn at(self, what: impl Into<String>) -> DeviceError {
        let kind = match self.kind() {
            io::ErrorKind::PermissionDenied => ErrorKind::Unsupported,
            io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => ErrorKind::Conflict,
            io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused => ErrorKind::Unavailable,
            io::ErrorKind::OutOfMemory => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        };
        DeviceError { kind, what: what.into(), source: Some(self), remedy: None }
    }
}

impl<T, E: Into<io::Error>> Step for Result<T, E> {
    type Output = Result<T, DeviceError>;

    fn at(self, what: impl Into<String>) -> Result<T, DeviceError> {
        self.map_err(|error| error.into().at(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_cause_and_remedy() {
        let error = io::Error::from_raw_os_error(libc::EACCES).at("open /dev/x");
        assert_eq!(error.to_string(), "open /dev/x: Permission denied (os error 13)");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let error = DeviceError::unsupported("no ublk", "load it");
        assert_eq!(error.to_string(), "no ublk; load it");
    }
}
