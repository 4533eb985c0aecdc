//! Decides which life of a client owns an allocation. A copy of a client's state directory has the same client id; it
//! gets nothing while the owner is heard, or connected to an appliance.
//!
//! Rights of a life, by its relation to the owner's life:
//!
//! ```text
//!                     attach                                   detach               orders, reports, slabs
//! Same                as the owner                             as the owner         as the owner
//! Past                refused                                  nothing is its own   refused
//! IfEnded             when none is connected: as the owner     when not heard       refused until it attached
//! Copy, Stranger      when not heard and none is connected:    nothing is its own   refused
//!                     by a new epoch
//! ```
//!
//! A client that sends no life (a version from before lives existed) is identified by its id alone.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Owner;
use xpm_protocol::api::appliance::Holder;
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ClientId, Life, Name, Succession};

use super::{Answer, Awaited, Call, CallError, ReplyTo, Request, Service};

/// Interval at which owners ask for their orders.
const ASKS_EVERY: Duration = Duration::from_secs(10);
/// Missed intervals after which an owner counts as silent.
const TIMES: u32 = 3;

/// Standing of a request about an allocation, by the life that it comes from.
pub(super) enum Claim {
    /// The request is handled further.
    Good,
    /// The request is handled further, and the present owner is cut off.
    Fences,
    Refused(ApiError),
    /// The client detaches from an allocation that it does not have.
    HasNothing,
    /// Only the appliances can say which life is connected.
    Ask(Life),
}

/// A request that waits for answers of appliances.
pub(super) struct Asking {
    reply: ReplyTo,
    name: Name,
    life: Life,
    request: Request,
    open: usize,
    living: Vec<String>,
}

impl Service {
    /// The standing of a request. `living`: the connected lives, if the appliances were asked.
    pub(super) fn claim(
        &mut self,
        id: AllocationId,
        request: &Request,
        life: Option<Life>,
        living: Option<&[String]>,
    ) -> Claim {
        let client = match request {
            Request::Attach { attach, .. } => attach.client,
            Request::Detach { client, .. }
            | Request::Report { client, .. }
            | Request::Slabs { client, .. } => *client,
            _ => return Claim::Good,
        };
        let Some((owner, life, is)) = self.succession(id, client, life) else { return Claim::Good };
        if is == Succession::Same {
            self.entry(id).owner_heard = self.now.at;
            return Claim::Good;
        }
        let heard = self.is_owner_heard(id);
        match request {
            Request::Attach { attach, .. } if attach.force => Claim::Fences,
            Request::Attach { attach, .. } => {
                let why = match (is, living) {
                    (Succession::Past, _) => "which is a later life of it",
                    (Succession::Copy | Succession::Stranger, _) if heard => "which was heard just now",
                    (_, None) => return Claim::Ask(life),
                    (Succession::IfEnded, Some([])) => return Claim::Good,
                    (_, Some([])) => return Claim::Fences,
                    (_, Some(_)) => "which is connected to its appliances",
                };
                Claim::Refused(self.refuse_life(id, &owner, (&attach.host_name, life), why))
            }
            Request::Detach { .. } if is == Succession::IfEnded && !heard => Claim::Good,
            Request::Detach { .. } if is == Succession::IfEnded => {
                let line =
                    "the life of this client that attached it was heard just now; try again in half a minute";
                Claim::Refused(ApiError(ErrorKind::InUse, line.to_owned()))
            }
            Request::Detach { .. } => Claim::HasNothing,
            _ => Claim::Refused(not_attached(&owner)),
        }
    }

    /// Checks that a request comes from the life that owns the allocation, and notes that the owner was heard.
    pub(super) fn check_life(
        &mut self,
        id: AllocationId,
        client: ClientId,
        life: Option<Life>,
    ) -> Result<(), ApiError> {
        match self.succession(id, client, life) {
            Some((owner, _, is)) if is != Succession::Same => Err(not_attached(&owner)),
            _ => {
                self.entry(id).owner_heard = self.now.at;
                Ok(())
            }
        }
    }

    /// None where the allocation is another client's or has no owner, or where a life is unknown.
    fn succession(
        &mut self,
        id: AllocationId,
        client: ClientId,
        life: Option<Life>,
    ) -> Option<(Owner, Life, Succession)> {
        let owner = self.entry(id).record.owner.clone().filter(|owner| owner.client == client)?;
        let (holder, life) = (owner.life?, life?);
        Some((owner, life, life.after(&holder)))
    }

    fn is_owner_heard(&mut self, id: AllocationId) -> bool {
        let patience = self.settings.interval.max(ASKS_EVERY) * TIMES;
        self.now.at.saturating_sub(self.entry(id).owner_heard) <= patience
    }

    /// The refusal that names the owner. It is reported as an event once for each refused life.
    fn refuse_life(
        &mut self,
        id: AllocationId,
        owner: &Owner,
        (host_name, life): (&str, Life),
        why: &str,
    ) -> ApiError {
        let name = self.entry(id).record.name.clone();
        let host_name: String = host_name.chars().filter(|one| !one.is_control()).collect();
        let line = format!(
            "`{name}` is in use by {} as {}, {why}; {host_name} ({}) has the same client id and is a copy of it, or is to follow it: \
             detach it there first, or take it with force, which cuts that one off",
            owner.shown(),
            owner.purpose,
            life.shown(),
        );
        if self.entry(id).refused.replace(life) != Some(life) {
            self.tell(EventKind::CopyRefused, &name, line.clone());
        }
        ApiError(ErrorKind::InUse, line)
    }

    /// Asks the appliances which lives are connected. The request is handled again when all have answered or failed.
    pub(super) fn ask_living(&mut self, reply: ReplyTo, id: AllocationId, life: Life, request: Request) {
        let record = &self.entry(id).record;
        let name = record.name.clone();
        let grants: Vec<_> = record.known_grants().map(|grant| (grant.appliance, grant.id)).collect();
        if grants.is_empty() {
            return self.change(reply, &name, (Some(life), request), Some(&[]));
        }
        self.clock += 1;
        let number = self.clock;
        let asking = Asking { reply, name, life, request, open: grants.len(), living: Vec::new() };
        self.askings.insert(number, asking);
        for (appliance, grant) in grants {
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Living(grant, life), Awaited::Living(number));
        }
    }

    /// An appliance that does not answer keeps every other life out; a version from before lives existed says
    /// nothing.
    pub(super) fn living_told(&mut self, number: u64, result: Result<Answer, CallError>) {
        let Some(asking) = self.askings.get_mut(&number) else { return };
        asking.open -= 1;
        if let Ok(Answer::Living(living)) = result {
            asking.living.extend(living.iter().map(Holder::shown));
        }
        if asking.open > 0 {
            return;
        }
        if let Some(Asking { reply, name, life, request, living, .. }) = self.askings.remove(&number) {
            self.change(reply, &name, (Some(life), request), Some(&living));
        }
    }
}

fn not_attached(owner: &Owner) -> ApiError {
    let line =
        format!("it is attached by the same client in another life, on {}: attach it again", owner.shown());
    ApiError(ErrorKind::Conflict, line)
}
