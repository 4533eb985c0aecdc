//! Grants by RDMA, for clients whose reads and writes no processor of this machine sees.

use std::sync::Arc;

use xpm_protocol::{Epoch, GrantKey, Life};
use xpm_transport::IoBuf;
use xpm_transport::rdma::server::{Grants, Lent, RdmaServer};

use crate::arena::Memory;
use crate::lease::Lease;
use crate::regions::{Fence, Table};

/// The grants of a table, to be found by their keys.
pub struct RdmaGrants(pub Table);

impl Grants for RdmaGrants {
    fn find(&self, key: &GrantKey) -> Option<u128> {
        Some(self.0.open(key)?.grant().as_u128())
    }
}

/// Memory with its pages kept as they are.
struct Pinned(Arc<Memory>);

impl Pinned {
    fn lend(memory: &Arc<Memory>) -> Arc<dyn Lent> {
        memory.pin();
        Arc::new(Pinned(memory.clone()))
    }
}

impl Lent for Pinned {
    fn buffer(&self) -> IoBuf {
        // A region is as long as an address space allows: it is mapped.
        self.0.at(0, self.0.len() as usize)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.0.unpin();
    }
}

/// Registers the memory of grants that open, and revokes those that close.
pub struct RdmaFence(pub Arc<RdmaServer>);

impl Fence for RdmaFence {
    fn close_group(&self, group: u128) -> usize {
        self.0.close_group(group);
        0
    }

    fn connections(&self, group: u128) -> usize {
        self.0.connections(Some(group))
    }

    fn opened(&self, lease: &Arc<Lease>, epoch: Epoch) {
        let regions = lease.regions().iter().map(Pinned::lend).collect();
        self.0.open_group(lease.grant().as_u128(), epoch, regions);
    }

    /// Those of the life that enters come after it was let in over NBD.
    fn close_others(&self, group: u128, _: &Life) {
        self.0.shut_all_out(group);
    }

    fn sharing(&self, group: u128) {
        self.0.withdraw(group);
    }
}
