//! State that outlives the process: the lent memory, and the grants that say which client it belongs to.
//!
//! A client knows its memory by the key of a grant only: an appliance that knows the key has the data. So a
//! grant is taken back only when its record and all of its memory are those of the last moment of the
//! previous life; otherwise neither is taken back, and the grant's clients learn that it is unknown.
//!
//! * The service manager keeps memfds and their record, which consists of two memfds, too (`vault`). They are
//!   added and removed together: no record outlives its memory.
//! * A backing file and its record, two files in the state directory, are bound by the content's number in
//!   the file's superblock. They are valid while the same kernel runs, since its page cache has all written
//!   data, or when the file was closed.
//!
//! Each change of a grant is recorded before a client learns of it, and before the memory is used for another
//! purpose: a life that ends at any moment leaves either the state before the change or the state after it.

mod journal;
mod record;
mod vault;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::MemfdFlags;
use xpm_control::handed;
use xpm_control::manager::Manager;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{GrantId, RegionId, Visitor};

use self::journal::{Content, Journal, JournalError};
pub(crate) use self::record::{Condition, MemfdId, SavedGrant, SavedPlace, SavedRegion};
pub(crate) use self::vault::{Stored, Vault};
use crate::arena::{self, Arena, BackingFile, Left, Memory, Superblock};
use crate::ledger::Grant;

/// Names of the record's memfds in the store, and also the suffixes of the memfds' own names.
const LEDGERS: [&str; 2] = ["ledger-0", "ledger-1"];
/// Prefix of the names of the record's memfds.
const LEDGER_PREFIX: &str = "/memfd:xpm-";
/// The content's number of a record that is stored together with its memory.
const MEMFDS: u128 = 0;
/// Names of the record's files.
const FILES: [&str; 2] = ["grants-0", "grants-1"];

