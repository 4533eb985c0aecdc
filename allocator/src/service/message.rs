//! What goes into the service and what comes out of it.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    self as api, Attach, ClientFacts, Create, Heartbeat, HeartbeatAnswer, Renew,
};
use xpm_protocol::api::appliance as appliance_api;
use xpm_protocol::api::decision::Decision;
use xpm_protocol::api::policy::{Applied, Apply, Policy};
use xpm_protocol::policy::DocumentName;
use xpm_protocol::{AllocationId, ApplianceId, ClientId, Epoch, GrantId, Life, Name, RequestId};

use crate::store::Batch;
use crate::store::backup::Backup;

/// When an event happens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moment {
    /// Time since the service started, from a clock that never goes back.
    pub at: Duration,
    /// Seconds since 1970.
    pub unix: u64,
}

/// Names the one who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyTo(pub u64);

/// Names a store or a call whose result is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub(super) u64);

/// What happens to the service.
#[derive(Debug)]
pub enum Event {
    /// Somebody asks.
    Request(ReplyTo, Request),
    /// The batch of this ticket is durable.
    Stored(Ticket),
    /// The call of this ticket ended.
    Called(Ticket, Result<Answer, CallError>),
    /// The metadata cannot be written, for this reason; or, with none, they can again. What was to be stored is kept.
    Writing(Option<String>),
    /// Time passed; to come about once a second.
    Tick,
}

/// What can be asked, as in the table of `xpm_protocol::api::allocator`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum Request {
    /// The same, of this life of a client.
    As(Life, Box<Request>),
    Status,
    Heartbeat(Box<Heartbeat>),
    Appliances,
    ForgetAppliance(ApplianceId),
    /// Its memory is lost.
    GiveUpAppliance(ApplianceId),
    Create(Create),
    /// The same by somebody who names the request, to ask for it again.
    CreateAs(RequestId, Create),
    /// What would become of it; with `all`, every appliance is named.
    Decide {
        create: Create,
        all: bool,
    },
    Allocations,
    Allocation(Name),
    Delete {
        name: Name,
        force: bool,
    },
    Attach {
        name: Name,
        attach: Attach,
        /// It has the map of this epoch, with its keys, and asks for nothing but to be known.
        has: Option<Epoch>,
    },
    Detach {
        name: Name,
        client: ClientId,
    },
    /// A client stands by to take it over.
    StandBy {
        name: Name,
        attach: Attach,
    },
    HandOverAll(api::HandOverAll),
    CommitHandover(super::Which),
    RollBackHandover(super::Which),
    Handovers,
    Renew {
        name: Name,
        renew: Renew,
    },
    Resize {
        name: Name,
        resize: api::Resize,
    },
    Transfer {
        name: Name,
        transfer: api::Transfer,
    },
    Rename {
        name: Name,
        to: Name,
    },
    /// What the owner is to do.
    Orders {
        name: Name,
        client: ClientId,
        /// The newest state of the metadata that it heard of.
        known: Option<api::MetadataState>,
    },
    /// The same, asked by an owner whom appliances refuse these grants.
    Doubt {
        name: Name,
        client: ClientId,
        refused: Vec<GrantId>,
    },
    /// What the owner says to it.
    Report {
        name: Name,
        client: ClientId,
        report: api::Report,
    },
    /// Slabs with names that the owner carved or gave up.
    Slabs {
        name: Name,
        client: ClientId,
        slabs: api::SlabMap,
    },
    Drain {
        id: ApplianceId,
        drain: api::Drain,
    },
    EndDrain(ApplianceId),
    Rebalance(api::Rebalance),
    Rebalancing,
    Garbage,
    Backup,
    PauseRebalance(api::Pause),
    EndRebalance,
    Usage,
    HearClient {
        name: Name,
        facts: ClientFacts,
    },
    Clients,
    Events(EventQuery),
    Metrics,
    Policy,
    Apply(Apply),
    RemoveDocument {
        name: DocumentName,
        version: Option<u64>,
    },
}

