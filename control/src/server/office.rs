//! A daemon that is the leader at times, and at other times redirects requests to the leader.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::extract::Request;
use axum::http::header::LOCATION;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use xpm_protocol::api::{ErrorBody, ErrorKind};

use super::complete;

/// The present duty of a daemon that may lead. Cheap to clone; all clones are the same office.
#[derive(Debug, Clone)]
pub struct Office(Arc<RwLock<Duty>>);

/// How a daemon answers requests.
#[derive(Clone)]
pub enum Duty {
    /// It is the leader.
    Lead {
        /// Routes that answer.
        routes: Router,
        /// Whether it is still the leader: checked for each request.
        holds: Arc<dyn Fn() -> bool + Send + Sync>,
    },
    /// It redirects requests to the leader at this URL, if it knows one.
    Follow(Option<String>),
    /// It cannot lead now, for this reason.
    Wait(String),
}

impl fmt::Debug for Duty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Duty::Lead { .. } => f.write_str("Lead"),
            Duty::Follow(leader) => f.debug_tuple("Follow").field(leader).finish(),
            Duty::Wait(why) => f.debug_tuple("Wait").field(why).finish(),
        }
    }
}

impl Office {
    /// A daemon that follows and knows no leader yet.
    pub fn new() -> Office {
        Office(Arc::new(RwLock::new(Duty::Follow(None))))
    }

    /// Changes its duty, for every request from now on.
    pub fn set(&self, duty: Duty) {
        let duty = match duty {
            Duty::Lead { routes, holds } => Duty::Lead { routes: complete(routes), holds },
            other @ (Duty::Follow(_) | Duty::Wait(_)) => other,
        };
        // No code panics while it holds the lock.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = duty;
    }

    /// Whether the leader's routes answer this path ([`super::answers`]). True for a daemon that is not the
    /// leader, because it has no routes to check.
    pub async fn answers(&self, path: &'static str) -> bool {
        match self.duty() {
            Duty::Lead { routes, holds } if holds() => super::answers(routes, path).await,
            Duty::Lead { .. } | Duty::Follow(_) | Duty::Wait(_) => true,
        }
    }

    fn duty(&self) -> Duty {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn routes(&self) -> Router {
        let office = self.clone();
        Router::new().fallback(move |request| {
            let duty = office.duty();
            async move { duty.answer(request).await }
        })
    }
}

impl Default for Office {
    fn default() -> Office {
        Office::new()
    }
}

impl Duty {
    async fn answer(self, request: Request) -> Response {
        match self {
            Duty::Lead { routes, holds } if holds() => {
                let answered = TowerToHyperService::new(routes).call(request).await;
                answered.unwrap_or_else(|never| match never {})
            }
            Duty::Lead { .. } => refusal(
                "this allocator waits for its metadata store, which does not answer: try again in some seconds",
            ),
            Duty::Wait(why) => refusal(&format!("{why}: try again in some seconds")),
            Duty::Follow(None) => refusal(
                "this allocator does not lead, and none is known that does: try another one, or this one again in some \
                 seconds",
            ),
            Duty::Follow(Some(leader)) => redirect(&leader, &request),
        }
    }
}

fn refusal(line: &str) -> Response {
    let body = ErrorBody { kind: ErrorKind::NotLeader, error: line.to_owned() };
    (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
}

fn redirect(leader: &str, request: &Request) -> Response {
    let mut response = refusal(&format!(
        "this allocator follows the one at {leader}: ask that one, or give all of them as the allocator"
    ));
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    if let Ok(url) = HeaderValue::try_from(format!("{leader}{path}")) {
        *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        response.headers_mut().insert(LOCATION, url);
    }
    response
}
