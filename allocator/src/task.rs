//! Tasks that run instead of the daemon: metadata are restored, recovered, or moved to another place. A task has its
//! store for itself: a file is locked, and on etcd the task becomes the leader.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use tokio::runtime::Handle as Runtime;
use xpm_protocol::api::allocator::MetadataState;

use crate::config::{Config, Storage, Task};
use crate::etcd::{Address, Election, Etcd, Seen};
use crate::recover::{self, Sources};
use crate::store::backup::Backup;
use crate::store::etcd::EtcdStore;
use crate::store::redb::{FILE_NAME, RedbStore};
use crate::store::{Change, Loaded, MetadataStore, StoreError};

/// How long a task waits to become the leader; the lease of a killed allocator runs out sooner.
const OFFICE_LIMIT: Duration = Duration::from_secs(6);
/// The leader's name during a task, in place of a URL.
const OFFICE_NAME: &str = "a task of xpm-allocator";
/// Distance in batch numbers by which rebuilt metadata are ahead of every state that others may have heard of.
const AHEAD: u64 = 1 << 20;

/// Carries out a task.
///
/// # Errors
/// When the task fails. Then nothing has changed, unless the message says otherwise.
pub(crate) async fn carry_out(task: &Task, config: &Config) -> anyhow::Result<()> {
    let storage = &config.storage;
    match task {
        Task::Restore { file, accept_loss } => restore(file, *accept_loss, storage).await,
        Task::Recover { appliances, client_state, partial } => {
            let sources = Sources {
                appliances: appliances.clone(),
                client_state: client_state.clone(),
                partial: *partial,
                token: config.token()?,
                ..Sources::default()
            };
            recover(sources, storage).await
        }
        Task::Migrate { to } => migrate(storage, &place(to)?).await,
    }
}

async fn restore(file: &Path, accept_loss: bool, storage: &Storage) -> anyhow::Result<()> {
    let mut backup = Backup::read(file)?;
    if let Some(state) = backup.metadata.as_mut().filter(|_| accept_loss) {
        state.number = state.number.saturating_add(1 << 32);
    }
    let allocations = backup.allocations.len();
    with_store(storage, move |store| backup.restore(store)).await?;
    println!("{allocations} allocations are in {storage}");
    Ok(())
}

/// Replaces the present metadata by what the network knows. Documents and appliances are kept as far as they can be
/// read, and so are keys that are still valid.
async fn recover(mut sources: Sources, storage: &Storage) -> anyhow::Result<()> {
    let unix = now();
    let kept = set_aside(storage, unix).await?;
    let there = match with_store(storage, |store| Ok(store.load()?)).await {
        Ok(there) => there,
        Err(error) => {
            let damaged = matches!(
                error.downcast_ref::<StoreError>(),
                Some(StoreError::Damaged { .. } | StoreError::Database { .. } | StoreError::Gone { .. })
            );
            if !damaged {
                return Err(error);
            }
            make_room(storage, &error)?;
            println!("the present metadata cannot be read, and are not used: {error:#}");
            Loaded::default()
        }
    };
    check_named(&there, &sources)?;
    let known = there.allocations.iter().map(|record| record.id).collect::<Vec<_>>();
    for record in &there.allocations {
        let keys = record.known_grants().map(|grant| (grant.id, (record.epoch, grant.key.clone())));
        sources.keys.extend(keys);
    }
    let recovered = recover::recover(&sources, unix).await?;
    recovered.lines.iter().for_each(|line| println!("{line}"));
    let mut backup = recovered.backup;
    backup.metadata = newest(there.state, &recovered.heard);
    if there.revision > 0 {
        println!("documents are as they were before");
    }
    backup.written = there.written;
    (backup.documents, backup.revision, backup.appliances) =
        (there.documents, there.revision, there.appliances);
    let allocations = backup.allocations.len();
    with_store(storage, move |store| {
        let mut batch: Vec<Change> = known.into_iter().map(Change::AllocationGone).collect();
        batch.extend(backup.into_batch());
        Ok(store.commit(&[batch])?)
    })
    .await?;
    if let Some(kept) = kept {
        println!("the earlier metadata are kept in {}", kept.display());
    }
    println!("{allocations} allocations are in {storage}");
    Ok(())
}

/// Requires all known appliances to be named: the grants of an appliance that is not asked would count as garbage,
/// and be freed.
fn check_named(there: &Loaded, sources: &Sources) -> anyhow::Result<()> {
    let named = |url: &str| sources.appliances.iter().any(|one| one.trim_end_matches('/') == url);
    let missing = there.appliances.iter().map(|one| &one.info).find(|info| !named(&info.control));
    match missing.filter(|_| !sources.partial) {
        Some(info) => bail!(
            "appliance {} at {} is known, and not named, and nothing was changed: give it with --from-network, or go on with --partial, \
             without what it has",
            info.name,
            info.control
        ),
        None => Ok(()),
    }
}

