//! The control interface: HTTP on a unix socket, as `xpm_protocol::api::blk` describes it.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, put};
use xpm_control::server::{ApiError, Force, Json, Path, Router};
use xpm_protocol::Name;
use xpm_protocol::api::blk::{AttachDevice, Cache, Device, Status};

use crate::daemon::Daemon;
use crate::error::DeviceError;

/// The routes of a daemon.
pub fn routes(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/devices", get(devices).post(attach))
        .route("/v1/devices/{name}", get(device).delete(detach))
        .route("/v1/devices/{name}/abort", put(abort))
        .route("/v1/devices/{name}/cache", get(cache).put(drop_cache))
        .route("/v1/lost/{appliance}", put(lose))
        .with_state(daemon)
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Status> {
    Json(daemon.status())
}

async fn devices(State(daemon): State<Arc<Daemon>>) -> Json<Vec<Device>> {
    Json(daemon.devices())
}

async fn device(State(daemon): State<Arc<Daemon>>, Path(name): Path<Name>) -> Result<Json<Device>, ApiError> {
    daemon.device(&name).map(Json).map_err(|error| refused(&error))
}

async fn attach(
    State(daemon): State<Arc<Daemon>>,
    Json(request): Json<AttachDevice>,
) -> Result<Json<Device>, ApiError> {
    daemon.attach(request).await.map(Json).map_err(|error| refused(&error))
}

async fn detach(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<Name>,
    Force(force): Force,
) -> Result<Json<()>, ApiError> {
    daemon.detach(name, force).await.map(Json).map_err(|error| refused(&error))
}

async fn abort(State(daemon): State<Arc<Daemon>>, Path(name): Path<Name>) -> Result<Json<Device>, ApiError> {
    daemon.abort(&name).await.map(Json).map_err(|error| refused(&error))
}

async fn cache(State(daemon): State<Arc<Daemon>>, Path(name): Path<Name>) -> Result<Json<Cache>, ApiError> {
    daemon.cache(&name, false).await.map(Json).map_err(|error| refused(&error))
}

async fn drop_cache(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<Name>,
) -> Result<Json<Cache>, ApiError> {
    daemon.cache(&name, true).await.map(Json).map_err(|error| refused(&error))
}

async fn lose(
    State(daemon): State<Arc<Daemon>>,
    Path(appliance): Path<String>,
) -> Result<Json<Vec<Device>>, ApiError> {
    daemon.lose(&appliance).await.map(Json).map_err(|error| refused(&error))
}

fn refused(error: &DeviceError) -> ApiError {
    ApiError(error.kind(), error.to_string())
}
