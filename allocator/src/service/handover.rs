//! Hands allocations in use over to the client that stands by for them: all of them, or none.
//!
//! ```text
//!              every appliance has the next epoch
//!   [raising] ------------------------------------> [open] --commit--> over: the new owner has them
//!       |                                             |
//!       | an appliance refuses, or does not answer;   | rollback: one more epoch
//!       | or the allocator restarts                   v
//!       +----------------------------------------> [returning] --every appliance has it--> over: old owner has them
//! ```
//!
//! Each arrow changes the records of all allocations in one batch, so no crash leaves some of them behind. The keys
//! of an epoch are durable before the first appliance hears of them. In `raising` no client has them: the new owner
//! gets them in `open`, and the old owner at the end of `returning`. So at any moment at most one client has keys
//! that appliances accept.
//!
//! The old owner is told to hold its I/O in each of the three states; the new client is the owner in `open`, and
//! stands by in the other two. Only an order ends `open`. A `returning` that an appliance keeps from completing is
//! tried again until it succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;
use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    ApplianceState, HANDOVER_NAMES_MAX, HandOverAll, Handover, HandoverPart, HandoverState, Standby,
};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::api::health::{Check, Problem};
use xpm_protocol::id::ParseIdError;
use xpm_protocol::{AllocationId, HandoverId, Name, Span};

use super::describe::Fingerprint;
use super::owner::raise_calls;
use super::{Answer, Awaited, CallError, Outcome, ReplyTo, Request, Service, Work};
use crate::store::Change;
use crate::store::record::{AllocationRecord, HandoverRecord, NextEpoch, Phase};

/// Age in seconds from which a hand-over that is neither committed nor rolled back is a problem.
const OPEN_LONG: u64 = 60;
/// Pause before appliances are sent an epoch again that they did not take.
const AGAIN: Duration = Duration::from_secs(2);

/// How a request names a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Which {
    /// By its id.
    Id(HandoverId),
    /// By the name of an allocation that is part of it.
    Of(Name),
}

impl TryFrom<String> for Which {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Which, ParseIdError> {
        // 32 hexadecimal digits would be a name, too, but not one that people use.
        text.parse().map(Which::Id).or_else(|_| text.parse().map(Which::Of))
    }
}

/// Work of the allocator at a hand-over. It is lost with the process; the records say how to go on.
#[derive(Debug, Default)]
pub(super) struct Handing {
    reply: Option<ReplyTo>,
    /// Calls without a result yet.
    open: usize,
    failures: Vec<String>,
    /// Allocations of which some appliance has, or may have, the next epoch.
    touched: BTreeSet<AllocationId>,
    /// A store or a call is under way.
    busy: bool,
    /// Earliest next try, by the service's clock.
    again: Duration,
}

/// The state of a hand-over once a batch is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The appliances are to be sent the next epoch.
    Planned,
    /// No appliance changed anything, and all stays as before.
    Withdrawn,
    Opened,
    Committed,
    Returned,
}

impl Service {
    /// Hands these allocations over.
    pub(super) fn hand_over_all(&mut self, reply: ReplyTo, order: HandOverAll) {
        let members = match self.members_named(&order.names) {
            Ok(members) => members,
            Err(error) => return self.reply(reply, Err(error)),
        };
        if self.waits_its_turn(&members) {
            return self.queue_behind(&members, reply, Request::HandOverAll(order));
        }
        let checked = self.check_hand_over(&members, &order.to, order.force);
        let planned = checked.and_then(|()| self.plan_hand_over(&members));
        let (id, records) = match planned {
            Ok(planned) => planned,
            Err(error) => return self.reply(reply, Err(error)),
        };
        self.handovers.insert(id, Handing { reply: Some(reply), busy: true, ..Handing::default() });
        self.store_handover(id, Step::Planned, records);
    }

    fn members_named(&self, names: &[Name]) -> Result<Vec<AllocationId>, ApiError> {
        let once: BTreeSet<&Name> = names.iter().collect();
        if names.is_empty() || names.len() > HANDOVER_NAMES_MAX || once.len() != names.len() {
            let line = format!("a hand-over is of 1 to {HANDOVER_NAMES_MAX} allocations, each named once");
            return Err(ApiError(ErrorKind::Invalid, line));
        }
        let known = |name: &Name| self.names.get(name).copied().ok_or_else(|| super::view::unknown(name));
        names.iter().map(known).collect()
    }