/// The state to continue from: that of the pool that most appliances know, or else that of the present metadata.
fn newest(there: Option<MetadataState>, heard: &[MetadataState]) -> Option<MetadataState> {
    let mut count: BTreeMap<_, usize> = BTreeMap::new();
    heard.iter().for_each(|state| *count.entry(state.pool).or_default() += 1);
    let known = count.into_iter().max_by_key(|(_, count)| *count).map(|(pool, _)| pool);
    let pool = known.or(there.map(|state| state.pool))?;
    let numbers = heard.iter().chain(&there).filter(|state| state.pool == pool).map(|state| state.number);
    Some(MetadataState { pool, number: numbers.max().unwrap_or(0).saturating_add(AHEAD) })
}

/// Copies everything to an empty place, and leaves a note at the old place so that no allocator is started on it by
/// mistake.
async fn migrate(from: &Storage, to: &Storage) -> anyhow::Result<()> {
    ensure!(from != to, "the metadata are in {from} already");
    if let Storage::Data(directory) = from {
        let file = directory.join(FILE_NAME);
        ensure!(file.exists(), "there are no metadata in {}", directory.display());
    }
    let target = to.clone();
    let (allocations, state) = with_store(from, move |source| {
        let loaded = source.load()?;
        let (allocations, alive, state) = (loaded.allocations.len(), loaded.alive, loaded.state);
        let decisions = source.all_decisions()?;
        let backup = Backup::new(alive.unwrap_or_else(now), loaded);
        let copied = with_store(&target, move |store| {
            backup.restore(store)?;
            for part in decisions.chunks(256) {
                let changes =
                    part.iter().map(|(number, one)| Change::Decision(*number, Box::new(one.clone())));
                store.commit(&[changes.collect()])?;
            }
            Ok(())
        });
        Runtime::current().block_on(copied)?;
        Ok((allocations, state))
    })
    .await?;
    // The old place counts as outdated from now on: an allocator that is started on it learns that from the
    // appliances.
    let ahead = state.map(|state| MetadataState { number: state.number.saturating_add(AHEAD), ..state });
    with_store(to, move |store| Ok(store.commit(&[ahead.map(Change::State).into_iter().collect()])?)).await?;
    println!(
        "{allocations} allocations are in {to} now. Start the allocator there, with the same options otherwise; {from} is \
         unchanged, and outdated from now on"
    );
    Ok(())
}

/// A place as on the command line: `etcd://...` or a directory.
fn place(text: &str) -> anyhow::Result<Storage> {
    if text.starts_with("etcd://") {
        let address: Address = text.parse().context("--to")?;
        return Ok(Storage::Etcd { address, advertise: None });
    }
    Ok(Storage::Data(PathBuf::from(text)))
}

/// Does some work with a store that no other process has meanwhile.
async fn with_store<T: Send + 'static>(
    storage: &Storage,
    work: impl FnOnce(&mut dyn MetadataStore) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    match storage {
        Storage::Data(directory) => {
            let directory = directory.clone();
            let done = tokio::task::spawn_blocking(move || work(&mut RedbStore::open(&directory)?));
            done.await.context("the task broke down")?
        }
        Storage::Etcd { address, .. } => {
            let election = Election::new(Etcd::new(address.clone()).await?, OFFICE_NAME.to_owned());
            let mut seen = None;
            let campaign = election.campaign(|now| seen = Some(now));
            let Ok(term) = tokio::time::timeout(OFFICE_LIMIT, campaign).await else {
                match seen {
                    Some(Seen::Leader(url)) => {
                        bail!("the allocator at {url} uses {address}: stop every allocator first")
                    }
                    Some(Seen::Trouble(error)) => return Err(error.into()),
                    _ => bail!("{address} does not answer: check that most of its members run"),
                }
            };
            let (etcd, revision) = (election.etcd().clone(), term.revision());
            let done = tokio::task::spawn_blocking(move || {
                work(&mut EtcdStore::open(etcd, revision, &Runtime::current())?)
            });
            let done = tokio::select! {
                done = done => done.context("the task broke down")?,
                reason = election.keep(&term) => Err(anyhow::anyhow!("{address}: {reason}")),
            };
            election.resign().await;
            done
        }
    }
}

/// Keeps a copy of a file that is going to be changed.
async fn set_aside(storage: &Storage, unix: u64) -> anyhow::Result<Option<PathBuf>> {
    let Storage::Data(directory) = storage else { return Ok(None) };
    let file = directory.join(FILE_NAME);
    if !file.exists() {
        return Ok(None);
    }
    // The file is locked while an allocator runs on it. The check does not open the database, since a damaged one may
    // not open.
    RedbStore::check_unused(directory)?;
    let copy = directory.join(format!("{FILE_NAME}.before-recovery-{unix}"));
    std::fs::copy(&file, &copy)
        .with_context(|| format!("cannot copy {} to {}", file.display(), copy.display()))?;
    Ok(Some(copy))
}

/// Removes an unreadable file; a copy of it was kept.
fn make_room(storage: &Storage, error: &anyhow::Error) -> anyhow::Result<()> {
    match storage {
        Storage::Data(directory) => RedbStore::clear(directory)
            .with_context(|| format!("cannot clear {}: {error:#}", directory.display())),
        Storage::Etcd { .. } => bail!("{error:#}"),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
