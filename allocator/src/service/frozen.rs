//! States in which the service answers but changes nothing: its metadata are older than a state that another process
//! reported, or they cannot be written now.
//!
//! An allocator with outdated metadata does not know which regions were moved, made or handed over since. A grant
//! that it judges lost may be in use, and one that it takes for garbage may hold somebody's memory. So it makes no
//! judgement, gives no orders, and refuses every question about a single allocation, until `xpm-allocator recover`
//! has rebuilt the metadata.
//!
//! ```text
//!   [serves] --a newer state is reported--> [behind: answers about the pool only]   ends with the process
//!   [serves] --no room to write--> [read-only: answers, changes nothing] --room--> [serves]
//! ```

use xpm_control::server::ApiError;
use xpm_protocol::ApplianceId;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Behind, MetadataState};
use xpm_protocol::api::event::EventKind;

use super::{Awaited, Request, Service};
use crate::store::Change;

impl Service {
    /// Compares our metadata with the newest state that `who` has heard of.
    pub(super) fn hear_state(&mut self, heard: Option<MetadataState>, who: &str) {
        let (Some(ours), Some(heard)) = (self.state, heard) else { return };
        if !ours.is_behind(&heard) || self.behind.as_ref().is_some_and(|known| known.heard >= heard.number) {
            return;
        }
        let text = format!(
            "the metadata of this allocator are outdated: they are at change {}, and {who} heard of change {}. A snapshot \
             was reverted, or an old copy restored. Nothing is judged or changed; I/O goes on. Stop this allocator, run \
             `xpm-allocator recover --from-network URL...` with the control interface of each appliance, and start it again",
            ours.number, heard.number
        );
        if self.behind.is_none() {
            tracing::error!("{text}");
            self.tell_of_itself(EventKind::MetadataBehind, text.clone());
        }
        self.behind = Some(Behind { heard: heard.number, who: who.to_owned(), text });
    }

    /// The metadata cannot be written, for the reason `why`, or can be written again.
    pub(super) fn writing_stopped(&mut self, why: Option<String>) {
        match (why, self.read_only.take()) {
            (Some(why), before) => {
                if before.is_none() {
                    self.tell_of_itself(EventKind::MetadataReadOnly, why.clone());
                }
                self.read_only = Some(why);
            }
            (None, Some(_)) => {
                self.tell_of_itself(
                    EventKind::MetadataWritable,
                    "the metadata can be written again".to_owned(),
                );
                for id in std::mem::take(&mut self.unsaved) {
                    self.save_appliance(id);
                }
            }
            (None, None) => {}
        }
    }

    fn save_appliance(&mut self, id: ApplianceId) {
        if let Some(record) = self.inventory.record(id) {
            self.store(vec![Change::Appliance(Box::new(record))], Awaited::Nothing);
        }
    }

    /// Whether the service may make judgements and changes.
    pub(super) fn serves(&self) -> bool {
        self.behind.is_none() && self.read_only.is_none()
    }

    /// The refusal of a request while the service does not serve, if any.
    pub(super) fn frozen(&self, request: &Request) -> Option<ApiError> {
        let about = About::of(request);
        let line = match (&self.behind, &self.read_only) {
            (Some(behind), _) if about != About::Pool => behind.text.clone(),
            (None, Some(why)) if about == About::Change => why.clone(),
            _ => return None,
        };
        Some(ApiError(ErrorKind::Unavailable, line))
    }
}

impl Request {
    /// Whether the request asks for a change.
    pub fn changes(&self) -> bool {
        About::of(self) == About::Change
    }
}

/// Subject of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    /// Looks at the pool.
    Pool,
    /// Looks at one allocation: the answer may make a client fail its I/O.
    One,
    /// Changes state.
    Change,
}

impl About {
    fn of(request: &Request) -> About {
        match request {
            Request::As(_, request) => About::of(request),
            Request::Status
            | Request::Heartbeat(_)
            | Request::Appliances
            | Request::Allocations
            | Request::Usage
            | Request::Handovers
            | Request::HearClient { .. }
            | Request::Clients
            | Request::Events { .. }
            | Request::Metrics
            | Request::Policy
            | Request::Rebalancing
            | Request::Garbage
            | Request::Backup => About::Pool,
            Request::Allocation(_)
            | Request::Orders { .. }
            | Request::Doubt { .. }
            | Request::Decide { .. } => About::One,
            _ => About::Change,
        }
    }
}
