//! The HTTP routes, as in the table of `xpm_protocol::api::allocator`.

use serde::Deserialize;
use xpm_control::client::Client;
use xpm_control::server::routing::{delete, get, post, put};
use xpm_control::server::{ApiError, Force, Json, Limits, NoContent, Office, Path, Query, Router, Server};
use xpm_control::token::Token;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Attach, ClientFacts, Create, Drain, HandOverAll, Heartbeat, MetadataState, Pause, Rebalance, Rename,
    Renew, Report, Resize, SlabMap, Transfer,
};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::api::policy::Apply;
use xpm_protocol::id::ParseIdError;
use xpm_protocol::policy::{DocumentName, Kind, LABELS_MAX};
use xpm_protocol::text::one_line;
use xpm_protocol::{ApplianceId, ClientId, Epoch, GrantId, Life, Name, PoolId, RequestId};

use crate::driver::Handle;
use crate::service::{EventQuery, Outcome, Request, Which};

type Answered = Result<Json<Outcome>, ApiError>;
type Done = Result<NoContent, ApiError>;

/// Largest body, in bytes: a set of documents.
const BODY_LEN_MAX: usize = 4 << 20;

/// Most connections: each client that follows events has one.
const CONNECTIONS_MAX: usize = 16_384;

/// Most refused grants that one doubt can name.
const DOUBTS_MAX: usize = 256;

/// Query of a removal.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Version {
    version: Option<u64>,
}

/// Query of a creation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    request: Option<RequestId>,
}

/// Query for a decision.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct All {
    /// Whether to name every appliance.
    #[serde(default)]
    all: bool,
}

/// Query for orders: the newest state of the metadata that the owner has heard of.
#[derive(Debug, Deserialize)]
struct Known {
    pool: Option<PoolId>,
    number: Option<u64>,
}

/// Query for events.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct After {
    after: Option<u64>,
    /// Whether to wait for an event if there is none yet.
    #[serde(default)]
    wait: bool,
    /// `NAME`, or `KIND/NAME` as in problems.
    object: Option<String>,
    /// Kinds, with commas in between.
    #[serde(default)]
    kind: String,
    limit: Option<usize>,
}

impl After {
    fn query(self) -> Result<EventQuery, ApiError> {
        let invalid = |line: String| ApiError(ErrorKind::Invalid, line);
        let name = |text: String| {
            let name = text.rsplit('/').next().unwrap_or_default().parse();
            name.map_err(|error: ParseIdError| invalid(error.to_string()))
        };
        let kinds: Vec<String> = self.kind.split(',').filter(|kind| !kind.is_empty()).map(one_line).collect();
        let known = |kind: &String| EventKind::ALL.iter().any(|known| known.as_str() == kind);
        if let Some(kind) = kinds.iter().find(|kind| !known(kind)) {
            let all: Vec<&str> = EventKind::ALL.iter().map(|kind| kind.as_str()).collect();
            return Err(invalid(format!("no event is of the kind `{kind}`; kinds are {}", all.join(", "))));
        }
        let object = self.object.map(name).transpose()?;
        Ok(EventQuery { after: self.after, wait: self.wait, object, kinds, limit: self.limit })
    }
}

/// Query of an owner. Owners of later versions may add to it.
#[derive(Debug, Deserialize)]
struct Doubt {
    /// Grants that their appliances refuse to the owner, separated by commas.
    #[serde(default)]
    refused: String,
}

impl Doubt {
    fn grants(&self) -> Result<Vec<GrantId>, ApiError> {
        let ids = self.refused.split(',').filter(|id| !id.is_empty());
        let parsed: Result<Vec<GrantId>, _> = ids.take(DOUBTS_MAX).map(str::parse).collect();
        parsed.map_err(|error| ApiError(ErrorKind::Invalid, format!("refused: {error}")))
    }
}

/// Query of an owner that has a map with its keys, and only wants to be registered: the epoch of that map.
#[derive(Debug, Deserialize)]
struct Has {
    has: Option<Epoch>,
}

/// Query of requests that an owner makes.
#[derive(Debug, Deserialize)]
struct OfLife {
    /// The life of the client that asks.
    life: Option<Life>,
}

impl OfLife {
    fn asks(self, request: Request) -> Request {
        match self.life {
            Some(life) => Request::As(life, Box::new(request)),
            None => request,
        }
    }
}

/// The control interface.
pub(crate) fn scaffold(handle: Handle, token: Option<Token>) -> Server {
    Server::new(all_routes(handle), token, limits())
}

/// The control interface of one of several allocators, which serves only as leader.
pub(crate) fn with_office(office: &Office, token: Option<Token>) -> Server {
    Server::with_office(office, token, limits())
}

fn limits() -> Limits {
    Limits { body_len_max: BODY_LEN_MAX, connections_max: CONNECTIONS_MAX, ..Limits::default() }
}

/// All routes to the service.
pub(crate) fn all_routes(handle: Handle) -> Router {
    routes(handle.clone())
        .merge(document_routes(handle.clone()))
        .merge(more_routes(handle.clone()))
        .merge(life_routes(handle))
}

