//! The token: the secret that all parts of an xpm installation share on the control plane.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use subtle::ConstantTimeEq as _;

/// Shortest token, in characters.
pub const LEN_MIN: usize = 16;
/// Longest token, in characters.
pub const LEN_MAX: usize = 512;

/// A bearer token (RFC 6750). `Debug` does not show it. Clones share the token: when its file is read again
/// ([`Token::reload`]), all of them change.
///
/// A file may contain two tokens, one per line, so that the token of a pool can be changed while the pool runs: the
/// first is sent to others, both are accepted from others.
#[derive(Clone)]
pub struct Token(Arc<Shared>);

struct Shared {
    words: RwLock<Words>,
    path: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
struct Words {
    first: Arc<str>,
    second: Option<Arc<str>>,
}

/// Tokens that came from files, for [`reload_all`].
static LOADED: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// Reads all token files of this process again, and logs the result. Blocks.
pub fn reload_all() {
    let tokens: Vec<Token> = {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|token| token.strong_count() > 0);
        loaded.iter().filter_map(Weak::upgrade).map(Token).collect()
    };
    for token in tokens {
        let Some(path) = &token.0.path else { continue };
        match token.reload() {
            Ok(changed) => tracing::info!(
                "the token file {} was read anew: {}{}",
                path.display(),
                if changed { "the token is another one" } else { "nothing of it changed" },
                if token.words().second.is_some() { "; two tokens are accepted" } else { "" }
            ),
            Err(error) => tracing::error!("{}; the token of before stays", crate::error_line(&error)),
        }
    }
}

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file does not exist.
    #[error(
        "there is no token file {path}; copy the one of the allocator's machine, or for the first machine make one: \
         (umask 077; openssl rand -hex 32 >{path})"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file exists and cannot be read. The advice must not be a command that makes a token: it would overwrite
    /// the file.
    #[error("cannot read the token file {path} ({why}); {}", remedy(.why))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// Users other than its owner can access it.
    #[error("the token file {path} has mode {mode:04o}, so others can use the secret: chmod 600 {path}")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file contains no token.
    #[error(
        "the token file {path} must hold one line of {LEN_MIN} to {LEN_MAX} visible ASCII characters, or two while the token \
         is being changed: the new one, which is sent, and the old one, which is accepted too"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// Reads a token from a file of mode 0600 or stricter. Surrounding white space is ignored. Blocks.
    pub fn load(path: &Path) -> Result<Token, TokenError> {
        let words = RwLock::new(Words::load(path)?);
        let token = Token(Arc::new(Shared { words, path: Some(path.to_owned()) }));
        LOADED.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&token.0));
        Ok(token)
    }

    /// The token with this text: 16 to 512 visible ASCII characters, otherwise none.
    pub fn new(text: &str) -> Option<Token> {
        let words = RwLock::new(Words { first: word(text)?, second: None });
        Some(Token(Arc::new(Shared { words, path: None })))
    }

    /// Reads its file again; returns whether the token changed. A token without a file stays. Blocks.
    ///
    /// # Errors
    /// When the file contains no token; the present token stays.
    pub fn reload(&self) -> Result<bool, TokenError> {
        let Some(path) = &self.0.path else { return Ok(false) };
        let words = Words::load(path)?;
        let mut known = self.0.words.write().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *known, words.clone()) != words)
    }

    /// The secret, for the `Authorization` header.
    pub fn reveal(&self) -> Arc<str> {
        self.words().first
    }

    /// Whether `shown` is the token or the second accepted one. The time that this takes does not depend on how much
    /// of `shown` is right.
    pub fn matches(&self, shown: &[u8]) -> bool {
        let Words { first, second } = self.words();
        let is = |word: &str| word.as_bytes().ct_eq(shown);
        let other = second.as_deref().map_or_else(|| subtle::Choice::from(0), is);
        (is(&first) | other).into()
    }

    fn words(&self) -> Words {
        self.0.words.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Words {
    fn load(path: &Path) -> Result<Words, TokenError> {
        let unreadable = |why: io::Error| match why.kind() {
            io::ErrorKind::NotFound => TokenError::Missing { path: path.to_owned() },
            _ => TokenError::Unreadable { path: path.to_owned(), why },
        };
        let malformed = || TokenError::Malformed { path: path.to_owned() };
        let file = File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Exposed { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(4 * LEN_MAX as u64).read_to_end(&mut bytes).map_err(unreadable)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| malformed())?;
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().and_then(word).ok_or_else(malformed)?;
        let second = lines.next().map(|line| word(line).ok_or_else(malformed)).transpose()?;
        match lines.next() {
            None => Ok(Words { first, second }),
            Some(_) => Err(malformed()),
        }
    }
}

/// The remedy for a token file that exists and cannot be read.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "its owner alone may read it: run this as that user (sudo), or have a copy of your own, mode 0600, and name it by \
             XPM_TOKEN_FILE"
        }
        _ => "look at the path and at the file system it is on",
    }
}

fn word(text: &str) -> Option<Arc<str>> {
    let fits = (LEN_MIN..=LEN_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    fits.then(|| text.into())
}

impl PartialEq for Token {
    fn eq(&self, other: &Token) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Token {}

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
    fn two_tokens_are_accepted_and_the_first_is_shown() {
        let (_directory, path) = file("0123456789abcdef\n", 0o600);
        let token = Token::load(&path).unwrap();
        let same = token.clone();
        fs::write(&path, "new-new-new-new-new\n0123456789abcdef\n").unwrap();
        assert!(token.reload().unwrap());
        assert_eq!(&*same.reveal(), "new-new-new-new-new");
        assert!(same.matches(b"new-new-new-new-new") && same.matches(b"0123456789abcdef"));
        assert!(!same.matches(b"new-new-new-new-new\n0123456789abcdef"));
        fs::write(&path, "new-new-new-new-new\n").unwrap();
        assert!(token.reload().unwrap() && !token.reload().unwrap());
        assert!(!same.matches(b"0123456789abcdef"));
        fs::write(&path, "").unwrap();
        assert!(token.reload().is_err());
        assert!(same.matches(b"new-new-new-new-new"), "an empty file takes nothing away");
    }

    #[test]
    fn a_file_without_a_token_is_refused() {
        for content in ["", "short", "two words two words", &"x".repeat(600), &"0123456789abcdef\n".repeat(3)]
        {
            let (_directory, path) = file(content, 0o600);
            assert!(matches!(Token::load(&path), Err(TokenError::Malformed { .. })), "{content}");
        }
    }

    #[test]
    fn advice_to_make_a_token_is_given_only_if_the_file_is_missing() {
        let missing = Token::load(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(missing.contains("openssl rand"), "{missing}");
        let (directory, _path) = file("0123456789abcdef\n", 0o600);
        // Reading a directory as a file fails. Its mode must be strict, because a lax mode is refused before reading.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let unreadable = Token::load(directory.path()).unwrap_err().to_string();
        assert!(unreadable.starts_with("cannot read") && !unreadable.contains("openssl"), "{unreadable}");
        let denied = TokenError::Unreadable {
            path: "/etc/xpm/token".into(),
            why: io::ErrorKind::PermissionDenied.into(),
        };
        assert!(denied.to_string().contains("sudo") && !denied.to_string().contains("openssl"), "{denied}");
    }
}
