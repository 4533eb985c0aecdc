//! When the service only looks: its metadata are older than what others heard of, or cannot be written now.
//!
//! An allocator with metadata of yesterday does not know what was moved, made or handed over since. What it judged lost
//! may be in use, what it took for garbage may be somebody's memory. So it judges nothing, gives no orders, and refuses
//! every question about one allocation, until the metadata were made anew by `xpm-allocator recover`.
//!
//! ```text
//!   [serves] --somebody heard of a newer state--> [behind: looks only]        ends with the process
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
    /// Takes what somebody says of the newest state of the metadata that it heard of.
    pub(super) fn hear_state(&mut self, heard: Option<MetadataState>, who: &str) {
        let (Some(ours), Some(heard)) = (self.state, heard) else { return };
        if !ours.is_behind(&heard) || self.behind.as_ref().is_some_and(|known| known.heard >= heard.number) {
            return;
        }
        let text = format!(
            "the metadata of this allocator are of yesterday: they are at change {}, and {who} heard of change {}. A snapshot \
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

    /// The metadata cannot be written, for this reason, or can again.
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

    /// Whether anything may be judged and changed.
    pub(super) fn serves(&self) -> bool {
        self.behind.is_none() && self.read_only.is_none()
    }

    /// Why a request is refused now, if it is.
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
    /// Whether it asks for a change.
    pub fn changes(&self) -> bool {
        About::of(self) == About::Change
    }
}

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    /// The pool, to look at.
    Pool,
    /// One allocation, to look at: the answer may end I/O.
    One,
    /// Something is to be changed.
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
