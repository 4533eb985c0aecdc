//! Carries a change out while the allocation has no owner: the appliances check and copy, run by run.

use xpm_protocol::AllocationId;
use xpm_protocol::api::allocator::{ChangeKind, RegionSlot};
use xpm_protocol::api::appliance::{COPY_LEN_MAX, Copy, Digest, Range};

use super::super::{Answer, Awaited, Call, CallError, Service, Work};
use super::settle::Over;
use crate::store::record::{AllocationRecord, ChangeRecord};

/// Progress of a copy, or of the check that regions to be removed are unused.
#[derive(Debug)]
pub(in super::super) struct Copying {
    /// Steps left to do; the last one comes next.
    todo: Vec<Step>,
    /// A client wants the allocation: the change is given up after the present step.
    stopped: bool,
}

/// A call to an appliance.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Copy a run of a region.
    Copy { region: u32, start: u64, len: u64 },
    /// Check that the copy of a run has this digest.
    Verify { region: u32, start: u64, len: u64, xxh3: String },
    /// Check that a run of a region holds only zeros.
    Look { region: u32, start: u64, len: u64 },
}

impl Service {
    pub(super) fn carry_out(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let mut todo = Vec::new();
        for &region in change.moved.iter().rev() {
            runs(0, record.region_len, |start, len| todo.push(Step::Copy { region, start, len }));
        }
        if change.kind == ChangeKind::Shrink {
            tail(&record, change.size, |region, start, len| todo.push(Step::Look { region, start, len }));
        }
        self.entry(id).work = Work::Copying(Copying { todo, stopped: false });
        self.next_step(id);
    }

    /// A client wants the allocation: gives the change up after the present step.
    pub(in super::super) fn stop_copying(&mut self, id: AllocationId) {
        if let Work::Copying(copying) = &mut self.entry(id).work {
            copying.stopped = true;
        }
    }

    fn next_step(&mut self, id: AllocationId) {
        let (record, change) = self.record_and_change(id);
        let Work::Copying(copying) = &self.entry(id).work else { return };
        if copying.stopped {
            let why = format!("`{}` is as it was: it came into use meanwhile", record.name);
            return self.end_change(id, Over::Refused(why));
        }
        let Some(step) = copying.todo.last().cloned() else { return self.switch_change(id, None) };
        let (grant, call) = match &step {
            Step::Copy { region, start, len } => self.copy_call(&record, &change, (*region, *start, *len)),
            Step::Verify { region, start, len, .. } => {
                digest_call(&change.slots, &change.grants, record.region_len, (*region, *start, *len))
            }
            Step::Look { region, start, len } => {
                digest_call(&record.slots, &record.grants, record.region_len, (*region, *start, *len))
            }
        };
        let control = self.control_of(grant);
        self.call(grant, control, call, Awaited::ChangeCopied(id));
    }

    fn copy_call(
        &self,
        record: &AllocationRecord,
        change: &ChangeRecord,
        (region, start, len): (u32, u64, u64),
    ) -> (xpm_protocol::ApplianceId, Call) {
        let from = record.slots[region as usize];
        let to = change.slots[region as usize];
        let (source, target) = (&record.grants[from.grant as usize], &change.grants[to.grant as usize]);
        let nbd = self.inventory.info(target.appliance).map(|info| info.endpoints.nbd.clone());
        let copy = Copy {
            range: Range { offset: u64::from(from.slot) * record.region_len + start, len },
            nbd: nbd.unwrap_or_default(),
            key: target.key.clone(),
            to: u64::from(to.slot) * record.region_len + start,
        };
        (source.appliance, Call::Copy(source.id, copy))
    }

    pub(in super::super) fn change_copied(&mut self, id: AllocationId, result: Result<Answer, CallError>) {
        let name = self.entry(id).record.name.clone();
        let digest = match result {
            Ok(Answer::Digest(digest)) => Ok(digest),
            Ok(_) => Err(CallError::Failed("an appliance answered something else".to_owned())),
            Err(error) => Err(error),
        };
        let done = digest.map_err(|error| error.to_string()).and_then(|digest| self.step_done(id, &digest));
        match done {
            Ok(()) => self.next_step(id),
            Err(why) => self.end_change(id, Over::Refused(format!("`{name}` is as it was: {why}"))),
        }
    }

    fn step_done(&mut self, id: AllocationId, digest: &Digest) -> Result<(), String> {
        let entry = self.entry(id);
        let Work::Copying(copying) = &mut entry.work else { return Ok(()) };
        match copying.todo.pop() {
            Some(Step::Copy { region, start, len }) => {
                let xxh3 = digest.xxh3.clone();
                copying.todo.push(Step::Verify { region, start, len, xxh3 });
            }
            Some(Step::Verify { xxh3, .. }) if xxh3 != digest.xxh3 => {
                return Err(
                    "the copy differs from the original; check the memory of both appliances".to_owned()
                );
            }
            Some(Step::Verify { len, .. }) => entry.side.copied += len,
            Some(Step::Look { region, .. }) if digest.data.0 > 0 => {
                return Err(format!(
                    "{} are in use in region {region}, beyond the new size: trim them, or choose a larger size",
                    digest.data
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

fn digest_call(
    slots: &[RegionSlot],
    grants: &[crate::store::record::GrantRecord],
    region_len: u64,
    (region, start, len): (u32, u64, u64),
) -> (xpm_protocol::ApplianceId, Call) {
    let slot = slots[region as usize];
    let grant = &grants[slot.grant as usize];
    let range = Range { offset: u64::from(slot.slot) * region_len + start, len };
    (grant.appliance, Call::Digest(grant.id, range))
}

fn runs(start: u64, end: u64, mut each: impl FnMut(u64, u64)) {
    // Emits the runs from the end, because steps are taken from the end of the list.
    let mut end = end;
    while end > start {
        let len = COPY_LEN_MAX.min(end - start);
        end -= len;
        each(end, len);
    }
}

/// Calls `each` with the part of each region that lies beyond `size`.
fn tail(record: &AllocationRecord, size: u64, mut each: impl FnMut(u32, u64, u64)) {
    for region in 0..record.slots.len() as u32 {
        let first = record.layout.bytes_before(record.region_len, region, size);
        runs(first, record.region_len, |start, len| each(region, start, len));
    }
}
