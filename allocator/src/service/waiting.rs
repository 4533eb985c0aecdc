//! The queue of requests that wait for memory, and the allocations that give way to them.
//!
//! Requests are served by priority and, within a priority, in order of arrival. If nothing else helps, allocations
//! that may be reclaimed give way: first those without an owner, the longest idle one at the head; then those in use
//! that have a lower priority, the lowest first. Their owners are told and get a time of grace. They are freed only
//! when that time is over; if the request is served or cancelled before that, they stay.
//!
//! The first request that lacks room keeps as much of the pool as it needs, not everything that is free: a later
//! request is served as long as the rest of the pool could still serve the first one once all other memory is given
//! back. Allocations that were made since the first request began to wait count as kept, so that small requests
//! cannot overtake it for ever. Memory on an appliance that cannot serve the first request at all is not kept for it.
//! The first request keeps memory for at most [`HOLD_MAX`], so that a request that waits for days blocks no other.
//!
//! The queue is in memory only: after a restart, waiting clients ask again.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, AllocationState, Create, Waiting};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::policy::{DocumentName, Kind, PRIORITY_DEFAULT, WAITING_MAX_DEFAULT};
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Epoch, Layout, Name, RequestId};

use super::asking::Asked;
use super::wish::{Looked, Wish};
use super::{AfterStore, Entry, Outcome, ReplyTo, Service, Work};
use crate::store::record::{AllocationRecord, Phase, Reclaim};
use crate::strategy::{Code, Placement, remedy};

/// Longest wait.
const WAIT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most requests that wait.
const QUEUE_MAX: usize = 10_000;
/// How many requests are tried per round, from the head of the queue and from the rest.
const TRIES_HEAD: usize = 16;
const TRIES_OTHERS: usize = 16;
/// How long the first request that lacks room keeps memory from later requests, in seconds.
const HOLD_MAX: u64 = 600;
/// Most cancelled requests that are remembered.
const CANCELLED_MAX: usize = 10_000;
/// How long a refusal after waiting is kept for the requester, in seconds.
const REFUSAL_KEPT: u64 = 600;

/// A request that waits, or that was refused after it had waited.
#[derive(Debug)]
pub(super) struct Waiter {
    id: AllocationId,
    wish: Wish,
    priority: u16,
    layout: Layout,
    /// Event at which the request arrived; orders requests of one priority.
    number: u64,
    since: u64,
    until: u64,
    why: String,
    /// It is being placed, or its allocation is being made.
    tried: bool,
    /// When it was refused, seconds since 1970.
    refused: Option<u64>,
    /// The result of its last evaluation.
    asked: Asked,
    /// Appliances that could serve it if they had room.
    holds: HashSet<ApplianceId>,
    /// Since when it keeps memory, seconds since 1970.
    held_since: Option<u64>,
}

impl Service {
    pub(super) fn is_queued(&self, name: &Name) -> bool {
        self.queue.iter().any(|one| one.wish.create.name == *name && one.refused.is_none())
    }

    pub(super) fn enqueue(&mut self, mut wish: Wish, looked: &Looked, why: String) {
        let Some(reply) = wish.reply.take() else { return };
        if self.queue.len() >= QUEUE_MAX {
            let line = format!("{why}; and {QUEUE_MAX} requests wait already: try again later");
            return self.refuse(reply, ErrorKind::Unavailable, line);
        }
        if let Some(line) = self.waits_too_often(looked) {
            return self.refuse(reply, ErrorKind::Denied, format!("{why}; {line}"));
        }
        let id = match self.random_id() {
            Ok(id) => AllocationId::from_u128(id),
            Err(error) => return self.reply(reply, Err(error)),
        };
        let wait = wish.create.wait.map_or(Duration::ZERO, |span| span.0.min(WAIT_MAX));
        let name = wish.create.name.clone();
        let waiter = Waiter {
            id,
            priority: looked.asked.priority,
            layout: looked.asked.layout,
            number: self.clock,
            since: self.now.unix,
            until: self.now.unix.saturating_add(wait.as_secs()),
            why,
            tried: false,
            refused: None,
            asked: looked.asked.clone(),
            holds: self.holds_of(&wish.create, looked),
            held_since: None,
            wish,
        };
        let at = self.queue.partition_point(|one| one.priority >= waiter.priority);
        self.queue.insert(at, waiter);
        self.tell(EventKind::Waiting, &name, format!("`{name}` waits for its turn"));
        let shown = self.queue.iter().find(|one| one.id == id).map(|one| self.view_waiter(one));
        if let Some(shown) = shown {
            self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        }
    }

