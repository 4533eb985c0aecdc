//! The state directory: the appliance's id, which outlives the process.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xpm_control::life::{self, Origin};
use xpm_control::state;
use xpm_protocol::{ApplianceId, Life};

/// Version of the state file's form.
const VERSION: u32 = 1;
const FILE: &str = "appliance.json";

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read or written.
    #[error("cannot {step} the state directory {path}; choose another one with --state DIR")]
    Io {
        /// The step that failed.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Another process uses it.
    #[error(
        "the state directory {0} is in use by another appliance: stop that one, or give each its own --state DIR"
    )]
    InUse(PathBuf),
    /// It was written by a newer program.
    #[error(
        "the state directory {path} has version {found}, and this program knows {VERSION}: use the newer program, or \
         another --state DIR"
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Its content is invalid.
    #[error("{path} is damaged ({reason}): restore it, or remove it, and the appliance becomes a new one")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The defect.
        reason: String,
    },
}

/// The state directory, locked by this process as long as this lives.
#[derive(Debug)]
pub struct StateDir {
    /// The appliance's id.
    pub id: ApplianceId,
    /// The life that began when the directory was opened.
    pub life: Life,
    _lock: File,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    id: ApplianceId,
}

impl StateDir {
    /// Opens the directory, creates it and the id if they do not exist, and begins a life of the appliance.
    /// Blocks.
    ///
    /// # Errors
    /// When the directory is in use, of a newer version, damaged, or cannot be accessed.
    pub fn open(path: &Path) -> Result<StateDir, StateError> {
        let failed = |step| move |source| StateError::Io { step, path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make"))?;
        let lock = state::lock(path).map_err(failed("lock"))?;
        let lock = lock.ok_or_else(|| StateError::InUse(path.to_owned()))?;
        let id = match fs::read(path.join(FILE)) {
            Ok(bytes) => parse(path, &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = xpm_control::random::u128().map(ApplianceId::from_u128).map_err(failed("make"))?;
                write(path, id).map_err(failed("write"))?;
                id
            }
            Err(error) => return Err(failed("read")(error)),
        };
        // A copied directory keeps the id: the allocator knows whether the original appliance is alive, and
        // refuses the copy then.
        let begun =
            life::begin(path, &lock, || Ok(false)).map_err(failed("begin a life of the appliance with"))?;
        if begun.origin == Origin::Copied {
            tracing::warn!(
                "the state directory {} was used on another machine: the allocator takes this appliance when the one there \
                 has ended",
                path.display()
            );
        }
        Ok(StateDir { id, life: begun.life, _lock: lock })
    }
}

/// The version is checked first, because the rest of a newer file may have another form.
fn parse(path: &Path, bytes: &[u8]) -> Result<ApplianceId, StateError> {
    let damaged =
        |error: serde_json::Error| StateError::Damaged { path: path.join(FILE), reason: error.to_string() };
    let Versioned { version: found } = serde_json::from_slice(bytes).map_err(damaged)?;
    if found > VERSION {
        return Err(StateError::Newer { path: path.to_owned(), found });
    }
    serde_json::from_slice::<Content>(bytes).map(|content| content.id).map_err(damaged)
}

fn write(path: &Path, id: ApplianceId) -> io::Result<()> {
    let text = serde_json::to_string(&Content { version: VERSION, id })?;
    state::write(&path.join(FILE), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let first = StateDir::open(&path).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::InUse(_))));
        let (id, life) = (first.id, first.life);
        drop(first);
        let second = StateDir::open(&path).unwrap();
        assert_eq!(second.id, id);
        assert_eq!(second.life.after(&life), xpm_protocol::Succession::Same);
        assert_eq!(life.after(&second.life), xpm_protocol::Succession::Past);
    }

    #[test]
    fn an_unknown_or_damaged_state_is_left_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        for (content, word) in [
            ("{\"version\":2,\"key\":\"new\"}", "version 2"),
            ("", "damaged"),
            ("{\"version\":1}", "damaged"),
            ("{\"version\":1,\"id\":\"x\"}", "damaged"),
        ] {
            fs::write(&file, content).unwrap();
            let line = StateDir::open(directory.path()).unwrap_err().to_string();
            assert!(line.contains(word), "{content}: {line}");
            assert_eq!(fs::read_to_string(&file).unwrap(), content);
        }
    }
}
