//! The control interface: orders about regions and grants, and the status.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use xpm_control::known::KnownMetadata;
use xpm_control::server::routing::{delete, get, post, put};
use xpm_control::server::{ApiError, Json, Path, Query, Router};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::MetadataState;
use xpm_protocol::api::appliance::{
    Commit, Copy, Counters, Digest, Grant, Holder, Range, Region, Reserve, Status,
};
use xpm_protocol::units::{ByteSize, Span};
use xpm_protocol::{ApplianceId, GrantId, Life, PoolId, RegionId};

use crate::copier::{self, Copier, CopyError};
use crate::regions::{Table, TableError};

/// Counts of the data plane.
pub trait Traffic: Send + Sync {
    /// Current number of connections.
    fn connections(&self) -> usize;

    /// Counters since the start.
    fn counters(&self) -> Counters;
}

/// The appliance, as the subject of orders.
pub struct Appliance {
    id: Option<ApplianceId>,
    table: Table,
    traffic: Box<dyn Traffic>,
    copier: Copier,
    started: Instant,
    known: KnownMetadata,
}

impl Appliance {
    /// An appliance with this table and data plane, started now.
    ///
    /// # Errors
    /// When the kernel provides no random number.
    pub fn new(table: Table, traffic: Box<dyn Traffic>) -> std::io::Result<Appliance> {
        let known = KnownMetadata::default();
        Ok(Appliance { id: None, table, traffic, copier: Copier::new()?, started: Instant::now(), known })
    }

    /// Sets its id, which the status shows.
    #[must_use]
    pub fn with_id(self, id: ApplianceId) -> Appliance {
        Appliance { id: Some(id), ..self }
    }

    /// Sets the state of the allocator's metadata that an earlier life has seen.
    #[must_use]
    pub fn with_known(self, known: KnownMetadata) -> Appliance {
        Appliance { known, ..self }
    }

    /// The newest state of the allocator's metadata that this appliance has seen.
    pub fn known(&self) -> &KnownMetadata {
        &self.known
    }

    /// The table of regions and grants.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The status: memory, grants and traffic.
    pub fn status(&self) -> Status {
        let free = self.table.look_at_limits();
        let summary = self.table.summary();
        Status {
            id: self.id,
            capacity: ByteSize(summary.capacity),
            granted: ByteSize(summary.totals.granted),
            reserved: ByteSize(summary.totals.reserved),
            free: ByteSize(free.min(summary.free)),
            ready: ByteSize(summary.totals.ready),
            resident: ByteSize(summary.resident),
            regions: summary.regions as u64,
            grants: summary.grants as u64,
            connections: self.traffic.connections() as u64,
            uptime: Span(self.started.elapsed()),
            traffic: None,
            counters: self.traffic.counters(),
            warnings: self.table.warnings(),
            metadata: self.known.get(),
        }
    }
}

type Shared = State<Arc<Appliance>>;

/// The routes of [`xpm_protocol::api::appliance`].
pub fn routes(appliance: Arc<Appliance>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/regions", get(regions).post(reserve))
        .route("/v1/regions/{id}", delete(delete_region))
        .route("/v1/grants", get(grants))
        .route("/v1/grants/{id}", put(commit).delete(delete_grant))
        .route("/v1/grants/{id}/living/{life}", get(living))
        .route("/v1/grants/{id}/copies", post(copy))
        .route("/v1/grants/{id}/digests", post(digest))
        .with_state(appliance)
}

async fn status(State(appliance): Shared) -> Result<Json<Status>, ApiError> {
    let status = tokio::task::spawn_blocking(move || appliance.status()).await.map_err(broken)?;
    Ok(Json(status))
}

async fn living(
    appliance: Shared,
    Path((id, life)): Path<(GrantId, Life)>,
) -> Result<Json<Vec<Holder>>, ApiError> {
    on_table(appliance, move |table| Ok(table.living(id, &life))).await.map(Json)
}

async fn regions(appliance: Shared) -> Result<Json<Vec<Region>>, ApiError> {
    on_table(appliance, |table| Ok(table.regions())).await.map(Json)
}

async fn reserve(
    appliance: Shared,
    Query(ordered): Query<Ordered>,
    Json(order): Json<Reserve>,
) -> Result<Json<Vec<Region>>, ApiError> {
    ordered.hear(&appliance).await?;
    let reservation = on_table(appliance, move |table| {
        let regions = table.reserve(&order)?;
        Ok(Reservation { table: table.clone(), regions })
    });
    Ok(Json(reservation.await?.hand_over()))
}

/// Regions whose ids no client has received yet: if the client disconnects before, they are free again at
/// once, and not only when their reservation expires.
struct Reservation {
    table: Table,
    regions: Vec<Region>,
}

impl Reservation {
    fn hand_over(mut self) -> Vec<Region> {
        std::mem::take(&mut self.regions)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for region in &self.regions {
            // The region is in no grant, because no client knows its id.
            let _ = self.table.delete_region(region.id);
        }
    }
}

