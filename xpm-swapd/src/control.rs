//! The control interface: HTTP on a unix socket, as `xpm_protocol::api::swapd` describes it.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use xpm_control::server::{ApiError, Json, Router};
use xpm_protocol::Name;
use xpm_protocol::api::swapd::{Area, Drain, Grow, Shrink, Status};

use crate::engine::Daemon;
use crate::error::Error;

type Answer<T> = Result<Json<T>, ApiError>;

/// The routes of a daemon.
pub fn routes(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/grow", post(grow))
        .route("/v1/shrink", post(shrink))
        .route("/v1/drain", post(drain).delete(stop))
        .route("/v1/resume", post(resume))
        .with_state(daemon)
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Status> {
    Json(daemon.status())
}

async fn grow(State(daemon): State<Arc<Daemon>>, Json(asked): Json<Grow>) -> Answer<Area> {
    answer(daemon.grow(asked).await)
}

async fn shrink(State(daemon): State<Arc<Daemon>>, Json(asked): Json<Shrink>) -> Answer<Vec<Name>> {
    answer(daemon.shrink(asked))
}

async fn drain(State(daemon): State<Arc<Daemon>>, Json(asked): Json<Drain>) -> Answer<Vec<Name>> {
    answer(daemon.drain(asked))
}

async fn stop(State(daemon): State<Arc<Daemon>>) -> Answer<()> {
    answer(daemon.stop_draining())
}

async fn resume(State(daemon): State<Arc<Daemon>>) -> Answer<()> {
    answer(daemon.resume())
}

fn answer<T>(result: Result<T, Error>) -> Answer<T> {
    result.map(Json).map_err(|error| ApiError(error.kind(), error.to_string()))
}
