//! Changes the owner of an allocation.
//!
//! The first owner gets the keys that the grants were made with. Every later change of owner raises the epoch, with
//! new keys, at every appliance before the new owner gets the map: so a late write of the earlier owner cannot land.
//! The next epoch and its keys are durable before the first appliance hears of them, and stay the same until all
//! appliances have them. So a change that broke off (an appliance away, the allocator killed) is simply repeated,
//! whichever client asks next.

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Attach, Grant, Map, Owned, Owner};
use xpm_protocol::api::appliance::Commit;
use xpm_protocol::api::blk::Form;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, BlockSize, BlockWish, ByteSize, ClientId, Epoch, Life};

use super::describe::Fingerprint;
use super::{
    AfterStore, Answer, Awaited, Call, CallError, Entry, Outcome, Raising, ReplyTo, Service, TEXT_LEN_MAX,
    Work,
};
use crate::store::record::{AllocationRecord, NextEpoch};

/// Options of a change of owner.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raised {
    /// A client or operator other than the new owner asked for the change.
    pub(super) handed_over: bool,
    /// Memory that cannot be moved away from the old owner is replaced by zeros.
    pub(super) lose: bool,
    /// Block size from now on.
    pub(super) block_size: Option<BlockSize>,
}

/// A change of owner that is under way at the appliances.
#[derive(Debug)]
pub(super) struct Raise {
    reply: ReplyTo,
    owner: Owner,
    /// A client or operator other than the new owner asked for the change.
    handed_over: bool,
    /// Memory that cannot be moved away from the old owner is replaced by zeros.
    lose: bool,
    /// Block size from now on.
    block_size: Option<BlockSize>,
    open: usize,
    /// Bytes that were replaced by zeros.
    lost: u64,
    failures: Vec<String>,
    /// How many failures are refusals that changed nothing because the memory cannot be moved.
    unmovable: usize,
    /// No appliance was sent this epoch before.
    first: bool,
}

impl Service {
    /// `fences`: the present owner is cut off, although it is the same client.
    pub(super) fn attach(
        &mut self,
        reply: ReplyTo,
        id: AllocationId,
        attach: Attach,
        (life, fences): (Option<Life>, bool),
        has: Option<Epoch>,
    ) {
        self.hear_owner(attach.client);
        let unix = self.now.unix;
        let record = &self.entry(id).record;
        if let Err(error) = check(record, &attach) {
            return self.reply(reply, Err(error));
        }
        let lose = attach.lose;
        let record = record.clone();
        // The present owner may still ask for its map again.
        if record.owner.as_ref().is_none_or(|owner| owner.client != attach.client)
            && let Err(error) = self.check_not_lost(&record)
        {
            return self.reply(reply, Err(error));
        }
        if let Some(line) = self.attach_denied(&record, &attach) {
            return self.refuse(reply, ErrorKind::Denied, line);
        }
        let block_size = match block_size(&record, &attach) {
            Ok(size) => size,
            Err(error) => return self.reply(reply, Err(error)),
        };
        let record = &self.entry(id).record;
        let same = record.owner.as_ref().filter(|owner| owner.client == attach.client && !fences);
        // The owner has keys that the allocator lost: they are to be reported, not replaced, since its device may be
        // in use.
        let tells = record.keyless && same.is_some() && has == Some(record.epoch);
        let since = same.map(|owner| owner.since).unwrap_or(unix);
        let Attach { client, host_name, purpose, .. } = attach;
        let owner = Owner { client, host_name, purpose, since, life };
        let record = &self.entry(id).record;
        let settled = (record.next.is_none() || tells) && !fences;
        let kept = record.owner.as_ref() == Some(&owner) && record.block_size == block_size;
        if settled && record.revealed && kept {
            self.owned(reply, id);
        } else if settled
            && (!record.revealed || record.owner.as_ref().is_some_and(|of| of.client == owner.client))
        {
            self.record_owner(reply, id, owner, block_size);
        } else {
            self.begin_raise(reply, id, owner, Raised { handed_over: false, lose, block_size });
        }
    }

