//! Ends of allocations: leases, hours of accounts, and giving way to other requests.
//!
//! An end comes in steps that everybody can see. First it is announced. Then it comes: no new client can attach.
//! After a time of grace the owner is cut off and the memory is freed. The moments of the steps are part of the
//! record. Each allocation that has an end has one timer, for its next step.
//!
//! ```text
//!   Nothing --warns--> Warned --ends--> Ended --frees--> freed
//!      ^_________________|_______________|   renewed
//! ```
//!
//! An owner always gets the whole warning time and the whole time of grace. So a step that comes late moves all later
//! steps by the same delay, and time that does not count moves them as well (`forbear.rs`).

use xpm_control::server::ApiError;
use xpm_protocol::AllocationId;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Attach, EndReason, Ending, Renew};
use xpm_protocol::api::event::EventKind;

use super::{AfterStore, Outcome, ReplyTo, Service, Work, asking, purge};
use crate::store::record::{AllocationRecord, LeaseRecord, Phase};

/// Delay in seconds from which a step counts as late; the service checks twice a second.
const LATE: u64 = 5;

/// The last step of an allocation that was announced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Told {
    #[default]
    Nothing,
    Warned,
    Ended,
}

impl Told {
    fn next(self) -> Told {
        match self {
            Told::Nothing => Told::Warned,
            Told::Warned | Told::Ended => Told::Ended,
        }
    }
}

impl Service {
    /// Sets the timer of an allocation to its next step.
    pub(super) fn set_timer(&mut self, id: AllocationId) {
        let Some(entry) = self.allocations.get_mut(&id) else { return };
        if let Some(at) = entry.timer.take() {
            self.timers.remove(&(at, id));
        }
        let next = match entry.record.phase {
            // While a move of the end is pending, the moments of the record are too early.
            Phase::Ready if entry.shift.is_none() => next_step(&entry.record, entry.told),
            _ => None,
        };
        if let Some(at) = next.map(|at| at.max(entry.steps_from)) {
            entry.timer = Some(at);
            self.timers.insert((at, id));
        }
    }

    /// Takes the steps that are due.
    pub(super) fn run_timers(&mut self) {
        let unix = self.now.unix;
        while let Some(&(at, id)) = self.timers.first().filter(|(at, _)| *at <= unix) {
            self.timers.remove(&(at, id));
            self.entry(id).timer = None;
            if self.can_be_heard(id) {
                self.step(id, unix - at);
            } else {
                self.is_deaf(id);
                self.look_again_soon(id);
            }
        }
    }

    /// Takes the next step, which comes `late` seconds late.
    fn step(&mut self, id: AllocationId, late: u64) {
        let unix = self.now.unix;
        let is_late = late > LATE;
        let told = self.entry(id).told;
        let record = &self.entry(id).record;
        let due = frees(record).is_some_and(|at| at <= unix);
        let lease_is_told = record.terms.lease.is_none() || told == Told::Ended || !is_late;
        if due && lease_is_told {
            match is_late {
                true => self.forbear(id, late.cast_signed(), "it could not be freed in time"),
                false => return self.free(id),
            }
        } else {
            let stage = record.lease_stage(unix);
            let stage = if is_late { stage.min(told.next()) } else { stage };
            if let (Some(lease), true) = (record.terms.lease, stage > told) {
                if is_late {
                    self.forbear(id, late.cast_signed(), "it could not be announced in time");
                }
                self.tell_stage(id, &lease, stage);
            }
            self.entry(id).told = stage;
        }
        self.set_timer(id);
    }

    fn tell_stage(&mut self, id: AllocationId, lease: &LeaseRecord, stage: Told) {
        let unix = self.now.unix;
        let record = &self.entry(id).record;
        let (name, kind) = (record.name.clone(), stage_kind(lease.reason, stage));
        let text = ending_text(record, unix).unwrap_or_default();
        self.tell(kind, &name, text);
    }

