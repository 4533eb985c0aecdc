//! Orders to the owner of an allocation, and the owner's reports.
//!
//! The owner asks for its orders: the allocator calls no client. No I/O ever waits for an owner that is not heard,
//! and every step here can be repeated.

use std::collections::BTreeMap;
use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{DeviceUse, HandOver, MapChange, Orders, Owner, Report, Transfer};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::text::short_line;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, ClientId, Epoch, GrantId, GrantKey, Life, Name};

use super::change::Over;

use super::{AfterStore, Outcome, ReplyTo, Service, Work, view};
use crate::store::record::{AllocationRecord, Stage};

/// Time that the present owner gets to let go, if the request sets none.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest time that a request can set. The requester waits for it, and the control interface cuts requests off after
/// a minute.
const DEADLINE_MAX: Duration = Duration::from_secs(50);
/// Most users of a device that are kept.
const USERS_MAX: usize = 16;

/// An allocation that is to go to another client; its owner is asked to let go.
#[derive(Debug)]
pub(super) struct HandingOver {
    reply: ReplyTo,
    to: Owner,
    /// When the time for the owner is over, by the service's clock and in seconds since 1970.
    until: (Duration, u64),
    /// The owner has asked for its orders since.
    heard: bool,
}

impl Service {
    /// Answers with the owner's orders.
    pub(super) fn ask_orders(&mut self, reply: ReplyTo, name: &Name, client: ClientId, life: Option<Life>) {
        let Some(&id) = self.names.get(name) else { return self.reply(reply, Err(view::unknown(name))) };
        if self.part_of(id, client).is_some() {
            self.hear_owner(client);
            return self.answer_part(reply, id, client);
        }
        let is_owner = self.check_owner(id, client).and_then(|()| self.check_life(id, client, life));
        if let Err(error) = is_owner {
            return self.reply(reply, Err(error));
        }
        if let Some(hand_over) = &mut self.entry(id).hand_over {
            hand_over.heard = true;
        }
        self.answer_orders(reply, id);
    }

    /// Answers with the orders of an owner that appliances refuse for these grants. The appliances are asked at once
    /// for their grants: the owner holds its I/O until it knows whether its memory is lost.
    pub(super) fn hear_doubt(
        &mut self,
        reply: ReplyTo,
        name: &Name,
        (client, life): (ClientId, Option<Life>),
        refused: &[GrantId],
    ) {
        if let Some(&id) = self.names.get(name)
            && self.check_owner(id, client).is_ok()
        {
            let grants = &self.entry(id).record.grants;
            let doubted = grants.iter().filter(|grant| refused.contains(&grant.id));
            let doubted: Vec<ApplianceId> = doubted.map(|grant| grant.appliance).collect();
            doubted.into_iter().for_each(|appliance| self.look_soon(appliance));
            self.look_for_garbage();
        }
        self.ask_orders(reply, name, client, life);
    }

    /// Keeps the device that the owner shows the allocation as, and answers with its orders.
    pub(super) fn hear_use(
        &mut self,
        reply: ReplyTo,
        name: &Name,
        (client, life): (ClientId, Option<Life>),
        used: &DeviceUse,
    ) {
        let Some(&id) = self.names.get(name) else { return self.reply(reply, Err(view::unknown(name))) };
        let is_owner = self.check_owner(id, client).and_then(|()| self.check_life(id, client, life));
        if let Err(error) = is_owner {
            return self.reply(reply, Err(error));
        }
        let users = used.users.iter().take(USERS_MAX).map(|user| shown(user)).collect();
        self.entry(id).side.used = Some((client, DeviceUse { device: shown(&used.device), users }));
        self.ask_orders(reply, name, client, life);
    }

    pub(super) fn check_owner(&mut self, id: AllocationId, client: ClientId) -> Result<(), ApiError> {
        self.hear_owner(client);
        let record = &self.entry(id).record;
        match &record.owner {
            Some(owner) if owner.client == client => Ok(()),
            _ => Err(ApiError(
                ErrorKind::Conflict,
                format!("client {client} does not own `{}`; attach it first", record.name),
            )),
        }
    }