fn routes(handle: Handle) -> Router {
    let ask = move |request| {
        let handle = handle.clone();
        async move { handle.ask(request).await }
    };
    let [status, appliances, heard, forget] = std::array::from_fn(|_| ask.clone());
    let [create, list, show, remove, attach, detach] = std::array::from_fn(|_| ask.clone());
    Router::new()
        .route("/v1/status", get(async move || answer(status(Request::Status).await)))
        .route("/v1/appliances", get(async move || answer(appliances(Request::Appliances).await)))
        .route(
            "/v1/appliances/{id}",
            put(async move |Path(id): Path<ApplianceId>, Json(beat): Json<Heartbeat>| {
                answer(heard(checked(id, beat)?).await)
            })
            .delete(async move |Path(id): Path<ApplianceId>| {
                done(forget(Request::ForgetAppliance(id)).await)
            }),
        )
        .route(
            "/v1/allocations",
            get(async move || answer(list(Request::Allocations).await)).post(
                async move |Query(Asked { request }): Query<Asked>, Json(body): Json<Create>| {
                    answer(
                        create(match request {
                            Some(request) => Request::CreateAs(request, body),
                            None => Request::Create(body),
                        })
                        .await,
                    )
                },
            ),
        )
        .route(
            "/v1/allocations/{name}",
            get(async move |Path(name): Path<Name>| answer(show(Request::Allocation(name)).await)).delete(
                async move |Path(name): Path<Name>, Force(force): Force| {
                    done(remove(Request::Delete { name, force }).await)
                },
            ),
        )
        .route(
            "/v1/allocations/{name}/owner",
            put(
                async move |Path(name): Path<Name>,
                            Query(life): Query<OfLife>,
                            Query(Has { has }): Query<Has>,
                            Json(body): Json<Attach>| {
                    answer(attach(life.asks(Request::Attach { name, attach: body, has })).await)
                },
            ),
        )
        .route(
            "/v1/allocations/{name}/owner/{client}",
            delete(async move |Path((name, client)): Path<(Name, ClientId)>, Query(life): Query<OfLife>| {
                done(detach(life.asks(Request::Detach { name, client })).await)
            }),
        )
}

fn document_routes(handle: Handle) -> Router {
    let ask = move |request| {
        let handle = handle.clone();
        async move { handle.ask(request).await }
    };
    let [policy, apply, remove, usage, metrics] = std::array::from_fn(|_| ask.clone());
    Router::new()
        .route(
            "/v1/policy",
            get(async move || answer(policy(Request::Policy).await))
                .post(async move |Json(body): Json<Apply>| answer(apply(Request::Apply(body)).await)),
        )
        .route(
            "/v1/policy/{kind}/{name}",
            delete(
                async move |Path((kind, name)): Path<(Kind, Name)>,
                            Query(Version { version }): Query<Version>| {
                    let name = DocumentName { kind, name };
                    done(remove(Request::RemoveDocument { name, version }).await)
                },
            ),
        )
        .route("/v1/usage", get(async move || answer(usage(Request::Usage).await)))
        .route(
            "/v1/metrics",
            get(async move || match metrics(Request::Metrics).await? {
                Outcome::Metrics(text) => Ok(text),
                _ => Err(ApiError(ErrorKind::Internal, "something else was answered".to_owned())),
            }),
        )
}