/// Errors of keeping state that must not be ignored.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// No random number.
    #[error("cannot get a random number")]
    Random(#[source] io::Error),
    /// The running kernel's id is unknown.
    #[error("cannot determine the running kernel, and so whether the content of a file is complete")]
    Kernel(#[source] io::Error),
    /// The file would count as closed while it is in use.
    #[error("cannot write the superblock of {path}: an incomplete content would later be taken for complete")]
    Superblock {
        /// The backing file.
        path: std::path::PathBuf,
        /// The error of the write.
        source: io::Error,
    },
}

/// Records grants for the next life.
pub struct Keeper {
    journal: Mutex<Option<Journal>>,
    vault: Option<Arc<Vault>>,
    file: Option<Arc<BackingFile>>,
}

/// The state that was taken back from the previous life.
#[derive(Default)]
pub struct Returned {
    /// Grants, in the order in which they were made.
    pub(crate) grants: Vec<ReturnedGrant>,
    /// Grants that were deleted.
    pub(crate) gone: Vec<GrantId>,
    /// Lines for the operator.
    pub(crate) warnings: Vec<String>,
}

/// A grant that was taken back.
pub(crate) struct ReturnedGrant {
    pub(crate) id: GrantId,
    pub(crate) grant: Grant,
    pub(crate) memories: Vec<(RegionId, Arc<Memory>)>,
    /// Whether the grant admits no client.
    pub(crate) closed: bool,
    /// The life of its owner that holds it.
    pub(crate) holder: Option<Visitor>,
}

/// The descriptors that the service manager passed at the start.
#[derive(Default)]
pub struct Handed {
    regions: HashMap<MemfdId, (String, OwnedFd)>,
    ledgers: [Option<OwnedFd>; 2],
    /// Whether two descriptors have the same identity, so that one of them is outdated.
    is_ambiguous: bool,
    /// Descriptors that do not belong to an appliance: their names in the store, and what they are.
    strangers: Vec<(String, String)>,
}

impl Handed {
    /// Takes the descriptors. To be called once, before this process opens any descriptor.
    pub fn take() -> Handed {
        Handed::sort(handed::take())
    }

    fn sort(descriptors: Vec<(String, OwnedFd)>) -> Handed {
        let mut handed = Handed::default();
        for (name, descriptor) in descriptors {
            let target = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
            let target = target.map_or_else(|error| error.to_string(), |path| path.display().to_string());
            let ledger = LEDGERS.iter().position(|ledger| {
                target.strip_prefix(LEDGER_PREFIX).and_then(|rest| rest.strip_suffix(" (deleted)"))
                    == Some(*ledger)
                    && name == *ledger
            });
            match (arena::memfd_id(&target), ledger) {
                (Some(id), _) if !handed.regions.contains_key(&id) => {
                    handed.regions.insert(id, (name, descriptor));
                }
                (None, Some(index)) => {
                    handed.is_ambiguous |= handed.ledgers[index].replace(descriptor).is_some();
                }
                _ => handed.strangers.push((name, target)),
            }
        }
        handed
    }

    /// The memory that the descriptors hold, in bytes.
    pub fn held(&self) -> u64 {
        let blocks = |(_, fd): &(String, OwnedFd)| rustix::fs::fstat(fd).map_or(0, |stat| stat.st_blocks);
        self.regions.values().map(|region| blocks(region).cast_unsigned() * 512).sum()
    }
}

impl Keeper {
    /// A keeper that keeps nothing.
    pub fn none() -> Keeper {
        Keeper { journal: Mutex::new(None), vault: None, file: None }
    }

    /// Takes back the state that an earlier life left, as far as it is complete, and records changes from now
    /// on. Losses are logged.
    ///
    /// # Errors
    /// When the state recorded from now on could be mistaken for another one.
    pub fn open(
        arena: &Arena,
        state: &Path,
        manager: Option<Arc<Manager>>,
        handed: Handed,
    ) -> Result<(Keeper, Returned), KeepError> {
        let most = std::env::var("FDSTORE").ok().and_then(|most| most.parse::<u32>().ok());
        let vault = manager.map(|manager| Vault::new(manager, most.map(|most| most.saturating_sub(2))));
        tell_strangers(&handed.strangers);
        match (arena.file(), vault) {
            (Some(file), vault) => {
                if let Some(vault) = vault {
                    vault.forget(handed);
                }
                of_file(arena, file.clone(), state)
            }
            (None, Some(vault)) => Ok(of_memfds(arena, vault, handed)),
            (None, None) => Ok((Keeper::none(), Returned::default())),
        }
    }

    /// Whether state outlives the process.
    pub fn keeps(&self) -> bool {
        self.lock().is_some()
    }

    /// The store of the regions' memfds.
    pub(crate) fn vault(&self) -> Option<&Arc<Vault>> {
        self.vault.as_ref()
    }

    /// From now on, dropped memory is removed from the store: by now all memory in use is known.
    pub fn begin(&self) {
        if let Some(vault) = &self.vault {
            vault.let_go(true);
        }
    }

    /// Called when the process ends: dropped memory is no longer removed from the store.
    pub fn end(&self) {
        if let Some(vault) = &self.vault {
            vault.let_go(false);
        }
    }

    /// Marks the backing file as closed, when no client writes to it any more. Returns whether its content
    /// survives a restart of the machine.
    ///
    /// # Errors
    /// When the disk does not store the data.
    pub fn close(&self) -> io::Result<bool> {
        let journal = self.lock();
        let Some((journal, file)) = journal.as_ref().zip(self.file.as_ref()) else { return Ok(false) };
        let left = Left::Closed(journal.seal()?);
        file.set_superblock(Superblock { content: journal.content(), left })
    }

    /// Records the present state of a grant. To be called before a client learns of it.
    pub(crate) fn put(&self, grant: SavedGrant) {
        self.change(|journal| journal.put(grant));
    }

    /// Records that a grant was deleted, or is not kept. To be called before its memory is used for another
    /// purpose.
    pub(crate) fn delete(&self, id: GrantId) {
        self.change(|journal| journal.delete(id));
    }

    /// A record that lacks a change could give one client's memory to another. So when a change cannot be
    /// written, the record is destroyed.
    fn change(&self, change: impl FnOnce(&mut Journal) -> io::Result<()>) {
        let mut guard = self.lock();
        let Some(journal) = guard.as_mut() else { return };
        if let Err(error) = change(journal) {
            tracing::error!(
                "the record of lent memory cannot be written ({error}): lent memory does not outlive this \
                 process"
            );
            // Each of these steps alone makes the record invalid.
            let content = !journal.content();
            let destroyed = journal.destroy();
            let renamed = self
                .file
                .as_ref()
                .map_or(Ok(true), |file| file.set_superblock(Superblock { content, left: Left::Open(0) }));
            LEDGERS.iter().for_each(|name| self.vault.iter().for_each(|vault| vault.remove(name)));
            if let (Err(error), Err(_)) = (destroyed, renamed) {
                tracing::error!(
                    "remove {FILES:?} in the state directory before this appliance is started again: {error}"
                );
            }
            *guard = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Journal>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vault {
    /// Removes all descriptors that were passed from the store.
    fn forget(&self, handed: Handed) {
        let held = handed.held();
        if !handed.regions.is_empty() {
            tracing::warn!(
                "{} is lost that this appliance lent as memfds before: `--backing` is a file now",
                ByteSize(held)
            );
        }
        let Handed { regions, strangers, ledgers, .. } = handed;
        let regions = regions.into_values().map(|(name, _)| name);
        regions.chain(strangers.into_iter().map(|(name, _)| name)).for_each(|name| self.remove(&name));
        for (name, ledger) in LEDGERS.into_iter().zip(ledgers) {
            ledger.iter().for_each(|_| self.remove(name));
        }
    }
}

fn tell_strangers(strangers: &[(String, String)]) {
    if let Some((name, target)) = strangers.first() {
        tracing::warn!(
            "the service manager handed over {} descriptors that are no memory of an appliance's (`{name}` is {target}): \
             they are let go",
            strangers.len()
        );
    }
}

/// Takes back memfds and their record, which are stored and removed together.
fn of_memfds(arena: &Arena, vault: Arc<Vault>, mut handed: Handed) -> (Keeper, Returned) {
    let held = handed.held();
    let mut names: HashMap<MemfdId, String> =
        handed.regions.iter().map(|(id, (name, _))| (*id, name.clone())).collect();
    let journal = match std::mem::take(&mut handed.ledgers) {
        [Some(first), Some(second)] if !handed.is_ambiguous => {
            Journal::open([first.into(), second.into()], MEMFDS)
        }
        [None, None] => Err(JournalError::Missing),
        _ => Err(JournalError::Damaged(0)),
    };
    let (journal, content) = match journal {
        Ok((mut journal, content)) => {
            renew(&mut journal);
            (Some(journal), content)
        }
        Err(error) => {
            if !names.is_empty() {
                tracing::warn!(
                    "{} is lost that the service manager kept for this appliance: {}",
                    ByteSize(held),
                    xpm_control::error_line(&error)
                );
            }
            (None, Content::default())
        }
    };
    let warnings = tell_damaged(&content);
    let (returned, lost) = take_back(content, |region| match region.place {
        SavedPlace::File(_) => Err("it lies in a file".to_owned()),
        SavedPlace::Memfd(id) => {
            let (name, fd) =
                handed.regions.remove(&id).ok_or("the service manager did not keep all of its memory")?;
            arena.take_back((id, fd), region.len, region.shared, vault.taken_back(&name))
        }
    });
    for (_, memory) in returned.grants.iter().flat_map(|grant| &grant.memories) {
        memory.memfd().and_then(|id| names.remove(&id));
    }
    // The remaining memfds are in no grant.
    let strangers = handed.strangers.iter().map(|(name, _)| name);
    // Removing the name of the record would remove the record, too.
    let strangers = strangers.filter(|name| !LEDGERS.contains(&name.as_str()));
    names.values().chain(strangers).for_each(|name| vault.remove(name));
    let journal = journal.map_or_else(|| new_memfds(&vault), Ok);
    let journal = journal.inspect_err(|error| {
        tracing::warn!("what is lent does not outlive this process: {}", xpm_control::error_line(error));
    });
    let keeper = Keeper { journal: Mutex::new(journal.ok()), vault: Some(vault), file: None };
    lost.into_iter().for_each(|id| keeper.delete(id));
    (keeper, Returned { warnings, ..returned })
}

fn new_memfds(vault: &Vault) -> Result<Journal, JournalError> {
    let make = |name: &str| -> io::Result<File> {
        let memfd = arena::open_memfd(&format!("xpm-{name}"), MemfdFlags::empty())?;
        vault.replace(name, &memfd)?;
        Ok(memfd.into())
    };
    let [first, second] = LEDGERS;
    Journal::create([make(first)?, make(second)?], MEMFDS)
}

/// Takes back a backing file and its record in the state directory.
fn of_file(arena: &Arena, file: Arc<BackingFile>, state: &Path) -> Result<(Keeper, Returned), KeepError> {
    let kernel = xpm_control::host::host_id().map_err(KeepError::Kernel)?.as_u128();
    let found = file.superblock();
    let opened = found.map(|found| {
        let (journal, content) = Journal::open(open_files(state)?, found.content)?;
        match found.left {
            Left::Open(of) if of != kernel => Err(JournalError::NotClosed),
            Left::Closed(digest) if journal.digest()? != digest => Err(JournalError::Other),
            Left::Open(_) | Left::Closed(_) => Ok((journal, content)),
        }
    });
    let opened = opened.and_then(|opened| {
        let told = |error: &JournalError| {
            let (path, why) = (file.path().display(), xpm_control::error_line(error));
            tracing::warn!("the memory that this appliance lent in {path} before is lost: {why}");
        };
        opened.inspect_err(told).ok()
    });
    let mut warnings = Vec::new();
    let (journal, returned, lost) = match opened {
        Some((mut journal, content)) => {
            renew(&mut journal);
            warnings = tell_damaged(&content);
            let (returned, lost) = take_back(content, |region| match region.place {
                SavedPlace::File(start) => arena.take_back_part(start, region.len),
                SavedPlace::Memfd(_) => Err("it lay in no file".to_owned()),
            });
            (Some(journal), returned, lost)
        }
        None => {
            let content = xpm_control::random::u128().map_err(KeepError::Random)?;
            let journal = open_files(state).map_err(JournalError::from);
            let journal = journal.and_then(|files| Journal::create(files, content)).inspect_err(|error| {
                tracing::warn!(
                    "what is lent does not outlive this process: {}",
                    xpm_control::error_line(error)
                );
            });
            (journal.ok(), Returned::default(), Vec::new())
        }
    };
    // From here on the file is in use, and no longer as it was closed; without a record, its content belongs
    // to no grant.
    let content = journal.as_ref().map_or(0, Journal::content);
    file.set_superblock(Superblock { content, left: Left::Open(kernel) })
        .map_err(|source| KeepError::Superblock { path: file.path().to_owned(), source })?;
    let keeper = Keeper { journal: Mutex::new(journal), vault: None, file: Some(file) };
    lost.into_iter().for_each(|id| keeper.delete(id));
    Ok((keeper, Returned { warnings, ..returned }))
}

/// A record that cannot be rewritten is used as it is.
fn renew(journal: &mut Journal) {
    if let Err(error) = journal.renew() {
        tracing::warn!("the record of lent memory cannot be rewritten: {error}");
    }
}

/// The lines about grants that are lost because their record is damaged. Their memory is not taken back, and
/// memory made in its place begins with zeros, so no client sees the old content.
fn tell_damaged(content: &Content) -> Vec<String> {
    let line = |(id, name): &(GrantId, xpm_protocol::Name)| {
        format!(
            "the record of grant {id} of `{name}` is damaged, so the grant is lost; its memory is cleared"
        )
    };
    let lines: Vec<String> = content.damaged.iter().map(line).collect();
    lines.iter().for_each(|line| tracing::error!("{line}"));
    lines
}

/// Mode 0600, because the files contain keys.
fn open_files(state: &Path) -> io::Result<[File; 2]> {
    let open = |name: &str| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(state.join(name))
    };
    let [first, second] = FILES;
    Ok([open(first)?, open(second)?])
}

/// The grants whose memory is complete, and the ids of the others, which are reported as lost.
fn take_back(
    content: Content,
    mut memory_of: impl FnMut(&SavedRegion) -> Result<Memory, String>,
) -> (Returned, Vec<GrantId>) {
    let mut known: HashMap<RegionId, Arc<Memory>> = HashMap::new();
    let (mut grants, mut lost, mut why) = (Vec::new(), Vec::new(), None);
    for saved in content.grants {
        let mut one = |region: &SavedRegion| match known.get(&region.id) {
            Some(memory) => Ok((region.id, memory.clone())),
            None => {
                let memory = Arc::new(memory_of(region)?);
                known.insert(region.id, memory.clone());
                Ok((region.id, memory))
            }
        };
        let memories: Result<Vec<_>, String> = match saved.condition {
            Condition::Moving => {
                Err("it was being moved away from the processes of its old owner".to_owned())
            }
            Condition::Open | Condition::Closed => saved.regions.iter().map(&mut one).collect(),
        };
        match memories {
            Ok(memories) => grants.push(returned(saved, memories)),
            Err(error) => {
                why.get_or_insert_with(|| format!("that of `{}`: {error}", saved.name));
                lost.push(saved.id);
            }
        }
    }
    if let Some(why) = why {
        tracing::warn!("{} grants of this appliance are lost ({why})", lost.len());
    }
    (Returned { grants, gone: content.gone, warnings: Vec::new() }, lost)
}

fn returned(saved: SavedGrant, memories: Vec<(RegionId, Arc<Memory>)>) -> ReturnedGrant {
    let SavedGrant { id, allocation, name, epoch, key, descriptor, condition, holder, .. } = saved;
    let regions = memories.iter().map(|(id, _)| *id).collect();
    let grant = Grant { allocation, name, epoch, key, regions, descriptor, closing: false };
    ReturnedGrant {
        id,
        grant,
        memories,
        closed: condition == Condition::Closed,
        holder: holder.map(|holder| *holder),
    }
}
