//! Names of files.

use std::fmt;

use super::Fault;

/// Bytes of the longest name.
pub const NAME_LEN_MAX: usize = 255;

/// The name of a file in its directory: 1 to [`NAME_LEN_MAX`] bytes without a slash and without NUL, not necessarily
/// UTF-8. A request never has "." or ".." as a name; a directory's listing does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// The entry of a directory for itself.
    pub const DOT: Name<'static> = Name(b".");
    /// The entry of a directory for its parent.
    pub const DOT_DOT: Name<'static> = Name(b"..");

    /// These bytes as a name.
    ///
    /// # Errors
    /// [`Fault::Name`] where they are empty or contain a slash or NUL, [`Fault::NameTooLong`].
    pub fn new(bytes: &'a [u8]) -> Result<Name<'a>, Fault> {
        if bytes.len() > NAME_LEN_MAX {
            Err(Fault::NameTooLong)
        } else if bytes.is_empty() || bytes.iter().any(|byte| matches!(byte, b'/' | 0)) {
            Err(Fault::Name)
        } else {
            Ok(Name(bytes))
        }
    }

    /// Its bytes, without NUL.
    pub const fn as_bytes(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn is_dots(self) -> bool {
        matches!(self.0, b"." | b"..")
    }
}

impl fmt::Debug for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}