async fn delete_region(
    appliance: Shared,
    Path(id): Path<RegionId>,
    Query(ordered): Query<Ordered>,
) -> Result<StatusCode, ApiError> {
    ordered.hear(&appliance).await?;
    on_table(appliance, move |table| table.delete_region(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn grants(appliance: Shared) -> Result<Json<Vec<Grant>>, ApiError> {
    on_table(appliance, |table| Ok(table.grants())).await.map(Json)
}

/// The query of an order: the newest state of the metadata of the allocator that sends it.
#[derive(Deserialize)]
struct Ordered {
    pool: Option<PoolId>,
    number: Option<u64>,
}

impl Ordered {
    /// Remembers the state before the order is executed. Blocks on writing a small file if the state is new.
    async fn hear(self, State(appliance): &Shared) -> Result<(), ApiError> {
        let state = self.pool.zip(self.number).map(|(pool, number)| MetadataState { pool, number });
        let appliance = Arc::clone(appliance);
        tokio::task::spawn_blocking(move || appliance.known().hear(state)).await.map_err(broken)
    }
}

/// Whether content may be discarded that cannot be protected from its old owner otherwise. Later allocators
/// may add to the query.
#[derive(Deserialize)]
struct Lose {
    #[serde(default)]
    lose: bool,
}

async fn commit(
    appliance: Shared,
    Path(id): Path<GrantId>,
    Query(Lose { lose }): Query<Lose>,
    Query(ordered): Query<Ordered>,
    Json(order): Json<Commit>,
) -> Result<Json<Grant>, ApiError> {
    ordered.hear(&appliance).await?;
    on_table(appliance, move |table| table.commit_with(id, &order, lose)).await.map(Json)
}

async fn delete_grant(
    appliance: Shared,
    Path(id): Path<GrantId>,
    Query(ordered): Query<Ordered>,
) -> Result<StatusCode, ApiError> {
    ordered.hear(&appliance).await?;
    on_table(appliance, move |table| table.delete_grant(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn copy(
    State(appliance): Shared,
    Path(id): Path<GrantId>,
    Json(order): Json<Copy>,
) -> Result<Json<Digest>, ApiError> {
    let copy = move || {
        let lease = copier::lease_of(&appliance.table, id)?;
        appliance.copier.copy(&lease, &order)
    };
    tokio::task::spawn_blocking(copy).await.map_err(broken)?.map(Json).map_err(not_copied)
}

async fn digest(
    State(appliance): Shared,
    Path(id): Path<GrantId>,
    Json(range): Json<Range>,
) -> Result<Json<Digest>, ApiError> {
    let digest = move || {
        let lease = copier::lease_of(&appliance.table, id)?;
        copier::digest(&lease, range)
    };
    tokio::task::spawn_blocking(digest).await.map_err(broken)?.map(Json).map_err(not_copied)
}

#[expect(clippy::needless_pass_by_value, reason = "used where an error is mapped")]
fn not_copied(error: CopyError) -> ApiError {
    let kind = match error {
        CopyError::Invalid(_) => ErrorKind::Invalid,
        CopyError::Revoked => ErrorKind::Conflict,
        CopyError::Connect(_) | CopyError::Target(_) | CopyError::Memory(_) => ErrorKind::Unavailable,
    };
    ApiError(kind, error.to_string())
}

/// Executes an order on a thread that may block, and completes it even if its sender disconnects.
async fn on_table<T: Send + 'static>(
    State(appliance): Shared,
    order: impl FnOnce(&Table) -> Result<T, TableError> + Send + 'static,
) -> Result<T, ApiError> {
    let result = tokio::task::spawn_blocking(move || order(appliance.table())).await.map_err(broken)?;
    result.map_err(|error| ApiError(error.kind(), xpm_control::error_line(&error)))
}

#[expect(clippy::needless_pass_by_value, reason = "used where an error is mapped")]
fn broken(error: tokio::task::JoinError) -> ApiError {
    ApiError(ErrorKind::Internal, format!("the order ended unexpectedly: {error}"))
}

#[cfg(test)]
mod tests {
    use xpm_protocol::AllocationId;

    use super::*;
    use crate::arena::{Arena, Backing};
    use crate::ledger::Stock;

    #[test]
    fn a_reservation_that_reaches_no_client_is_undone() {
        const LEN: u64 = 16 << 20;
        let arena = Arena::new(&Backing::Memfd, 2 * LEN, true).unwrap();
        let table = Table::start(arena, 2 * LEN, Stock { region_len: LEN, target: 0 }).unwrap();
        let order = Reserve {
            allocation: AllocationId::from_u128(1),
            count: 1,
            region_len: ByteSize(LEN),
            ttl: Span(std::time::Duration::from_secs(60)),
        };
        let reserve = || Reservation { table: table.clone(), regions: table.reserve(&order).unwrap() };
        let kept = reserve().hand_over();
        assert_eq!((kept.len(), table.summary().totals.reserved), (1, LEN));
        drop(reserve());
        assert_eq!(table.summary().totals.reserved, LEN);
    }
}