    /// The request was tried, and there is still no place for it.
    pub(super) fn still_waits(&mut self, name: &Name, looked: &Looked, why: String) {
        let priority = looked.asked.priority;
        let create = self.queue.iter().find(|one| one.wish.create.name == *name);
        let holds = create.map(|one| self.holds_of(&one.wish.create, looked)).unwrap_or_default();
        if let Some(waiter) = self.queue.iter_mut().find(|one| one.wish.create.name == *name) {
            if waiter.why != why {
                tracing::info!("`{name}` waits on: {why}");
            }
            (waiter.why, waiter.holds, waiter.tried, waiter.priority) = (why, holds, false, priority);
            waiter.asked = looked.asked.clone();
        }
        self.queue.sort_by_key(|one| (std::cmp::Reverse(one.priority), one.number));
        self.reclaim_for(name, looked);
    }

    /// An appliance failed while the allocation was made: the request waits on.
    pub(super) fn back_to_queue(&mut self, name: &Name, why: String) {
        if let Some(waiter) = self.queue.iter_mut().find(|one| one.wish.create.name == *name) {
            (waiter.why, waiter.tried) = (why, false);
        }
    }

    /// Whether a waiting request names a document.
    pub(super) fn waits_for(&self, document: &DocumentName) -> bool {
        let names = |create: &Create| match document.kind {
            Kind::Account => create.account.as_ref() == Some(&document.name),
            Kind::Client => create.client.as_ref() == Some(&document.name),
            Kind::Strategy => create.strategy.as_ref() == Some(&document.name),
            Kind::Appliance => false,
        };
        self.queue.iter().any(|one| one.refused.is_none() && names(&one.wish.create))
    }

    /// Removes a request that is served or cancelled.
    pub(super) fn leaves_queue(&mut self, name: &Name) {
        self.queue.retain(|one| one.wish.create.name != *name);
        self.keep_reclaimed(name);
    }

    /// Marks a request as refused. Its requester can read the reason for [`REFUSAL_KEPT`] seconds.
    pub(super) fn refuse_waiting(&mut self, name: &Name, why: &str) {
        let unix = self.now.unix;
        if let Some(waiter) = self.queue.iter_mut().find(|one| one.wish.create.name == *name) {
            (waiter.why, waiter.refused) = (why.to_owned(), Some(unix));
            waiter.holds.clear();
            self.tell(EventKind::Refused, name, format!("`{name}` was refused after waiting: {why}"));
            self.keep_reclaimed(name);
        }
    }

    /// The wall clock was set by `by` seconds: waiting requests keep their waiting time.
    pub(super) fn queue_follows_clock(&mut self, by: i64) {
        for one in &mut self.queue {
            one.since = one.since.saturating_add_signed(by);
            one.until = one.until.saturating_add_signed(by);
            one.refused = one.refused.map(|at| at.saturating_add_signed(by));
        }
    }

    /// Forgets an old refusal, because there is a new request of this name.
    pub(super) fn forget_refused(&mut self, name: &Name) {
        self.queue.retain(|one| one.refused.is_none() || one.wish.create.name != *name);
    }

    /// Cancels a request. Returns whether it waited: a request whose allocation is being made does not wait any more.
    pub(super) fn cancel_waiting(&mut self, name: &Name) -> bool {
        let being_made = self.names.contains_key(name);
        let there = !being_made && self.queue.iter().any(|one| one.wish.create.name == *name);
        if there {
            self.remember_cancelled(name);
            self.leaves_queue(name);
            self.tell(EventKind::Cancelled, name, format!("the request for `{name}` was taken back"));
        }
        there
    }

    /// Remembers the id of a cancelled request, so that its client cannot bring it back by repeating it.
    fn remember_cancelled(&mut self, name: &Name) {
        let waits = |one: &&Waiter| one.wish.create.name == *name && one.refused.is_none();
        let waiter = self.queue.iter().find(waits);
        if let Some((request, until)) = waiter.and_then(|one| Some((one.wish.request?, one.until))) {
            self.cancelled.push_back((request, until));
            self.cancelled.truncate(CANCELLED_MAX);
        }
    }

