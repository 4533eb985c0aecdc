//! The exchange between the owner of allocations and the allocator. It is never on the path of an I/O: an
//! allocator that does not answer changes nothing.

mod follow;
mod guard;
mod mover;

use std::sync::Arc;
use std::time::Duration;

use xpm_control::client::{Client, ClientError};
use xpm_control::error_line;
use xpm_control::known::KnownMetadata;
use xpm_control::token::Token;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Allocation, Attach, Event, Grant, Map, MetadataState, Orders, Owned, Report, SlabMap,
};
use xpm_protocol::{BlockWish, ClientId, Epoch, GrantId, HostId, Life, Name};

pub(crate) use self::follow::Follower;
pub use self::guard::{Guard, Guarded, Known, Trouble, Word};
pub use self::mover::{Mover, TailError};

/// Time limit for connecting to new appliances.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for the allocator's answer to a client that becomes the owner: long, because appliances move shared
/// memory before the allocator answers.
const OWN_LIMIT: Duration = Duration::from_secs(60);
/// Shortest and longest pause before the allocator is asked again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Time limit of a request for events, and the pause after a failure.
const LISTEN_LIMIT: Duration = Duration::from_secs(40);
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Most grants named in one question.
const DOUBTS_MAX: usize = 256;

/// The way in which an allocation is taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taking {
    /// Whether to take it from another owner, who is cut off.
    pub force: bool,
    /// Whether memory that cannot be moved away from the previous owner is replaced by zeros.
    pub lose: bool,
    /// The block size that a client which shows a block device wishes for.
    pub blocks: Option<BlockWish>,
    /// The epoch whose map, with its keys, the client has already; the client only wants to be recorded as
    /// the owner. Then the map in the answer must not be used, because its keys may be made up.
    pub has: Option<Epoch>,
}

/// A client that owns allocations, or is about to.
#[derive(Clone)]
pub struct Owner {
    /// The allocators, of which one leads.
    pub allocator: Client,
    /// The token of the control plane, which is also shown to appliances.
    pub token: Option<Token>,
    /// The client's id.
    pub client: ClientId,
    /// The host that the client runs on.
    pub host: HostId,
    /// That host's name, for display.
    pub host_name: String,
    /// The life of the client: the allocator lets one life own an allocation at a time. None when it is not
    /// known, so that the client's id alone counts.
    pub life: Option<Life>,
    /// The newest state of the allocator's metadata that this client has seen.
    pub known: Arc<KnownMetadata>,
}

impl Owner {
    /// Becomes the owner of an allocation. Returns its map, with the keys. `force` takes it from another
    /// owner.
    ///
    /// # Errors
    /// The allocator's refusal, or a failure to reach it.
    pub async fn own(&self, name: &Name, purpose: String, force: bool) -> Result<Map, ClientError> {
        self.own_with(name, purpose, Taking { force, ..Taking::default() }).await
    }

    /// As [`Owner::own`], with all parameters.
    ///
    /// # Errors
    /// As [`Owner::own`].
    pub async fn own_with(&self, name: &Name, purpose: String, how: Taking) -> Result<Map, ClientError> {
        let Taking { force, lose, blocks, has } = how;
        let attach = Attach {
            client: self.client,
            host: self.host,
            host_name: self.host_name.clone(),
            purpose,
            force,
            lose,
            blocks,
        };
        let (allocator, path) = (
            self.allocator.clone().with_limit(OWN_LIMIT),
            self.path(&format!("/v1/allocations/{name}/owner")),
        );
        let path =
            has.map_or_else(|| path.clone(), |Epoch(epoch)| with_query(&path, &format!("has={epoch}")));
        let owned: Owned = match allocator.put(&path, &attach).await {
            // An allocator of a version without block sizes refuses the field; then it is asked again without
            // the field.
            Err(ClientError::Refused(body))
                if blocks.is_some() && body.error.contains("unknown field `blocks`") =>
            {
                allocator.put(&path, &Attach { blocks: None, ..attach }).await
            }
            answer => answer,
        }?;
        self.known.hear(owned.metadata);
        Ok(owned.map)
    }

