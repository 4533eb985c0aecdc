//! The first orders after a start.
//!
//! A new life of the allocator knows its appliances from its record and has heard none of them. It asks each at
//! once whether it is there, which takes milliseconds; what does not answer may send a heartbeat soon, for it may be starting, too.
//!
//! ```text
//!   known ──asked──> Asked ──answers, or a heartbeat comes──> heard (not in the list any more)
//!                      └──no answer──> Missed ──a heartbeat comes──> heard
//! ```
//!
//! While one is `Asked`, orders that need a place wait, so that they find the whole pool. While one is `Missed`, only those
//! wait that find no place without it. All of that ends after three heartbeat intervals, or [`LIMIT`].

use std::collections::BTreeMap;
use std::time::Duration;

use xpm_protocol::ApplianceId;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::api::health::{Check, Problem};

use super::wish::Wish;
use super::{Answer, Awaited, Call, CallError, ReplyTo, Request, Service};
use crate::inventory::INTERVALS_MAX;

/// Longest wait of an order for appliances; the control interface cuts off whoever waits for more than a minute.
const LIMIT: Duration = Duration::from_secs(40);

/// Appliances that are known and were not heard in this life, and the orders that wait for them.
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
    /// Asks every appliance that is known whether it is there.
    pub(super) fn ask_who_is_there(&mut self) {
        let known: Vec<ApplianceId> = self.inventory.pool().iter().map(|one| one.id).collect();
        for id in known {
            self.early.expected.insert(id, Expected::Asked);
            self.clock += 1;
            let (asked, control) = (self.clock, self.control_of(id));
            self.call(id, control, Call::Status, Awaited::Greeted { asked, appliance: id });
        }
    }

    /// One has answered. Only an answer that names it counts: another appliance may have its address now.
    pub(super) fn greeted(&mut self, asked: u64, id: ApplianceId, result: Result<Answer, CallError>) {
        match result {
            Ok(Answer::Status(status)) if status.id == Some(id) => {
                // Before anything is given back there: metadata of yesterday have half done what is in use since.
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

    /// An appliance is heard, or forgotten: it is not waited for any more.
    pub(super) fn is_heard(&mut self, id: ApplianceId) {
        if self.early.expected.remove(&id).is_some() {
            self.wake_early();
        }
    }

    /// Whether an order waits for appliances: for any answer, or, where it finds no place without them, for those
    /// that did not answer.
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

    /// Looks again at the orders that wait. Those that have to wait on come back.
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

    /// Which appliances were not heard since the start, for a refusal; empty where all were.
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