    /// Answers a repeated request: with the waiting one, or, if it was cancelled, with a refusal.
    pub(super) fn is_known_request(
        &mut self,
        reply: ReplyTo,
        create: &Create,
        request: Option<RequestId>,
    ) -> bool {
        let Some(request) = request else { return false };
        if self.cancelled.iter().any(|(one, _)| *one == request) {
            let line = format!(
                "the request for `{}` was taken back; ask anew if it is wanted after all",
                create.name
            );
            self.refuse(reply, ErrorKind::Conflict, line);
            return true;
        }
        let waits = |one: &&Waiter| one.wish.request == Some(request) && one.refused.is_none();
        let Some(shown) = self.queue.iter().find(waits).map(|one| self.view_waiter(one)) else {
            return false;
        };
        self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        true
    }

    /// Why this account may have no further waiting request.
    fn waits_too_often(&self, looked: &Looked) -> Option<String> {
        let account = looked.asked.terms.account.as_ref();
        let document = account.and_then(|name| self.policy.account(name));
        let most = document.and_then(|one| one.account.waiting_max).unwrap_or(WAITING_MAX_DEFAULT);
        let same = |one: &&Waiter| one.refused.is_none() && one.asked.terms.account.as_ref() == account;
        let waiting = self.queue.iter().filter(same).count();
        let whose =
            account.map_or_else(|| "without an account".to_owned(), |name| format!("of account `{name}`"));
        (waiting >= most as usize).then(|| {
            format!("{waiting} requests {whose} wait already, and at most {most} may (`waiting-max`): try again later")
        })
    }

    /// Tries the waiting requests in order, and ends waits whose time is over.
    pub(super) fn serve_queue(&mut self) {
        let unix = self.now.unix;
        self.queue.retain(|one| one.refused.is_none_or(|at| unix < at.saturating_add(REFUSAL_KEPT)));
        self.cancelled.retain(|(_, until)| unix <= *until);
        if let Some(first) = self.queue.iter_mut().find(|one| one.refused.is_none() && !one.holds.is_empty())
        {
            first.held_since.get_or_insert(unix);
        }
        let over: Vec<(Name, String)> = self
            .queue
            .iter()
            .filter(|one| one.refused.is_none() && !one.tried && one.until <= unix)
            .map(|one| (one.wish.create.name.clone(), one.why.clone()))
            .collect();
        for (name, why) in over {
            self.refuse_waiting(&name, &format!("the time to wait is over: {why}"));
        }
        let ready: Vec<Name> = self
            .queue
            .iter()
            .filter(|one| one.refused.is_none() && !one.tried)
            .map(|one| one.wish.create.name.clone())
            .collect();
        // The head of the queue each time, and of the rest some in turn.
        let head = ready.len().min(TRIES_HEAD);
        let others = &ready[head..];
        let turn = if others.is_empty() { 0 } else { self.queue_turn % others.len() };
        self.queue_turn = turn + TRIES_OTHERS;
        let some = others.iter().cycle().skip(turn).take(TRIES_OTHERS.min(others.len()));
        for name in ready[..head].iter().chain(some) {
            self.try_waiter(name);
        }
    }

    fn try_waiter(&mut self, name: &Name) {
        let Some(waiter) = self.queue.iter_mut().find(|one| one.wish.create.name == *name) else { return };
        if waiter.tried || waiter.refused.is_some() {
            return;
        }
        waiter.tried = true;
        let mut wish = Wish::new(None, waiter.wish.create.clone());
        wish.request = waiter.wish.request;
        self.place(wish);
    }