    /// Stands by to take an allocation over from its owner. Returns its map, without keys.
    ///
    /// # Errors
    /// As [`Owner::own`].
    pub async fn stand_by(&self, name: &Name, purpose: String, how: Taking) -> Result<Map, ClientError> {
        let Taking { force, lose, blocks, has: _ } = how;
        let (client, host, host_name) = (self.client, self.host, self.host_name.clone());
        let attach = Attach { client, host, host_name, purpose, force, lose, blocks };
        self.allocator.put(&self.path(&format!("/v1/allocations/{name}/standby")), &attach).await
    }

    /// Adds the life as a query parameter, which allocators from before lives existed ignore.
    fn path(&self, path: &str) -> String {
        match &self.life {
            Some(life) => format!("{path}?life={life}"),
            None => path.to_owned(),
        }
    }

    /// Gives an allocation back, which nothing may use any more.
    ///
    /// # Errors
    /// As of [`Owner::own`]; it stays this owner's then.
    pub async fn disown(&self, name: &Name) -> Result<(), ClientError> {
        self.allocator.delete(&self.path(&format!("/v1/allocations/{name}/owner/{}", self.client))).await
    }

    /// Slabs of an allocation that have names.
    ///
    /// # Errors
    /// As of [`Owner::own`].
    pub async fn slabs(&self, name: &Name) -> Result<SlabMap, ClientError> {
        Ok(self.allocator.get::<Allocation>(&format!("/v1/allocations/{name}")).await?.slabs)
    }

    /// Replaces the map of named slabs, if this map follows the one that the allocator has.
    ///
    /// # Errors
    /// As [`Owner::own`]; without an answer the map may have been replaced or not.
    pub async fn set_slabs(&self, name: &Name, slabs: &SlabMap) -> Result<SlabMap, ClientError> {
        self.allocator.put(&self.path(&format!("/v1/allocations/{name}/slabs/{}", self.client)), slabs).await
    }

    /// The allocator's orders.
    ///
    /// # Errors
    /// As [`Owner::own`].
    pub async fn orders(&self, name: &Name) -> Result<Orders, ClientError> {
        let mut path = self.path(&format!("/v1/allocations/{name}/orders/{}", self.client));
        if let Some(MetadataState { pool, number }) = self.known.get() {
            path = with_query(&path, &format!("pool={pool}&number={number}"));
        }
        let orders: Orders = self.allocator.get(&path).await?;
        self.known.hear(orders.metadata);
        Ok(orders)
    }

    /// As [`Owner::orders`], with the grants that appliances refuse to this owner: the allocator asks those
    /// appliances at once.
    ///
    /// # Errors
    /// As [`Owner::own`].
    pub async fn orders_about(&self, name: &Name, refused: &[GrantId]) -> Result<Orders, ClientError> {
        let refused: Vec<String> = refused.iter().take(DOUBTS_MAX).map(ToString::to_string).collect();
        let path = self.path(&format!("/v1/allocations/{name}/orders/{}", self.client));
        let path = with_query(&path, &format!("refused={}", refused.join(",")));
        let orders: Orders = self.allocator.get(&path).await?;
        self.known.hear(orders.metadata);
        Ok(orders)
    }

