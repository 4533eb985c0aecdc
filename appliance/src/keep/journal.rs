//! The grants of an appliance as they were at its last change, in two files of which one counts.
//!
//! A change is appended; when most of what is there is outdated, the other file is written anew with a higher
//! generation, its head last, and counts from then on. What is appended is there before anybody is told of the
//! change. So a process that ends at any moment leaves a whole journal, but for an end that is torn: that change was
//! told to nobody. These files are not for the loss of power: memory of memfds is gone with them then, and a backing
//! file counts only with the digest that was taken when it was closed.
//!
//! The form, all numbers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 16 | `xpm grants v1`, filled up with zeros |
//! | 16 | 8 | generation; the file with the higher one counts |
//! | 24 | 16 | the content that it belongs to |
//! | 40 | 8 | XXH3-64 of the 40 bytes before |
//! | 48 | | entries: 4 bytes length, 8 bytes XXH3-64, and JSON of that length |

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use xpm_protocol::GrantId;
use xxhash_rust::xxh3::xxh3_64;

use super::record::{Entry, SavedGrant};

const MAGIC: &[u8; 16] = b"xpm grants v1\0\0\0";
const HEAD_LEN: u64 = 48;
const FRAME_LEN: usize = 12;
/// What may be outdated before the other file is written anew, beside as much as counts, in bytes.
const SLACK_LEN: u64 = 256 << 10;
/// How many deleted grants are remembered, as the ledger does.
const GONE_MAX: usize = 1 << 14;

/// Why a journal cannot be believed.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    /// It cannot be read or written.
    #[error("the record of whose it is cannot be read or written")]
    Io(#[from] io::Error),
    /// There is none.
    #[error("the record of whose it is was not kept with it")]
    Missing,
    /// It is not whole.
    #[error("the record of whose it is is damaged at byte {0}")]
    Damaged(u64),
    /// It is for other memory.
    #[error("the record of whose it is is not of this content")]
    Other,
    /// The memory may have lost something since.
    #[error("it was not closed before this machine was restarted; stop the appliance before the machine")]
    NotClosed,
}

pub(super) struct Journal {
    files: [File; 2],
    active: usize,
    generation: u64,
    content: u128,
    /// Where the next entry goes.
    end: u64,
    live: Live,
}

/// What counts: the grants in the order in which they were made, as text, and those deleted lately.
#[derive(Default)]
struct Live {
    grants: BTreeMap<u64, Vec<u8>>,
    places: HashMap<GrantId, u64>,
    next: u64,
    len: u64,
    gone: VecDeque<GrantId>,
}

/// What a journal says.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// The grants in the order in which they were made.
    pub(super) grants: Vec<SavedGrant>,
    /// Grants that were deleted lately.
    pub(super) gone: Vec<GrantId>,
}

impl Journal {
    /// An empty journal in these files, whatever they hold.
    pub(super) fn create(files: [File; 2], content: u128) -> Result<Journal, JournalError> {
        for file in &files {
            file.set_len(0)?;
        }
        let mut journal =
            Journal { files, active: 1, generation: 0, content, end: HEAD_LEN, live: Live::default() };
        journal.compact()?;
        Ok(journal)
    }

    /// The journal that these files hold, and what it says. An end that is torn is cut off.
    pub(super) fn open(files: [File; 2], content: u128) -> Result<(Journal, Content), JournalError> {
        let mut heads = Vec::new();
        for (index, file) in files.iter().enumerate() {
            if let Some((generation, of)) = read_head(file)? {
                heads.push((generation, index, of));
            }
        }
        let (generation, active, of) = heads.into_iter().max().ok_or(JournalError::Damaged(0))?;
        if of != content {
            return Err(JournalError::Other);
        }
        let mut journal =
            Journal { files, active, generation, content, end: HEAD_LEN, live: Live::default() };
        let said = journal.replay()?;
        Ok((journal, said))
    }

    /// The content that it belongs to.
    pub(super) fn content(&self) -> u128 {
        self.content
    }

    /// A grant is there now, or as it is now.
    pub(super) fn put(&mut self, grant: SavedGrant) -> io::Result<()> {
        let id = grant.id;
        let text = serde_json::to_vec(&Entry::Put(grant))?;
        self.append(&text)?;
        self.live.put(id, text);
        self.compact_if_worth_it()
    }

    /// A grant is deleted.
    pub(super) fn delete(&mut self, id: GrantId) -> io::Result<()> {
        self.append(&serde_json::to_vec(&Entry::Delete(id))?)?;
        self.live.delete(id);
        self.compact_if_worth_it()
    }

