//! Invariants of the state after each event; checked in builds with debug assertions, so in every test.

use std::collections::{HashMap, HashSet};

use xpm_protocol::ApplianceId;
use xpm_protocol::api::allocator::HandoverState;
use xpm_protocol::policy::Kind;

use super::{Entry, Service, Work};
use crate::store::record::Phase;
use crate::strategy::Candidate;
use crate::usage::Usage;

impl Service {
    pub(super) fn check(&self) -> Result<(), String> {
        self.check_names()?;
        self.check_works()?;
        self.check_regions()?;
        self.check_handovers()?;
        self.check_usage()
    }

    /// The usage is the sum over the records, links included.
    fn check_usage(&self) -> Result<(), String> {
        let mut usage = Usage::default();
        let mut links: HashMap<ApplianceId, u64> = HashMap::new();
        for Entry { record, counted, .. } in self.allocations.values() {
            if record.holds_name() != *counted {
                return Err(format!("{} is counted: {counted}", record.id));
            }
            if *counted {
                usage.add(record);
                let speed = record.terms.link_speed.map_or(0, |speed| speed.0);
                record.appliances().into_iter().for_each(|one| *links.entry(one).or_default() += speed);
            }
        }
        for (name, count) in self.usage.all() {
            let (_, hard) = self.policy.limits(name);
            let conditional = name.kind == Kind::Strategy;
            if !conditional && hard.is_some_and(|hard| count.bytes > hard.0) {
                return Err(format!("{name} has {} bytes, and may have {hard:?}", count.bytes));
            }
        }
        let promised = |one: &Candidate| one.link_promised.0 == links.get(&one.id).copied().unwrap_or(0);
        match usage == self.usage && self.inventory.pool().iter().all(promised) {
            true => Ok(()),
            false => Err(format!("{:?} is counted, and the records say {usage:?}", self.usage)),
        }
    }

    /// A name belongs to one allocation, and every allocation that is whole or being made has its own name.
    fn check_names(&self) -> Result<(), String> {
        for (name, id) in &self.names {
            match self.allocations.get(id) {
                Some(entry) if entry.record.name == *name => {}
                _ => {
                    return Err(format!("`{name}` belongs to {id}, which is not there or named differently"));
                }
            }
        }
        for (id, Entry { record, .. }) in &self.allocations {
            if record.holds_name() && self.names.get(&record.name) != Some(id) {
                return Err(format!("{id} has lost its name {}", record.name));
            }
        }
        Ok(())
    }

    /// The work on an allocation fits its phase, and no request waits on an idle allocation.
    fn check_works(&self) -> Result<(), String> {
        for (id, Entry { record, work, queue, .. }) in &self.allocations {
            let fits = match (record.phase, work) {
                (Phase::Creating, work) => matches!(work, Work::Creating(_)),
                (Phase::Ready, work) => !matches!(work, Work::Creating(_) | Work::Purging(_)),
                (Phase::Deleting | Phase::Undoing, work) => matches!(work, Work::Purging(_)),
            };
            if !fits {
                return Err(format!("{id} is {:?} while something else is done to it", record.phase));
            }
            if matches!(work, Work::Idle) && !queue.is_empty() {
                return Err(format!("requests wait for {id}, which is idle"));
            }
        }
        Ok(())
    }

    /// All members of a hand-over are in the same state, and their owner is the one that this state prescribes.
    fn check_handovers(&self) -> Result<(), String> {
        let mut states = HashMap::new();
        for Entry { record, .. } in
            self.allocations.values().filter(|entry| entry.record.phase == Phase::Ready)
        {
            let owner = record.owner.as_ref().map(|owner| owner.client);
            if record.standby.as_ref().is_some_and(|standby| Some(standby.client.client) == owner) {
                return Err(format!("{} has an owner that stands by for it", record.id));
            }
            let Some(handover) = &record.handover else { continue };
            if *states.entry(handover.id).or_insert(handover.state) != handover.state {
                return Err(format!("{} is further in hand-over {} than others", record.id, handover.id));
            }
            let fits = match handover.state {
                HandoverState::Open => record.next.is_none() && owner == Some(handover.to.client),
                HandoverState::Raising | HandoverState::Returning => record.next.is_some() && owner.is_some(),
                HandoverState::Committed | HandoverState::Returned => false,
            };
            if !fits {
                return Err(format!(
                    "{} is {:?} in a hand-over, with owner {owner:?}",
                    record.id, handover.state
                ));
            }
        }
        Ok(())
    }

    /// A whole allocation holds its size in whole rows, and no region belongs to two allocations.
    fn check_regions(&self) -> Result<(), String> {
        let mut seen = HashSet::new();
        for (id, Entry { record, .. }) in
            self.allocations.iter().filter(|(_, entry)| entry.record.phase == Phase::Ready)
        {
            let columns = record.layout.columns() as usize;
            let room = record.slots.len() as u64 * record.region_len;
            if record.slots.len() % columns != 0 || room < record.size {
                return Err(format!("{id} has {} regions for {} bytes", record.slots.len(), record.size));
            }
            if record.grants.iter().any(|grant| grant.regions.len() != grant.count as usize) {
                return Err(format!("{id} has a grant without its regions"));
            }
            let mut regions = record
                .grants
                .iter()
                .flat_map(|grant| grant.regions.iter().map(|one| (grant.appliance, *one)));
            if let Some((_, region)) = regions.find(|region| !seen.insert(*region)) {
                return Err(format!("region {region} of {id} is in another allocation too"));
            }
        }
        Ok(())
    }
}
