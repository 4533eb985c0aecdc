//! What the allocator remembers, and where.
//!
//! The service decides on changes; a store makes whole batches of them durable. `docs/metadata.md`
//! describes the stored form.

pub mod memory;
pub mod record;
pub mod redb;
mod writer;

use std::path::PathBuf;

use xpm_protocol::{AllocationId, ApplianceId};

pub use record::{AllocationRecord, ApplianceRecord};
pub use writer::Writer;

/// Version of the stored form. A store of a newer one is refused.
///
/// - 1: tables `meta`, `allocations`, `appliances`; values in JSON.
pub const SCHEMA: u64 = 1;

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
}

/// Keeps metadata. Its methods block.
pub trait MetadataStore: Send + 'static {
    /// Reads everything.
    fn load(&mut self) -> Result<Loaded, StoreError>;

    /// Makes the batches durable, in order, all together. After an error it is unknown whether
    /// they are, and the store must not be written again before it is opened anew.
    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError>;
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
    /// The database refuses.
    #[error("cannot {doing} {path}")]
    Database {
        /// What was tried: `open`, `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<::redb::Error>,
    },
    /// A value is not what this program writes.
    #[error("{path} is damaged: {what}; restore it from a copy")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        what: String,
    },
}
