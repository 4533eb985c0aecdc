//! Compares the grants that appliances have with the records: grants without a record, and records without their
//! grants.
//!
//! Every appliance is asked for its grants at intervals, and when it is heard again. A grant is durable in a record
//! before an appliance hears of it, and stays there until the appliance has confirmed its removal. So a grant without
//! a record is garbage, left by an allocator whose metadata were lost or are older than the grant. Such a grant may
//! be in use, and its record may be recovered. So it is reported first, and freed only after it was seen without a
//! user for a time of grace. A grant that is in a record and not on its appliance is lost with the appliance's
//! memory.
//!
//! An answer may be older than the record that it is compared with, so a single sighting counts for nothing.

use std::collections::{BTreeMap, BTreeSet};

use xpm_protocol::api::allocator::Garbage;
use xpm_protocol::api::appliance;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, GrantId, Name};

use super::{Answer, Awaited, Call, CallError, Service, Work};
use crate::store::record::Phase;

/// Findings of the comparison.
#[derive(Debug, Default)]
pub(super) struct Found {
    garbage: BTreeMap<(ApplianceId, GrantId), Unknown>,
    /// Appliances with a question under way, and when each is asked again.
    asked: BTreeSet<ApplianceId>,
    next: BTreeMap<ApplianceId, u64>,
}

#[derive(Debug)]
struct Unknown {
    name: Name,
    bytes: u64,
    /// Since when it is known and without a user, seconds since 1970.
    since: u64,
    times: u32,
}

/// Grants of an allocation that its appliances do not have.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Appliances where a grant was missing in one answer.
    suspected: BTreeSet<ApplianceId>,
    pub(super) on: BTreeSet<ApplianceId>,
    /// Missing grants by the latest answer of each appliance.
    grants: BTreeMap<ApplianceId, BTreeSet<GrantId>>,
}

impl Lost {
    /// Whether this grant is known to be lost.
    pub(super) fn has(&self, grant: GrantId) -> bool {
        self.on.iter().filter_map(|on| self.grants.get(on)).any(|missing| missing.contains(&grant))
    }
}

impl Service {
    /// Asks the appliances whose next question is due.
    pub(super) fn look_for_garbage(&mut self) {
        let unix = self.now.unix;
        let every = self.settings.reconcile.as_secs().max(1);
        let up: Vec<ApplianceId> = self
            .inventory
            .pool()
            .iter()
            .filter(|one| one.up_until >= self.now.at)
            .map(|one| one.id)
            .collect();
        for id in up {
            let next = self.found.next.entry(id).or_insert(unix);
            if *next > unix || !self.found.asked.insert(id) {
                continue;
            }
            *next = unix.saturating_add(every);
            self.list_grants(id);
        }
    }

    /// The wall clock was set by `by` seconds: garbage keeps its remaining time of grace.
    pub(super) fn garbage_follows_clock(&mut self, by: i64) {
        let moments = self.found.next.values_mut();
        let moments = moments.chain(self.found.garbage.values_mut().map(|one| &mut one.since));
        moments.for_each(|moment| *moment = moment.saturating_add_signed(by));
    }

    fn list_grants(&mut self, id: ApplianceId) {
        let control = self.control_of(id);
        self.call(id, control, Call::Grants, Awaited::GrantsListed(id));
    }

    /// Whether the appliance may be asked for its grants now: no earlier question is under way.
    pub(super) fn ask_grants_once(&mut self, id: ApplianceId) -> bool {
        self.found.asked.insert(id)
    }

    /// The appliance has answered.
    pub(super) fn grants_answered(&mut self, id: ApplianceId) {
        self.found.asked.remove(&id);
    }

    /// The appliance was away: its grants may have changed, so it is asked soon.
    pub(super) fn look_soon(&mut self, id: ApplianceId) {
        self.found.next.remove(&id);
    }

    pub(super) fn grants_listed(&mut self, id: ApplianceId, result: Result<Answer, CallError>) {
        self.found.asked.remove(&id);
        if !self.serves() {
            return;
        }
        // An appliance that does not answer turns silent soon, and that is reported.
        let Ok(Answer::Grants(grants)) = result else { return };
        self.find_garbage(id, &grants);
        self.find_lost(id, &grants);
        self.repair_descriptors(id, &grants);
    }