    /// The time of grace is over: cuts the owner off and frees the memory.
    fn free(&mut self, id: AllocationId) {
        if !matches!(self.entry(id).work, Work::Idle) {
            return self.look_again_soon(id);
        }
        let leased_out =
            self.entry(id).record.terms.lease.is_some_and(|lease| lease.frees() <= self.now.unix);
        if !leased_out && !self.still_needed(id) {
            return;
        }
        let name = self.entry(id).record.name.clone();
        self.tell(EventKind::Freed, &name, format!("`{name}` is freed: its time is over"));
        let mut record = self.entry(id).record.clone();
        record.end();
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Undo(purge::Then::Nothing));
    }

    pub(super) fn look_again_soon(&mut self, id: AllocationId) {
        let at = self.now.unix + 1;
        self.entry(id).timer = Some(at);
        self.timers.insert((at, id));
    }

    /// Renews a lease: its time begins anew, as far as its terms and the hours of its account allow.
    pub(super) fn renew(&mut self, reply: ReplyTo, id: AllocationId, renew: Renew) {
        let unix = self.now.unix;
        let record = self.entry(id).record.clone();
        let lease = match self.renewed(&record, renew) {
            Ok(lease) => lease,
            Err(error) => return self.reply(reply, Err(error)),
        };
        let mut record = record;
        let name = record.name.clone();
        let left = lease.ends.saturating_sub(unix);
        record.terms.lease = Some(lease);
        self.tell(EventKind::Renewed, &name, format!("`{name}` is renewed for {left} s"));
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Renewed(reply));
    }

    fn renewed(&self, record: &AllocationRecord, renew: Renew) -> Result<LeaseRecord, ApiError> {
        let unix = self.now.unix;
        let name = &record.name;
        let denied = |line: String| Err(ApiError(ErrorKind::Denied, line));
        let Some(lease) = record.terms.lease else {
            return Err(ApiError(
                ErrorKind::Invalid,
                format!("`{name}` has no lease: it stays until it is deleted"),
            ));
        };
        if !lease.renewable {
            return denied(format!("the lease of `{name}` cannot be renewed: make a new allocation"));
        }
        let account = record.terms.account.as_ref().and_then(|name| self.policy.account(name));
        if let Some((why, remedy)) = account.and_then(|account| asking::closed_line(account, unix)) {
            return denied(format!("{why}; {remedy}"));
        }
        let duration = renew.duration.map_or(lease.duration, |asked| asked.0.as_secs().min(lease.duration));
        let total = lease.total_ends.unwrap_or(u64::MAX);
        let ends = unix.saturating_add(duration.max(1)).min(total);
        if ends <= unix {
            return denied(format!(
                "`{name}` has been used as long as its account may: make a new allocation"
            ));
        }
        let renewed = LeaseRecord { ends, reason: EndReason::Lease, ..lease };
        let renewed = match account {
            Some(account) => asking::until_close(account, unix, Some(renewed)).unwrap_or(renewed),
            None => renewed,
        };
        Ok(renewed)
    }

    pub(super) fn was_renewed(&mut self, reply: ReplyTo, id: AllocationId) {
        // A step of the old lease may have been announced while the new lease was being stored.
        let unix = self.now.unix;
        let entry = self.entry(id);
        (entry.told, entry.steps_from) = (Told::Nothing, unix);
        self.set_timer(id);
        let shown = self.view(id);
        self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        self.finish_work(id);
    }

    /// Why a client may not attach to an allocation now.
    pub(super) fn attach_denied(&self, record: &AllocationRecord, attach: &Attach) -> Option<String> {
        let unix = self.now.unix;
        if record.owner.as_ref().is_some_and(|owner| owner.client == attach.client) {
            return None;
        }
        let ended = record.terms.lease.is_some_and(|lease| lease.ends <= unix) || record.reclaim.is_some();
        if ended {
            return ending_text(record, unix);
        }
        let account = record.terms.account.as_ref().and_then(|name| self.policy.account(name))?;
        asking::closed_line(account, unix).map(|(why, remedy)| format!("{why}; {remedy}"))
    }
}

impl AllocationRecord {
    pub(super) fn lease_stage(&self, unix: u64) -> Told {
        match self.terms.lease {
            Some(lease) if lease.ends <= unix => Told::Ended,
            Some(lease) if lease.warns() <= unix => Told::Warned,
            _ => Told::Nothing,
        }
    }
}

fn frees(record: &AllocationRecord) -> Option<u64> {
    let lease = record.terms.lease.map(|lease| lease.frees());
    let reclaim = record.reclaim.as_ref().map(|reclaim| reclaim.frees);
    lease.into_iter().chain(reclaim).min()
}

fn next_step(record: &AllocationRecord, told: Told) -> Option<u64> {
    let of_lease = record.terms.lease.map(|lease| match told {
        Told::Nothing => lease.warns(),
        Told::Warned => lease.ends,
        Told::Ended => lease.frees(),
    });
    of_lease.into_iter().chain(frees(record)).min()
}

fn stage_kind(reason: EndReason, stage: Told) -> EventKind {
    match (reason, stage) {
        (EndReason::Hours, Told::Ended) => EventKind::HoursEnded,
        (EndReason::Hours, _) => EventKind::HoursWarning,
        (_, Told::Ended) => EventKind::LeaseEnded,
        _ => EventKind::LeaseWarning,
    }
}

/// The announced end of an allocation, if there is one.
pub(super) fn ending(record: &AllocationRecord, unix: u64) -> Option<Ending> {
    let text = ending_text(record, unix)?;
    let lease = record.terms.lease.filter(|lease| lease.warns() <= unix);
    let lease = lease.map(|lease| (lease.frees(), lease.warns(), lease.reason));
    let reclaim = record.reclaim.as_ref().map(|one| (one.frees, one.since, EndReason::Reclaim));
    let (frees, since, reason) = lease.into_iter().chain(reclaim).min_by_key(|(frees, ..)| *frees)?;
    Some(Ending { reason, since, frees, text })
}

/// The announced end in one line, with the remedy.
fn ending_text(record: &AllocationRecord, unix: u64) -> Option<String> {
    let name = &record.name;
    if let Some(reclaim) = &record.reclaim {
        let left = reclaim.frees.saturating_sub(unix);
        return Some(format!(
            "`{name}` gives way to `{}`, which has a higher priority: its memory is freed in {left} s; move what is in it \
             elsewhere",
            reclaim.for_name
        ));
    }
    let lease = record.terms.lease.filter(|lease| lease.warns() <= unix)?;
    let what = match lease.reason {
        EndReason::Hours => "the hours of its account",
        _ => "its lease",
    };
    let can = if lease.renewable {
        format!("`xpm alloc renew {name}` renews it")
    } else {
        "it cannot be renewed".to_owned()
    };
    Some(match lease.ends.checked_sub(unix).filter(|left| *left > 0) {
        Some(left) => format!(
            "`{name}`: {what} end{} in {left} s, and its memory is freed {} s later; {can}",
            plural(lease.reason),
            lease.grace
        ),
        None => {
            let left = lease.frees().saturating_sub(unix);
            format!(
                "`{name}`: {what} ha{} ended; its memory is freed in {left} s; {can}",
                if lease.reason == EndReason::Hours { "ve" } else { "s" }
            )
        }
    })
}

fn plural(reason: EndReason) -> &'static str {
    if reason == EndReason::Hours { "" } else { "s" }
}
