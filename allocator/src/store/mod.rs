//! What the allocator remembers, and where.
//!
//! The service decides on changes; a store makes whole batches of them durable. `docs/metadata.md`
//! describes the stored form.

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

/// Version of the stored form. A store of a newer one is refused.
///
/// - 1: tables `meta`, `allocations`, `appliances`; values in JSON.
/// - 2: tables `documents` and `decisions`; allocations have terms. A store of schema 1 is read as
///   one without documents and decisions, and its allocations as without terms.
/// - 3: allocations have a map version, changes and a change, grants the one that they take over from,
///   appliances a drain. A store of schema 2 is read as one without any of these.
/// - 4: allocations have slabs with names. A store of schema 3 is read as one without any.
/// - 5: values in the file end with a checksum. Those of an older one get theirs at the first start. Allocations have a block
///   size, and appliances that are given up; appliances may be given up. Allocations have a client that stands by, and a hand-over.
pub const SCHEMA: u64 = 5;

/// From this schema on values in the file have a checksum.
const SCHEMA_SEALED: u64 = 5;

/// One change of what is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The allocation is like this now.
    Allocation(Box<AllocationRecord>),
    /// The allocation is gone.
    AllocationGone(AllocationId),
    /// The appliance is like this now.
    Appliance(Box<ApplianceRecord>),
    /// The appliance is gone.
    ApplianceGone(ApplianceId),
    /// Documents changed, and with them the revision.
    Policy(Box<PolicyChange>),
    /// A decision was made. The number orders the decisions about one name: the moment in seconds
    /// since 1970 times 2^20, and a count.
    Decision(u64, Box<Decision>),
    /// Something happened.
    Event(Box<Event>),
    /// The event of this number is forgotten.
    EventGone(u64),
    /// Decisions that were made before this moment, seconds since 1970, are forgotten.
    DecisionsBefore(u64),
    /// The allocator was there at this moment, seconds since 1970: from then on until it is there again no time counts.
    Alive(u64),
    /// The metadata are in this state now: they were restored or recovered.
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

/// All that is remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Every allocation, those being made and deleted included.
    pub allocations: Vec<AllocationRecord>,
    /// Every appliance.
    pub appliances: Vec<ApplianceRecord>,
    /// Every document.
    pub documents: Documents,
    /// The revision of the documents.
    pub revision: u64,
    /// When the allocator was there last, seconds since 1970; unknown where an older program wrote.
    pub alive: Option<u64>,
    /// Texts of documents, also of versions that are not the present ones.
    pub written: Vec<Written>,
    /// Events that are kept, in no certain order. Those that cannot be read are left out.
    pub events: Vec<Event>,
    /// Which metadata these are, and how many batches were committed. Each batch of [`MetadataStore::commit`] counts.
    pub state: Option<MetadataState>,
}

/// An id for metadata that have none.
fn new_pool(path: &Path) -> Result<PoolId, StoreError> {
    let random = xpm_control::random::u128();
    random.map(PoolId::from_u128).map_err(|source| StoreError::Directory { path: path.to_owned(), source })
}

/// Keeps metadata. Its methods block.
pub trait MetadataStore: Send + 'static {
    /// Reads everything.
    fn load(&mut self) -> Result<Loaded, StoreError>;

    /// Makes the batches durable, in order, all together. After an error it is unknown whether
    /// they are, and the store must not be written again before it is opened anew.
    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError>;

    /// Makes the store fit to be written again after [`Self::commit`] failed in a way that passes
    /// ([`StoreError::passing`]). The same batches can be committed again then.
    fn reopen(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Why it cannot be written from the start, if it cannot.
    fn is_read_only(&self) -> Option<String> {
        None
    }

    /// Every recorded decision with its number.
    fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError>;

    /// What reads decisions while another thread writes.
    fn decisions(&self) -> Box<dyn Decisions>;
}

/// Reads recorded decisions. Its methods block.
pub trait Decisions: fmt::Debug + Send + Sync {
    /// The decisions about a name, the newest first, at most so many.
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
    /// Another process has it open.
    #[error("another allocator uses {path}; stop that one, or name another directory with --data")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A newer program wrote it.
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
    /// There is no room to write. That may pass.
    #[error("{why}")]
    Full {
        /// Where, and what to do.
        why: String,
    },
    /// The file of a pool is not there.
    #[error(
        "{path} is gone, and {mark} says that a pool was made there: restore it, make it anew with `xpm-allocator recover \
         --from-network URL...`, or remove {mark} where a new pool is to begin"
    )]
    Gone {
        /// The file.
        path: PathBuf,
        /// What says so.
        mark: PathBuf,
    },
    /// The database refuses.
    #[error(
        "cannot {doing} {path}; if it is damaged, `xpm-allocator recover --from-network URL...` makes it anew from what appliances \
         know"
    )]
    Database {
        /// What was tried: `open`, `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<::redb::Error>,
    },
    /// etcd does not do what it is asked.
    #[error("cannot {doing} the metadata")]
    Etcd {
        /// What was tried: `read`, `write`.
        doing: &'static str,
        /// Why.
        source: Box<crate::etcd::EtcdError>,
    },
    /// Another allocator leads. Nothing was written.
    #[error("another allocator leads now, by {store}: this one writes no more")]
    Deposed {
        /// The address of etcd.
        store: String,
    },
    /// A value is not what this program writes.
    #[error(
        "{path} is damaged: {what}; `xpm-allocator recover --from-network URL...` makes the metadata anew from what appliances \
         know, or restore a backup"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        what: String,
    },
}

impl StoreError {
    /// Why nothing can be written now, if that may pass by itself.
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
