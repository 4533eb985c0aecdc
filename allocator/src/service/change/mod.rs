//! Changes where an allocation lies while it is in use: growing, shrinking, moving.
//!
//! A change has two sides (`ChangeRecord`). The side in the allocation's own fields is always the valid one. The other
//! side is in the field `change`: the new side at first, and the old side from `Switched` on.
//!
//! 1. The change is recorded as `Preparing`. The grants that only the new side has are made: of new regions, or of
//!    regions that they take over from a grant that loses some (`make.rs`).
//! 2. `Open` is recorded: all grants exist. The owner copies the regions that move, writes to both places, and
//!    reports `Ready` (`orders.rs`). If the allocation has no owner, the allocator has the appliances copy
//!    (`carry.rs`).
//! 3. `Switched` is recorded: the sides change places, in one step. Before this step the old side is complete, and
//!    after it the new one, whichever process dies: the owner writes to both sides until it has heard of the switch.
//! 4. The owner reports `Done`. The change is taken from the record. In the same step the grants that only the old
//!    side had become a record of their own, which is given back as after a deletion (`settle.rs`).
//!
//! If the change is given up before `Switched`, the new side is given back. The keys of grants that stay do not
//! change, because the owner does not change.

mod build;
mod carry;
mod make;
mod settle;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, ChangeKind, ChangeState, Create, DeviceUse, Resize};
use xpm_protocol::units::PAGE_LEN;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, ClientId};

pub(super) use self::build::Place;
pub(super) use self::carry::Copying;
pub(super) use self::make::Making;
pub(super) use self::settle::Over;
use super::early::Order;
use super::wish::Wish;
use super::{AfterStore, Outcome, ReplyTo, Request, Service, Work};
use crate::store::record::{AllocationRecord, Stage};
use crate::strategy::{self, Decided};

/// State of a change that is not in its record. It is lost with the process, and nothing depends on it.
#[derive(Debug, Default)]
pub(super) struct Side {
    /// Bytes that were copied so far.
    pub(super) copied: u64,
    /// The request that began the change, until it is answered.
    pub(super) reply: Option<ReplyTo>,
    /// Why the last change was not carried out.
    pub(super) refused: Option<String>,
    /// The owner's report on the last change: how its device followed.
    pub(super) followed: Option<String>,
    /// No further move is begun by the allocator itself before this moment, by the service's clock.
    pub(super) rests_until: Option<std::time::Duration>,
    /// Number of attempts in a row that found no place to move to.
    pub(super) unplaced: u32,
    /// The device that a client shows the allocation as.
    pub(super) used: Option<(ClientId, DeviceUse)>,
    /// Why the owner cannot hold its I/O during a hand-over.
    pub(super) cannot_hold: Option<String>,
}

impl Service {
    /// Makes an allocation larger or smaller.
    pub(super) fn resize(&mut self, reply: ReplyTo, id: AllocationId, resize: Resize) {
        if self.waits_for_appliances(true) {
            return self.resize_later(reply, id, resize);
        }
        match self.plan_resize(id, resize.size.0) {
            Ok(None) => {
                let shown = self.view(id);
                self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
            }
            Ok(Some((kind, size, places))) => {
                if let Err(error) = self.begin_change(id, kind, size, &places, None, Some(reply)) {
                    self.reply(reply, Err(error));
                }
            }
            Err(ApiError(ErrorKind::NoSpace, _)) if self.waits_for_appliances(false) => {
                self.resize_later(reply, id, resize);
            }
            Err(error) => self.reply(reply, Err(error)),
        }
    }

    /// Queues the resize until the known appliances are heard: the allocator started a moment ago.
    fn resize_later(&mut self, reply: ReplyTo, id: AllocationId, resize: Resize) {
        let name = self.entry(id).record.name.clone();
        self.wait_for_appliances(Order::Request(reply, Request::Resize { name, resize }));
    }