    /// The appliances that are kept for the first request that lacks room. None if that request comes after this one,
    /// has kept memory for [`HOLD_MAX`] seconds, or would fit beside this placement once all memory is given back that
    /// was allocated before it began to wait.
    pub(super) fn kept_for_the_first(
        &self,
        name: &Name,
        priority: u16,
        placement: &Placement,
    ) -> Option<HashSet<ApplianceId>> {
        let before = self.queue.iter().take_while(|one| one.wish.create.name != *name);
        let first = before
            .filter(|one| one.priority >= priority && one.refused.is_none())
            .find(|one| !one.holds.is_empty())?;
        let lapsed = first.held_since.is_some_and(|since| since.saturating_add(HOLD_MAX) <= self.now.unix);
        if lapsed || !placement.regions.iter().any(|one| first.holds.contains(one)) {
            return None;
        }
        let mut kept: HashMap<ApplianceId, u64> = HashMap::new();
        let younger = self.allocations.values().filter(|entry| entry.born > first.number);
        let younger = younger.map(|entry| &entry.record).filter(|record| record.holds_name());
        for (record, grant) in
            younger.flat_map(|record| record.memory_grants().map(move |grant| (record, grant)))
        {
            *kept.entry(grant.appliance).or_default() += record.bytes_of(grant);
        }
        for appliance in &placement.regions {
            *kept.entry(*appliance).or_default() += placement.region_len;
        }
        let fits = self.fits_in_all_but(&first.asked, &first.wish.create, &kept);
        (!fits).then(|| first.holds.clone())
    }

    /// The appliances that could serve a request if they had room. Empty if the request lacks something else than
    /// room, or if the whole pool could not serve it.
    fn holds_of(&self, create: &Create, looked: &Looked) -> HashSet<ApplianceId> {
        let Some(decided) = looked.decided.as_ref().filter(|_| looked.lacks_room()) else {
            return HashSet::new();
        };
        if !self.could_ever(create, looked) {
            return HashSet::new();
        }
        let pool = self.inventory.pool().iter().zip(&decided.seen);
        pool.filter(|(_, seen)| matches!(seen.code, Code::Usable | Code::Full | Code::ShareUsed | Code::Held))
            .map(|(one, _)| one.id)
            .collect()
    }

    pub(super) fn waiting_count(&self) -> u64 {
        self.queue.iter().filter(|one| one.refused.is_none()).count() as u64
    }

    /// Waiting requests in order, and requests that were refused after waiting.
    pub(super) fn list_waiting(&self) -> Vec<Allocation> {
        self.queue.iter().map(|one| self.view_waiter(one)).collect()
    }

    pub(super) fn show_waiting(&self, name: &Name) -> Option<Allocation> {
        self.queue.iter().find(|one| one.wish.create.name == *name).map(|one| self.view_waiter(one))
    }

    fn view_waiter(&self, waiter: &Waiter) -> Allocation {
        let before =
            self.queue.iter().take_while(|one| one.id != waiter.id).filter(|one| one.refused.is_none());
        let before = waiter.refused.is_none().then(|| before.count() as u64);
        let create = &waiter.wish.create;
        let state =
            if waiter.refused.is_some() { AllocationState::Refused } else { AllocationState::Waiting };
        Allocation {
            name: create.name.clone(),
            id: waiter.id,
            size: create.size,
            layout: waiter.layout,
            region_len: ByteSize(0),
            epoch: Epoch::FIRST,
            state,
            owner: None,
            standby: None,
            handover: None,
            regions: Vec::new(),
            created: waiter.since,
            taken: ByteSize(0),
            account: create.account.clone(),
            client: create.client.clone(),
            strategy: create.strategy.clone(),
            labels: create.labels.clone(),
            reclaimable: create.reclaimable,
            link_speed: None,
            lease: None,
            ending: None,
            waiting: Some(Waiting {
                before,
                priority: waiter.priority,
                since: waiter.since,
                until: waiter.until,
                why: waiter.why.clone(),
                request: waiter.wish.request,
            }),
            change: None,
            lost: Vec::new(),
            used: None,
            followed: None,
            refused: None,
            warnings: Vec::new(),
            slabs: Default::default(),
            block_size: create.block_size,
        }
    }

