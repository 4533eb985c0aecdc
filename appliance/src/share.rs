//! Grants as shared memory, for clients on the same host.

use xpm_protocol::GrantKey;
use xpm_transport::shm::server::{ShmExport, ShmExports};

use crate::regions::Table;

/// The grants of a table, as memory to be passed.
pub struct SharedGrants(pub Table);

impl ShmExports for SharedGrants {
    fn open(&self, key: &GrantKey) -> Option<ShmExport> {
        let (grant, regions) = self.0.open_shared(key)?;
        Some(ShmExport { group: grant.as_u128(), regions })
    }
}