/// Routes for changes during the life of allocations and appliances.
fn life_routes(handle: Handle) -> Router {
    let ask = move |request| {
        let handle = handle.clone();
        async move { handle.ask(request).await }
    };
    let [resize, transfer, orders, report, drain, end_drain] = std::array::from_fn(|_| ask.clone());
    let [rebalance, rebalancing, pause, end_rebalance] = std::array::from_fn(|_| ask.clone());
    let [garbage, backup, slabs, rename, lose] = std::array::from_fn(|_| ask.clone());
    let [stand_by, hand_over, handovers, commit, roll_back] = std::array::from_fn(|_| ask.clone());
    Router::new()
        .route("/v1/backup", get(async move || answer(backup(Request::Backup).await)))
        .route("/v1/garbage", get(async move || answer(garbage(Request::Garbage).await)))
        .route(
            "/v1/allocations/{name}/size",
            put(async move |Path(name): Path<Name>, Json(resize_to): Json<Resize>| {
                answer(resize(Request::Resize { name, resize: resize_to }).await)
            }),
        )
        .route(
            "/v1/allocations/{name}/name",
            put(async move |Path(name): Path<Name>, Json(order): Json<Rename>| {
                answer(rename(Request::Rename { name, to: order.to }).await)
            }),
        )
        .route(
            "/v1/allocations/{name}/transfer",
            post(async move |Path(name): Path<Name>, Json(order): Json<Transfer>| {
                answer(transfer(Request::Transfer { name, transfer: order }).await)
            }),
        )
        .route(
            "/v1/allocations/{name}/orders/{client}",
            get(
                async move |Path((name, client)): Path<(Name, ClientId)>,
                            Query(doubt): Query<Doubt>,
                            Query(life): Query<OfLife>,
                            Query(Known { pool, number }): Query<Known>| {
                    let known = pool.zip(number).map(|(pool, number)| MetadataState { pool, number });
                    let request = match doubt.grants()? {
                        none if none.is_empty() => Request::Orders { name, client, known },
                        refused => Request::Doubt { name, client, refused },
                    };
                    answer(orders(life.asks(request)).await)
                },
            )
            .post(
                async move |Path((name, client)): Path<(Name, ClientId)>,
                            Query(life): Query<OfLife>,
                            Json(said): Json<Report>| {
                    answer(report(life.asks(Request::Report { name, client, report: said })).await)
                },
            ),
        )
        .route(
            "/v1/allocations/{name}/standby",
            put(
                async move |Path(name): Path<Name>,
                            Query(life): Query<OfLife>,
                            Json(attach): Json<Attach>| {
                    answer(stand_by(life.asks(Request::StandBy { name, attach })).await)
                },
            ),
        )
        .route(
            "/v1/handovers",
            post(async move |Json(order): Json<HandOverAll>| {
                answer(hand_over(Request::HandOverAll(order)).await)
            })
            .get(async move || answer(handovers(Request::Handovers).await)),
        )
        .route(
            "/v1/handovers/{id}/commit",
            post(async move |Path(which): Path<Which>| answer(commit(Request::CommitHandover(which)).await)),
        )
        .route(
            "/v1/handovers/{id}/rollback",
            post(async move |Path(which): Path<Which>| {
                answer(roll_back(Request::RollBackHandover(which)).await)
            }),
        )
        .route(
            "/v1/allocations/{name}/slabs/{client}",
            put(
                async move |Path((name, client)): Path<(Name, ClientId)>,
                            Query(life): Query<OfLife>,
                            Json(map): Json<SlabMap>| {
                    answer(slabs(life.asks(Request::Slabs { name, client, slabs: map })).await)
                },
            ),
        )
        .route(
            "/v1/appliances/{id}/loss",
            post(async move |Path(id): Path<ApplianceId>| answer(lose(Request::GiveUpAppliance(id)).await)),
        )
        .route(
            "/v1/appliances/{id}/drain",
            post(async move |Path(id): Path<ApplianceId>, Json(order): Json<Drain>| {
                answer(drain(Request::Drain { id, drain: order }).await)
            })
            .delete(async move |Path(id): Path<ApplianceId>| done(end_drain(Request::EndDrain(id)).await)),
        )
        .route(
            "/v1/rebalance",
            post(async move |Json(order): Json<Rebalance>| {
                answer(rebalance(Request::Rebalance(order)).await)
            })
            .get(async move || answer(rebalancing(Request::Rebalancing).await))
            .put(async move |Json(order): Json<Pause>| answer(pause(Request::PauseRebalance(order)).await))
            .delete(async move || done(end_rebalance(Request::EndRebalance).await)),
        )
}

fn more_routes(handle: Handle) -> Router {
    let reader = handle.clone();
    let ask = move |request| {
        let handle = handle.clone();
        async move { handle.ask(request).await }
    };
    let [decide, renew, hear, clients, events] = std::array::from_fn(|_| ask.clone());
    Router::new()
        .route(
            "/v1/decisions",
            post(async move |Query(All { all }): Query<All>, Json(create): Json<Create>| {
                answer(decide(Request::Decide { create, all }).await)
            }),
        )
        .route(
            "/v1/allocations/{name}/decisions",
            get(async move |Path(name): Path<Name>| reader.decisions(name).await.map(Json)),
        )
        .route(
            "/v1/allocations/{name}/renewal",
            post(async move |Path(name): Path<Name>, Json(body): Json<Renew>| {
                answer(renew(Request::Renew { name, renew: body }).await)
            }),
        )
        .route("/v1/clients", get(async move || answer(clients(Request::Clients).await)))
        .route(
            "/v1/clients/{name}",
            put(async move |Path(name): Path<Name>, Json(facts): Json<ClientFacts>| {
                answer(hear(Request::HearClient { name, facts }).await)
            }),
        )
        .route(
            "/v1/events",
            get(async move |Query(after): Query<After>| {
                answer(events(Request::Events(after.query()?)).await)
            }),
        )
}

/// A heartbeat as a request, if its id fits the path and the allocator can call its appliance.
fn checked(id: ApplianceId, heartbeat: Heartbeat) -> Result<Request, ApiError> {
    let invalid = |line: String| Err(ApiError(ErrorKind::Invalid, line));
    if id != heartbeat.info.id {
        return invalid(format!("the heartbeat of {} came for {id}", heartbeat.info.id));
    }
    if heartbeat.info.labels.len() > LABELS_MAX {
        return invalid(format!("an appliance has at most {LABELS_MAX} labels"));
    }
    if let Err(error) = Client::new(&heartbeat.info.control, None) {
        return invalid(format!("the appliance cannot be called: {error}"));
    }
    Ok(Request::Heartbeat(Box::new(heartbeat)))
}

fn answer(result: Result<Outcome, ApiError>) -> Answered {
    result.map(Json)
}

fn done(result: Result<Outcome, ApiError>) -> Done {
    result.map(|_| NoContent)
}
