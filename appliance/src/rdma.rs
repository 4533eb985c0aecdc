//! Serving grants by RDMA, to clients whose reads and writes involve no processor of this machine.

use std::sync::Arc;

use xpm_protocol::{Epoch, GrantKey, Life};
use xpm_transport::IoBuf;
use xpm_transport::rdma::server::{Grants, Lent, RdmaServer};

use crate::arena::Memory;
use crate::lease::Lease;
use crate::regions::{Fence, Table};

/// The grants of a table, looked up by their keys.
pub struct RdmaGrants(pub Table);

impl Grants for RdmaGrants {
    fn find(&self, key: &GrantKey) -> Option<u128> {
        Some(self.0.open(key)?.grant().as_u128())
    }
}

/// Memory whose pages are pinned.
struct Pinned(Arc<Memory>);

impl Pinned {
    fn lend(memory: &Arc<Memory>) -> Arc<dyn Lent> {
        memory.pin();
        Arc::new(Pinned(memory.clone()))
    }
}

impl Lent for Pinned {
    fn buffer(&self) -> IoBuf {
        // A region is mapped, so its length fits into an address.
        self.0.at(0, self.0.len() as usize)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.0.unpin();
    }
}

/// Registers the memory of grants when they open, and revokes them when they close.
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

    /// RDMA connections of the admitted life are made after that life was admitted over NBD, so all present
    /// ones can be closed.
    fn close_others(&self, group: u128, _: &Life) {
        self.0.shut_all_out(group);
    }

    fn sharing(&self, group: u128) {
        self.0.withdraw(group);
    }
}
