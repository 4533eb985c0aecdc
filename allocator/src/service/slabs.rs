//! Named slabs: the map of where the owner of an allocation carved them, kept for later owners.
//!
//! The owner carves slabs on its own. The allocator only keeps the map as part of the record: in the store, in
//! backups, and in the descriptors at the appliances, from which it can be recovered.

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::SlabMap;
use xpm_protocol::{AllocationId, ByteSize, ClientId};

use super::{AfterStore, Outcome, ReplyTo, Service, Work};

impl Service {
    /// Keeps a new map if its number follows the known one. Sending the same map again is no error.
    pub(super) fn set_slabs(&mut self, reply: ReplyTo, id: AllocationId, client: ClientId, slabs: SlabMap) {
        let kept = self.check_owner(id, client).and_then(|()| self.check_slabs(id, &slabs));
        match kept {
            Err(error) => self.reply(reply, Err(error)),
            Ok(false) => self.answer_slabs(reply, id),
            Ok(true) => {
                let entry = self.entry(id);
                let mut record = entry.record.clone();
                record.slabs = slabs;
                entry.work = Work::Storing;
                self.store_record(record, AfterStore::Slabs(reply));
            }
        }
    }

    /// Whether the map is new.
    fn check_slabs(&mut self, id: AllocationId, slabs: &SlabMap) -> Result<bool, ApiError> {
        let record = &self.entry(id).record;
        let known = &record.slabs;
        if slabs == known {
            return Ok(false);
        }
        if slabs.number != known.number + 1 {
            let line = format!(
                "the slabs of `{}` were changed meanwhile: map {} is known, and {} does not follow it; read it again",
                record.name, known.number, slabs.number
            );
            return Err(ApiError(ErrorKind::Conflict, line));
        }
        // During a shrink, slabs have to fit into the smaller size.
        let size = record.change.as_ref().map_or(record.size, |change| change.size.min(record.size));
        slabs.check(size).map_err(|line| ApiError(ErrorKind::Invalid, line))?;
        Ok(true)
    }

    pub(super) fn answer_slabs(&mut self, reply: ReplyTo, id: AllocationId) {
        let slabs = self.entry(id).record.slabs.clone();
        self.reply(reply, Ok(Outcome::Slabs(slabs)));
        self.finish_work(id);
    }

    /// Refuses a size that would cut a slab off.
    pub(super) fn check_slabs_within(&mut self, id: AllocationId, size: u64) -> Result<(), ApiError> {
        let record = &self.entry(id).record;
        let end = |one: &xpm_protocol::api::allocator::SlabPlace| one.offset.0 + one.len.0;
        match record.slabs.slabs.iter().find(|(_, place)| end(place) > size) {
            None => Ok(()),
            Some((slab, place)) => Err(ApiError(
                ErrorKind::Conflict,
                format!(
                    "slab `{slab}` of `{}` ends at {}, beyond the new size: have its owner remove it, or choose a larger size",
                    record.name,
                    ByteSize(end(place))
                ),
            )),
        }
    }
}