    /// Nothing of it counts any more.
    pub(super) fn destroy(&mut self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.set_len(0))
    }

    /// Makes it survive the loss of power from now on, if nothing is changed; its digest.
    pub(super) fn seal(&self) -> io::Result<u64> {
        self.files[self.active].sync_all()?;
        self.digest()
    }

    /// The digest of what counts.
    pub(super) fn digest(&self) -> io::Result<u64> {
        let mut bytes = vec![0; usize::try_from(self.end).map_err(io::Error::other)?];
        self.files[self.active].read_exact_at(&mut bytes, 0)?;
        Ok(xxh3_64(&bytes))
    }

    fn replay(&mut self) -> Result<Content, JournalError> {
        let file = &self.files[self.active];
        let len = file.metadata()?.len();
        let mut said = BTreeMap::new();
        loop {
            let mut frame = [0; FRAME_LEN];
            if self.end + FRAME_LEN as u64 > len {
                break;
            }
            file.read_exact_at(&mut frame, self.end)?;
            let (text_len, digest) = split_frame(&frame);
            let next = self.end + (FRAME_LEN as u64) + u64::from(text_len);
            if next > len {
                break;
            }
            let mut text = vec![0; text_len as usize];
            file.read_exact_at(&mut text, self.end + FRAME_LEN as u64)?;
            let damaged = JournalError::Damaged(self.end);
            if xxh3_64(&text) != digest {
                return Err(damaged);
            }
            match serde_json::from_slice(&text).map_err(|_| damaged)? {
                Entry::Put(grant) => {
                    let place = self.live.put(grant.id, text);
                    said.insert(place, grant);
                }
                Entry::Delete(id) => {
                    if let Some(place) = self.live.delete(id) {
                        said.remove(&place);
                    }
                }
                Entry::Gone(ids) => ids.into_iter().for_each(|id| self.live.add_gone(id)),
            }
            self.end = next;
        }
        file.set_len(self.end)?;
        Ok(Content { grants: said.into_values().collect(), gone: self.live.gone.iter().copied().collect() })
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        self.end = append(&self.files[self.active], self.end, text)?;
        Ok(())
    }

    fn compact_if_worth_it(&mut self) -> io::Result<()> {
        if self.end > 2 * self.live.len + SLACK_LEN { self.compact() } else { Ok(()) }
    }

    fn compact(&mut self) -> io::Result<()> {
        let (other, generation) = (1 - self.active, self.generation + 1);
        let file = &self.files[other];
        file.set_len(0)?;
        let mut end = HEAD_LEN;
        let gone: Vec<GrantId> = self.live.gone.iter().copied().collect();
        if !gone.is_empty() {
            end = append(file, end, &serde_json::to_vec(&Entry::Gone(gone))?)?;
        }
        for text in self.live.grants.values() {
            end = append(file, end, text)?;
        }
        file.write_all_at(&head(generation, self.content), 0)?;
        (self.active, self.generation, self.end) = (other, generation, end);
        Ok(())
    }
}

impl Live {
    fn put(&mut self, id: GrantId, text: Vec<u8>) -> u64 {
        let place = *self.places.entry(id).or_insert_with(|| {
            self.next += 1;
            self.next
        });
        self.len += text.len() as u64;
        if let Some(before) = self.grants.insert(place, text) {
            self.len -= before.len() as u64;
        }
        place
    }

    fn delete(&mut self, id: GrantId) -> Option<u64> {
        self.add_gone(id);
        let place = self.places.remove(&id)?;
        let before = self.grants.remove(&place)?;
        self.len -= before.len() as u64;
        Some(place)
    }

    fn add_gone(&mut self, id: GrantId) {
        self.gone.push_back(id);
        if self.gone.len() > GONE_MAX {
            self.gone.pop_front();
        }
    }
}

fn append(file: &File, at: u64, text: &[u8]) -> io::Result<u64> {
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(FRAME_LEN + text.len());
    bytes.extend(len.to_le_bytes());
    bytes.extend(xxh3_64(text).to_le_bytes());
    bytes.extend(text);
    file.write_all_at(&bytes, at)?;
    Ok(at + bytes.len() as u64)
}

fn split_frame(frame: &[u8; FRAME_LEN]) -> (u32, u64) {
    let [a, b, c, d, digest @ ..] = *frame;
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(digest))
}

fn head(generation: u64, content: u128) -> [u8; HEAD_LEN as usize] {
    let mut head = [0; HEAD_LEN as usize];
    head[..16].copy_from_slice(MAGIC);
    head[16..24].copy_from_slice(&generation.to_le_bytes());
    head[24..40].copy_from_slice(&content.to_le_bytes());
    let digest = xxh3_64(&head[..40]);
    head[40..].copy_from_slice(&digest.to_le_bytes());
    head
}

