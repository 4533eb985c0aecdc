//! The journal of an appliance's grants, as of their last change: two files, of which one is valid.
//!
//! A change is appended. When most of the file is outdated, the other file is rewritten with a higher
//! generation, its head last, and is valid from then on. An entry is appended before a client learns of the
//! change. So a process that ends at any moment leaves a complete journal, possibly with a torn end, and no
//! client has learned of that last change. The files need not survive a loss of power: the memory of memfds
//! is lost with them then, and a backing file is valid only with the digest that was taken when it was
//! closed.
//!
//! The form, all numbers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 16 | `xpm grants v1`, padded with zeros |
//! | 16 | 8 | generation; the file with the higher one is valid |
//! | 24 | 16 | the number of the content that the journal belongs to |
//! | 40 | 8 | XXH3-64 of the preceding 40 bytes |
//! | 48 | | entries, each of them twice: 4 bytes length, 8 bytes XXH3-64, and JSON of that length |
//!
//! A flipped bit loses no data: a damaged entry lies beside its twin, and the invalid file has a copy of the
//! valid one's head, at byte 48 behind zeros. If both twins are damaged, or the entry of a journal from
//! before 0.2, which has each entry once, the grant that the entry is about is lost. If that grant cannot be
//! determined, all grants that were recorded before the entry are lost, since the entry may have given the
//! memory of any of them to another client.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use xpm_protocol::{GrantId, Name};
use xxhash_rust::xxh3::xxh3_64;

use super::record::{Entry, SavedGrant};

const MAGIC: &[u8; 16] = b"xpm grants v1\0\0\0";
const HEAD_LEN: u64 = 48;
const FRAME_LEN: usize = 12;
/// How many bits of an entry or head may differ from its twin; entries about different subjects differ in
/// more.
const FLIPPED_MAX: u32 = 16;
/// Outdated bytes that are allowed beyond the size of the valid entries before the other file is rewritten.
const SLACK_LEN: u64 = 256 << 10;
/// How many deleted grants are remembered; the ledger remembers as many.
const GONE_MAX: usize = 1 << 14;

/// Why a journal is not valid.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    /// The files cannot be read or written.
    #[error("the record of whose it is cannot be read or written")]
    Io(#[from] io::Error),
    /// There is no journal.
    #[error("the record of whose it is was not kept with it")]
    Missing,
    /// The journal is damaged.
    #[error("the record of whose it is is damaged at byte {0}")]
    Damaged(u64),
    /// The journal belongs to other content.
    #[error("the record of whose it is is not of this content")]
    Other,
    /// The memory may have lost data since.
    #[error("it was not closed before this machine was restarted; stop the appliance before the machine")]
    NotClosed,
}

pub(super) struct Journal {
    files: [File; 2],
    active: usize,
    generation: u64,
    content: u128,
    /// Offset of the next entry.
    end: u64,
    live: Live,
}

/// The valid entries: the grants in the order of creation, as text, and the grants that were deleted lately.
#[derive(Default)]
struct Live {
    grants: BTreeMap<u64, Vec<u8>>,
    places: HashMap<GrantId, u64>,
    next: u64,
    len: u64,
    gone: VecDeque<GrantId>,
    gone_known: HashSet<GrantId>,
}

/// The content of a journal.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// The grants in the order of creation.
    pub(super) grants: Vec<SavedGrant>,
    /// Grants that were deleted lately.
    pub(super) gone: Vec<GrantId>,
    /// Grants whose record is damaged, with the allocations' names.
    pub(super) damaged: Vec<(GrantId, Name)>,
}

impl Journal {
    /// Creates an empty journal in these files, whatever their content.
    pub(super) fn create(files: [File; 2], content: u128) -> Result<Journal, JournalError> {
        for file in &files {
            file.set_len(0)?;
        }
        let mut journal =
            Journal { files, active: 1, generation: 0, content, end: HEAD_LEN, live: Live::default() };
        journal.compact()?;
        Ok(journal)
    }

