//! A daemon that leads at times, and at other times sends those who ask to the one that leads.

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

/// What a daemon does that may lead. Cheap to clone; all clones are the same.
#[derive(Debug, Clone)]
pub struct Office(Arc<RwLock<Duty>>);

/// What a daemon does with requests.
#[derive(Clone)]
pub enum Duty {
    /// It leads.
    Lead {
        /// What answers.
        routes: Router,
        /// Whether it still does: looked at for each request.
        holds: Arc<dyn Fn() -> bool + Send + Sync>,
    },
    /// It sends everybody to this one, if it knows one that leads.
    Follow(Option<String>),
    /// It cannot lead now, and says why.
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
    /// A daemon that follows nobody yet.
    pub fn new() -> Office {
        Office(Arc::new(RwLock::new(Duty::Follow(None))))
    }

    /// Changes what it does, for every request from now on.
    pub fn set(&self, duty: Duty) {
        let duty = match duty {
            Duty::Lead { routes, holds } => Duty::Lead { routes: complete(routes), holds },
            other @ (Duty::Follow(_) | Duty::Wait(_)) => other,
        };
        // Nothing panics while it holds the lock.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = duty;
    }

    /// Whether who leads can be asked for this path ([`super::answers`]); one that follows has nobody to ask.
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
