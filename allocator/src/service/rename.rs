//! Renames an allocation.
//!
//! Owners ask for their orders by the allocation's name, and devices are named after it, so an allocation in use
//! keeps its name. The new name is taken from the moment of the request, and takes effect when it is durable;
//! appliances are told of it as of any other change of a record.

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, Name};

use super::{AfterStore, Outcome, ReplyTo, Service, Work};
use crate::store::record::AllocationRecord;

impl Service {
    pub(super) fn rename(&mut self, reply: ReplyTo, id: AllocationId, to: Name) {
        let record = self.entry(id).record.clone();
        let going = self.entry(id).hand_over.is_some();
        let name = record.name.clone();
        if name == to {
            let shown = self.view(id);
            return self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        }
        if let Some(owner) = &record.owner {
            let line = format!(
                "`{name}` is in use by {} as {}, which knows it by this name: detach it there first",
                owner.host_name, owner.purpose
            );
            return self.refuse(reply, ErrorKind::InUse, line);
        }
        if record.change.is_some() || record.next.is_some() || going {
            let line = format!(
                "`{name}` is being changed; `xpm alloc show {name}` says how far that is, wait for its end"
            );
            return self.refuse(reply, ErrorKind::Conflict, line);
        }
        if self.names.contains_key(&to) || self.is_queued(&to) || self.renaming.contains(&to) {
            let line = format!("an allocation named `{to}` is there already: choose another name");
            return self.refuse(reply, ErrorKind::Conflict, line);
        }
        let record = AllocationRecord { name: to.clone(), ..record };
        self.renaming.insert(to);
        self.entry(id).work = Work::Storing;
        self.store_record(record, AfterStore::Renamed(reply, name));
    }

    /// The new name is durable and in effect.
    pub(super) fn renamed(&mut self, reply: ReplyTo, id: AllocationId, old: &Name) {
        let name = self.entry(id).record.name.clone();
        self.renaming.remove(&name);
        self.tell(EventKind::Renamed, &name, format!("`{old}` is named `{name}` now"));
        let shown = self.view(id);
        self.reply(reply, Ok(Outcome::Allocation(Box::new(shown))));
        self.finish_work(id);
    }

    /// Keeps the index of names in step with the record.
    pub(super) fn follow_name(&mut self, id: AllocationId, old: &Name) {
        let name = self.entry(id).record.name.clone();
        if name != *old && self.names.get(old) == Some(&id) {
            self.names.remove(old);
            self.names.insert(name, id);
        }
    }
}