    /// Opens the journal in these files, and returns its content. A torn end is cut off.
    pub(super) fn open(files: [File; 2], content: u128) -> Result<(Journal, Content), JournalError> {
        let mut heads = Vec::new();
        for (index, file) in files.iter().enumerate() {
            if let Some((generation, of)) = read_head(file, &files[1 - index])? {
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

    /// The number of the content that the journal belongs to.
    pub(super) fn content(&self) -> u128 {
        self.content
    }

    /// Records a new or changed grant.
    pub(super) fn put(&mut self, grant: SavedGrant) -> io::Result<()> {
        let id = grant.id;
        let text = serde_json::to_vec(&Entry::Put(grant))?;
        self.append(&text)?;
        self.live.put(id, text);
        self.compact_if_worth_it()
    }

    /// Records that a grant was deleted.
    pub(super) fn delete(&mut self, id: GrantId) -> io::Result<()> {
        self.append(&serde_json::to_vec(&Entry::Delete(id))?)?;
        self.live.delete(id);
        self.compact_if_worth_it()
    }

    /// Makes the journal invalid.
    pub(super) fn destroy(&mut self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.set_len(0))
    }

    /// Makes the journal survive a loss of power, unless it is changed after this call. Returns its digest.
    pub(super) fn seal(&self) -> io::Result<u64> {
        self.files[self.active].sync_all()?;
        self.digest()
    }

    /// The digest of the valid entries.
    pub(super) fn digest(&self) -> io::Result<u64> {
        let mut bytes = vec![0; usize::try_from(self.end).map_err(io::Error::other)?];
        self.files[self.active].read_exact_at(&mut bytes, 0)?;
        Ok(xxh3_64(&bytes))
    }

    /// Rewrites the journal, with each entry twice, whatever form it had.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        self.compact()
    }

    fn replay(&mut self) -> Result<Content, JournalError> {
        let file = &self.files[self.active];
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, 0)?;
        let mut replay = Replay { live: &mut self.live, said: BTreeMap::new(), damaged: Vec::new() };
        let (mut at, mut before) = (HEAD_LEN as usize, None);
        while at < bytes.len() {
            if let Some(next) = frame_end(&bytes, at) {
                replay.apply(&bytes[at + FRAME_LEN..next]).ok_or(JournalError::Damaged(at as u64))?;
                (before, at) = (Some(at..next), next);
                continue;
            }
            let next = (at + 1..bytes.len()).find(|from| frame_end(&bytes, *from).is_some());
            let end = next.unwrap_or(bytes.len());
            let after = next.and_then(|from| Some(from..frame_end(&bytes, from)?));
            let twin = [before.clone(), after].into_iter().flatten().map(|twin| &bytes[twin]);
            let whole = twin.into_iter().find(|twin| is_twin(&bytes[at..end], twin)).map(<[u8]>::to_vec);
            if let Some(whole) = whole.or_else(|| with_right_length(&bytes[at..end])) {
                file.write_all_at(&whole, at as u64)?;
                bytes[at..end].copy_from_slice(&whole);
                continue;
            }
            if next.is_none() && is_torn(&bytes[at..]) {
                break;
            }
            replay.lose(&bytes[at..end]);
            (before, at) = (None, end);
        }
        self.end = at as u64;
        let Replay { said, damaged, .. } = replay;
        self.files[self.active].set_len(self.end)?;
        let gone = self.live.gone.iter().copied().collect();
        Ok(Content { grants: said.into_values().collect(), gone, damaged })
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        self.end = append(&self.files[self.active], self.end, text)?;
        Ok(())
    }

