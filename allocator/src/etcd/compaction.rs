//! Compacts etcd's history: etcd keeps every earlier value of a key until it is compacted, and an allocator never
//! reads earlier values.
//!
//! So every allocator on an etcd cluster compacts, every few minutes, the history older than that, by the method of
//! the API server of Kubernetes: a key holds the revision up to which the next compaction goes, and the allocator
//! that is first to change this key compacts. A compaction covers the whole cluster, including the keys of other
//! programs.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp, TxnOpResponse};

use super::{Etcd, EtcdError};

/// Key of the revision up to which the next compaction goes. Its version counts compactions.
const KEY: &str = "compaction";
/// Time limit of a request.
const LIMIT: Duration = Duration::from_secs(5);

/// Compacts from time to time.
#[derive(Debug)]
pub(crate) struct Compactor {
    etcd: Etcd,
    every: Duration,
    /// Version of the key at the last turn, and the revision of etcd then.
    seen: (i64, i64),
}

impl Compactor {
    pub(crate) fn new(etcd: Etcd, every: Duration) -> Compactor {
        Compactor { etcd, every, seen: (0, 0) }
    }

    /// Compacts at intervals, for ever.
    pub(crate) async fn run(mut self) {
        loop {
            tokio::time::sleep(self.every).await;
            if let Err(error) = self.turn().await {
                tracing::debug!("etcd is not compacted: {}", xpm_control::error_line(&error));
            }
        }
    }

    async fn turn(&mut self) -> Result<(), EtcdError> {
        let (version, revision) = self.seen;
        let key = self.etcd.key(KEY);
        let take = Txn::new()
            .when([Compare::version(key.as_str(), CompareOp::Equal, version)])
            .and_then([TxnOp::put(key.as_str(), revision.to_string(), None)])
            .or_else([TxnOp::get(key.as_str(), None::<GetOptions>)]);
        let taken = self.etcd.ask(LIMIT, async |mut member: Client| member.txn(take.clone()).await).await;
        let taken = match taken {
            Ok(taken) => taken,
            // Without room the key cannot be changed. Compacting twice does no harm.
            Err(error) if error.full().is_some() && revision > 0 => return self.compact(revision).await,
            Err(error) => return Err(error),
        };
        let now = taken.header().map_or(revision, etcd_client::ResponseHeader::revision);
        if taken.succeeded() {
            self.seen = (version + 1, now);
            return match revision {
                // The first turn of this allocator.
                0 => Ok(()),
                revision => self.compact(revision).await,
            };
        }
        let responses = taken.op_responses();
        let found = match responses.first() {
            Some(TxnOpResponse::Get(found)) => found.kvs().first().map(etcd_client::KeyValue::version),
            _ => None,
        };
        // Another allocator was first; or it is the first turn.
        self.seen = (found.unwrap_or(0), now);
        Ok(())
    }

    async fn compact(&self, revision: i64) -> Result<(), EtcdError> {
        let done =
            self.etcd.ask(LIMIT, async |mut member: Client| member.compact(revision, None).await).await;
        match done {
            Ok(_) => tracing::debug!("etcd has forgotten what was before revision {revision}"),
            // Another allocator compacted already.
            Err(EtcdError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