    /// Sends the keys of an ownership if its orders request them. Returns the orders after that, or the given
    /// orders if the allocator did not receive the keys.
    pub async fn tell_keys<'a>(
        &self,
        name: &Name,
        epoch: Epoch,
        grants: impl IntoIterator<Item = &'a Grant>,
        orders: Orders,
    ) -> Orders {
        if !orders.wants_keys {
            return orders;
        }
        let keys = grants.into_iter().map(|grant| (grant.id, grant.key.clone())).collect();
        match self.say(name, &Report::Keys { epoch, keys }).await {
            Ok(orders) => orders,
            Err(error) => {
                tracing::debug!("allocation {name}: {}", error_line(&error));
                orders
            }
        }
    }

    /// Reports the state of executing an order.
    ///
    /// # Errors
    /// As [`Owner::own`].
    pub async fn say(&self, name: &Name, report: &Report) -> Result<Orders, ClientError> {
        let path = self.path(&format!("/v1/allocations/{name}/orders/{}", self.client));
        let orders: Orders = self.allocator.post(&path, report).await?;
        self.known.hear(orders.metadata);
        Ok(orders)
    }

    /// Repeats a report until the allocator has received it. None when the allocator answers that this client
    /// does not own the allocation.
    pub async fn say_until_heard(&self, name: &Name, report: &Report) -> Option<Orders> {
        let mut pause = PAUSE.0;
        loop {
            match self.say(name, report).await {
                Ok(orders) => return Some(orders),
                Err(ClientError::Refused(body)) if is_final(body.kind) => {
                    tracing::warn!("allocation {name}: {}", body.error);
                    return None;
                }
                Err(error) => tracing::debug!("allocation {name}: {}", error_line(&error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Starts listening to events.
    pub fn listen(&self) -> Listener {
        Listener::new(&self.allocator)
    }
}

fn with_query(path: &str, more: &str) -> String {
    let mark = if path.contains('?') { '&' } else { '?' };
    format!("{path}{mark}{more}")
}

/// The text that is shown for an appliance that the operator has given up.
pub fn lost_on(name: &Name) -> String {
    format!("lost on {name}: the operator has given that appliance up")
}

/// Whether a refusal is a definite answer, and not only the statement that no answer is possible now.
pub const fn is_final(kind: ErrorKind) -> bool {
    !matches!(
        kind,
        ErrorKind::Unavailable | ErrorKind::NotLeader | ErrorKind::Internal | ErrorKind::Unauthorized
    )
}

/// News for an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// There may be orders for this allocation, or it may belong to another owner now, or may not be whole
    /// any more.
    Allocation(Name),
    /// The addresses of the appliance of this name changed.
    Appliance(Name),
    /// The listener begins to listen, or was out of touch with the allocator: anything may have happened before.
    Missed,
}

impl Heard {
    /// Whether there may be orders for this allocation.
    pub fn may_order(&self, allocation: &Name) -> bool {
        match self {
            Heard::Missed => true,
            Heard::Allocation(name) => name == allocation,
            Heard::Appliance(_) => false,
        }
    }

    /// The news of an event for owners, if there is any.
    fn of(event: &Event) -> Option<Heard> {
        let subject = event.subject.clone();
        match event.kind.as_str() {
            "change-open" | "hand-over" | "lender-lost" | "lost" | "deleted" | "freed" | "attached"
            | "handed-over" | "cut-off" | "standby" | "standby-gone" | "handover-open"
            | "handover-failed" | "handover-committed" | "handover-returning" | "handover-returned" => {
                Some(Heard::Allocation(subject))
            }
            "appliance-moved" => Some(Heard::Appliance(subject)),
            _ => None,
        }
    }
}

/// Receives the news of orders without delay.
pub struct Listener {
    allocator: Client,
    /// Number of the last event received.
    after: Option<u64>,
}

impl Listener {
    /// Listens at the allocator that this client asks.
    pub fn new(allocator: &Client) -> Listener {
        Listener { allocator: allocator.clone().with_limit(LISTEN_LIMIT), after: None }
    }

    /// Waits until there is news for owners, or for half a minute. The first call, and the first one that
    /// reaches an allocator after one that did not, returns [`Heard::Missed`] at once: events from before
    /// are not reported, so the caller has to ask for orders.
    pub async fn hear(&mut self) -> Vec<Heard> {
        let path = match self.after {
            Some(number) => format!("/v1/events?after={number}&wait=true"),
            None => "/v1/events".to_owned(),
        };
        let Ok(events) = self.allocator.get::<Vec<Event>>(&path).await else {
            self.after = None;
            tokio::time::sleep(LISTEN_AGAIN).await;
            return Vec::new();
        };
        let before = self.after;
        self.after = Some(events.last().map_or(before.unwrap_or(0), |event| event.number));
        if before.is_none() {
            return vec![Heard::Missed];
        }
        events.iter().filter_map(Heard::of).collect()
    }
}
