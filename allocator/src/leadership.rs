//! One of several allocators leads: it alone has a service. The others answer every request with
//! where the leader is.
//!
//! What a leader knows is dropped when its term ends, however that comes about; a new leader loads
//! all of it. So an allocator that lost its office goes on as one that follows, in the same process.
//! What it asked of appliances and is still on its way does no harm: it was durable before it was
//! asked, as after a crash.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use xpm_control::server::{Duty, Office};
use xpm_control::token::Token;

use crate::driver::{self, Driver, Handle};
use crate::etcd::{Election, Seen, Term};
use crate::server;
use crate::service::Settings;
use crate::store::StoreError;
use crate::store::etcd::EtcdStore;

/// Pause after a term that ended by a fault, so that another allocator can try.
const PAUSE: Duration = Duration::from_secs(1);

/// An allocator that leads at times.
pub(crate) struct Candidate {
    pub(crate) settings: Settings,
    pub(crate) token: Option<Token>,
    pub(crate) office: Office,
    pub(crate) election: Arc<Election>,
    pub(crate) url: String,
}

/// Why a term ended.
enum Ended {
    /// This allocator may lead again later.
    Over(String),
    /// It cannot lead.
    Unfit(anyhow::Error),
}

impl Candidate {
    /// Follows and leads by turns. Resolves only when this allocator is unfit to lead, with the reason.
    pub(crate) async fn run(self) -> anyhow::Error {
        loop {
            let term = self.follow().await;
            tracing::info!("leads the allocators, term {}", term.revision());
            let ended = tokio::select! {
                ended = self.lead(&term) => ended,
                reason = self.election.keep(&term) => Ended::Over(reason),
            };
            self.office.set(Duty::Follow(None));
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
        let tell = |seen| {
            // What etcd's trouble is may differ with each try.
            let kind = std::mem::discriminant(&seen);
            let (line, leader) = self.describe(seen);
            if known.as_ref() != Some(&(kind, leader.clone())) {
                tracing::info!("{line}");
                known = Some((kind, leader.clone()));
            }
            self.office.set(Duty::Follow(leader));
        };
        self.election.campaign(tell).await
    }

    /// What is seen in a line, and where requests are sent. A key with this one's own URL is of its
    /// last life and runs out.
    fn describe(&self, seen: Seen) -> (String, Option<String>) {
        match seen {
            Seen::Leader(url) if url == self.url => {
                ("waits for its own last lease to run out".to_owned(), None)
            }
            Seen::Leader(url) => (format!("follows the allocator at {url}"), Some(url)),
            Seen::Nobody => ("no allocator leads".to_owned(), None),
            Seen::Trouble(error) => (format!("follows nobody: {}", xpm_control::error_line(&error)), None),
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

    /// Loads everything; reading blocks, so a thread of its own does it.
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
        Some(StoreError::Etcd { .. } | StoreError::Deposed { .. }) => Ended::Over(format!("{error:#}")),
        _ => Ended::Unfit(error),
    }
}