/// Generation and content, if there is a head.
fn read_head(file: &File) -> io::Result<Option<(u64, u128)>> {
    let mut found = [0; HEAD_LEN as usize];
    match file.read_exact_at(&mut found, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (mut generation, mut content) = ([0; 8], [0; 16]);
    generation.copy_from_slice(&found[16..24]);
    content.copy_from_slice(&found[24..40]);
    let (generation, content) = (u64::from_le_bytes(generation), u128::from_le_bytes(content));
    Ok((found == head(generation, content)).then_some((generation, content)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::record::tests::grant;
    use super::*;

    fn files() -> [File; 2] {
        [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()]
    }

    fn again(journal: &Journal) -> [File; 2] {
        journal.files.each_ref().map(|file| file.try_clone().unwrap())
    }

    fn told(journal: &Journal) -> Result<Vec<(GrantId, u64)>, JournalError> {
        let (_, content) = Journal::open(again(journal), journal.content)?;
        Ok(content.grants.iter().map(|grant| (grant.id, grant.epoch.0)).collect())
    }

    proptest! {
        /// Against a list: whatever is done, the next life is told the same, in the order of making.
        #[test]
        fn the_next_life_knows_what_this_one_did(steps in prop::collection::vec((any::<bool>(), 1_u128..6, 1_u64..9), 1..120)) {
            let mut journal = Journal::create(files(), 7).unwrap();
            let mut model: Vec<(GrantId, u64)> = Vec::new();
            for (put, id, epoch) in steps {
                let id = GrantId::from_u128(id);
                if put {
                    // Long, so that the files take turns.
                    journal.put(grant(id, epoch, 30_000)).unwrap();
                    match model.iter_mut().find(|(other, _)| *other == id) {
                        Some(known) => known.1 = epoch,
                        None => model.push((id, epoch)),
                    }
                } else {
                    journal.delete(id).unwrap();
                    model.retain(|(other, _)| *other != id);
                }
            }
            prop_assert_eq!(told(&journal).unwrap(), model);
            let len: u64 = journal.files.iter().map(|file| file.metadata().unwrap().len()).sum();
            prop_assert!(len < 4 * (5 * 31_000 + SLACK_LEN), "{} bytes", len);
        }
    }

    #[test]
    fn a_torn_end_is_a_change_that_nobody_was_told_of() {
        let mut journal = Journal::create(files(), 7).unwrap();
        let id = GrantId::from_u128(1);
        journal.put(grant(id, 1, 0)).unwrap();
        let end = journal.end;
        journal.put(grant(id, 2, 0)).unwrap();
        let file = journal.files[journal.active].try_clone().unwrap();
        let mut last = vec![0; (journal.end - end) as usize];
        file.read_exact_at(&mut last, end).unwrap();
        for torn in end..journal.end {
            file.write_all_at(&last, end).unwrap();
            file.set_len(torn).unwrap();
            assert_eq!(told(&journal).unwrap(), [(id, 1)], "{torn}");
        }
    }

    #[test]
    fn a_compaction_that_did_not_end_changes_nothing() {
        let mut journal = Journal::create(files(), 7).unwrap();
        let id = GrantId::from_u128(1);
        journal.put(grant(id, 1, 0)).unwrap();
        let other = journal.files[1 - journal.active].try_clone().unwrap();
        append(&other, HEAD_LEN, b"half").unwrap();
        assert_eq!(told(&journal).unwrap(), [(id, 1)]);
    }

    #[test]
    fn what_was_changed_by_others_is_not_believed() {
        let mut journal = Journal::create(files(), 7).unwrap();
        journal.put(grant(GrantId::from_u128(1), 1, 0)).unwrap();
        let end = journal.end;
        journal.put(grant(GrantId::from_u128(2), 1, 0)).unwrap();
        let file = journal.files[journal.active].try_clone().unwrap();
        assert!(matches!(Journal::open(again(&journal), 8), Err(JournalError::Other)));
        file.write_all_at(b"x", HEAD_LEN + 40).unwrap();
        assert!(matches!(told(&journal), Err(JournalError::Damaged(HEAD_LEN))));
        file.write_all_at(b"x", 20).unwrap();
        assert!(matches!(told(&journal), Err(JournalError::Damaged(0))), "no head");
        assert!(end > HEAD_LEN);
    }

    #[test]
    fn deleted_grants_are_remembered_over_a_compaction() {
        let mut journal = Journal::create(files(), 7).unwrap();
        for id in 1..=3 {
            journal.put(grant(GrantId::from_u128(id), 1, 0)).unwrap();
        }
        journal.delete(GrantId::from_u128(2)).unwrap();
        journal.compact().unwrap();
        let (_, content) = Journal::open(again(&journal), 7).unwrap();
        assert_eq!(content.gone, [GrantId::from_u128(2)]);
        let ids: Vec<_> = content.grants.iter().map(|grant| grant.id.as_u128()).collect();
        assert_eq!(ids, [1, 3]);
    }

    #[test]
    fn the_digest_is_of_what_counts() {
        let mut journal = Journal::create(files(), 7).unwrap();
        journal.put(grant(GrantId::from_u128(1), 1, 0)).unwrap();
        let sealed = journal.seal().unwrap();
        assert_eq!(Journal::open(again(&journal), 7).unwrap().0.digest().unwrap(), sealed);
        journal.put(grant(GrantId::from_u128(1), 2, 0)).unwrap();
        assert_ne!(journal.digest().unwrap(), sealed);
    }
}
