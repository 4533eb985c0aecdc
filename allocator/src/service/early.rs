//! Orders that arrive before the appliances were heard after a start.
//!
//! A new process of the allocator knows its appliances from its records and has heard none of them. At the start it
//! asks each one whether it is there, which takes milliseconds. An appliance that does not answer may be starting
//! too, and send a heartbeat soon.
//!
//! ```text
//!   known ──asked──> Asked ──answers, or a heartbeat comes──> heard (not in the list any more)
//!                      └──no answer──> Missed ──a heartbeat comes──> heard
//! ```
//!
//! While any appliance is `Asked`, orders that need a placement wait, so that they see the whole pool. While any is
//! `Missed`, only orders wait that find no placement without it. All waiting ends after three heartbeat intervals, or
//! after [`LIMIT`].

use std::collections::BTreeMap;
use std::time::Duration;

use xpm_protocol::ApplianceId;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::api::health::{Check, Problem};

use super::wish::Wish;
use super::{Answer, Awaited, Call, CallError, ReplyTo, Request, Service};
use crate::inventory::INTERVALS_MAX;

/// Longest wait of an order for appliances. The control interface cuts requests off after a minute.
const LIMIT: Duration = Duration::from_secs(40);

/// Known appliances that were not heard since this process started, and the orders that wait for them.
#[derive(Debug, Default)]
pub(super) struct Early {
    expected: BTreeMap<ApplianceId, Expected>,
    orders: Vec<Order>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Asked,
    Missed,
}

/// An order that waits.
#[derive(Debug)]
pub(super) enum Order {
    Place(Wish),
    Request(ReplyTo, Request),
}

impl Service {
    /// Asks every known appliance whether it is there.
    pub(super) fn ask_who_is_there(&mut self) {
        let known: Vec<ApplianceId> = self.inventory.pool().iter().map(|one| one.id).collect();
        for id in known {
            self.early.expected.insert(id, Expected::Asked);
            self.clock += 1;
            let (asked, control) = (self.clock, self.control_of(id));
            self.call(id, control, Call::Status, Awaited::Greeted { asked, appliance: id });
        }
    }

    /// Handles the answer of an appliance. It counts only if it has the appliance's id: another appliance may have
    /// that address now.
    pub(super) fn greeted(&mut self, asked: u64, id: ApplianceId, result: Result<Answer, CallError>) {
        match result {
            Ok(Answer::Status(status)) if status.id == Some(id) => {
                // First of all, before anything is given back there: if our metadata are outdated, they may list
                // memory as half done that is in use since.
                let metadata = status.metadata;
                self.hear_state(metadata, &format!("appliance {}", self.inventory.name(id)));
                if self.inventory.greet(id, self.now.at, asked, self.clock, *status) {
                    let line = format!("appliance {} ({id}) is up", self.inventory.name(id));
                    self.tell_of_appliance(EventKind::ApplianceUp, id, false, line);
                    self.hasten_purges(id);
                    self.look_soon(id);
                }
                self.is_heard(id);
            }
            _ => {
                if let Some(expected) = self.early.expected.get_mut(&id) {
                    *expected = Expected::Missed;
                }
                self.wake_early();
            }
        }
    }

    /// An appliance was heard or forgotten: orders wait for it no longer.
    pub(super) fn is_heard(&mut self, id: ApplianceId) {
        if self.early.expected.remove(&id).is_some() {
            self.wake_early();
        }
    }

    /// Whether an order has to wait: for appliances that may still answer, or, if it finds no placement, also for
    /// those that missed their answer.
    pub(super) fn waits_for_appliances(&self, finds_place: bool) -> bool {
        let waits = |expected: &Expected| *expected == Expected::Asked || !finds_place;
        self.now.at < self.early_until() && self.early.expected.values().any(waits)
    }

    fn early_until(&self) -> Duration {
        (self.settings.interval * INTERVALS_MAX).min(LIMIT)
    }

    pub(super) fn wait_for_appliances(&mut self, order: Order) {
        self.early.orders.push(order);
    }

    /// Tries the waiting orders again. Orders that still have to wait are queued again.
    pub(super) fn wake_early(&mut self) {
        for order in std::mem::take(&mut self.early.orders) {
            match order {
                Order::Place(wish) => match self.frozen(&Request::Create(wish.create.clone())) {
                    Some(refusal) => self.reject(&wish, refusal),
                    None => self.place(wish),
                },
                Order::Request(reply, request) => self.request(reply, request),
            }
        }
    }

    /// Names the appliances that were not heard since the start, for a refusal; empty if all were heard.
    pub(super) fn unheard_line(&self) -> String {
        let names: Vec<String> = self.early.expected.keys().map(|id| self.inventory.name(*id)).collect();
        match names.is_empty() {
            true => String::new(),
            false => format!(
                "; not heard since the allocator started {} s ago: {}",
                self.now.at.as_secs(),
                names.join(", ")
            ),
        }
    }

    pub(super) fn early_problem(&self) -> Option<Problem> {
        let waits = self.now.at < self.early_until() && !self.early.expected.is_empty();
        waits.then(|| {
            let summary = format!("the first orders wait for appliances{}", self.unheard_line());
            Problem::new(Check::AllocatorStarting, "allocator/this", summary)
        })
    }
}
