//! Client of etcd: requests to a cluster of which some members may be down, the election of one leader among several
//! allocators, and the compaction of history.

mod address;
mod compaction;
mod election;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error};

pub use address::{Address, ParseAddressError};
pub(crate) use compaction::Compactor;
pub(crate) use election::LEADER_KEY;
pub use election::{Election, Seen, Term};

/// Time limit of one member, before the next one is asked.
const TRY_LIMIT: Duration = Duration::from_millis(800);
/// Pause after a member that did not answer.
const PAUSE: Duration = Duration::from_millis(50);
/// gRPC code with which etcd reports that it has no room.
const RESOURCE_EXHAUSTED: i32 = 8;
/// gRPC codes that every member would return: the request itself is at fault.
const FINAL_CODES: [i32; 7] = [3, 5, 7, 8, 9, 12, 16];

/// A cluster. Cheap to clone.
#[derive(Clone)]
pub struct Etcd {
    address: Arc<Address>,
    members: Arc<[Client]>,
    preferred: Arc<AtomicUsize>,
}

/// Why etcd did not carry out a request.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The address cannot be used.
    #[error("cannot use {store}")]
    Address {
        /// The address.
        store: String,
        /// Why.
        source: Error,
    },
    /// No member answered in time. Whether the request was carried out is unknown.
    #[error(
        "no member of {store} answered within {limit:?} ({last}); check that most of them run and can be reached"
    )]
    Silent {
        /// The address.
        store: String,
        /// The time.
        limit: Duration,
        /// Error of the last attempt.
        last: String,
    },
    /// etcd refused the request.
    #[error("{store} refused")]
    Refused {
        /// The address.
        store: String,
        /// Why.
        source: Error,
    },
}

impl EtcdError {
    /// Whether a later request may succeed: nothing was refused.
    pub fn is_silent(&self) -> bool {
        matches!(self, EtcdError::Silent { .. })
    }

    /// If etcd has no room left (its alarm NOSPACE): the reason to show.
    pub fn full(&self) -> Option<String> {
        let EtcdError::Refused { store, source: Error::GRpcStatus(status) } = self else { return None };
        let full = i32::from(status.code()) == RESOURCE_EXHAUSTED && status.message().contains("space");
        full.then(|| {
            format!(
                "{store} has no room left (alarm NOSPACE): the allocator answers and changes nothing until there is; run `etcdctl \
                 compact --physical REVISION`, `etcdctl defrag` and `etcdctl alarm disarm`, or give etcd a larger --quota-backend-bytes"
            )
        })
    }
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Etcd").field(&self.address).finish()
    }
}

impl Etcd {
    /// A client of the members at this address. Sends nothing yet; must be called within a runtime.
    pub async fn new(address: Address) -> Result<Etcd, EtcdError> {
        let mut members = Vec::new();
        for url in address.urls() {
            let options = ConnectOptions::new().with_connect_timeout(TRY_LIMIT).with_require_leader(true);
            let member = Client::connect([url], Some(options)).await;
            members.push(member.map_err(|source| EtcdError::Address { store: address.to_string(), source })?);
        }
        Ok(Etcd { address: Arc::new(address), members: members.into(), preferred: Arc::default() })
    }

    /// The address of the cluster in its written form.
    pub fn store(&self) -> String {
        self.address.to_string()
    }

    /// The full key of this name.
    pub fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.address.prefix())
    }

    /// Asks one member after the other until one answers or the time is over. The request may be carried out more
    /// than once, and late.
    pub(crate) async fn ask<T>(
        &self,
        limit: Duration,
        request: impl AsyncFn(Client) -> Result<T, Error>,
    ) -> Result<T, EtcdError> {
        let begun = Instant::now();
        loop {
            let number = self.preferred.load(Ordering::Relaxed);
            let member = self.members[number % self.members.len()].clone();
            let left = limit.saturating_sub(begun.elapsed()).min(TRY_LIMIT);
            let last = match tokio::time::timeout(left, request(member)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(source)) if is_final(&source) => {
                    return Err(EtcdError::Refused { store: self.store(), source });
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it takes too long".to_owned(),
            };
            self.preferred.store(number.wrapping_add(1), Ordering::Relaxed);
            if begun.elapsed() + PAUSE >= limit {
                return Err(EtcdError::Silent { store: self.store(), limit, last });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether every member would return this error.
fn is_final(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => FINAL_CODES.contains(&i32::from(status.code())),
        Error::TransportError(_) | Error::IoError(_) | Error::WatchError(_) => false,
        _ => true,
    }
}