    fn compact_if_worth_it(&mut self) -> io::Result<()> {
        if self.end > 4 * self.live.len + SLACK_LEN { self.compact() } else { Ok(()) }
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
        let head = head(generation, self.content);
        file.write_all_at(&head, 0)?;
        // From here on the new file is valid. The old file keeps only a copy of the new file's head.
        let old = &self.files[self.active];
        (self.active, self.generation, self.end) = (other, generation, end);
        old.set_len(0)?;
        old.write_all_at(&head, HEAD_LEN)
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
        if self.gone_known.insert(id) {
            self.gone.push_back(id);
        }
        if self.gone.len() > GONE_MAX
            && let Some(oldest) = self.gone.pop_front()
        {
            self.gone_known.remove(&oldest);
        }
    }
}

/// The state of reading a journal.
struct Replay<'a> {
    live: &'a mut Live,
    said: BTreeMap<u64, SavedGrant>,
    damaged: Vec<(GrantId, Name)>,
}

impl Replay<'_> {
    /// None when the text is no entry.
    fn apply(&mut self, text: &[u8]) -> Option<()> {
        match serde_json::from_slice(text).ok()? {
            Entry::Put(grant) => {
                let place = self.live.put(grant.id, text.to_vec());
                self.damaged.retain(|(id, _)| *id != grant.id);
                self.said.insert(place, grant);
            }
            Entry::Delete(id) => {
                if let Some(place) = self.live.delete(id) {
                    self.said.remove(&place);
                }
                self.damaged.retain(|(lost, _)| *lost != id);
            }
            Entry::Gone(ids) => ids.into_iter().for_each(|id| self.live.add_gone(id)),
        }
        Some(())
    }

    /// Handles a damaged entry: the grant that it was about is lost.
    fn lose(&mut self, frame: &[u8]) {
        let about = self.said.values().map(|grant| grant.id).find(|id| names(frame, *id));
        let lost: Vec<(GrantId, Name)> = self
            .said
            .values()
            .filter(|grant| about.is_none_or(|about| about == grant.id))
            .map(|grant| (grant.id, grant.name.clone()))
            .collect();
        for (id, _) in &lost {
            if let Some(place) = self.live.delete(*id) {
                self.said.remove(&place);
            }
        }
        self.damaged.extend(lost);
    }
}

/// Whether the text of a damaged entry begins like an entry about this grant.
fn names(frame: &[u8], id: GrantId) -> bool {
    let text = String::from_utf8_lossy(frame.get(FRAME_LEN..).unwrap_or_default());
    text.starts_with(&format!("{{\"put\":{{\"id\":\"{id}\""))
        || text.starts_with(&format!("{{\"delete\":\"{id}\""))
}

/// The end of the frame at `at`, if it is complete and valid.
fn frame_end(bytes: &[u8], at: usize) -> Option<usize> {
    let (len, digest) = split_frame(bytes.get(at..at + FRAME_LEN)?.try_into().ok()?);
    let end = (at + FRAME_LEN).checked_add(len as usize)?;
    (xxh3_64(bytes.get(at + FRAME_LEN..end)?) == digest).then_some(end)
}

fn is_twin(damaged: &[u8], whole: &[u8]) -> bool {
    damaged.len() == whole.len()
        && damaged.iter().zip(whole).map(|(one, other)| (one ^ other).count_ones()).sum::<u32>()
            <= FLIPPED_MAX
}

/// The frame with its length corrected, if only the length is damaged.
fn with_right_length(frame: &[u8]) -> Option<Vec<u8>> {
    let (_, digest) = split_frame(frame.get(..FRAME_LEN)?.try_into().ok()?);
    let text = &frame[FRAME_LEN..];
    let len = u32::try_from(text.len()).ok()?;
    (xxh3_64(text) == digest).then(|| [&len.to_le_bytes()[..], &frame[4..]].concat())
}

/// Whether the end of the file is an incomplete frame.
fn is_torn(rest: &[u8]) -> bool {
    let frame: Option<&[u8; FRAME_LEN]> = rest.get(..FRAME_LEN).and_then(|frame| frame.try_into().ok());
    frame.is_none_or(|frame| split_frame(frame).0 as usize > rest.len() - FRAME_LEN)
}

