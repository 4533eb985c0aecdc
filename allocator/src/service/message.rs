//! Events and requests that go into the service, and effects that come out of it.

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

/// The time at which an event happens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moment {
    /// Time since the service started, by a clock that never goes back.
    pub at: Duration,
    /// Seconds since 1970.
    pub unix: u64,
}

/// Identifies the requester that waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyTo(pub u64);

/// Identifies a store or a call whose result is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub(super) u64);

/// An input of the service.
#[derive(Debug)]
pub enum Event {
    /// A request of a client, an appliance or the operator.
    Request(ReplyTo, Request),
    /// The batch of this ticket is durable.
    Stored(Ticket),
    /// The call of this ticket ended.
    Called(Ticket, Result<Answer, CallError>),
    /// The metadata cannot be written, for this reason; or, with none, they can be written again. Pending batches are
    /// kept.
    Writing(Option<String>),
    /// Time passed; to be sent about once a second.
    Tick,
}

/// Requests, as in the table of `xpm_protocol::api::allocator`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum Request {
    /// A request of this life of a client.
    As(Life, Box<Request>),
    Status,
    Heartbeat(Box<Heartbeat>),
    Appliances,
    ForgetAppliance(ApplianceId),
    /// The appliance's memory is lost.
    GiveUpAppliance(ApplianceId),
    Create(Create),
    /// A creation with an id of the request, so that the requester can repeat it.
    CreateAs(RequestId, Create),
    /// The decision that a creation would get; with `all`, every appliance is named.
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
        /// The client has the map of this epoch with its keys, and only wants to be registered.
        has: Option<Epoch>,
    },
    Detach {
        name: Name,
        client: ClientId,
    },
    /// A client wants to stand by for the allocation.
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
    /// Asks for the owner's orders.
    Orders {
        name: Name,
        client: ClientId,
        /// The newest state of the metadata that the owner has heard of.
        known: Option<api::MetadataState>,
    },
    /// The same, from an owner that appliances refuse for these grants.
    Doubt {
        name: Name,
        client: ClientId,
        refused: Vec<GrantId>,
    },
    /// A report of the owner on its orders.
    Report {
        name: Name,
        client: ClientId,
        report: api::Report,
    },
    /// Named slabs that the owner carved or gave up.
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

/// The events that a query wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventQuery {
    /// Events with a larger number, the oldest first; without it, the newest events.
    pub after: Option<u64>,
    /// Whether to wait for an event if there is none yet.
    pub wait: bool,
    /// Only events of the object of this name.
    pub object: Option<Name>,
    /// Only events of these kinds; of all kinds if none is named.
    pub kinds: Vec<String>,
    /// Most events in the answer.
    pub limit: Option<usize>,
}

impl EventQuery {
    /// Whether an event fits the query, apart from its number.
    pub fn fits(&self, event: &api::Event) -> bool {
        self.object.as_ref().is_none_or(|object| *object == event.subject)
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
    }
}

/// A successful answer; its JSON is just the content.
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

/// An action that the caller of the service has to carry out.
#[derive(Debug)]
pub enum Effect {
    /// Send this answer.
    Reply(ReplyTo, Result<Outcome, ApiError>),
    /// Make the batch durable, after all batches before it; then send [`Event::Stored`].
    Store(Ticket, Batch),
    /// Call an appliance within a time limit; then send [`Event::Called`].
    Call(Ticket, Target, Call),
}

/// The appliance to call.
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
    /// Ask for its status.
    Status,
    /// Ask for its grants.
    Grants,
    /// Reserve regions.
    Reserve(appliance_api::Reserve),
    /// Make reserved regions a grant, or raise the epoch of one.
    Commit(GrantId, appliance_api::Commit),
    /// Raise the epoch of a grant.
    Raise(GrantId, appliance_api::Commit, Raising),
    /// Revoke the grant; the appliance need not have it.
    Revoke(GrantId),
    /// Revoke the grant and release every region that the appliance has for the allocation, until it lists none:
    /// after that, no call that is still on its way can make a grant of them.
    Purge(AllocationId, GrantId),
    /// Copy a run of the grant to another appliance.
    Copy(GrantId, appliance_api::Copy),
    /// Ask for the digest of a run of the grant.
    Digest(GrantId, appliance_api::Range),
    /// Ask which lives other than this one are connected to the grant, and have a host that answers. A connection alone
    /// proves nothing: its host may be dead.
    Living(GrantId, Life),
}

/// Details of raising an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raising {
    /// Length of the grant in bytes, since its memory may have to be moved.
    pub len: u64,
    /// Replace memory that cannot be moved away from the old owner by zeros.
    pub lose: bool,
}

/// Answer of an appliance to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// The epoch is raised, and this number of bytes was replaced by zeros.
    Lost(u64),
    /// Its status.
    Status(Box<appliance_api::Status>),
    /// The regions that it reserved.
    Regions(Vec<appliance_api::Region>),
    /// Its grants.
    Grants(Vec<appliance_api::Grant>),
    /// Digest of a run.
    Digest(appliance_api::Digest),
    /// Lives that are connected to the grant, and whose hosts answer.
    Living(Vec<appliance_api::Holder>),
}

/// Why a call got no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The appliance refused it and changed nothing.
    Refused(ErrorKind, String),
    /// Unreachable, too late or broken off: the appliance may have carried the call out.
    Failed(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Refused(_, line) | CallError::Failed(line) => f.write_str(line),
        }
    }
}
