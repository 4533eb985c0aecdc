//! Elects the leader of several allocators: the leader is the allocator whose lease the leader's key is bound to.
//!
//! The leader renews its lease and checks that the key is still its own. It may answer requests as long as the last
//! check is recent; it stops a margin before the lease can run out. So an allocator that takes the key afterwards is
//! the only one that answers. The leader's writes do not depend on clocks: each write is conditional on the revision
//! at which its key was created ([`Term::revision`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, Error, GetResponse, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};

use super::{Etcd, EtcdError};

/// Key of the leader's URL.
pub(crate) const LEADER_KEY: &str = "leader";
/// Time to live of the leader's lease, in seconds.
const TTL_S: i64 = 3;
/// How long before its lease can run out the leader stops answering.
const MARGIN: Duration = Duration::from_millis(500);
/// How often the lease is renewed.
const RENEW_EVERY: Duration = Duration::from_millis(600);
/// How often followers look for the leader.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Time limit of a request of the election.
const LIMIT: Duration = Duration::from_secs(2);

/// An allocator that takes part in the election.
#[derive(Debug)]
pub struct Election {
    etcd: Etcd,
    url: String,
    lease: AtomicI64,
}

/// The state that a follower sees.
#[derive(Debug)]
pub enum Seen {
    /// The leader is at this URL.
    Leader(String),
    /// There is no leader now.
    Nobody,
    /// etcd did not answer.
    Trouble(EtcdError),
}

/// The period during which this allocator leads.
#[derive(Debug, Clone)]
pub struct Term {
    revision: i64,
    lease: i64,
    validity: Arc<Validity>,
}

/// Until when the lease cannot run out.
#[derive(Debug)]
struct Validity {
    since: Instant,
    until_ms: AtomicU64,
}

impl Validity {
    fn extend(&self, asked: Instant, ttl: Duration) {
        let until = asked.duration_since(self.since) + ttl.saturating_sub(MARGIN);
        self.until_ms.fetch_max(until.as_millis() as u64, Ordering::SeqCst);
    }

    /// How long the validity is over; none while it lasts.
    fn over_for(&self) -> Option<Duration> {
        let until = Duration::from_millis(self.until_ms.load(Ordering::SeqCst));
        self.since.elapsed().checked_sub(until)
    }
}

impl Term {
    /// The revision at which the leader's key was created: it identifies the term.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Whether this allocator may answer requests.
    pub fn holds(&self) -> bool {
        self.validity.over_for().is_none()
    }
}

impl Election {
    /// An allocator that others reach at this URL.
    pub fn new(etcd: Etcd, url: String) -> Election {
        Election { etcd, url, lease: AtomicI64::new(0) }
    }

    /// The cluster.
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// Waits until this allocator leads, and reports what it sees meanwhile.
    pub async fn campaign(&self, mut tell: impl FnMut(Seen)) -> Term {
        loop {
            match self.run().await {
                Ok(term) => return term,
                Err(seen) => tell(seen),
            }
        }
    }

    /// Tries once to become the leader. A failure is returned after a pause, so that the caller can simply call
    /// again.
    ///
    /// # Errors
    /// The leader, or why there is none.
    pub async fn run(&self) -> Result<Term, Seen> {
        let seen = match self.look().await {
            Ok(Some(url)) => Seen::Leader(url),
            Ok(None) => match self.stand().await {
                Ok(Some(term)) => return Ok(term),
                Ok(None) => Seen::Nobody,
                Err(error) => Seen::Trouble(error),
            },
            Err(error) => Seen::Trouble(error),
        };
        tokio::time::sleep(LOOK_EVERY).await;
        Err(seen)
    }

