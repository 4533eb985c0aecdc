//! What happened, for those who want to see it coming.

use std::collections::VecDeque;

use xpm_protocol::api::allocator::Event;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::text::into_line;
use xpm_protocol::{ApplianceId, Name};

use super::{Outcome, ReplyTo, Service};

/// Most events that are kept.
const EVENTS_MAX: usize = 10_000;
/// How long a question for events that are not there yet waits, in seconds.
const WAIT: u64 = 20;

/// The events of this life of the allocator, and who waits for the next one.
#[derive(Debug, Default)]
pub(super) struct Events {
    kept: VecDeque<Event>,
    count: u64,
    waiting: Vec<(ReplyTo, u64, u64)>,
}

impl Service {
    /// Logs something that happened to what has this name, and keeps it for those who ask.
    pub(super) fn tell(&mut self, kind: EventKind, subject: &Name, text: String) {
        let text = into_line(text);
        tracing::info!("{kind}: {text}");
        self.keep_event(kind, subject, text);
    }

    /// The same for an appliance; what is bad is a warning in the log.
    pub(super) fn tell_of_appliance(&mut self, kind: EventKind, id: ApplianceId, bad: bool, text: String) {
        let text = into_line(text);
        match bad {
            true => tracing::warn!("{kind}: {text}"),
            false => tracing::info!("{kind}: {text}"),
        }
        let name = self.inventory.info(id).map(|info| info.name.clone());
        // An id is always a name as well.
        if let Some(name) = name.or_else(|| id.to_string().parse().ok()) {
            self.keep_event(kind, &name, text);
        }
    }

    /// The same for the allocator itself; whatever it is, somebody should look at it.
    pub(super) fn tell_of_itself(&mut self, kind: EventKind, text: String) {
        tracing::warn!("{kind}: {text}");
        if let Ok(name) = "allocator".parse() {
            self.keep_event(kind, &name, text);
        }
    }

    /// Waits for events go on as long as they would have.
    pub(super) fn event_waits_follow_clock(&mut self, by: i64) {
        for (.., until) in &mut self.events.waiting {
            *until = until.saturating_add_signed(by);
        }
    }

    fn keep_event(&mut self, kind: EventKind, subject: &Name, text: String) {
        self.events.count += 1;
        if self.events.kept.len() >= EVENTS_MAX {
            self.events.kept.pop_front();
        }
        let (number, at) = (self.events.count, self.now.unix);
        self.events.kept.push_back(Event {
            number,
            at,
            kind: kind.as_str().to_owned(),
            subject: subject.clone(),
            text,
        });
        for (reply, after, _) in std::mem::take(&mut self.events.waiting) {
            let events = self.events_after(after);
            self.reply(reply, Ok(Outcome::Events(events)));
        }
    }

    /// Answers with the events after this number, now or, if that is wanted, when there is one. A number larger than
    /// all is of an earlier life: it is answered with everything.
    pub(super) fn ask_events(&mut self, reply: ReplyTo, after: u64, wait: bool) {
        let after = if after > self.events.count { 0 } else { after };
        let events = self.events_after(after);
        match events.is_empty() && wait {
            true => {
                let until = self.now.unix + WAIT;
                self.events.waiting.push((reply, after, until));
            }
            false => self.reply(reply, Ok(Outcome::Events(events))),
        }
    }

    /// Answers those who have waited long enough.
    pub(super) fn end_event_waits(&mut self) {
        let unix = self.now.unix;
        let (over, waiting) =
            std::mem::take(&mut self.events.waiting).into_iter().partition(|(.., until)| *until <= unix);
        self.events.waiting = waiting;
        let over: Vec<(ReplyTo, u64, u64)> = over;
        for (reply, ..) in over {
            self.reply(reply, Ok(Outcome::Events(Vec::new())));
        }
    }

    fn events_after(&self, after: u64) -> Vec<Event> {
        self.events.kept.iter().filter(|event| event.number > after).cloned().collect()
    }
}
