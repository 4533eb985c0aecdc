//! Clients that stand by to take an allocation over.
//!
//! A client that stands by knows where the allocation lies, and has no keys. At most one client stands by for an
//! allocation at a time. Meanwhile the allocation stays where and as large as it is: the map that the standby has
//! must be right at the moment when it becomes the owner. The present owner is told of the standby, writes down that
//! it has to hold its I/O when appliances refuse it, and reports that: only then can the allocation be handed over
//! without force (`handover.rs`).

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Attach, HandoverState, Map, Owned, Owner, Part, Standby};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ClientId, GrantKey, Life, Succession};

use super::owner::{block_size, check_texts};
use super::{AfterStore, Outcome, ReplyTo, Request, Service};
use crate::store::record::AllocationRecord;

impl Service {
    /// Lets a client stand by.
    pub(super) fn stand_by(&mut self, reply: ReplyTo, id: AllocationId, attach: Attach, life: Option<Life>) {
        self.hear_owner(attach.client);
        let record = self.entry(id).record.clone();
        let checked = check_texts(&attach)
            .and_then(|()| self.check_not_lost(&record))
            .and_then(|()| self.may_stand_by(&record, &attach, life));
        if let Err(error) = checked {
            return self.reply(reply, Err(error));
        }
        if let Some(line) = self.attach_denied(&record, &attach) {
            return self.refuse(reply, ErrorKind::Denied, line);
        }
        if let Err(error) = block_size(&record, &attach) {
            return self.reply(reply, Err(error));
        }
        let before = record.standby.as_ref().filter(|standby| standby.client.client == attach.client);
        let since = before.map_or(self.now.unix, |standby| standby.client.since);
        let noted = record.standby.as_ref().is_some_and(|standby| standby.noted);
        let Attach { client, host_name, purpose, .. } = attach;
        let client = Owner { client, host_name, purpose, since, life };
        let standby = Some(Box::new(Standby { client, noted }));
        if record.standby == standby {
            return self.answer_standby(reply, id);
        }
        self.entry(id).work = super::Work::Storing;
        self.store_record(AllocationRecord { standby, ..record }, AfterStore::StandsBy(reply));
    }

    fn may_stand_by(
        &self,
        record: &AllocationRecord,
        attach: &Attach,
        life: Option<Life>,
    ) -> Result<(), ApiError> {
        let name = &record.name;
        let conflict = |line: String| Err(ApiError(ErrorKind::Conflict, line));
        if let Some(owner) = record.owner.as_ref().filter(|owner| owner.client == attach.client) {
            return conflict(format!("`{name}` is in use by this client already, as {}", owner.purpose));
        }
        if record.change.is_some()
            || record.next.is_some()
            || self.allocations[&record.id].hand_over.is_some()
        {
            return conflict(format!(
                "`{name}` is being changed; `xpm alloc show {name}` says how far that is, wait for its end"
            ));
        }
        let Some(Standby { client: other, .. }) = record.standby.as_deref().filter(|_| !attach.force) else {
            return Ok(());
        };
        let is_a_copy = match (life, other.life) {
            (Some(life), Some(holder)) => {
                !matches!(life.after(&holder), Succession::Same | Succession::IfEnded)
            }
            _ => false,
        };
        if other.client != attach.client || is_a_copy {
            let line = format!(
                "{} stands by for `{name}` already, as {}: detach it there first, or take its place with force",
                other.shown(),
                other.purpose
            );
            return Err(ApiError(ErrorKind::InUse, line));
        }
        Ok(())
    }

    /// The standby is durable.
    pub(super) fn stands_by(&mut self, reply: ReplyTo, id: AllocationId) {
        let record = &self.entry(id).record;
        let (name, standby) = (record.name.clone(), record.standby.clone());
        if let Some(standby) = standby {
            let line =
                format!("{} stands by for `{name}` as {}", standby.client.shown(), standby.client.purpose);
            self.tell(EventKind::Standby, &name, line);
        }
        self.answer_standby(reply, id);
        self.finish_work(id);
    }

    fn answer_standby(&mut self, reply: ReplyTo, id: AllocationId) {
        let record = self.entry(id).record.clone();
        let map = self.map_of(record).map(without_keys);
        let metadata = self.known_state();
        self.reply(reply, map.map(|map| Outcome::Owned(Box::new(Owned { map, metadata }))));
    }

