//! Stores: where the allocator keeps its metadata.
//!
//! The service decides on changes; a store makes whole batches of them durable. `docs/metadata.md` describes the
//! stored form.

pub mod backup;
pub mod etcd;
mod guard;
pub mod memory;
pub mod record;
pub mod redb;
#[cfg(test)]
mod suite;
mod writer;

use std::fmt;
use std::path::{Path, PathBuf};

use xpm_protocol::api::allocator::{Event, MetadataState};
use xpm_protocol::api::decision::Decision;
use xpm_protocol::api::policy::Written;
use xpm_protocol::policy::{DocumentName, Documents};
use xpm_protocol::{AllocationId, ApplianceId, Name, PoolId};

pub use record::{AllocationRecord, ApplianceRecord};
pub use writer::{Tell, Writer};

/// Version of the stored form. A store of a newer version is refused.
///
/// - 1: tables `meta`, `allocations`, `appliances`; values in JSON.
/// - 2: tables `documents` and `decisions`; allocations have terms. A store of schema 1 is read as without documents
///   and decisions, and its allocations as without terms.
/// - 3: allocations have a map version, changes and a change; grants have the grant that they take over from;
///   appliances have a drain. A store of schema 2 is read as without any of these.
/// - 4: allocations have named slabs. A store of schema 3 is read as without any.
/// - 5: values in the file end with a checksum. Values of an older file get theirs at the first start. Allocations
///   have a block size, appliances that are given up, a client that stands by, and a hand-over; appliances may be
///   given up.
pub const SCHEMA: u64 = 5;

/// From this schema on values in the file have a checksum.
const SCHEMA_SEALED: u64 = 5;

/// A change of the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The new record of an allocation.
    Allocation(Box<AllocationRecord>),
    /// The allocation is gone.
    AllocationGone(AllocationId),
    /// The new record of an appliance.
    Appliance(Box<ApplianceRecord>),
    /// The appliance is gone.
    ApplianceGone(ApplianceId),
    /// Documents changed, and with them the revision.
    Policy(Box<PolicyChange>),
    /// A decision was made. The number orders the decisions about one name: the moment in seconds
    /// since 1970 times 2^20, and a count.
    Decision(u64, Box<Decision>),
    /// A new event.
    Event(Box<Event>),
    /// The event of this number is deleted.
    EventGone(u64),
    /// Decisions that were made before this moment, seconds since 1970, are deleted.
    DecisionsBefore(u64),
    /// The allocator was running at this moment, seconds since 1970. The time from then until it runs again counts as
    /// absence.
    Alive(u64),
    /// The metadata have this state now: they were restored or recovered.
    State(MetadataState),
}

/// A change of documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyChange {
    /// The revision afterwards.
    pub revision: u64,
    /// Documents that are new or different, each with its version.
    pub changed: Documents,
    /// Documents that are gone, with their texts.
    pub gone: Vec<DocumentName>,
    /// Texts of documents that are new or different.
    pub written: Vec<Written>,
}

/// Changes that become durable together or not at all.
pub type Batch = Vec<Change>;

/// All stored metadata, except decisions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Every allocation, including those being made or deleted.
    pub allocations: Vec<AllocationRecord>,
    /// Every appliance.
    pub appliances: Vec<ApplianceRecord>,
    /// Every document.
    pub documents: Documents,
    /// The revision of the documents.
    pub revision: u64,
    /// When the allocator was running last, seconds since 1970; unknown if an older program wrote the store.
    pub alive: Option<u64>,
    /// Texts of documents, including those of outdated versions.
    pub written: Vec<Written>,
    /// Events that are kept, in no particular order. Unreadable events are left out.
    pub events: Vec<Event>,
    /// Id of the metadata, and the number of committed batches. Each batch of [`MetadataStore::commit`] counts.
    pub state: Option<MetadataState>,
}

/// An id for metadata without one.
fn new_pool(path: &Path) -> Result<PoolId, StoreError> {
    let random = xpm_control::random::u128();
    random.map(PoolId::from_u128).map_err(|source| StoreError::Directory { path: path.to_owned(), source })
}

/// A store of metadata. Its methods block.
pub trait MetadataStore: Send + 'static {
    /// Reads everything except decisions.
    fn load(&mut self) -> Result<Loaded, StoreError>;

    /// Makes the batches durable, in order, all together. After an error it is unknown whether they are durable, and
    /// the store must not be written again before it is opened anew.
    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError>;

    /// Makes the store fit for writing again after [`Self::commit`] failed with a passing error
    /// ([`StoreError::passing`]). Then the same batches can be committed again.
    fn reopen(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    /// If the store was opened read-only: the reason.
    fn is_read_only(&self) -> Option<String> {
        None
    }

    /// Every recorded decision with its number.
    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError>;

    /// A reader of decisions, for use while another thread writes.
    fn decisions(&self) -> Box<dyn Decisions>;
}

/// Reads recorded decisions. Its methods block.
pub trait Decisions: fmt::Debug + Send + Sync {
    /// The newest `most` decisions about a name, the newest first.
    fn about(&self, name: &Name, most: usize) -> Result<Vec<Decision>, StoreError>;
}

/// Why metadata cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be used.
    #[error(
        "cannot use the data directory {path}; it must be writable for this user, or name another with --data"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process has the store open.
    #[error("another allocator uses {path}; stop that one, or name another directory with --data")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A newer program wrote the store.
    #[error(
        "{path} was written by a newer xpm-allocator (schema {found}, this one knows {known}); nothing was changed; start \
         the newer program"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u64,
        /// The newest schema that this program knows.
        known: u64,
    },
    /// There is no room to write. This may pass.
    #[error("{why}")]
    Full {
        /// The place, and the remedy.
        why: String,
    },
    /// The file of a pool is missing.
    #[error(
        "{path} is gone, and {mark} says that a pool was made there: restore it, make it anew with `xpm-allocator recover \
         --from-network URL...`, or remove {mark} where a new pool is to begin"
    )]
    Gone {
        /// The file.
        path: PathBuf,
        /// The file that says that a pool was made.
        mark: PathBuf,
    },
    /// The database failed.
    #[error(
        "cannot {doing} {path}; if it is damaged, `xpm-allocator recover --from-network URL...` makes it anew from what appliances \
         know"
    )]
    Database {
        /// The failed action: `open`, `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<::redb::Error>,
    },
    /// etcd did not carry out a request.
    #[error("cannot {doing} the metadata")]
    Etcd {
        /// The failed action: `read`, `write`.
        doing: &'static str,
        /// Why.
        source: Box<crate::etcd::EtcdError>,
    },
    /// Another allocator is the leader. Nothing was written.
    #[error("another allocator leads now, by {store}: this one writes no more")]
    Deposed {
        /// The address of etcd.
        store: String,
    },
    /// A value is not in the form that this program writes.
    #[error(
        "{path} is damaged: {what}; `xpm-allocator recover --from-network URL...` makes the metadata anew from what appliances \
         know, or restore a backup"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The place and the damage.
        what: String,
    },
}

impl StoreError {
    /// Why nothing can be written now, if the error may pass by itself.
    pub fn passing(&self) -> Option<String> {
        match self {
            StoreError::Full { why } => Some(why.clone()),
            StoreError::Etcd { source, .. } if source.is_silent() => {
                Some(format!("the allocator waits for its metadata: {}", xpm_control::error_line(source)))
            }
            _ => None,
        }
    }
}
