//! The token: the secret that all parts of one xpm installation share on the control plane.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq as _;

/// Shortest token, in characters.
pub const LEN_MIN: usize = 16;
/// Longest token, in characters.
pub const LEN_MAX: usize = 512;

/// A bearer token (RFC 6750). `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// There is none.
    #[error(
        "there is no token file {path}; copy the one of the allocator's machine, or for the first machine make one: \
         (umask 077; openssl rand -hex 32 >{path})"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// There is one, and it cannot be read. The advice must not be a command that makes one: that would overwrite it.
    #[error("cannot read the token file {path} ({why}); {}", remedy(.why))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// Others than its owner can use it.
    #[error("the token file {path} has mode {mode:04o}, so others can use the secret: chmod 600 {path}")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Its content is no token.
    #[error("the token file {path} must hold one line of {LEN_MIN} to {LEN_MAX} visible ASCII characters")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// Reads a token from a file of mode 0600 or stricter. White space around it is not part of
    /// it. Blocks.
    pub fn load(path: &Path) -> Result<Token, TokenError> {
        let unreadable = |why: io::Error| match why.kind() {
            io::ErrorKind::NotFound => TokenError::Missing { path: path.to_owned() },
            _ => TokenError::Unreadable { path: path.to_owned(), why },
        };
        let file = File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Exposed { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(2 * LEN_MAX as u64).read_to_end(&mut bytes).map_err(unreadable)?;
        let text = std::str::from_utf8(&bytes).ok().map(str::trim);
        text.and_then(Token::new).ok_or_else(|| TokenError::Malformed { path: path.to_owned() })
    }

    /// The token with this text: 16 to 512 visible ASCII characters, else none.
    pub fn new(text: &str) -> Option<Token> {
        let fits = (LEN_MIN..=LEN_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        fits.then(|| Token(text.to_owned()))
    }

    /// The secret, for the `Authorization` header.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `shown` is the token, in a time that does not tell how much of it is right.
    pub fn matches(&self, shown: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(shown).into()
    }
}

/// What helps where a token file is there and cannot be read.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "its owner alone may read it: run this as that user (sudo), or have a copy of your own, mode 0600, and name it by \
             XPM_TOKEN_FILE"
        }
        _ => "look at the path and at the file system it is on",
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(content: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (directory, path)
    }

    #[test]
    fn a_private_file_is_read() {
        let (_directory, path) = file("0123456789abcdef\n", 0o600);
        let token = Token::load(&path).unwrap();
        assert!(token.matches(b"0123456789abcdef"));
        assert!(!token.matches(b"0123456789abcdeg"));
        assert!(!token.matches(b""));
        assert!(!format!("{token:?}").contains("0123"));
    }

    #[test]
    fn an_exposed_file_is_refused() {
        let (_directory, path) = file("0123456789abcdef\n", 0o640);
        let line = Token::load(&path).unwrap_err().to_string();
        assert!(line.contains("0640") && line.contains("chmod 600"), "{line}");
    }

    #[test]
    fn no_token_in_it() {
        for content in ["", "short", "two words two words", &"x".repeat(600)] {
            let (_directory, path) = file(content, 0o600);
            assert!(matches!(Token::load(&path), Err(TokenError::Malformed { .. })), "{content}");
        }
    }

    #[test]
    fn advice_to_make_one_is_given_only_where_there_is_none() {
        let missing = Token::load(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(missing.contains("openssl rand"), "{missing}");
        let (directory, _path) = file("0123456789abcdef\n", 0o600);
        let unreadable = Token::load(directory.path()).unwrap_err().to_string();
        assert!(unreadable.starts_with("cannot read") && !unreadable.contains("openssl"), "{unreadable}");
        let denied = TokenError::Unreadable {
            path: "/etc/xpm/token".into(),
            why: io::ErrorKind::PermissionDenied.into(),
        };
        assert!(denied.to_string().contains("sudo") && !denied.to_string().contains("openssl"), "{denied}");
    }
}