    /// A client stops standing by. Returns whether it stood by.
    pub(super) fn withdraw(
        &mut self,
        reply: ReplyTo,
        id: AllocationId,
        client: ClientId,
        life: Option<Life>,
    ) -> bool {
        let record = self.entry(id).record.clone();
        let Some(standby) = record.standby.as_ref().filter(|standby| standby.client.client == client) else {
            return false;
        };
        // A copy of the client's state directory may not withdraw the client.
        if let (Some(life), Some(holder)) = (life, standby.client.life)
            && !matches!(life.after(&holder), Succession::Same | Succession::IfEnded)
        {
            return false;
        }
        self.entry(id).work = super::Work::Storing;
        self.store_record(AllocationRecord { standby: None, ..record }, AfterStore::StandbyGone(reply));
        true
    }

    pub(super) fn standby_gone(&mut self, reply: ReplyTo, id: AllocationId) {
        let name = self.entry(id).record.name.clone();
        self.tell(EventKind::StandbyGone, &name, format!("nobody stands by for `{name}` any more"));
        self.reply(reply, Ok(Outcome::Done));
        self.finish_work(id);
    }

    /// The owner has noted the standby: when appliances refuse it, it holds its I/O until the allocator says who owns
    /// the allocation.
    pub(super) fn note_standby(&mut self, reply: ReplyTo, id: AllocationId) {
        let mut record = self.entry(id).record.clone();
        match &mut record.standby {
            Some(standby) if !standby.noted && record.handover.is_none() => standby.noted = true,
            _ => return self.answer_orders(reply, id),
        }
        self.entry(id).side.cannot_hold = None;
        self.entry(id).work = super::Work::Storing;
        self.store_record(record, AfterStore::Noted(reply));
    }

    pub(super) fn standby_noted(&mut self, reply: ReplyTo, id: AllocationId) {
        self.answer_orders(reply, id);
        self.finish_work(id);
    }

    /// The role that a client has in an allocation of another owner, if any.
    pub(super) fn part_of(&self, id: AllocationId, client: ClientId) -> Option<Part> {
        let record = &self.allocations[&id].record;
        match &record.handover {
            Some(one) if one.from.client == client => {
                Some(Part::Holds { handover: one.id, to: one.to.host_name.clone() })
            }
            Some(one) if one.to.client == client && one.state != HandoverState::Open => Some(Part::StandsBy),
            Some(_) => None,
            None => {
                let standby = record.standby.as_ref().filter(|standby| standby.client.client == client);
                standby.map(|_| Part::StandsBy)
            }
        }
    }

    /// Why a request cannot be carried out while a client stands by, or while the allocation is being handed over.
    pub(super) fn standby_forbids(
        &self,
        id: AllocationId,
        request: &Request,
        fences: bool,
    ) -> Option<ApiError> {
        let record = &self.allocations[&id].record;
        let name = &record.name;
        if let Some(handover) = &record.handover {
            let owns =
                |client: &ClientId| handover.state == HandoverState::Open && handover.to.client == *client;
            let has_part = |client: &ClientId| [handover.from.client, handover.to.client].contains(client);
            let allowed = match request {
                Request::Attach { attach, .. } => owns(&attach.client) && !fences,
                Request::Detach { client, .. } => !has_part(client),
                Request::Delete { force, .. } => *force,
                Request::Renew { .. } | Request::Slabs { .. } | Request::Report { .. } => true,
                _ => false,
            };
            let (from, to, id) = (&handover.from.host_name, &handover.to.host_name, handover.id);
            // A client keeps trying a detach that is refused as in use, so it asks again once the hand-over is over.
            let kind = if matches!(request, Request::Detach { .. }) {
                ErrorKind::InUse
            } else {
                ErrorKind::Conflict
            };
            return (!allowed).then(|| {
                ApiError(
                    kind,
                    format!(
                        "`{name}` is being handed over from {from} to {to}: `xpm alloc handover --commit {id}` or `--rollback {id}` \
                         first"
                    ),
                )
            });
        }
        let standby = record.standby.as_ref()?;
        let stays = match request {
            Request::Resize { .. } | Request::Rename { .. } => true,
            Request::Delete { force, .. } => !force,
            _ => false,
        };
        stays.then(|| {
            let (host, form) = (standby.client.shown(), &standby.client.purpose);
            let line = format!("{host} stands by for `{name}` as {form}: detach it there first");
            ApiError(ErrorKind::InUse, line)
        })
    }
}

/// The map for a client that is not the owner.
fn without_keys(mut map: Map) -> Map {
    map.grants.iter_mut().for_each(|grant| grant.key = GrantKey::NONE);
    map
}