    pub(super) fn answer_orders(&mut self, reply: ReplyTo, id: AllocationId) {
        let orders = self.orders(id);
        self.reply(reply, orders.map(|orders| Outcome::Orders(Box::new(orders))));
    }

    fn orders(&mut self, id: AllocationId) -> Result<Orders, ApiError> {
        let entry = self.entry(id);
        let hand_over = entry.hand_over.as_ref();
        let hand_over = hand_over.map(|one| HandOver { to: one.to.client, until: one.until.1 });
        let record = entry.record.clone();
        let change = match &record.change {
            // An owner that was cut off and then became owner again has an old map until it attaches.
            Some(change) if change.stage != Stage::Preparing && record.revealed => {
                Some(self.map_change(&record)?)
            }
            _ => None,
        };
        let given_up = self.lost_lenders(&record);
        let lost = entry_lost(&self.entry(id).lost, &record);
        let endpoints = record
            .grants
            .iter()
            .filter_map(|grant| Some((grant.id, self.inventory.info(grant.appliance)?.endpoints.clone())));
        Ok(Orders {
            version: record.version,
            change,
            hand_over,
            epoch: Some(record.epoch),
            lost: Some(lost),
            endpoints: endpoints.collect(),
            metadata: self.known_state(),
            given_up,
            part: None,
            contested: record.standby.is_some() || record.handover.is_some(),
            wants_keys: record.keyless,
        })
    }

    /// Answers a client that does not own the allocation now and may become its owner. Any life of the client gets
    /// this answer: it only says to wait.
    fn answer_part(&mut self, reply: ReplyTo, id: AllocationId, client: ClientId) {
        let part = self.part_of(id, client);
        let orders = self.orders(id).map(|orders| Orders {
            part,
            change: None,
            hand_over: None,
            lost: None,
            wants_keys: false,
            ..orders
        });
        self.reply(reply, orders.map(|orders| Outcome::Orders(Box::new(orders))));
    }

    fn map_change(&self, record: &AllocationRecord) -> Result<MapChange, ApiError> {
        let change = record.change.as_deref().expect("asked for where there is one");
        let switched = change.stage == Stage::Switched;
        let mut next = record.clone();
        if !switched {
            (next.size, next.version) = (change.size, change.number);
            (next.grants, next.slots) = (change.grants.clone(), change.slots.clone());
        }
        let control = record
            .known_grants()
            .filter_map(|grant| Some((grant.id, self.inventory.info(grant.appliance)?.control.clone())));
        Ok(MapChange {
            number: change.number,
            kind: change.kind,
            moved: change.moved.clone(),
            control: control.collect(),
            rate: change.rate.map(ByteSize),
            switched,
            next: self.map_of(next)?,
        })
    }

    /// Handles a report of the owner.
    pub(super) fn report(&mut self, reply: ReplyTo, id: AllocationId, client: ClientId, report: Report) {
        if let Err(error) = self.check_owner(id, client) {
            return self.reply(reply, Err(error));
        }
        match report {
            Report::HandedOver => self.handed_over(reply, id),
            Report::Holds => self.note_standby(reply, id),
            Report::Kept { why } => self.kept(reply, id, &why),
            // Handled before it came here.
            Report::Used(_) => self.answer_orders(reply, id),
            Report::Keys { epoch, keys } => self.hear_keys(reply, id, epoch, &keys),
            Report::GaveUp { appliance } => self.hear_given_up(reply, id, appliance),
            Report::Copied { number, .. }
            | Report::Ready { number }
            | Report::Done { number, .. }
            | Report::Refused { number, .. } => self.change_report(reply, id, number, report),
        }
    }

