//! Runs one of several allocators. Only the leader has a service; the others answer every request with the leader's
//! URL.
//!
//! The service is dropped when the term ends, for whatever reason; a new leader loads everything from the store. So
//! an allocator that lost the leadership becomes a follower in the same process. Its calls to appliances that are
//! still under way do no harm: their intents were durable before they were sent, and the next leader
//! settles them as after a crash.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use xpm_control::server::{Duty, Office};
use xpm_control::token::Token;

use crate::driver::{self, Driver, Handle};
use crate::etcd::{Compactor, Election, Seen, Term};
use crate::server;
use crate::service::Settings;
use crate::store::StoreError;
use crate::store::etcd::{EtcdStore, ReadOnly};

/// Pause after a term that ended by a fault, so that another allocator can try.
const PAUSE: Duration = Duration::from_millis(500);

/// An allocator that takes turns as follower and leader.
pub(crate) struct Candidate {
    pub(crate) settings: Settings,
    pub(crate) token: Option<Token>,
    pub(crate) office: Office,
    pub(crate) election: Arc<Election>,
    pub(crate) url: String,
    /// Interval at which etcd's history is compacted.
    pub(crate) compact_every: Duration,
}

/// Result of a term.
enum Ended {
    /// This allocator may lead again later.
    Over(String),
    /// This allocator is unfit to lead.
    Unfit(anyhow::Error),
}

impl Candidate {
    /// Follows and leads by turns. Returns only when this allocator is unfit to lead, with the reason.
    pub(crate) async fn run(self) -> anyhow::Error {
        let compactor = Compactor::new(self.election.etcd().clone(), self.compact_every);
        tokio::select! {
            error = self.follow_and_lead() => error,
            () = compactor.run() => unreachable!("it compacts for ever"),
        }
    }

    async fn follow_and_lead(&self) -> anyhow::Error {
        loop {
            let term = self.follow().await;
            tracing::info!("leads the allocators, term {}", term.revision());
            let ended = tokio::select! {
                ended = self.lead(&term) => ended,
                reason = self.election.keep(&term) => Ended::Over(reason),
            };
            let waits = |reason: &String| Duty::Wait(format!("this allocator leads no more: {reason}"));
            self.office.set(match &ended {
                Ended::Over(reason) => waits(reason),
                Ended::Unfit(_) => Duty::Follow(None),
            });
            self.election.resign().await;
            match ended {
                Ended::Over(reason) => tracing::warn!("leads no more: {reason}"),
                Ended::Unfit(error) => return error,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits until this allocator leads.
    async fn follow(&self) -> Term {
        let mut known = None;
        let mut reading = None;
        loop {
            let seen = match self.election.run().await {
                Ok(term) => return term,
                Err(seen) => seen,
            };
            if let Seen::Trouble(error) = &seen
                && let Some(why) = error.full()
            {
                if reading.is_none() {
                    reading = self.read_only(&why).await;
                }
                continue;
            }
            reading = None;
            // The error text of etcd may differ with each attempt, so only its kind is compared.
            let kind = std::mem::discriminant(&seen);
            let (line, leader, duty) = self.describe(seen);
            if known.as_ref() != Some(&(kind, leader.clone())) {
                tracing::info!("{line}");
                known = Some((kind, leader));
            }
            self.office.set(duty);
        }
    }

    /// etcd has no room, so no leader can be elected: this allocator answers from the stored state and changes
    /// nothing.
    async fn read_only(&self, why: &str) -> Option<Driver> {
        tracing::error!("{why}");
        let (settings, token, etcd) = (self.settings, self.token.clone(), self.election.etcd().clone());
        let why = why.to_owned();
        let start = move || driver::start(settings, token, ReadOnly::new(etcd, &Runtime::current(), why));
        let started = tokio::task::spawn_blocking(start).await.map_err(anyhow::Error::from).flatten();
        match started {
            Ok((handle, driver)) => {
                self.office.set(Duty::Lead { routes: server::all_routes(handle), holds: Arc::new(|| true) });
                Some(driver)
            }
            Err(error) => {
                self.office.set(Duty::Wait(format!("{error:#}")));
                None
            }
        }
    }

    /// Describes what was seen in a line, with the URL to send requests to. If the leader's key has our own URL, it
    /// is left from our earlier process and will run out.
    fn describe(&self, seen: Seen) -> (String, Option<String>, Duty) {
        let none = |line: String| (line, None, Duty::Follow(None));
        match seen {
            Seen::Leader(url) if url == self.url => {
                none("waits for its own last lease to run out".to_owned())
            }
            Seen::Leader(url) => {
                (format!("follows the allocator at {url}"), Some(url.clone()), Duty::Follow(Some(url)))
            }
            Seen::Nobody => none("no allocator leads".to_owned()),
            Seen::Trouble(error) => {
                let line = format!("this allocator waits for etcd: {}", xpm_control::error_line(&error));
                (line.clone(), None, Duty::Wait(line))
            }
        }
    }

    /// Serves until it cannot go on.
    async fn lead(&self, term: &Term) -> Ended {
        let driver = match self.start(term).await {
            Ok((handle, driver)) => {
                let holds = {
                    let term = term.clone();
                    move || term.holds()
                };
                self.office.set(Duty::Lead { routes: server::all_routes(handle), holds: Arc::new(holds) });
                driver
            }
            Err(error) => return ended(error),
        };
        ended(driver.failed().await)
    }

    /// Loads everything, in a thread of its own because reading blocks.
    async fn start(&self, term: &Term) -> anyhow::Result<(Handle, Driver)> {
        let (settings, token) = (self.settings, self.token.clone());
        let (etcd, revision) = (self.election.etcd().clone(), term.revision());
        let start = move || {
            let store = EtcdStore::open(etcd, revision, &Runtime::current())?;
            driver::start(settings, token, store)
        };
        tokio::task::spawn_blocking(start).await?
    }
}

/// Whether this allocator may try again after the error.
fn ended(error: anyhow::Error) -> Ended {
    match error.downcast_ref::<StoreError>() {
        Some(StoreError::Etcd { .. } | StoreError::Deposed { .. } | StoreError::Full { .. }) => {
            Ended::Over(format!("{error:#}"))
        }
        _ => Ended::Unfit(error),
    }
}