/// Appends an entry and its twin.
fn append(file: &File, at: u64, text: &[u8]) -> io::Result<u64> {
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(2 * (FRAME_LEN + text.len()));
    for _ in 0..2 {
        bytes.extend(len.to_le_bytes());
        bytes.extend(xxh3_64(text).to_le_bytes());
        bytes.extend(text);
    }
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

/// Generation and content of the head, if there is one. A damaged head is repaired from its copy in the other
/// file.
fn read_head(file: &File, other: &File) -> Result<Option<(u64, u128)>, JournalError> {
    let Some(mut found) = head_at(file, 0)? else { return Ok(None) };
    if split_head(&found).is_none()
        && let Some(copy) = head_at(other, HEAD_LEN)?
        && split_head(&copy).is_some()
        && is_twin(&found, &copy)
    {
        file.write_all_at(&copy, 0)?;
        found = copy;
    }
    match split_head(&found) {
        // The head is written last: it is missing until the rest exists.
        None if found == [0; HEAD_LEN as usize] => Ok(None),
        None => Err(JournalError::Damaged(0)),
        head => Ok(head),
    }
}

fn head_at(file: &File, at: u64) -> io::Result<Option<[u8; HEAD_LEN as usize]>> {
    let mut found = [0; HEAD_LEN as usize];
    match file.read_exact_at(&mut found, at) {
        Ok(()) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn split_head(found: &[u8; HEAD_LEN as usize]) -> Option<(u64, u128)> {
    let (mut generation, mut content) = ([0; 8], [0; 16]);
    generation.copy_from_slice(&found[16..24]);
    content.copy_from_slice(&found[24..40]);
    let (generation, content) = (u64::from_le_bytes(generation), u128::from_le_bytes(content));
    (*found == head(generation, content)).then_some((generation, content))
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
        /// Against a list: after any changes, the next life reads the same grants, in the order of creation.
        #[test]
        fn the_next_life_knows_what_this_one_did(steps in prop::collection::vec((any::<bool>(), 1_u128..6, 1_u64..9), 1..120)) {
            let mut journal = Journal::create(files(), 7).unwrap();
            let mut model: Vec<(GrantId, u64)> = Vec::new();
            for (put, id, epoch) in steps {
                let id = GrantId::from_u128(id);
                if put {
                    // The entries are long, so that the files take turns.
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
    fn a_torn_end_is_an_unpublished_change() {
        let mut journal = Journal::create(files(), 7).unwrap();
        let id = GrantId::from_u128(1);
        journal.put(grant(id, 1, 0)).unwrap();
        let end = journal.end;
        journal.put(grant(id, 2, 0)).unwrap();
        let file = journal.files[journal.active].try_clone().unwrap();
        let mut last = vec![0; (journal.end - end) as usize];
        file.read_exact_at(&mut last, end).unwrap();
        let once = end + (journal.end - end) / 2;
        for torn in end..journal.end {
            file.write_all_at(&last, end).unwrap();
            file.set_len(torn).unwrap();
            // No client has learned of the change, so either state is right.
            let epoch = if torn < once { 1 } else { 2 };
            assert_eq!(told(&journal).unwrap(), [(id, epoch)], "{torn}");
        }
    }

    #[test]
    fn a_compaction_that_did_not_end_changes_nothing() {
        let mut journal = Journal::create(files(), 7).unwrap();
        let id = GrantId::from_u128(1);
        journal.put(grant(id, 1, 0)).unwrap();
        let other = journal.files[1 - journal.active].try_clone().unwrap();
        other.set_len(0).unwrap();
        append(&other, HEAD_LEN, b"half").unwrap();
        assert_eq!(told(&journal).unwrap(), [(id, 1)]);
    }

    fn active(journal: &Journal) -> File {
        journal.files[journal.active].try_clone().unwrap()
    }

    fn flip(file: &File, bit: u64) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, bit / 8).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
    }

    #[test]
    fn a_flipped_bit_loses_no_data() {
        let mut journal = Journal::create(files(), 7).unwrap();
        journal.put(grant(GrantId::from_u128(1), 1, 0)).unwrap();
        journal.put(grant(GrantId::from_u128(2), 1, 0)).unwrap();
        journal.delete(GrantId::from_u128(1)).unwrap();
        journal.put(grant(GrantId::from_u128(3), 2, 0)).unwrap();
        let (expected, digest) = (told(&journal).unwrap(), journal.digest().unwrap());
        assert_eq!(expected, [(GrantId::from_u128(2), 1), (GrantId::from_u128(3), 2)]);
        for bit in (0..8 * journal.end).step_by(3) {
            flip(&active(&journal), bit);
            assert_eq!(told(&journal).unwrap(), expected, "bit {bit}");
            assert_eq!(journal.digest().unwrap(), digest, "bit {bit} is as it was again");
        }
    }

    /// A journal as an earlier version of the program wrote it: each entry once, and two heads.
    fn of_before(entries: &[Entry]) -> Journal {
        let journal = Journal::create(files(), 7).unwrap();
        let file = active(&journal);
        let mut end = HEAD_LEN;
        for entry in entries {
            let text = serde_json::to_vec(entry).unwrap();
            let after = append(&file, end, &text).unwrap();
            end += (after - end) / 2;
        }
        file.set_len(end).unwrap();
        let other = &journal.files[1 - journal.active];
        other.set_len(0).unwrap();
        other.write_all_at(&head(0, 7), 0).unwrap();
        Journal { end, ..journal }
    }

    #[test]
    fn an_old_journal_is_read_and_a_damaged_entry_loses_its_grant_only() {
        let id = GrantId::from_u128;
        let put = |number, epoch| Entry::Put(grant(id(number), epoch, 0));
        let journal = || of_before(&[put(1, 1), put(2, 1), put(1, 2), put(3, 1)]);
        let whole = journal();
        let expected = [(id(1), 2), (id(2), 1), (id(3), 1)];
        assert_eq!(told(&whole).unwrap(), expected);
        let mut renewed = Journal::open(again(&whole), 7).unwrap().0;
        renewed.renew().unwrap();
        assert_eq!(told(&renewed).unwrap(), expected);
        // Testing all bits would take too long.
        for bit in (8 * HEAD_LEN..8 * whole.end).step_by(11) {
            let damaged = journal();
            flip(&active(&damaged), bit);
            let (_, content) = Journal::open(again(&damaged), 7).unwrap();
            let found: Vec<_> = content.grants.iter().map(|grant| (grant.id, grant.epoch.0)).collect();
            assert!(found.iter().all(|one| expected.contains(one)), "bit {bit} brings {found:?} back");
            for (known, _) in expected {
                let there = found.iter().any(|(id, _)| *id == known);
                let said = content.damaged.iter().any(|(id, _)| *id == known);
                // A grant whose entry was never read is not known to be missing.
                assert!(there != said || known != id(1), "bit {bit}: {known}");
            }
        }
        let damaged = journal();
        flip(&active(&damaged), 3);
        assert!(matches!(told(&damaged), Err(JournalError::Damaged(0))), "not the older file in its place");
    }

    #[test]
    fn a_journal_of_another_content_is_refused() {
        let journal = Journal::create(files(), 7).unwrap();
        assert!(matches!(Journal::open(again(&journal), 8), Err(JournalError::Other)));
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
    fn the_digest_covers_the_valid_entries() {
        let mut journal = Journal::create(files(), 7).unwrap();
        journal.put(grant(GrantId::from_u128(1), 1, 0)).unwrap();
        let sealed = journal.seal().unwrap();
        assert_eq!(Journal::open(again(&journal), 7).unwrap().0.digest().unwrap(), sealed);
        journal.put(grant(GrantId::from_u128(1), 2, 0)).unwrap();
        assert_ne!(journal.digest().unwrap(), sealed);
    }
}