    /// Whether one of these allocations has work that ends by itself and soon.
    fn waits_its_turn(&self, members: &[AllocationId]) -> bool {
        members.iter().any(|id| {
            let entry = &self.allocations[id];
            let is_short = !matches!(entry.work, Work::Idle | Work::Creating(_) | Work::Copying(_));
            is_short && entry.queue.len() < super::QUEUE_MAX
        })
    }

    fn queue_behind(&mut self, members: &[AllocationId], reply: ReplyTo, request: Request) {
        let busy = members.iter().find(|id| !matches!(self.allocations[id].work, Work::Idle));
        match busy {
            Some(id) => self.entry(*id).queue.push_back((reply, request)),
            None => self.request(reply, request),
        }
    }

    /// Refuses a hand-over that is impossible now. `to` is a host, or a client by name or id, that stands by for all
    /// of the allocations. A host can be two clients: one for memory as a file, one for disks.
    fn check_hand_over(&self, members: &[AllocationId], to: &str, force: bool) -> Result<(), ApiError> {
        let client = self.new_owner(to).map(|owner| owner.client);
        for id in members {
            let entry = &self.allocations[id];
            let (record, name) = (&entry.record, &entry.record.name);
            let refused = |kind, line: String| Err(ApiError(kind, line));
            let changing = record.change.is_some() || entry.hand_over.is_some() || record.next.is_some();
            if let Some(handover) = &record.handover {
                let line = format!("`{name}` is part of hand-over {} already", handover.id);
                return refused(ErrorKind::Conflict, line);
            }
            if changing || record.phase != Phase::Ready || !matches!(entry.work, Work::Idle) {
                let line = format!(
                    "`{name}` is being changed; `xpm alloc show {name}` says how far that is, wait for its end"
                );
                return refused(ErrorKind::Conflict, line);
            }
            self.check_not_lost(record)?;
            let Some(owner) = &record.owner else {
                let line =
                    format!("`{name}` has no owner: detach the client that stands by, and attach it there");
                return refused(ErrorKind::Conflict, line);
            };
            let is_it = |standby: &Standby| {
                standby.client.host_name == to
                    || client.as_ref().is_ok_and(|client| *client == standby.client.client)
            };
            let Some(standby) = record.standby.as_ref().filter(|standby| is_it(standby)) else {
                let line = format!(
                    "{to} does not stand by for `{name}`: run `xpm blk attach {name} --standby`, or `xpm fs attach`, there first"
                );
                return refused(ErrorKind::Conflict, line);
            };
            if !standby.noted && !force {
                let why = entry.side.cannot_hold.clone();
                let why = why.unwrap_or_else(|| "it has not answered to that a client stands by".to_owned());
                let line = format!(
                    "the owner of `{name}` ({}) cannot be made to wait: {why}. Try again in a moment; if its I/O may fail, use --force",
                    owner.host_name
                );
                return refused(ErrorKind::Unavailable, line);
            }
            let up = |one| self.inventory.state(one, self.now.at) == Some(ApplianceState::Up);
            if let Some(silent) = record.appliances().into_iter().find(|one| !up(*one)) {
                let line = format!(
                    "appliance {} of `{name}` is silent: bring it back first",
                    self.inventory.name(silent)
                );
                return refused(ErrorKind::Unavailable, line);
            }
        }
        Ok(())
    }

    fn plan_hand_over(
        &mut self,
        members: &[AllocationId],
    ) -> Result<(HandoverId, Vec<AllocationRecord>), ApiError> {
        let id = HandoverId::from_u128(self.random_id()?);
        let since = self.now.unix;
        let mut records = Vec::with_capacity(members.len());
        for member in members {
            let mut record = self.entry(*member).record.clone();
            record.next = Some(self.next_epoch(&record)?);
            let parties =
                record.owner.clone().zip(record.standby.as_ref().map(|standby| standby.client.clone()));
            let Some((from, to)) = parties else { continue };
            let state = HandoverState::Raising;
            record.handover = Some(Box::new(HandoverRecord { id, state, from, to, since }));
            records.push(record);
        }
        Ok((id, records))
    }