    fn record_owner(
        &mut self,
        reply: ReplyTo,
        id: AllocationId,
        owner: Owner,
        block_size: Option<BlockSize>,
    ) {
        let mut record = self.entry(id).record.clone();
        record.block_size = block_size;
        forget_standby(&mut record, &owner);
        record.owner = Some(owner);
        record.revealed = true;
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Owned(reply));
    }

    /// Records the next epoch. If one is recorded already, it is used with its keys, since no client was given them.
    pub(super) fn begin_raise(&mut self, reply: ReplyTo, id: AllocationId, owner: Owner, how: Raised) {
        let Raised { handed_over, lose, block_size } = how;
        if !handed_over {
            self.drop_hand_over(id);
        }
        let mut record = self.entry(id).record.clone();
        let first = record.next.is_none();
        let raise = Raise {
            reply,
            owner,
            handed_over,
            lose,
            block_size,
            open: 0,
            lost: 0,
            failures: Vec::new(),
            unmovable: 0,
            first,
        };
        if !first && !std::mem::take(&mut record.keyless) {
            return self.raise(id, raise);
        }
        if !first {
            // Durable before an appliance hears of the new keys: from then on the present owner's keys do not count.
            self.entry(id).work = Work::Storing;
            return self.store_record(record, AfterStore::Raise(raise));
        }
        let keys = record.grants.iter().map(|_| self.random_key()).collect();
        match keys {
            Ok(keys) => record.next = Some(NextEpoch { epoch: record.epoch.next(), keys }),
            Err(error) => return self.reply(reply, Err(error)),
        }
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Raise(raise));
    }

    /// The same for a new owner that did not ask for the change itself.
    pub(super) fn begin_raise_for(&mut self, reply: ReplyTo, id: AllocationId, owner: Owner, lose: bool) {
        let block_size = self.entry(id).record.block_size();
        self.begin_raise(reply, id, owner, Raised { handed_over: true, lose, block_size });
    }

    pub(super) fn raise(&mut self, id: AllocationId, mut raise: Raise) {
        let descriptor = raised_record(self.entry(id).record.clone(), &raise).descriptor();
        self.entry(id).described = Some(Fingerprint::of(descriptor.as_deref()));
        let calls = raise_calls(&self.entry(id).record, descriptor.as_ref(), raise.lose);
        raise.open = calls.len();
        self.entry(id).work = Work::Raising(raise);
        for (index, (appliance, call)) in calls.into_iter().enumerate() {
            let control = self.control_of(appliance);
            self.call(appliance, control, call, Awaited::Raised(id, index));
        }
    }

    pub(super) fn raised(&mut self, id: AllocationId, grant: usize, result: Result<Answer, CallError>) {
        let appliance = self.entry(id).record.grants[grant].appliance;
        let name = self.inventory.name(appliance);
        let Entry { record, work: Work::Raising(raise), .. } = self.entry(id) else { return };
        raise.open -= 1;
        match result {
            Ok(Answer::Lost(lost)) => raise.lost += lost,
            Ok(_) => {}
            Err(error) => {
                raise.unmovable += usize::from(matches!(error, CallError::Refused(ErrorKind::NoSpace, _)));
                raise.failures.push(format!("appliance {name}: {error}"));
            }
        }
        if raise.open > 0 {
            return;
        }
        let (reply, handed_over, lost) = (raise.reply, raise.handed_over, raise.lost);
        if raise.failures.is_empty() {
            let record = raised_record(record.clone(), raise);
            self.entry(id).work = Work::Storing;
            if lost > 0 {
                let (name, lost) = (record.name.clone(), ByteSize(lost));
                let line = format!(
                    "the new owner of `{name}` gets zeros in place of {lost} that could not be moved away from its old owner"
                );
                self.tell(EventKind::ContentLost, &name, line);
            }
            let after = if handed_over { AfterStore::HandedOver(reply) } else { AfterStore::Owned(reply) };
            return self.store_record(record, after);
        }
        let failures = raise.failures.join("; ");
        // An earlier call may have been carried out, or may still arrive; and after a recovery of the metadata, only
        // the keys of the next epoch are known. Such an epoch stays, with its keys, until every appliance has it.
        if raise.first && raise.unmovable == record.grants.len() {
            // Each appliance was asked once and has changed nothing: no client has the new keys, and the owner goes
            // on.
            let line = format!("`{}` stays with its owner: {failures}", record.name);
            let mut record = record.clone();
            record.next = None;
            self.entry(id).work = Work::Storing;
            return self.store_record(record, AfterStore::NotRaised(reply, line));
        }
        let record = &self.allocations[&id].record;
        let advice = self.advice_for_silent(record);
        let line = format!(
            "the owner of `{}` cannot be changed until every appliance of it agrees: {failures}; bring it back and try again, \
             or delete the allocation{advice}",
            record.name
        );
        self.refuse(reply, ErrorKind::Unavailable, line);
        self.finish_work(id);
    }

    pub(super) fn handed_over_to(&mut self, reply: ReplyTo, id: AllocationId) {
        let record = &self.entry(id).record;
        let name = record.name.clone();
        let to = record.owner.as_ref().map(|owner| owner.host_name.clone()).unwrap_or_default();
        self.tell(EventKind::HandedOver, &name, format!("`{name}` belongs to {to} now"));
        let shown = self.view(id);
        self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        self.finish_work(id);
    }

    pub(super) fn owned(&mut self, reply: ReplyTo, id: AllocationId) {
        self.entry(id).owner_heard = self.now.at;
        let record = &self.entry(id).record;
        let (name, owner) = (record.name.clone(), record.owner.clone());
        if let Some(owner) = owner.filter(|owner| owner.since == self.now.unix) {
            let line = format!("`{name}` is used by {} as {}", owner.shown(), owner.purpose);
            self.tell(EventKind::Attached, &name, line);
        }
        let map = self.map(id);
        let metadata = self.known_state();
        self.reply(reply, map.map(|map| Outcome::Owned(Box::new(Owned { map, metadata }))));
        self.finish_work(id);
    }

    /// Ends an ownership. For a client that is not the owner there is nothing to do.
    pub(super) fn detach(&mut self, reply: ReplyTo, id: AllocationId, client: ClientId, life: Option<Life>) {
        let mut record = self.entry(id).record.clone();
        if record.owner.as_ref().is_none_or(|owner| owner.client != client) {
            if !self.withdraw(reply, id, client, life) {
                self.reply(reply, Ok(Outcome::Done));
            }
            return;
        }
        if self.entry(id).hand_over.is_some() {
            // Detaching is what the owner was asked for.
            self.reply(reply, Ok(Outcome::Done));
            return self.let_go(id);
        }
        // A device that left the choice open used the block size of its form.
        record.block_size = record.block_size();
        record.owner = None;
        record.standby.iter_mut().for_each(|standby| standby.noted = false);
        record.idle_since = self.now.unix;
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Disowned(reply));
    }

    fn map(&mut self, id: AllocationId) -> Result<Map, ApiError> {
        let record = self.entry(id).record.clone();
        self.map_of(record)
    }

    /// The map of an allocation: its grants with all that its owner needs.
    pub(super) fn map_of(&self, record: AllocationRecord) -> Result<Map, ApiError> {
        let mut grants = Vec::with_capacity(record.grants.len());
        for grant in &record.grants {
            let info = self.inventory.info(grant.appliance).ok_or_else(|| {
                ApiError(
                    ErrorKind::Internal,
                    format!("appliance {} of `{}` is unknown", grant.appliance, record.name),
                )
            })?;
            grants.push(Grant {
                id: grant.id,
                appliance: grant.appliance,
                appliance_name: info.name.clone(),
                endpoints: info.endpoints.clone(),
                key: grant.key.clone(),
                regions: grant.count,
            });
        }
        let block_size = record.block_size();
        Ok(Map {
            name: record.name,
            id: record.id,
            epoch: record.epoch,
            version: record.version,
            size: ByteSize(record.size),
            layout: record.layout,
            region_len: ByteSize(record.region_len),
            grants,
            regions: record.slots,
            slabs: record.slabs,
            block_size,
        })
    }
}

