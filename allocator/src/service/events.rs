//! Events for operators and monitoring.
//!
//! The newest events are kept in memory and in the store, so a restart or another leader goes on with the same
//! numbers. An event becomes durable with the change that it reports, or right after that change.

use std::collections::VecDeque;

use xpm_protocol::api::allocator::{EVENTS_PAGE_MAX, Event};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::text::into_line;
use xpm_protocol::{ApplianceId, Name};

use super::{Awaited, Effect, EventQuery, Outcome, ReplyTo, Service};
use crate::store::Change;

/// Most events that are kept.
const EVENTS_MAX: usize = 10_000;
/// How long a query waits for an event, in seconds.
const WAIT: u64 = 20;

/// The events, and the queries that wait for the next one.
#[derive(Debug, Default)]
pub(super) struct Events {
    kept: VecDeque<Event>,
    /// Number of the newest event.
    count: u64,
    /// Changes of the event list that were not handed to the store yet.
    unsaved: Vec<Change>,
    waiting: Vec<(ReplyTo, EventQuery, u64)>,
}

impl Service {
    /// Logs an event about the object of this name, and keeps it for queries.
    pub(super) fn tell(&mut self, kind: EventKind, subject: &Name, text: String) {
        let text = into_line(text);
        tracing::info!("{kind}: {text}");
        self.keep_event(kind, subject, text);
    }

    /// The same for an appliance; `bad` events are logged as warnings.
    pub(super) fn tell_of_appliance(&mut self, kind: EventKind, id: ApplianceId, bad: bool, text: String) {
        let text = into_line(text);
        match bad {
            true => tracing::warn!("{kind}: {text}"),
            false => tracing::info!("{kind}: {text}"),
        }
        let name = self.inventory.info(id).map(|info| info.name.clone());
        // An id is always a valid name.
        if let Some(name) = name.or_else(|| id.to_string().parse().ok()) {
            self.keep_event(kind, &name, text);
        }
    }

    /// The same for the allocator itself; always a warning.
    pub(super) fn tell_of_itself(&mut self, kind: EventKind, text: String) {
        tracing::warn!("{kind}: {text}");
        if let Ok(name) = "allocator".parse() {
            self.keep_event(kind, &name, text);
        }
    }

    /// The wall clock was set by `by` seconds: waiting queries keep their time left.
    pub(super) fn event_waits_follow_clock(&mut self, by: i64) {
        for (.., until) in &mut self.events.waiting {
            *until = until.saturating_add_signed(by);
        }
    }

    fn keep_event(&mut self, kind: EventKind, subject: &Name, text: String) {
        self.events.count += 1;
        let (number, at) = (self.events.count, self.now.unix);
        let event = Event { number, at, kind: kind.as_str().to_owned(), subject: subject.clone(), text };
        self.events.unsaved.push(Change::Event(Box::new(event.clone())));
        self.events.kept.push_back(event);
        self.drop_old_events();
        for (reply, query, until) in std::mem::take(&mut self.events.waiting) {
            let events = self.events_for(&query);
            match events.is_empty() {
                true => self.events.waiting.push((reply, query, until)),
                false => self.reply(reply, Ok(Outcome::Events(events))),
            }
        }
    }

    fn drop_old_events(&mut self) {
        while self.events.kept.len() > EVENTS_MAX {
            let gone = self.events.kept.pop_front().map(|event| Change::EventGone(event.number));
            self.events.unsaved.extend(gone);
        }
    }

    /// Loads the events of earlier processes, which come in no particular order.
    pub(super) fn restore_events(&mut self, mut events: Vec<Event>) {
        events.sort_unstable_by_key(|event| event.number);
        self.events.count = events.last().map_or(0, |event| event.number);
        self.events.kept = events.into();
        self.drop_old_events();
    }

    /// Stores the new events: with the last batch of this step if there is one, else as a batch of their own.
    pub(super) fn save_events(&mut self) {
        if self.events.unsaved.is_empty() {
            return;
        }
        let unsaved = std::mem::take(&mut self.events.unsaved);
        let last = self.effects.iter_mut().rev().find_map(|effect| match effect {
            Effect::Store(_, batch) => Some(batch),
            _ => None,
        });
        match last {
            Some(batch) => batch.extend(unsaved),
            None => self.store(unsaved, Awaited::Nothing),
        }
    }

    /// Answers with a page of events, now or, if the query wants to wait, once there is one. A number larger than all
    /// known ones comes from before the metadata were lost: the answer is then everything.
    pub(super) fn ask_events(&mut self, reply: ReplyTo, mut query: EventQuery) {
        query.after = query.after.map(|after| if after > self.events.count { 0 } else { after });
        let events = self.events_for(&query);
        match events.is_empty() && query.wait {
            true => {
                let until = self.now.unix + WAIT;
                query.after.get_or_insert(self.events.count);
                self.events.waiting.push((reply, query, until));
            }
            false => self.reply(reply, Ok(Outcome::Events(events))),
        }
    }

    /// Answers queries whose waiting time is over.
    pub(super) fn end_event_waits(&mut self) {
        let unix = self.now.unix;
        let (over, waiting) =
            std::mem::take(&mut self.events.waiting).into_iter().partition(|(.., until)| *until <= unix);
        self.events.waiting = waiting;
        let over: Vec<(ReplyTo, EventQuery, u64)> = over;
        for (reply, ..) in over {
            self.reply(reply, Ok(Outcome::Events(Vec::new())));
        }
    }

    /// The page after a number, or the newest page.
    fn events_for(&self, query: &EventQuery) -> Vec<Event> {
        let most = query.limit.unwrap_or(EVENTS_PAGE_MAX).min(EVENTS_PAGE_MAX);
        let wanted = |event: &&Event| query.fits(event);
        match query.after {
            Some(after) => {
                let from = self.events.kept.partition_point(|event| event.number <= after);
                self.events.kept.range(from..).filter(wanted).take(most).cloned().collect()
            }
            None => {
                let mut newest: Vec<Event> =
                    self.events.kept.iter().rev().filter(wanted).take(most).cloned().collect();
                newest.reverse();
                newest
            }
        }
    }
}