    fn next_epoch(&mut self, record: &AllocationRecord) -> Result<NextEpoch, ApiError> {
        let keys: Result<Vec<_>, ApiError> = record.grants.iter().map(|_| self.random_key()).collect();
        Ok(NextEpoch { epoch: record.epoch.next(), keys: keys? })
    }

    /// Makes the records of a hand-over durable, all together.
    fn store_handover(&mut self, id: HandoverId, step: Step, records: Vec<AllocationRecord>) {
        records.iter().for_each(|record| self.entry(record.id).work = Work::Handing);
        let batch = records.iter().map(|record| Change::Allocation(Box::new(record.clone()))).collect();
        self.store(batch, Awaited::Handover(id, step, records));
    }

    pub(super) fn handover_stored(&mut self, id: HandoverId, step: Step, records: Vec<AllocationRecord>) {
        let members: Vec<AllocationId> = records.iter().map(|record| record.id).collect();
        let before = self.shown_handover(id);
        for record in records {
            let member = record.id;
            self.replace(member, record);
            self.set_timer(member);
            if step != Step::Planned {
                self.describe_if_new(member);
            }
        }
        if step == Step::Planned {
            for member in members {
                // No appliance has heard of the new owner of this allocation, so it left the hand-over.
                if self.entry(member).record.handover.is_none() {
                    self.describe_if_new(member);
                    self.finish_work(member);
                }
            }
            return self.raise_all(id);
        }
        let shown = match (step, before) {
            (Step::Opened, _) => self.shown_handover(id),
            (Step::Committed, before) => {
                before.map(|one| Handover { state: HandoverState::Committed, ..one })
            }
            (_, before) => before.map(|one| Handover { state: HandoverState::Returned, ..one }),
        };
        let handing = self.handovers.remove(&id).unwrap_or_default();
        if let Some(shown) = &shown {
            self.tell_handover(step, shown);
        }
        if let Some(reply) = handing.reply {
            match (step, shown) {
                (Step::Withdrawn, _) | (_, None) => self.refuse_handover(reply, &handing.failures),
                (_, Some(shown)) => self.reply(reply, Ok(Outcome::Handover(Box::new(shown)))),
            }
        }
        members.into_iter().for_each(|member| self.finish_work(member));
    }

    fn refuse_handover(&mut self, reply: ReplyTo, failures: &[String]) {
        let line = format!("nothing was handed over, and the owner goes on: {}", failures.join("; "));
        self.refuse(reply, ErrorKind::Unavailable, line);
    }

    fn tell_handover(&mut self, step: Step, shown: &Handover) {
        let (from, to, id) = (&shown.from.host_name, &shown.to.host_name, shown.id);
        for name in &shown.names {
            let (kind, line) = match step {
                Step::Planned => continue,
                Step::Opened => (
                    EventKind::HandoverOpen,
                    format!(
                        "`{name}` belongs to {to} now; {from} waits for the commit or rollback of hand-over {id}"
                    ),
                ),
                Step::Committed => (
                    EventKind::HandoverCommitted,
                    format!("`{name}` belongs to {to} for good (hand-over {id})"),
                ),
                Step::Returned => (
                    EventKind::HandoverReturned,
                    format!("`{name}` belongs to {from} again (hand-over {id})"),
                ),
                Step::Withdrawn => {
                    (EventKind::HandoverFailed, format!("`{name}` stays with {from} (hand-over {id})"))
                }
            };
            self.tell(kind, name, line);
        }
    }

    /// The present members of a hand-over: an allocation may have been deleted by force.
    fn members_of(&self, id: HandoverId) -> Vec<AllocationId> {
        let is_in = |entry: &&super::Entry| {
            entry.record.phase == Phase::Ready
                && entry.record.handover.as_ref().is_some_and(|one| one.id == id)
        };
        self.allocations.values().filter(is_in).map(|entry| entry.record.id).collect()
    }

