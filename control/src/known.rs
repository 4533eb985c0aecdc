//! The newest state of the allocator's metadata that a daemon has heard of.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use xpm_protocol::api::allocator::MetadataState;

/// Name of the file in a state directory.
pub const FILE_NAME: &str = "metadata-known.json";

/// The newest known state, in memory and, if a file is named, on disk. The file is not synced: it only has to outlive
/// the process, because the memory that it protects does not outlive the machine either.
#[derive(Debug, Default)]
pub struct KnownMetadata {
    file: Option<PathBuf>,
    state: Mutex<Option<MetadataState>>,
}

impl KnownMetadata {
    /// Loads the state that an earlier process left in this directory. An unreadable file counts as missing. Blocks.
    pub fn load(directory: &Path) -> KnownMetadata {
        let file = directory.join(FILE_NAME);
        let text = fs::read_to_string(&file).ok();
        let state = text.and_then(|text| serde_json::from_str(&text).ok());
        KnownMetadata { file: Some(file), state: Mutex::new(state) }
    }

    /// The newest state.
    pub fn get(&self) -> Option<MetadataState> {
        *self.lock()
    }

    /// Keeps the state that an allocator reports, unless a newer state of the same pool is known. May write a small
    /// file.
    pub fn hear(&self, heard: Option<MetadataState>) {
        let Some(heard) = heard else { return };
        let mut state = self.lock();
        if state.is_some_and(|known| known == heard || heard.is_behind(&known)) {
            return;
        }
        *state = Some(heard);
        if let Some(file) = &self.file
            && let Err(error) = replace(file, &heard)
        {
            tracing::warn!("cannot write {}: {error}", file.display());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<MetadataState>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn replace(file: &Path, state: &MetadataState) -> std::io::Result<()> {
    let beside = file.with_extension("new");
    fs::write(&beside, serde_json::to_vec(state)?)?;
    fs::rename(&beside, file)
}

#[cfg(test)]
mod tests {
    use xpm_protocol::PoolId;

    use super::*;

    #[test]
    fn the_newest_state_of_a_pool_is_kept() {
        let state = |pool, number| MetadataState { pool: PoolId::from_u128(pool), number };
        let directory = tempfile::tempdir().unwrap();
        let known = KnownMetadata::load(directory.path());
        assert_eq!(known.get(), None);
        known.hear(Some(state(1, 7)));
        known.hear(Some(state(1, 6)));
        known.hear(None);
        assert_eq!(known.get(), Some(state(1, 7)));
        assert_eq!(KnownMetadata::load(directory.path()).get(), Some(state(1, 7)), "in the next life too");
        known.hear(Some(state(2, 1)));
        assert_eq!(known.get(), Some(state(2, 1)), "another pool");
        fs::write(directory.path().join(FILE_NAME), "{").unwrap();
        assert_eq!(KnownMetadata::load(directory.path()).get(), None);
    }
}
