//! Serving grants as shared memory, to clients on the same host.

use xpm_protocol::{GrantKey, Visitor};
use xpm_transport::shm::server::{ShmExport, ShmExports};

use crate::regions::Table;

/// The grants of a table, as memory that is passed to clients.
pub struct SharedGrants(pub Table);

impl ShmExports for SharedGrants {
    fn open(&self, key: &GrantKey) -> Option<ShmExport> {
        let (grant, regions) = self.0.open_shared(key)?;
        Some(ShmExport { group: grant.as_u128(), regions })
    }

    fn admit(&self, key: &GrantKey, visitor: Option<&Visitor>) -> Result<(), String> {
        let grant = visitor.and_then(|visitor| Some((self.0.open(key)?.grant(), visitor)));
        grant.map_or(Ok(()), |(grant, visitor)| self.0.admit(grant, visitor))
    }
}