    /// Sends the next epoch to the appliances of all members.
    fn raise_all(&mut self, id: HandoverId) {
        let members = self.members_of(id);
        let handing = self.handovers.entry(id).or_default();
        (handing.open, handing.busy) = (0, true);
        handing.failures.clear();
        handing.touched.clear();
        for member in members {
            self.entry(member).work = Work::Handing;
            let record = self.entry(member).record.clone();
            let descriptor = settled(record.clone()).descriptor();
            self.entry(member).described = Some(Fingerprint::of(descriptor.as_deref()));
            let calls = raise_calls(&record, descriptor.as_ref(), false);
            for (index, (appliance, call)) in calls.into_iter().enumerate() {
                // An appliance that was given up accepts no keys any more.
                if self.is_gone(appliance) {
                    continue;
                }
                let control = self.control_of(appliance);
                self.call(appliance, control, call, Awaited::HandoverRaised(id, member, index));
                self.handing(id).open += 1;
            }
        }
        if self.handing(id).open == 0 {
            self.all_raised(id);
        }
    }

    fn handing(&mut self, id: HandoverId) -> &mut Handing {
        self.handovers.entry(id).or_default()
    }

    pub(super) fn handover_raised(
        &mut self,
        id: HandoverId,
        (member, grant): (AllocationId, usize),
        result: Result<Answer, CallError>,
    ) {
        let appliance = self.entry(member).record.grants[grant].appliance;
        let name = self.inventory.name(appliance);
        let handing = self.handing(id);
        handing.open -= 1;
        if !matches!(result, Err(CallError::Refused(..))) {
            handing.touched.insert(member);
        }
        if let Err(error) = result {
            handing.failures.push(format!("appliance {name}: {error}"));
        }
        if handing.open == 0 {
            self.all_raised(id);
        }
    }

    /// Every appliance has answered, or cannot.
    fn all_raised(&mut self, id: HandoverId) {
        let members = self.members_of(id);
        let handing = self.handing(id);
        let (failed, touched) = (!handing.failures.is_empty(), handing.touched.clone());
        let records: Vec<AllocationRecord> =
            members.iter().map(|one| self.entry(*one).record.clone()).collect();
        let returning = records.iter().any(|record| is_in(record, HandoverState::Returning));
        match (returning, failed) {
            (false, false) => {
                let records = records.into_iter().map(settled).collect();
                self.store_handover(id, Step::Opened, records);
            }
            (false, true) => {
                // The old owner goes on with the untouched allocations, and gets the others back.
                let mut withdrawn = Vec::with_capacity(records.len());
                for mut record in records {
                    match touched.contains(&record.id) {
                        true => set_state(&mut record, HandoverState::Returning),
                        false => (record.next, record.handover) = (None, None),
                    }
                    withdrawn.push(record);
                }
                let step = if touched.is_empty() { Step::Withdrawn } else { Step::Planned };
                if step == Step::Planned {
                    let handing = self.handing(id);
                    let (failures, reply) = (handing.failures.clone(), handing.reply.take());
                    reply.into_iter().for_each(|reply| self.refuse_handover(reply, &failures));
                }
                self.store_handover(id, step, withdrawn);
            }
            (true, false) => {
                let records = records.into_iter().map(settled).collect();
                self.store_handover(id, Step::Returned, records);
            }
            (true, true) => self.try_return_again(id, &members),
        }
    }

    fn try_return_again(&mut self, id: HandoverId, members: &[AllocationId]) {
        let again = self.now.at + AGAIN;
        let handing = self.handing(id);
        (handing.busy, handing.again) = (false, again);
        let line = format!(
            "the old owner gets everything back when every appliance has agreed, which is tried again and again: {}",
            handing.failures.join("; ")
        );
        if let Some(reply) = handing.reply.take() {
            self.refuse(reply, ErrorKind::Unavailable, line);
        }
        members.iter().for_each(|member| self.finish_work(*member));
    }

    /// The new owner keeps the allocations for good.
    pub(super) fn commit_handover(&mut self, reply: ReplyTo, which: Which) {
        let Some((id, members)) = self.found(reply, &which) else { return };
        if self.waits_its_turn(&members) {
            return self.queue_behind(&members, reply, Request::CommitHandover(which));
        }
        let mut records: Vec<AllocationRecord> =
            members.iter().map(|one| self.entry(*one).record.clone()).collect();
        if !records.iter().all(|record| is_in(record, HandoverState::Open)) {
            let line = format!("hand-over {id} is not open: the old owner gets its allocations back");
            return self.refuse(reply, ErrorKind::Conflict, line);
        }
        records.iter_mut().for_each(|record| record.handover = None);
        self.handovers.insert(id, Handing { reply: Some(reply), busy: true, ..Handing::default() });
        self.store_handover(id, Step::Committed, records);
    }