/// Which events somebody wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventQuery {
    /// Those with a larger number, the oldest first; without it, the newest.
    pub after: Option<u64>,
    /// Whether to wait for one where there is none yet.
    pub wait: bool,
    /// Only those of what has this name.
    pub object: Option<Name>,
    /// Only those of these kinds; of all where none is named.
    pub kinds: Vec<String>,
    /// At most so many.
    pub limit: Option<usize>,
}

impl EventQuery {
    /// Whether an event is one of those.
    pub fn fits(&self, event: &api::Event) -> bool {
        self.object.as_ref().is_none_or(|object| *object == event.subject)
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
    }
}

/// What is answered; as JSON just the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Outcome {
    Done,
    Status(Box<api::Status>),
    Heartbeat(HeartbeatAnswer),
    Appliances(Vec<api::Appliance>),
    Allocation(Box<api::Allocation>),
    Allocations(Vec<api::Allocation>),
    Owned(Box<api::Owned>),
    Handover(Box<api::Handover>),
    Handovers(Vec<api::Handover>),
    Slabs(api::SlabMap),
    Decision(Box<Decision>),
    Usage(Vec<api::Usage>),
    Client(api::Client),
    Clients(Vec<api::Client>),
    Events(Vec<api::Event>),
    Metrics(String),
    Policy(Policy),
    Applied(Applied),
    Orders(Box<api::Orders>),
    Appliance(Box<api::Appliance>),
    Rebalance(api::RebalancePlan),
    Garbage(Vec<api::Garbage>),
    Backup(Box<Backup>),
}

/// What the service wants done.
#[derive(Debug)]
pub enum Effect {
    /// Give this answer.
    Reply(ReplyTo, Result<Outcome, ApiError>),
    /// Make the batch durable, after all batches before it; then [`Event::Stored`].
    Store(Ticket, Batch),
    /// Call an appliance within a time limit; then [`Event::Called`].
    Call(Ticket, Target, Call),
}

/// Which appliance to call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The appliance.
    pub appliance: ApplianceId,
    /// Base URL of its control interface.
    pub control: String,
    /// The newest state of the metadata that is durable, for the appliance to remember.
    pub metadata: Option<api::MetadataState>,
}

/// A call to an appliance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Ask what it has.
    Status,
    /// Ask which grants it has.
    Grants,
    /// Reserve regions.
    Reserve(appliance_api::Reserve),
    /// Make reserved regions a grant, or raise the epoch of one.
    Commit(GrantId, appliance_api::Commit),
    /// Raise the epoch of a grant.
    Raise(GrantId, appliance_api::Commit, Raising),
    /// Revoke the grant; the appliance need not have it.
    Revoke(GrantId),
    /// Revoke the grant and release every region that the appliance has for the allocation, until
    /// it lists none: nothing that is still on its way can make a grant of them afterwards.
    Purge(AllocationId, GrantId),
    /// Copy a run of the grant to another appliance.
    Copy(GrantId, appliance_api::Copy),
    /// Say what a run of the grant holds.
    Digest(GrantId, appliance_api::Range),
    /// Say which other lives than this one are connected to the grant, and answer.
    Living(GrantId, Life),
}

/// More about raising an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raising {
    /// Length of the grant in bytes: it may have to be moved.
    pub len: u64,
    /// Give the new owner zeros in place of memory that cannot be moved away from the old one.
    pub lose: bool,
}

/// How an appliance answered a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// The epoch is raised, and zeros are in place of so many bytes.
    Lost(u64),
    /// What it has.
    Status(Box<appliance_api::Status>),
    /// The regions that it reserved.
    Regions(Vec<appliance_api::Region>),
    /// Its grants.
    Grants(Vec<appliance_api::Grant>),
    /// What a run holds.
    Digest(appliance_api::Digest),
    /// Lives that are connected to a grant.
    Living(Vec<appliance_api::Holder>),
}

/// Why a call brought no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The appliance refused it and changed nothing.
    Refused(ErrorKind, String),
    /// Unreachable, too late or broken off: whether it was carried out may be unknown.
    Failed(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Refused(_, line) | CallError::Failed(line) => f.write_str(line),
        }
    }
}
