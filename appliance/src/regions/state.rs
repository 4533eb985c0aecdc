//! What the table's lock protects.

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
    /// Which life of its owner holds each grant that one has entered.
    pub(super) holders: HashMap<GrantId, Visitor>,
    /// Since when the one that holds a grant was found absent by another life.
    pub(super) absent: HashMap<GrantId, Instant>,
    /// Orders that wait for memory which is being made for the stock.
    pub(super) orders_waiting: usize,
    /// To be dropped, with their lengths, to make room for others.
    pub(super) leaving: VecDeque<(Arc<Memory>, u64)>,
    /// Lent, but not wholly faulted in. Weak, so that they hold nothing up that is to be cleared.
    pub(super) to_fault: VecDeque<Weak<Memory>>,
    /// After a failure, no stocking until then.
    pub(super) stock_again: Option<Instant>,
    /// After a region could not be cleared because someone still held it.
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
            // A region without memory at hand is being cleared right now.
            resident: ByteSize(region.memory.as_ref().map_or(region.len, |memory| memory.resident())),
        })
    }

    /// Puts what an earlier life left into the books.
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

    /// Ends a change of epoch. Where memory could not be moved away from a process that has it
    /// mapped, the grant stays closed to everyone until the order is repeated with success.
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
                // Whoever has the new key comes in first.
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

    /// Leases of other grants with regions of this one, whose owner is outdated when this one's epoch is raised.
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