    /// The old owner gets the allocations back.
    pub(super) fn roll_back_handover(&mut self, reply: ReplyTo, which: Which) {
        let Some((id, members)) = self.found(reply, &which) else { return };
        let mut records: Vec<AllocationRecord> =
            members.iter().map(|one| self.entry(*one).record.clone()).collect();
        let returning = records.iter().any(|record| is_in(record, HandoverState::Returning));
        if returning && self.handing(id).busy {
            if let Some(before) = self.handing(id).reply.replace(reply) {
                self.refuse(
                    before,
                    ErrorKind::Conflict,
                    "another request for the same has come since".to_owned(),
                );
            }
            return;
        }
        if self.waits_its_turn(&members) {
            return self.queue_behind(&members, reply, Request::RollBackHandover(which));
        }
        if returning {
            self.handing(id).reply = Some(reply);
            return self.raise_all(id);
        }
        for record in &mut records {
            record.next = match self.next_epoch(record) {
                Ok(next) => Some(next),
                Err(error) => return self.reply(reply, Err(error)),
            };
            set_state(record, HandoverState::Returning);
        }
        let name = |record: &AllocationRecord| (record.name.clone(), record.handover.clone());
        let told: Vec<_> = records.iter().map(name).collect();
        for (name, handover) in told {
            let from = handover.map(|one| one.from.host_name).unwrap_or_default();
            let line = format!("`{name}` is to belong to {from} again (hand-over {id})");
            self.tell(EventKind::HandoverReturning, &name, line);
        }
        self.handovers.insert(id, Handing { reply: Some(reply), busy: true, ..Handing::default() });
        self.store_handover(id, Step::Planned, records);
    }

    /// Finds a hand-over and its members; refuses the request if there is none.
    fn found(&mut self, reply: ReplyTo, which: &Which) -> Option<(HandoverId, Vec<AllocationId>)> {
        let found = match which {
            Which::Id(id) => Some(*id),
            Which::Of(name) => {
                self.names.get(name).and_then(|id| Some(self.allocations[id].record.handover.as_ref()?.id))
            }
        };
        let members = found.map(|id| self.members_of(id)).unwrap_or_default();
        match found {
            Some(id) if !members.is_empty() => Some((id, members)),
            _ => {
                let line =
                    "there is no such hand-over: `xpm alloc handover --list` lists those that are not over";
                self.refuse(reply, ErrorKind::NotFound, line.to_owned());
                None
            }
        }
    }

    /// Undoes hand-overs that an earlier process left half done, and tries those again that an appliance delayed.
    pub(super) fn run_handovers(&mut self) {
        let now = self.now.at;
        let mut due: BTreeMap<HandoverId, bool> = BTreeMap::new();
        for entry in self.allocations.values().filter(|entry| entry.record.phase == Phase::Ready) {
            if is_in(&entry.record, HandoverState::Returning)
                && let Some(handover) = &entry.record.handover
            {
                let idle = matches!(entry.work, Work::Idle);
                *due.entry(handover.id).or_insert(true) &= idle;
            }
        }
        for (id, idle) in due {
            let handing = self.handing(id);
            let (busy, is_time) = (handing.busy, handing.again <= now);
            if idle && !busy && (is_time || self.are_heard(id)) {
                self.raise_all(id);
            }
        }
    }

    /// Whether a hand-over of an earlier process can go on: each of its appliances was heard.
    fn are_heard(&mut self, id: HandoverId) -> bool {
        let is_first = self.handing(id).failures.is_empty();
        let up = |one| self.inventory.state(one, self.now.at) == Some(ApplianceState::Up);
        is_first
            && self
                .members_of(id)
                .iter()
                .all(|one| self.allocations[one].record.appliances().into_iter().all(up))
    }

