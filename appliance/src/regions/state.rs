//! The state under the table's lock.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Instant;

use xpm_protocol::api::appliance::{self as api, Commit};
use xpm_protocol::units::ByteSize;
use xpm_protocol::{Epoch, GrantId, RegionId, Visitor};

use super::fence::Moved;
use crate::arena::{ArenaError, Memory};
use crate::keep::{Returned, ReturnedGrant};
use crate::lease::Lease;
use crate::ledger::Ledger;

pub(super) struct State {
    pub(super) ledger: Ledger<Arc<Memory>>,
    pub(super) leases: HashMap<GrantId, Arc<Lease>>,
    /// The life of its owner that holds each grant, for grants that were entered.
    pub(super) holders: HashMap<GrantId, Visitor>,
    /// The time when another life found the holder of a grant absent.
    pub(super) absent: HashMap<GrantId, Instant>,
    /// Number of orders that wait for memory which is being made for the stock.
    pub(super) orders_waiting: usize,
    /// Memory to be dropped to make room for others, with its length.
    pub(super) leaving: VecDeque<(Arc<Memory>, u64)>,
    /// Lent memory that is not completely faulted in. Weak references, so that they do not delay clearing.
    pub(super) to_fault: VecDeque<Weak<Memory>>,
    /// After a failure, no stocking until this time.
    pub(super) stock_again: Option<Instant>,
    /// After a region could not be cleared because it was still in use, no clearing until this time.
    pub(super) clear_again: Option<Instant>,
}

impl State {
    pub(super) fn region(&self, id: RegionId) -> Option<api::Region> {
        use crate::ledger::State::{Clearing, Granted, Ready, Reserved};
        let region = self.ledger.region(id)?;
        let (allocation, grant) = match region.state {
            Ready | Clearing => (None, None),
            Reserved { allocation, .. } => (Some(allocation), None),
            Granted { allocation, grant } => (Some(allocation), Some(grant)),
        };
        Some(api::Region {
            id,
            len: ByteSize(region.len),
            state: region.state.name(),
            allocation,
            grant,
            // A region whose memory is taken is being cleared right now.
            resident: ByteSize(region.memory.as_ref().map_or(region.len, |memory| memory.resident())),
        })
    }

    /// Adds the grants of an earlier life to the ledger.
    pub(super) fn take_back(&mut self, returned: Returned) {
        self.ledger.remember_gone(returned.gone);
        for ReturnedGrant { id, grant, memories, closed, holder } in returned.grants {
            self.holders.extend(holder.map(|holder| (id, holder)));
            self.to_fault.extend(memories.iter().map(|(_, memory)| Arc::downgrade(memory)));
            let memories = memories.into_iter().map(|(region, memory)| (region, memory.len(), memory));
            self.ledger.take_back(id, grant, memories.collect());
            self.add_lease(id);
            if closed {
                self.leases.get(&id).into_iter().for_each(|lease| lease.revoke());
            }
        }
    }

    /// Completes a change of epoch. If memory could not be moved away from a process that has it mapped, the
    /// grant stays closed to all clients until the order is repeated with success.
    pub(super) fn renew(&mut self, id: GrantId, commit: &Commit, moved: Moved) -> Result<(), ArenaError> {
        let regions = self.ledger.grant(id).map(|grant| grant.regions.clone()).unwrap_or_default();
        for (region, memory) in regions.into_iter().zip(moved.memories) {
            self.to_fault.push_back(Arc::downgrade(&memory));
            self.ledger.replace_memory(region, memory);
        }
        self.add_lease(id);
        match moved.error {
            None => {
                self.ledger.renew(id, commit);
                // The first life with the new key becomes the holder.
                self.holders.remove(&id);
                self.absent.remove(&id);
                Ok(())
            }
            Some(error) => {
                self.leases.values().filter(|lease| lease.grant() == id).for_each(|lease| lease.revoke());
                self.ledger.set_closing(id, false);
                Err(error)
            }
        }
    }

    /// Leases of other grants that have regions of this one, and whose owners are outdated once this grant's
    /// epoch is raised.
    pub(super) fn outdated_with(&self, id: GrantId, epoch: Epoch) -> Vec<Arc<Lease>> {
        let regions = self.ledger.grant(id).map(|grant| grant.regions.as_slice()).unwrap_or_default();
        let mut others = self.ledger.sharing(regions);
        others.retain(|other| {
            *other != id && self.ledger.grant(*other).is_some_and(|grant| grant.epoch < epoch)
        });
        others.iter().filter_map(|other| self.leases.get(other).cloned()).collect()
    }

    pub(super) fn add_lease(&mut self, id: GrantId) {
        let Some(grant) = self.ledger.grant(id) else { return };
        let memories: Vec<Arc<Memory>> =
            grant.regions.iter().filter_map(|region| self.ledger.region(*region)?.memory.clone()).collect();
        self.leases.insert(id, Arc::new(Lease::new(id, memories)));
    }
}