    fn find_garbage(&mut self, id: ApplianceId, grants: &[appliance::Grant]) {
        let known: BTreeSet<GrantId> = self.known_on(id).map(|(_, grant)| grant).collect();
        let unknown = |grant: &&appliance::Grant| !known.contains(&grant.id);
        let there: BTreeSet<GrantId> = grants.iter().filter(unknown).map(|grant| grant.id).collect();
        self.found.garbage.retain(|(on, grant), _| *on != id || there.contains(grant));
        let unix = self.now.unix;
        for grant in grants.iter().filter(|grant| there.contains(&grant.id)) {
            let new = Unknown { name: grant.name.clone(), bytes: grant.len.0, since: unix, times: 0 };
            let garbage = self.found.garbage.entry((id, grant.id)).or_insert(new);
            garbage.times += 1;
            if grant.connections > 0 {
                // The grant has a user: its time of grace begins when the last connection ends.
                garbage.since = unix;
            }
            let (times, since) = (garbage.times, garbage.since);
            let grace = self.settings.garbage_grace.as_secs();
            if times == 2 {
                let line = format!(
                    "appliance {} has {} of `{}` that no record knows; it is freed in {grace} s, unless its record is found",
                    self.inventory.name(id),
                    grant.len,
                    grant.name
                );
                self.tell_of_appliance(EventKind::GarbageFound, id, true, line);
            }
            if times >= 2 && grant.connections == 0 && since.saturating_add(grace) <= unix {
                self.free_garbage(id, grant);
            }
        }
    }

    fn free_garbage(&mut self, id: ApplianceId, grant: &appliance::Grant) {
        let appliance = self.inventory.name(id);
        let line = format!(
            "{} of `{}` on appliance {appliance} are freed: no record knows them",
            grant.len, grant.name
        );
        self.tell_of_appliance(EventKind::GarbageFreed, id, false, line);
        self.found.garbage.remove(&(id, grant.id));
        let control = self.control_of(id);
        self.call(id, control, Call::Revoke(grant.id), Awaited::Ignored);
    }

    /// Finds the allocations that lack their grant on an appliance.
    fn find_lost(&mut self, id: ApplianceId, grants: &[appliance::Grant]) {
        let there: BTreeSet<GrantId> = grants.iter().map(|grant| grant.id).collect();
        for entry in self.allocations.values_mut().filter(|entry| !matches!(entry.work, Work::Idle)) {
            // A sighting from before the present work says nothing about the record after it.
            entry.lost.suspected.retain(|one| *one != id || entry.lost.on.contains(one));
        }
        let settled: Vec<(AllocationId, BTreeSet<GrantId>)> = self
            .allocations
            .iter()
            .filter(|(_, entry)| entry.record.phase == Phase::Ready && matches!(entry.work, Work::Idle))
            .filter(|(_, entry)| entry.record.grants.iter().any(|grant| grant.appliance == id))
            .map(|(of, entry)| {
                let on_it = entry.record.grants.iter().filter(|grant| grant.appliance == id);
                let missing = on_it.map(|grant| grant.id).filter(|grant| !there.contains(grant));
                (*of, missing.collect())
            })
            .collect();
        let mut is_new = false;
        for (of, missing) in settled {
            let lost = &mut self.entry(of).lost;
            if missing.is_empty() {
                lost.suspected.remove(&id);
                lost.on.remove(&id);
                lost.grants.remove(&id);
                continue;
            }
            lost.grants.insert(id, missing);
            if lost.suspected.insert(id) {
                is_new = true;
                continue;
            }
            if !lost.on.insert(id) {
                continue;
            }
            let name = self.entry(of).record.name.clone();
            let line = format!(
                "`{name}` has lost what it had on appliance {}: the appliance does not have it any more",
                self.inventory.name(id)
            );
            tracing::warn!("{line}");
            self.tell(EventKind::Lost, &name, line);
        }
        if is_new {
            // Ask once more at once: owners hold their I/O until they have the result.
            self.look_soon(id);
            self.look_for_garbage();
        }
    }

    fn known_on(&self, id: ApplianceId) -> impl Iterator<Item = (AllocationId, GrantId)> + '_ {
        let records = self.allocations.values().map(|entry| &entry.record);
        records.flat_map(move |record| {
            let on_it = record.known_grants().filter(move |grant| grant.appliance == id);
            on_it.map(|grant| (record.id, grant.id))
        })
    }

    /// Garbage that was found and is not freed yet.
    pub(super) fn list_garbage(&self) -> Vec<Garbage> {
        let grace = self.settings.garbage_grace.as_secs();
        let sure = self.found.garbage.iter().filter(|(_, garbage)| garbage.times >= 2);
        let shown = sure.map(|((appliance, grant), garbage)| Garbage {
            appliance: *appliance,
            appliance_name: self.inventory.name(*appliance),
            grant: *grant,
            name: garbage.name.clone(),
            bytes: ByteSize(garbage.bytes),
            since: garbage.since,
            frees: garbage.since.saturating_add(grace),
        });
        shown.collect()
    }
}