    /// Takes up a hand-over that an earlier process left in `Raising` or `Returning`. No client has the keys of its
    /// next epoch yet, so the old owner gets them. An `Open` hand-over stays open: only an order ends it.
    pub(super) fn restore_handover(&mut self, record: &mut AllocationRecord, until: Duration) {
        let Some(handover) = &mut record.handover else { return };
        if handover.state == HandoverState::Raising {
            tracing::info!("hand-over {} of {} was not finished: it is undone", handover.id, record.name);
            handover.state = HandoverState::Returning;
        }
        if handover.state == HandoverState::Returning {
            self.handing(handover.id).again = until;
        }
    }

    /// Every hand-over that is not over.
    pub(super) fn list_handovers(&self) -> Vec<Handover> {
        let records = self.allocations.values().map(|entry| &entry.record);
        let ids: BTreeSet<HandoverId> =
            records.filter_map(|record| Some(record.handover.as_ref()?.id)).collect();
        ids.into_iter().filter_map(|id| self.shown_handover(id)).collect()
    }

    fn shown_handover(&self, id: HandoverId) -> Option<Handover> {
        let members = self.members_of(id);
        let names = members.iter().map(|one| self.allocations[one].record.name.clone()).collect();
        let HandoverRecord { state, from, to, since, .. } =
            self.allocations[members.first()?].record.handover.as_deref()?.clone();
        let stuck = self
            .handovers
            .get(&id)
            .filter(|one| state == HandoverState::Returning && !one.failures.is_empty());
        let stuck = stuck.map(|handing| handing.failures.join("; "));
        Some(Handover { id, names, from, to, state, since, stuck })
    }

    pub(super) fn view_handover(&self, record: &AllocationRecord) -> Option<HandoverPart> {
        let HandoverRecord { id, state, from, to, since } = record.handover.as_deref()?.clone();
        Some(HandoverPart { id, state, from, to, since })
    }

    /// Hand-overs that an operator has to end.
    pub(super) fn handover_problems(&self) -> Vec<Problem> {
        let unix = self.now.unix;
        let old = |one: &Handover| one.stuck.is_some() || unix.saturating_sub(one.since) >= OPEN_LONG;
        let problem = |one: Handover| {
            let names: Vec<&str> = one.names.iter().map(Name::as_str).collect();
            let (names, from, to) = (names.join(", "), &one.from.host_name, &one.to.host_name);
            let age = Span(Duration::from_secs(unix.saturating_sub(one.since)));
            let summary = match (&one.stuck, one.state) {
                (Some(why), _) => format!("the hand-over of {names} back to {from} does not end: {why}"),
                (None, HandoverState::Open) => format!(
                    "the hand-over of {names} from {from} to {to} has been neither committed nor rolled back for {age}: {from} waits"
                ),
                (None, state) => {
                    format!("the hand-over of {names} from {from} to {to} is {} for {age}", state.as_str())
                }
            };
            let id = one.id;
            Problem::new(Check::HandoverOpen, format!("handover/{id}"), summary)
                .with_remedy(format!("`xpm alloc handover --commit {id}` or `--rollback {id}`"))
        };
        self.list_handovers().into_iter().filter(old).map(problem).collect()
    }
}

fn is_in(record: &AllocationRecord, state: HandoverState) -> bool {
    record.handover.as_ref().is_some_and(|one| one.state == state)
}

fn set_state(record: &mut AllocationRecord, state: HandoverState) {
    if let Some(handover) = &mut record.handover {
        handover.state = state;
    }
}

/// The record after every appliance has its next epoch.
fn settled(mut record: AllocationRecord) -> AllocationRecord {
    record.block_size = record.block_size();
    if let Some(next) = record.next.take() {
        record.epoch = next.epoch;
        for (grant, key) in record.grants.iter_mut().zip(next.keys) {
            grant.key = key;
        }
    }
    let Some(mut handover) = record.handover.take() else { return record };
    record.revealed = true;
    if handover.state == HandoverState::Returning {
        record.owner = Some(handover.from);
        // The client that was or was to be the new owner stands by as before; the old owner has noted that already.
        record.standby = Some(Box::new(Standby { client: handover.to, noted: true }));
        return record;
    }
    record.owner = Some(handover.to.clone());
    record.standby = None;
    handover.state = HandoverState::Open;
    record.handover = Some(handover);
    record
}