    /// Renews the term until it is over, and returns the reason. While etcd is silent the term may go on: only etcd
    /// knows.
    pub async fn keep(&self, term: &Term) -> String {
        let mut silent = false;
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            let asked = Instant::now();
            match self.renew(term).await {
                Ok(true) => {
                    term.validity.extend(asked, ttl());
                    if std::mem::take(&mut silent) {
                        tracing::info!("etcd answers again, and this allocator leads as before");
                    }
                }
                Ok(false) => return "another allocator took over".to_owned(),
                Err(error @ EtcdError::Refused { .. }) => return xpm_control::error_line(&error),
                Err(error) => {
                    if !std::mem::replace(&mut silent, true) {
                        let line = xpm_control::error_line(&error);
                        tracing::warn!("waits for etcd: the lease cannot be renewed: {line}");
                    }
                }
            }
        }
    }

    /// Gives the leadership back, if this allocator has it, so that another allocator need not wait for the lease to
    /// run out.
    pub async fn resign(&self) {
        let lease = self.lease.swap(0, Ordering::SeqCst);
        if lease != 0 {
            let revoked =
                self.etcd.ask(LIMIT, async |mut member: Client| member.lease_revoke(lease).await).await;
            if let Err(error) = revoked {
                tracing::debug!("the lease runs out by itself: {}", xpm_control::error_line(&error));
            }
        }
    }

    /// The leader's URL.
    async fn look(&self) -> Result<Option<String>, EtcdError> {
        let found = self.leader().await?;
        Ok(found.kvs().first().map(|entry| String::from_utf8_lossy(entry.value()).into_owned()))
    }

    async fn leader(&self) -> Result<GetResponse, EtcdError> {
        let key = self.etcd.key(LEADER_KEY);
        self.etcd.ask(LIMIT, async |mut member: Client| member.get(key.as_str(), None).await).await
    }

    /// Takes the leader's key if no allocator has it.
    async fn stand(&self) -> Result<Option<Term>, EtcdError> {
        let since = Instant::now();
        let granted =
            self.etcd.ask(LIMIT, async |mut member: Client| member.lease_grant(TTL_S, None).await).await?;
        let lease = granted.id();
        self.lease.store(lease, Ordering::SeqCst);
        let key = self.etcd.key(LEADER_KEY);
        let take = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(
                key.as_str(),
                self.url.as_str(),
                Some(PutOptions::new().with_lease(lease)),
            )])
            .or_else([TxnOp::get(key.as_str(), None)]);
        let taken = self.etcd.ask(LIMIT, async |mut member: Client| member.txn(take.clone()).await).await;
        let Some(revision) = taken.as_ref().ok().and_then(|answer| revision_of(answer, lease)) else {
            self.resign().await;
            return taken.map(|_| None);
        };
        let validity = Arc::new(Validity { since, until_ms: AtomicU64::new(0) });
        validity.extend(since, ttl());
        Ok(Some(Term { revision, lease, validity }))
    }

    /// Renews the lease, and returns whether the key is still this term's.
    async fn renew(&self, term: &Term) -> Result<bool, EtcdError> {
        let renewed = self
            .etcd
            .ask(LIMIT, async |mut member: Client| member.lease_keep_alive(term.lease).await.map(drop))
            .await;
        match renewed {
            Err(EtcdError::Refused { source: Error::LeaseKeepAliveError(_), .. }) => return Ok(false),
            other => other?,
        }
        let found = self.leader().await?;
        Ok(found.kvs().first().is_some_and(|entry| entry.create_revision() == term.revision))
    }
}

fn ttl() -> Duration {
    Duration::from_secs(TTL_S.unsigned_abs())
}

/// The revision of the leader's key if this lease holds it, from this attempt or from an earlier one that seemed to
/// fail.
fn revision_of(answer: &TxnResponse, lease: i64) -> Option<i64> {
    if answer.succeeded() {
        return answer.header().map(etcd_client::ResponseHeader::revision);
    }
    let responses = answer.op_responses();
    let Some(TxnOpResponse::Get(found)) = responses.first() else { return None };
    found.kvs().first().filter(|entry| entry.lease() == lease).map(etcd_client::KeyValue::create_revision)
}
