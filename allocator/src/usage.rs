//! Memory in use by accounts, clients and strategies. The figures are exact at every moment: the one owner of all
//! records updates them when a record begins and when it ceases to hold its name.

use std::collections::HashMap;

use xpm_protocol::policy::{DocumentName, Kind};
use xpm_protocol::{ApplianceId, Name};

use crate::store::AllocationRecord;

/// Memory in use by allocations that are whole or being made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    counts: HashMap<DocumentName, Count>,
    /// Bytes by account and appliance.
    on_appliances: HashMap<Name, HashMap<ApplianceId, u64>>,
}

/// A sum over allocations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Memory that these allocations take, in bytes.
    pub bytes: u64,
    /// Number of these allocations.
    pub allocations: u64,
}

impl Usage {
    /// Counts an allocation.
    pub fn add(&mut self, record: &AllocationRecord) {
        for name in charged(record) {
            let count = self.counts.entry(name).or_default();
            count.bytes += record.taken();
            count.allocations += 1;
        }
        if let Some(account) = &record.terms.account {
            let on = self.on_appliances.entry(account.clone()).or_default();
            for grant in record.memory_grants() {
                *on.entry(grant.appliance).or_default() += record.bytes_of(grant);
            }
        }
    }

    /// Counts an allocation no longer. It must have been counted.
    pub fn remove(&mut self, record: &AllocationRecord) {
        for name in charged(record) {
            let count = self.counts.entry(name.clone()).or_default();
            count.bytes -= record.taken();
            count.allocations -= 1;
            if count.allocations == 0 {
                self.counts.remove(&name);
            }
        }
        if let Some(account) = &record.terms.account
            && let Some(on) = self.on_appliances.get_mut(account)
        {
            for grant in record.memory_grants() {
                *on.entry(grant.appliance).or_default() -= record.bytes_of(grant);
            }
            on.retain(|_, bytes| *bytes > 0);
            if on.is_empty() {
                self.on_appliances.remove(account);
            }
        }
    }

    /// Usage of one account, client or strategy.
    pub fn of(&self, kind: Kind, name: &Name) -> Count {
        // The look-up needs a key; its text is short.
        self.counts.get(&DocumentName { kind, name: name.clone() }).copied().unwrap_or_default()
    }

    /// Memory of an account on each appliance, in bytes; none if it has no memory.
    pub fn on_appliances(&self, account: &Name) -> Option<&HashMap<ApplianceId, u64>> {
        self.on_appliances.get(account)
    }

    /// All that have memory.
    pub fn all(&self) -> impl Iterator<Item = (&DocumentName, Count)> {
        self.counts.iter().map(|(name, count)| (name, *count))
    }
}

fn charged(record: &AllocationRecord) -> impl Iterator<Item = DocumentName> {
    let one = |kind| move |name: &Name| DocumentName { kind, name: name.clone() };
    let terms = &record.terms;
    let account = terms.account.iter().map(one(Kind::Account));
    let client = terms.client.iter().map(one(Kind::Client));
    account.chain(client).chain(terms.strategies.iter().map(one(Kind::Strategy)))
}