/// Adjusts the standby to a new owner: an owner does not stand by, and a new owner has not noted who does.
fn forget_standby(record: &mut AllocationRecord, owner: &Owner) {
    let stays = record.owner.as_ref().is_some_and(|before| before.client == owner.client);
    record.standby = record.standby.take().filter(|standby| standby.client.client != owner.client);
    if let Some(standby) = &mut record.standby {
        standby.noted &= stays;
    }
}

/// Refuses texts that are too long.
pub(super) fn check_texts(attach: &Attach) -> Result<(), ApiError> {
    if attach.host_name.len() > TEXT_LEN_MAX || attach.purpose.len() > TEXT_LEN_MAX {
        let line = format!("a host name and a purpose are at most {TEXT_LEN_MAX} bytes long");
        return Err(ApiError(ErrorKind::Invalid, line));
    }
    Ok(())
}

fn check(record: &AllocationRecord, attach: &Attach) -> Result<(), ApiError> {
    check_texts(attach)?;
    match &record.owner {
        Some(owner) if owner.client != attach.client && !attach.force => {
            let line = format!(
                "`{}` is in use by {} as {} (client {}): detach it there first, or take it with force, which cuts that client off",
                record.name,
                owner.shown(),
                owner.purpose,
                owner.client
            );
            Err(ApiError(ErrorKind::InUse, line))
        }
        _ => Ok(()),
    }
}

