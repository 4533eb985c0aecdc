//! Calls to appliances over their control interface, each with a time limit.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use xpm_control::client::{Client, ClientError};
use xpm_control::error_line;
use xpm_control::token::Token;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::MetadataState;
use xpm_protocol::api::appliance::{Commit, Grant, Region, RegionState, Reserve};
use xpm_protocol::{AllocationId, GrantId};

use crate::service::{Answer, Call, CallError, Raising, Target};

/// Time limit of a request that needs little work.
const LIMIT: Duration = Duration::from_secs(3);
/// Additional time of a reservation per GiB, since regions that are not ready are prepared then.
const LIMIT_PER_GIB: Duration = Duration::from_millis(250);
/// Longest time of a reservation; shorter than the shortest `reserve_ttl`.
const LIMIT_MAX: Duration = Duration::from_secs(20);
/// Additional time for raising an epoch per GiB, since memory that was shared is moved then.
const RAISE_PER_GIB: Duration = Duration::from_secs(2);
/// Longest time for raising an epoch: the control interface of an appliance answers within a minute.
const RAISE_MAX: Duration = Duration::from_secs(55);
/// Time limit of asking which lives are connected: the appliance gives their hosts three seconds to answer.
const LIMIT_LIVING: Duration = Duration::from_secs(6);
/// Time limit of copying one run.
const LIMIT_COPY: Duration = Duration::from_secs(60);
/// Rounds of a purge: the first gives everything back, the second finds that nothing is left. More are needed only
/// while an earlier call is still on its way.
const PURGE_ROUNDS_MAX: usize = 4;

/// Client of all appliances. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Appliances {
    token: Option<Token>,
}

impl Appliances {
    pub(crate) fn new(token: Option<Token>) -> Appliances {
        Appliances { token }
    }

    /// Makes one call.
    pub(crate) async fn call(&self, target: &Target, call: Call) -> Result<Answer, CallError> {
        let client = Client::new(&target.control, self.token.clone())
            .map_err(|error| CallError::Failed(error.to_string()))?;
        let client = Ordering { client: client.with_limit(LIMIT), metadata: target.metadata };
        let asking = client.client.clone();
        match call {
            Call::Status => Ok(Answer::Status(Box::new(asking.get("/v1/status").await.map_err(failed)?))),
            Call::Grants => Ok(Answer::Grants(asking.get("/v1/grants").await.map_err(failed)?)),
            Call::Reserve(reserve) => reserve_regions(client, &reserve).await,
            Call::Commit(id, commit) => commit_grant(&client, id, &commit, false).await,
            Call::Raise(id, commit, Raising { len, lose }) => {
                let gib = u32::try_from(len.div_ceil(1 << 30)).unwrap_or(u32::MAX);
                let limit = RAISE_PER_GIB.saturating_mul(gib).saturating_add(LIMIT).min(RAISE_MAX);
                commit_grant(&client.with_limit(limit), id, &commit, lose).await
            }
            Call::Revoke(id) => revoke(&client, id).await.map(|()| Answer::Done),
            Call::Purge(allocation, grant) => purge(&client, allocation, grant).await,
            Call::Copy(id, order) => digest(&client, &format!("/v1/grants/{id}/copies"), &order).await,
            Call::Living(id, life) => {
                let path = format!("/v1/grants/{id}/living/{life}");
                asking.with_limit(LIMIT_LIVING).get(&path).await.map(Answer::Living).map_err(failed)
            }
            Call::Digest(id, range) => digest(&client, &format!("/v1/grants/{id}/digests"), &range).await,
        }
    }
}

/// Client of one appliance that sends the state of the metadata along with each order. So even an allocator that dies
/// after one order leaves a trace of its durable state.
struct Ordering {
    client: Client,
    metadata: Option<MetadataState>,
}

impl Ordering {
    fn with_limit(self, limit: Duration) -> Ordering {
        Ordering { client: self.client.with_limit(limit), ..self }
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, order: &impl Serialize) -> Result<T, ClientError> {
        self.client.post(&self.path(path), order).await
    }

    async fn put<T: DeserializeOwned>(&self, path: &str, order: &impl Serialize) -> Result<T, ClientError> {
        self.client.put(&self.path(path), order).await
    }

    async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.client.delete(&self.path(path)).await
    }

    /// Adds the state as a query, which older appliances ignore.
    fn path(&self, path: &str) -> String {
        let Some(MetadataState { pool, number }) = self.metadata else { return path.to_owned() };
        let mark = if path.contains('?') { '&' } else { '?' };
        format!("{path}{mark}pool={pool}&number={number}")
    }
}

async fn reserve_regions(client: Ordering, reserve: &Reserve) -> Result<Answer, CallError> {
    let bytes = u64::from(reserve.count).saturating_mul(reserve.region_len.0);
    let gib = u32::try_from(bytes >> 30).unwrap_or(u32::MAX);
    let limit = LIMIT_PER_GIB.saturating_mul(gib).saturating_add(LIMIT).min(LIMIT_MAX);
    let regions = client.with_limit(limit).post("/v1/regions", reserve).await.map_err(failed)?;
    Ok(Answer::Regions(regions))
}

async fn commit_grant(
    client: &Ordering,
    id: GrantId,
    commit: &Commit,
    lose: bool,
) -> Result<Answer, CallError> {
    let query = if lose { "?lose=true" } else { "" };
    let grant: Grant = client.put(&format!("/v1/grants/{id}{query}"), commit).await.map_err(failed)?;
    match grant.epoch == commit.epoch && grant.regions == commit.regions {
        true => Ok(grant.lost.map_or(Answer::Done, |lost| Answer::Lost(lost.0))),
        false => Err(CallError::Failed("it made another grant than the requested one".to_owned())),
    }
}

async fn digest(client: &Ordering, path: &str, order: &impl Serialize) -> Result<Answer, CallError> {
    client.client.clone().with_limit(LIMIT_COPY).post(path, order).await.map(Answer::Digest).map_err(failed)
}

async fn revoke(client: &Ordering, id: GrantId) -> Result<(), CallError> {
    gone(client.delete(&format!("/v1/grants/{id}")).await)
}

async fn purge(client: &Ordering, allocation: AllocationId, grant: GrantId) -> Result<Answer, CallError> {
    for _ in 0..PURGE_ROUNDS_MAX {
        revoke(client, grant).await?;
        let mut regions: Vec<Region> = client.client.get("/v1/regions").await.map_err(failed)?;
        regions
            .retain(|region| region.allocation == Some(allocation) && region.state != RegionState::Clearing);
        if regions.is_empty() {
            return Ok(Answer::Done);
        }
        for region in regions.iter().filter(|region| region.state == RegionState::Reserved) {
            gone(client.delete(&format!("/v1/regions/{}", region.id)).await)?;
        }
    }
    Err(CallError::Failed("it still has regions of the allocation".to_owned()))
}

/// Deleting succeeds also if the object is gone already.
fn gone(result: Result<(), ClientError>) -> Result<(), CallError> {
    match result.map_err(failed) {
        Err(CallError::Refused(ErrorKind::NotFound, _)) => Ok(()),
        other => other,
    }
}

fn failed(error: ClientError) -> CallError {
    match error {
        // Abandoned or broken inside the appliance: the call may have been carried out.
        ClientError::Refused(body) if matches!(body.kind, ErrorKind::Internal | ErrorKind::Unavailable) => {
            CallError::Failed(body.error)
        }
        ClientError::Refused(body) => CallError::Refused(body.kind, body.error),
        other => CallError::Failed(error_line(&other)),
    }
}
