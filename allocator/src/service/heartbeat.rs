//! Heartbeats of appliances, and forgetting an appliance.

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Heartbeat, HeartbeatAnswer};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{ApplianceId, Span};

use super::{Awaited, Outcome, ReplyTo, Service};
use crate::store::Change;

impl Service {
    pub(super) fn heartbeat(&mut self, reply: ReplyTo, heartbeat: Heartbeat) {
        if let Some(refusal) = self.refuse_twin(&heartbeat.info) {
            return self.reply(reply, Err(refusal));
        }
        let id = heartbeat.info.id;
        let control = heartbeat.info.control.clone();
        self.hear_state(heartbeat.status.metadata, &format!("appliance {}", heartbeat.info.name));
        let heard = self.inventory.hear(self.now.at, self.now.unix, self.clock, heartbeat);
        if heard.changed {
            let policy = &self.policy;
            self.inventory.profile_one(id, |name| policy.appliance(name));
        }
        if self.inventory.given_up(id).is_some() {
            self.clear_returned(id);
        } else if heard.back {
            let line = format!("appliance {} ({id}) is up at {control}", self.inventory.name(id));
            self.tell_of_appliance(EventKind::ApplianceUp, id, false, line);
            self.hasten_purges(id);
        }
        if heard.back || heard.has_less {
            self.look_soon(id);
        }
        for line in heard.warnings {
            let line = format!("appliance {}: {line}", self.inventory.name(id));
            self.tell_of_appliance(EventKind::ApplianceWarning, id, true, line);
        }
        if heard.moved {
            let line =
                format!("appliance {} ({id}) is reached at other addresses now", self.inventory.name(id));
            self.tell_of_appliance(EventKind::ApplianceMoved, id, false, line);
        }
        self.is_heard(id);
        let outcome = Outcome::Heartbeat(HeartbeatAnswer {
            interval: Span(self.settings.interval),
            metadata: self.known_state(),
        });
        match self.inventory.record(id).filter(|_| heard.changed) {
            Some(_) if !self.serves() => {
                self.unsaved.insert(id);
                self.reply(reply, Ok(outcome));
            }
            Some(record) => {
                self.store(vec![Change::Appliance(Box::new(record))], Awaited::Answer(reply, outcome));
            }
            None => self.reply(reply, Ok(outcome)),
        }
    }

    pub(super) fn forget_appliance(&mut self, reply: ReplyTo, id: ApplianceId) {
        if self.inventory.info(id).is_none() {
            return self.refuse(reply, ErrorKind::NotFound, format!("no appliance has the id {id}"));
        }
        if let Some(line) = self.reason_to_keep(id) {
            return self.refuse(reply, ErrorKind::InUse, line);
        }
        let line = format!("appliance {} ({id}) is forgotten", self.inventory.name(id));
        self.tell_of_appliance(EventKind::ApplianceForgotten, id, false, line);
        self.inventory.remove(id);
        self.is_heard(id);
        self.hasten_purges(id);
        self.store(vec![Change::ApplianceGone(id)], Awaited::Answer(reply, Outcome::Done));
    }
}