    /// Takes the keys of an ownership that was recovered without them. Wrong keys harm only the owner that sends
    /// them: the appliances know the right ones.
    fn hear_keys(
        &mut self,
        reply: ReplyTo,
        id: AllocationId,
        epoch: Epoch,
        keys: &BTreeMap<GrantId, GrantKey>,
    ) {
        let mut record = self.entry(id).record.clone();
        let told = record.grants.iter().all(|grant| keys.contains_key(&grant.id));
        if !record.keyless || record.epoch != epoch || !told {
            return self.answer_orders(reply, id);
        }
        for grant in &mut record.grants {
            grant.key = keys[&grant.id].clone();
        }
        (record.next, record.keyless) = (None, false);
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::KeysTold(reply));
    }

    fn change_report(&mut self, reply: ReplyTo, id: AllocationId, number: u64, report: Report) {
        let entry = self.entry(id);
        let name = entry.record.name.clone();
        let change = entry.record.change.as_ref().filter(|_| entry.record.revealed);
        let stage = change.filter(|change| change.number == number).map(|change| change.stage);
        match (stage, report) {
            (Some(_), Report::Copied { bytes, .. }) => {
                entry.side.copied = bytes;
                self.answer_orders(reply, id);
            }
            (Some(Stage::Open), Report::Ready { .. }) => self.switch_change(id, Some(reply)),
            (Some(Stage::Switched), Report::Ready { .. }) => self.answer_orders(reply, id),
            (Some(Stage::Switched), Report::Done { how, .. }) => {
                entry.side.followed = how.as_deref().map(shown);
                self.end_change(id, Over::Done(Some(reply)));
            }
            (Some(Stage::Open), Report::Refused { why, .. }) => {
                let why = shown(&why);
                self.answer_nothing(reply, id);
                self.end_change(id, Over::Refused(format!("`{name}` is as it was: {why}")));
            }
            // The change is over already, or the owner cannot have seen this stage.
            _ => self.answer_orders(reply, id),
        }
    }

    /// Answers that the owner has nothing left to do.
    fn answer_nothing(&mut self, reply: ReplyTo, id: AllocationId) {
        let record = self.entry(id).record.clone();
        let given_up = self.lost_lenders(&record);
        let orders = Orders {
            version: record.version,
            change: None,
            hand_over: None,
            epoch: Some(record.epoch),
            lost: None,
            endpoints: BTreeMap::new(),
            given_up,
            part: None,
            contested: record.standby.is_some() || record.handover.is_some(),
            metadata: self.known_state(),
            wants_keys: record.keyless,
        };
        self.reply(reply, Ok(Outcome::Orders(Box::new(orders))));
    }

    /// Hands an allocation over to another client. The present owner is asked first, unless `force` is set.
    pub(super) fn transfer(&mut self, reply: ReplyTo, id: AllocationId, transfer: &Transfer) {
        let to = match self.new_owner(&transfer.to) {
            Ok(to) => to,
            Err(error) => return self.reply(reply, Err(error)),
        };
        if let Err(error) = self.check_not_lost(&self.allocations[&id].record) {
            return self.reply(reply, Err(error));
        }
        let entry = self.entry(id);
        let name = entry.record.name.clone();
        let line = match &entry.record.owner {
            Some(owner) if owner.client == to.client => format!("`{name}` is {}'s already", owner.host_name),
            Some(_) if entry.record.change.is_some() => {
                format!(
                    "`{name}` is being changed; `xpm alloc show {name}` says how far that is, wait for its end"
                )
            }
            _ if entry.hand_over.is_some() => format!("`{name}` is going to another client already"),
            _ => String::new(),
        };
        if !line.is_empty() {
            return self.refuse(reply, ErrorKind::Conflict, line);
        }
        if entry.record.owner.is_none() || transfer.force {
            return self.begin_raise_for(reply, id, to, transfer.lose);
        }
        let deadline = transfer.deadline.map_or(DEADLINE, |span| span.0);
        if deadline > DEADLINE_MAX {
            let line = format!("a deadline is at most {}", xpm_protocol::Span(DEADLINE_MAX));
            return self.refuse(reply, ErrorKind::Invalid, line);
        }
        let until = (self.now.at + deadline, self.now.unix + deadline.as_secs());
        self.entry(id).hand_over = Some(HandingOver { reply, to, until, heard: false });
        self.tell(EventKind::HandOver, &name, format!("`{name}` is to go to {}", transfer.to));
    }

    pub(super) fn new_owner(&self, text: &str) -> Result<Owner, ApiError> {
        let named = text
            .parse::<Name>()
            .ok()
            .and_then(|name| Some((name.to_string(), self.clients.get(&name)?.client.facts.client?)));
        let (host_name, client) = match (named, text.parse::<ClientId>()) {
            (Some(named), _) => named,
            (None, Ok(client)) => (format!("client {client}"), client),
            (None, Err(_)) => {
                let line = format!(
                    "no client `{text}` has told of itself: `xpm client list` shows those that have; else give its id, which \
                     `xpm status --json` on it shows as blk.client"
                );
                return Err(ApiError(ErrorKind::NotFound, line));
            }
        };
        Ok(Owner { client, host_name, purpose: "handed over".to_owned(), since: self.now.unix, life: None })
    }

    /// The owner has let go.
    fn handed_over(&mut self, reply: ReplyTo, id: AllocationId) {
        self.answer_nothing(reply, id);
        self.let_go(id);
    }

    /// The client that the allocation was promised to becomes its owner.
    pub(super) fn let_go(&mut self, id: AllocationId) {
        if let Some(HandingOver { reply, to, .. }) = self.entry(id).hand_over.take() {
            self.begin_raise_for(reply, id, to, false);
        }
    }

    fn kept(&mut self, reply: ReplyTo, id: AllocationId, why: &str) {
        let name = self.entry(id).record.name.clone();
        let why = shown(why);
        match self.entry(id).hand_over.take() {
            Some(HandingOver { reply, .. }) => {
                self.refuse(reply, ErrorKind::InUse, format!("`{name}` stays where it is: {why}"));
            }
            None => self.entry(id).side.cannot_hold = Some(why),
        }
        self.answer_orders(reply, id);
    }

    /// Ends transfers whose time is over. An owner that was heard is cut off, because it knows of the order. An owner
    /// that was not heard may be dead, or out of reach and still writing. It keeps the allocation, and the transfer is
    /// refused: only an order with `force` cuts it off.
    pub(super) fn run_hand_overs(&mut self) {
        let now = self.now.at;
        let late = |entry: &super::Entry| entry.hand_over.as_ref().is_some_and(|one| one.until.0 <= now);
        let ids: Vec<AllocationId> =
            self.allocations.iter().filter(|(_, entry)| late(entry)).map(|(id, _)| *id).collect();
        for id in ids {
            if !matches!(self.entry(id).work, Work::Idle) {
                continue;
            }
            let Some(HandingOver { reply, to, heard, .. }) = self.entry(id).hand_over.take() else {
                continue;
            };
            let name = self.entry(id).record.name.clone();
            if heard {
                self.tell(
                    EventKind::CutOff,
                    &name,
                    format!("`{name}`: its owner did not let go in time and is cut off"),
                );
                self.begin_raise_for(reply, id, to, false);
            } else {
                let line = format!(
                    "the owner of `{name}` was not heard; if it is dead, or is to be cut off, say so with --force"
                );
                self.refuse(reply, ErrorKind::Unavailable, line);
            }
        }
    }

    /// Drops a pending transfer and a pending resize: the allocation ends or changes its owner.
    pub(super) fn drop_hand_over(&mut self, id: AllocationId) {
        if let Some(HandingOver { reply, .. }) = self.entry(id).hand_over.take() {
            let line = "its owner changed meanwhile; look at it, and try again".to_owned();
            self.refuse(reply, ErrorKind::Conflict, line);
        }
        if let Some(reply) = self.entry(id).side.reply.take() {
            self.refuse(reply, ErrorKind::Conflict, "the allocation is given back".to_owned());
        }
    }
}

/// The grants of a record that their appliances do not have any more.
fn entry_lost(lost: &super::garbage::Lost, record: &AllocationRecord) -> Vec<GrantId> {
    record.grants.iter().map(|grant| grant.id).filter(|id| lost.has(*id)).collect()
}

/// A text of a client, made fit for display.
fn shown(text: &str) -> String {
    short_line(text, 500)
}
