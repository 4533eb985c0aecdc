//! Two appliances with one identity: a copy of an appliance's state directory (a cloned machine, an image, a backup),
//! or a second appliance of the same name. The allocator accepts one of the two.
//!
//! ```text
//!   a heartbeat of id X, name N, life L
//!     X is known in life H, and L is not H or a later life under the same lock:
//!         X may be up, and nothing proves that H ended   refused: a copy
//!         X is silent, or its port is L's now            accepted
//!     N is new for X, or X was silent, and another appliance of name N may be up:
//!         an allocation has memory on X                  accepted: it was there first
//!         else                                           refused: the name is in use
//! ```
//!
//! An appliance may be up if it was heard within three heartbeat intervals, or if this process started within them.
//! An appliance that sends no life (a version from before lives existed) is accepted by its id, unless a life of that
//! id is known.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::ApplianceState;
use xpm_protocol::api::appliance::Info;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::api::health::{Check, Problem};
use xpm_protocol::{ApplianceId, Life, Name, Succession};

use super::Service;

/// Most refused appliances that are remembered.
const REFUSED_MAX: usize = 64;
/// How long a refused appliance counts as a problem after its last heartbeat; it sends one every few seconds.
const ASKS_LATELY: Duration = Duration::from_secs(60);

/// The appliances whose heartbeats were refused lately.
#[derive(Debug, Default)]
pub(super) struct Twins {
    refused: Vec<Refused>,
}

#[derive(Debug)]
struct Refused {
    id: ApplianceId,
    life: Option<Life>,
    name: Name,
    why: Why,
    line: String,
    /// Its last heartbeat, by the service's clock.
    asked: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Copy,
    Name,
}

impl Why {
    const fn remedy(self) -> &'static str {
        match self {
            Why::Copy => "stop the copy, remove its state directory, and start it again",
            Why::Name => "give one of the two another --name",
        }
    }
}

impl Service {
    /// The refusal of a heartbeat, if it has to be refused. It is reported as an event once for each refused life.
    pub(super) fn refuse_twin(&mut self, info: &Info) -> Option<ApiError> {
        let same = |one: &Refused| one.id == info.id && one.life == info.life;
        let Some((why, line)) = self.twin_of(info) else {
            self.twins.refused.retain(|one| !same(one));
            return None;
        };
        let line = format!("{line}: {}", why.remedy());
        let asked = self.now.at;
        match self.twins.refused.iter_mut().find(|one| same(one)) {
            Some(known) => (known.asked, known.why, known.line) = (asked, why, line.clone()),
            None => {
                self.tell_of_appliance(EventKind::ApplianceRefused, info.id, true, line.clone());
                if self.twins.refused.len() == REFUSED_MAX {
                    self.twins.refused.remove(0);
                }
                let (id, life, name) = (info.id, info.life, info.name.clone());
                self.twins.refused.push(Refused { id, life, name, why, line: line.clone(), asked });
            }
        }
        Some(ApiError(ErrorKind::Conflict, line))
    }

    /// Why another appliance has precedence over this one, as kind and reason.
    fn twin_of(&self, info: &Info) -> Option<(Why, String)> {
        let now = self.now.at;
        let known = self.inventory.info(info.id);
        if let Some(held) = known.filter(|held| is_another_life(held, info))
            && self.inventory.may_be_up(info.id, now)
            && !has_its_port(held, info)
        {
            let line = format!(
                "appliance {} ({}) is at {} and was heard just now; the one at {} has the same id and is a copy of it, or is to \
                 follow it, and is taken when the first one has been silent for {} heartbeats",
                held.name,
                info.id,
                held.place(),
                info.place(),
                crate::inventory::INTERVALS_MAX
            );
            return Some((Why::Copy, line));
        }
        let is_settled = known.is_some_and(|held| held.name == info.name)
            && self.inventory.state(info.id, now) == Some(ApplianceState::Up);
        if is_settled {
            return None;
        }
        let other = self.inventory.namesake(info.id, &info.name, now)?;
        if has_its_port(other, info) || self.has_memory_on(info.id) {
            return None;
        }
        let line = format!(
            "the name {} belongs to appliance {} at {}; another appliance of that name, {}, is at {}",
            info.name,
            other.id,
            other.place(),
            info.id,
            info.place()
        );
        Some((Why::Name, line))
    }

    fn has_memory_on(&self, id: ApplianceId) -> bool {
        self.allocations.values().any(|entry| entry.record.grant_on(id).is_some())
    }

    /// Forgets refused appliances that send no more heartbeats.
    pub(super) fn forget_old_twins(&mut self) {
        let now = self.now.at;
        self.twins.refused.retain(|one| now.saturating_sub(one.asked) <= ASKS_LATELY);
    }

    pub(super) fn twin_problems(&self) -> impl Iterator<Item = Problem> {
        self.twins.refused.iter().map(|one| {
            let summary = format!("an appliance is refused and lends nothing: {}", one.line);
            Problem::new(Check::ApplianceRefused, format!("appliance/{}", one.name), summary)
                .with_remedy(one.why.remedy())
        })
    }
}

/// Whether a heartbeat comes from a life that may only follow when the known life has ended.
fn is_another_life(held: &Info, info: &Info) -> bool {
    match (&held.life, &info.life) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(held), Some(life)) => life.after(held) != Succession::Same,
    }
}

/// Whether this life listens at the port of the known one, on the same running kernel: the process of the known one
/// has ended.
fn has_its_port(held: &Info, info: &Info) -> bool {
    held.endpoints.host == info.endpoints.host && held.control == info.control
}