/// The block size of an allocation from this attachment on.
///
/// A client that sends no block size shows the size of its form. That is right for allocations from before block
/// sizes could be chosen, and for allocations that were never written to; for others it would show the data with the
/// wrong block size.
pub(super) fn block_size(record: &AllocationRecord, attach: &Attach) -> Result<Option<BlockSize>, ApiError> {
    let Ok(form) = attach.purpose.parse::<Form>() else { return Ok(record.block_size()) };
    let (name, of_form) = (&record.name, form.block_size_of_before());
    let unused = !record.revealed && record.epoch == Epoch::FIRST;
    let (kind, line) = match (record.block_size(), attach.blocks, of_form) {
        (Some(size), Some(BlockWish::Is(other)), _) if size != other => (
            ErrorKind::Conflict,
            format!(
                "`{name}` has blocks of {size} bytes, for good: attach it without --block-size, or make another allocation with \
                 --block-size {other}"
            ),
        ),
        (Some(size), Some(_), _) => return Ok(Some(size)),
        (Some(size), None, Some(other)) if size != other && !unused => (
            ErrorKind::Unsupported,
            format!(
                "`{name}` has blocks of {size} bytes, and this xpm-blk is of a version that shows {other} as {form}: upgrade it"
            ),
        ),
        (Some(_), None, Some(other)) => return Ok(Some(other)),
        (size @ Some(_), None, None) => return Ok(size),
        (None, Some(BlockWish::Is(size)), _) => return Ok(Some(size)),
        (None, Some(BlockWish::Kept), _) if unused => return Ok(Some(BlockSize::default())),
        (None, Some(BlockWish::Kept), Some(_)) => (
            ErrorKind::Invalid,
            format!(
                "`{name}` was made before block sizes could be chosen, and nothing says which one its content has: attach it with \
                 --block-size 512 if it was used as ublk or vhost-user, with --block-size 4096 if as nbd or nbd-direct"
            ),
        ),
        (None, _, of_form) => return Ok(of_form),
    };
    Err(ApiError(kind, line))
}

pub(super) fn raise_calls(
    record: &AllocationRecord,
    descriptor: Option<&String>,
    lose: bool,
) -> Vec<(xpm_protocol::ApplianceId, Call)> {
    let next = record.next.as_ref().expect("an epoch is recorded before it is raised");
    let call = |(grant, key): (&crate::store::record::GrantRecord, &xpm_protocol::GrantKey)| {
        let commit = Commit {
            allocation: record.id,
            name: record.name.clone(),
            epoch: next.epoch,
            key: key.clone(),
            regions: grant.regions.clone(),
            from: None,
            descriptor: descriptor.cloned(),
        };
        let len = u64::from(grant.count).saturating_mul(record.region_len);
        (grant.appliance, Call::Raise(grant.id, commit, Raising { len, lose }))
    };
    record.grants.iter().zip(&next.keys).map(call).collect()
}

/// The record after the raise. A client that gets the allocation without asking receives the keys when it attaches,
/// and carries out no change before.
fn raised_record(mut record: AllocationRecord, raise: &Raise) -> AllocationRecord {
    record.block_size = raise.block_size;
    if let Some(next) = record.next.take() {
        record.epoch = next.epoch;
        for (grant, key) in record.grants.iter_mut().zip(next.keys) {
            grant.key = key;
        }
    }
    forget_standby(&mut record, &raise.owner);
    record.owner = Some(raise.owner.clone());
    record.revealed = !raise.handed_over;
    record
}