    /// Chooses the allocations that give way to a request, and announces it to their owners.
    fn reclaim_for(&mut self, name: &Name, looked: &Looked) {
        let asked_already = || self.allocations.values().any(|entry| is_reclaimed_for(&entry.record, name));
        if !looked.lacks_room() || asked_already() {
            return;
        }
        let Some(create) =
            self.queue.iter().find(|one| one.wish.create.name == *name).map(|one| one.wish.create.clone())
        else {
            return;
        };
        let held = looked.held.clone();
        let victims = self.victims(looked.asked.priority);
        let enough = |service: &Service, some: &[AllocationId]| {
            let back = service.given_back(some);
            let snapshot = service.snapshot(&looked.asked, &create, &[], &held, &back);
            remedy::with_given_back(&snapshot, &looked.asked.demand, &back)
        };
        let Some(count) = (1..=victims.len()).find(|&count| enough(self, &victims[..count])) else { return };
        let mut chosen = victims[..count].to_vec();
        // With the last victim chosen, some of the earlier ones may be unnecessary.
        for id in victims[..count - 1].iter().rev() {
            let without: Vec<AllocationId> = chosen.iter().copied().filter(|one| one != id).collect();
            if enough(self, &without) {
                chosen = without;
            }
        }
        for id in chosen {
            self.announce_reclaim(id, name);
        }
    }

    /// Allocations that may give way to a request of this priority, in the order in which they would.
    fn victims(&self, priority: u16) -> Vec<AllocationId> {
        let may = |entry: &&Entry| {
            let record = &entry.record;
            record.phase == Phase::Ready
                && matches!(entry.work, Work::Idle)
                && record.terms.reclaimable
                && record.reclaim.is_none()
                && match record.owner {
                    None => self.priority_of(record) <= priority,
                    Some(_) => self.priority_of(record) < priority,
                }
        };
        let mut victims: Vec<&AllocationRecord> =
            self.allocations.values().filter(may).map(|entry| &entry.record).collect();
        victims.sort_by_key(|record| match record.owner {
            None => (false, 0, record.idle_since, record.id),
            Some(_) => (true, self.priority_of(record), u64::MAX - record.created, record.id),
        });
        victims.iter().map(|record| record.id).collect()
    }

    pub(super) fn priority_of(&self, record: &AllocationRecord) -> u16 {
        let account = record.terms.account.as_ref().and_then(|name| self.policy.account(name));
        account.map_or(PRIORITY_DEFAULT, |one| one.account.priority)
    }

    fn given_back(&self, some: &[AllocationId]) -> HashMap<ApplianceId, u64> {
        let mut back = HashMap::new();
        for record in some.iter().filter_map(|id| self.allocations.get(id)).map(|entry| &entry.record) {
            for grant in record.memory_grants() {
                *back.entry(grant.appliance).or_default() += record.bytes_of(grant);
            }
        }
        back
    }

    fn announce_reclaim(&mut self, id: AllocationId, name: &Name) {
        let (since, grace) = (self.now.unix, self.settings.reclaim_grace.as_secs());
        let mut record = self.entry(id).record.clone();
        let reclaim = Reclaim { for_name: name.clone(), since, frees: since.saturating_add(grace) };
        let victim = record.name.clone();
        self.tell(
            EventKind::ReclaimNotice,
            &victim,
            format!("`{victim}` gives way to `{name}`, which has a higher priority: its memory is freed in {grace} s"),
        );
        record.reclaim = Some(reclaim);
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Settled);
    }

    /// The request is served or gone: allocations that were to give way and still exist stay.
    fn keep_reclaimed(&mut self, name: &Name) {
        let kept: Vec<AllocationId> = self
            .allocations
            .iter()
            .filter(|(_, entry)| is_reclaimed_for(&entry.record, name) && entry.record.phase == Phase::Ready)
            .map(|(id, _)| *id)
            .collect();
        for id in kept {
            match self.entry(id).work {
                Work::Idle => self.keep_one(id),
                // It is checked again when its time of grace is over.
                _ => continue,
            }
        }
    }

    fn keep_one(&mut self, id: AllocationId) {
        let mut record = self.entry(id).record.clone();
        record.reclaim = None;
        let name = record.name.clone();
        self.tell(
            EventKind::ReclaimWithdrawn,
            &name,
            format!("`{name}` stays: the request that needed its memory is gone or served"),
        );
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Settled);
    }

    /// Whether the request for which an allocation is to give way still waits.
    pub(super) fn still_needed(&mut self, id: AllocationId) -> bool {
        let Some(reclaim) = self.entry(id).record.reclaim.clone() else { return true };
        let needed = self.is_queued(&reclaim.for_name);
        if !needed {
            self.keep_one(id);
        }
        needed
    }
}

fn is_reclaimed_for(record: &AllocationRecord, name: &Name) -> bool {
    record.reclaim.as_ref().is_some_and(|reclaim| reclaim.for_name == *name)
}