    /// Plans a resize: nothing to do, or the kind of change, the new size, and the place of each region.
    fn plan_resize(
        &mut self,
        id: AllocationId,
        asked: u64,
    ) -> Result<Option<(ChangeKind, u64, Vec<Place>)>, ApiError> {
        self.may_change(id)?;
        let record = self.entry(id).record.clone();
        let size = asked.checked_next_multiple_of(PAGE_LEN).filter(|size| *size > 0);
        let size = size.ok_or_else(|| {
            ApiError(
                ErrorKind::Invalid,
                "a size is 1 byte or more: say how much memory is wanted, such as 1GiB".to_owned(),
            )
        })?;
        let row = u64::from(record.layout.columns()) * record.region_len;
        let rows = size.div_ceil(row);
        let regions =
            usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(record.layout.columns() as usize));
        let regions = regions.ok_or_else(|| {
            ApiError(ErrorKind::Invalid, format!("{size} bytes are more than any pool has"))
        })?;
        if size == record.size {
            return Ok(None);
        }
        if size < record.size {
            self.check_slabs_within(id, size)?;
            return Ok(Some((ChangeKind::Shrink, size, vec![Place::Stay; regions])));
        }
        let mut places = vec![Place::Stay; record.slots.len()];
        if regions > places.len() {
            let more = (regions - places.len()) as u64 * record.region_len;
            let found = self.find_places(&record, more, &[], true)?;
            places.extend(found.into_iter().map(Place::Go));
        }
        Ok(Some((ChangeKind::Grow, size, places)))
    }

    /// Moves these regions (by index) of an allocation away from `from`: to `to`, or to where the documents place
    /// them.
    pub(super) fn begin_move(
        &mut self,
        id: AllocationId,
        regions: &[usize],
        (from, to): (ApplianceId, Option<ApplianceId>),
        rate: Option<u64>,
    ) -> Result<(), ApiError> {
        self.may_change(id)?;
        let record = self.entry(id).record.clone();
        let others: Vec<ApplianceId> = match to {
            Some(to) => self.inventory.pool().iter().map(|one| one.id).filter(|one| *one != to).collect(),
            None => vec![from],
        };
        let bytes = regions.len() as u64 * record.region_len;
        let found = self.find_places(&record, bytes, &others, false)?;
        let mut places = vec![Place::Stay; record.slots.len()];
        for (region, appliance) in regions.iter().zip(found) {
            places[*region] = Place::Go(appliance);
        }
        self.begin_change(id, ChangeKind::Move, record.size, &places, rate, None)
    }

    /// Places for more regions of an allocation, by the present documents.
    fn find_places(
        &mut self,
        record: &AllocationRecord,
        bytes: u64,
        without: &[ApplianceId],
        charged: bool,
    ) -> Result<Vec<ApplianceId>, ApiError> {
        let terms = &record.terms;
        let create = Create {
            account: terms.account.clone(),
            client: terms.client.clone(),
            strategy: terms.strategies.first().cloned(),
            labels: terms.labels.clone(),
            region_len: Some(ByteSize(record.region_len)),
            stripe: Some(record.layout.columns()),
            stripe_unit: (record.layout.columns() > 1)
                .then(|| ByteSize(record.layout.unit(record.region_len))),
            ..Create::new(record.name.clone(), ByteSize(bytes))
        };
        let mut wish = Wish::new(None, create);
        wish.failed = without.to_vec();
        wish.home = record.appliances().into_iter().collect();
        let looked = match charged {
            true => self.look(&wish, false),
            false => self.look_uncharged(&wish),
        };
        let looked = looked.map_err(|line| ApiError(ErrorKind::Invalid, line))?;
        self.record_decision(looked.decision);
        match (looked.refusal, looked.decided) {
            (None, Some(Decided { placement: Ok(strategy::Placement { regions, .. }), .. })) => Ok(regions),
            (Some(refusal), _) => Err(ApiError(refusal.kind, refusal.line())),
            _ => Err(ApiError(ErrorKind::NoSpace, "no appliance can take it".to_owned())),
        }
    }

    /// Checks whether a change may begin now.
    fn may_change(&mut self, id: AllocationId) -> Result<(), ApiError> {
        self.check_not_lost(&self.allocations[&id].record)?;
        let entry = self.entry(id);
        let name = entry.record.name.clone();
        let line = if entry.record.change.is_some() || !matches!(entry.work, Work::Idle) {
            format!(
                "`{name}` is being changed already; `xpm alloc show {name}` says how far that is, wait for its end"
            )
        } else if entry.record.keyless {
            format!(
                "`{name}` was recovered without its keys: its owner is asked for them within 10 s (an xpm-blk older than 0.2 has to \
                 attach it again); try again"
            )
        } else if let Some(standby) = &entry.record.standby {
            format!(
                "{} stands by for `{name}`: it stays as it is until that is over",
                standby.client.host_name
            )
        } else if entry.hand_over.is_some() || entry.record.next.is_some() || entry.record.handover.is_some()
        {
            format!("`{name}` is going to another client; try again when it has arrived")
        } else {
            return Ok(());
        };
        Err(ApiError(ErrorKind::Conflict, line))
    }

    /// Whether a request has to wait until the change has ended, because the request changes the owner.
    pub(super) fn is_in_the_way(&mut self, id: AllocationId, request: &Request, fences: bool) -> bool {
        let record = &self.entry(id).record;
        let owner = record.owner.as_ref().map(|owner| owner.client);
        record.change.is_some()
            && match request {
                Request::Attach { attach, .. } => {
                    fences || owner != Some(attach.client) && (attach.force || owner.is_none())
                }
                Request::Detach { client, .. } => owner == Some(*client),
                // An owner that is asked to let go finishes the change first.
                Request::Transfer { transfer, .. } => transfer.force || owner.is_none(),
                _ => false,
            }
    }

    /// Progress of a change, for display.
    pub(super) fn view_change(&self, id: AllocationId) -> Option<ChangeState> {
        let entry = &self.allocations[&id];
        let change = entry.record.change.as_ref()?;
        let owner = entry.record.owner.as_ref();
        let text = match (change.stage, owner) {
            (Stage::Preparing, _) => "appliances make memory ready".to_owned(),
            (Stage::Open, Some(owner)) => format!("{} carries it out", owner.host_name),
            (Stage::Open, None) => "appliances copy".to_owned(),
            (Stage::Switched, Some(owner)) => {
                format!("it is done; {} releases the old regions", owner.host_name)
            }
            (Stage::Switched, None) => "it is done; the old regions are given back".to_owned(),
        };
        let switched = change.stage == Stage::Switched;
        Some(ChangeState {
            kind: change.kind,
            since: change.since,
            size: ByteSize(if switched { entry.record.size } else { change.size }),
            bytes: ByteSize(change.moved.len() as u64 * entry.record.region_len),
            copied: ByteSize(entry.side.copied),
            text,
        })
    }

    /// Answers the request that began the change: the change is under way or over.
    fn answer_change(&mut self, id: AllocationId) {
        if let Some(reply) = self.entry(id).side.reply.take() {
            let shown: Allocation = self.view(id);
            self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        }
    }

    /// Stores the record with a new state of its change. The new state takes effect once the record is durable.
    fn store_change(&mut self, id: AllocationId, record: AllocationRecord, after: AfterStore) {
        self.entry(id).work = Work::Storing;
        self.store_record(record, after);
    }
}
