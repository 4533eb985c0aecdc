//! The allocator: it knows the appliances, decides which of them serve an allocation, and keeps the records. Nothing
//! on the data path ever waits for it.
//!
//! A request walks `server` (HTTP) -> `driver` (the one task that owns the service) -> [`service`] (decisions, no
//! I/O) -> [`strategy`] (pure) and back out as effects. The driver carries these out: [`store`] makes changes
//! durable, `appliances` calls the appliances. With several allocators, `leadership` starts the driver when [`etcd`]
//! elects this one, and drops it when the term ends.

#![forbid(unsafe_code)]

mod appliances;
pub mod config;
mod driver;
pub mod etcd;
pub mod inventory;
mod leadership;
pub mod policy;
pub mod recover;
mod server;
pub mod service;
pub mod store;
pub mod strategy;
mod task;
#[cfg(test)]
mod testing;
pub mod usage;

use std::sync::Arc;

use anyhow::Context as _;
use xpm_control::discover::{self, Announcement};
use xpm_control::listen::{Listener, Place};
use xpm_control::manager::{Manager, prove_alive};
use xpm_control::random;
use xpm_control::server::{Office, answers};
use xpm_control::shutdown::{Shutdown, end_in_time};
use xpm_control::token::Token;

use crate::config::{Config, Storage};
use crate::etcd::{Address, Election, Etcd};
use crate::leadership::Candidate;

/// Request by which the watchdog checks that the service is alive.
const STATUS: &str = "/v1/status";

/// Runs the allocator until a signal ends it, or does the one task that it was started for.
pub async fn run(config: Config) -> anyhow::Result<()> {
    if let Some(task) = &config.task {
        return task::carry_out(task, &config).await;
    }
    let shutdown = Shutdown::catch().context("cannot catch signals")?;
    let manager = Manager::from_environment();
    let token = config.token()?;
    config.listen.check_exposure(token.is_some(), config.insecure)?;
    match &config.storage {
        Storage::Data(directory) => {
            let store = store::redb::RedbStore::open(directory)?;
            let listener = config.listen.bind()?;
            let (handle, driver) = driver::start(config.settings(), token.clone(), store)?;
            announce(&config, &listener, &format!("data in {}", directory.display()));
            let _announcement = announced(&config, &own_url(&config, None, &listener))?;
            ready(manager.as_ref(), "Decides and remembers");
            let proof = || answers(server::all_routes(handle.clone()), STATUS);
            tokio::select! {
                () = server::scaffold(handle.clone(), token)
                    .serve(listener, told_to_end(shutdown, manager.as_ref())) => Ok(()),
                error = driver.failed() => Err(error),
                () = prove_alive(manager.as_ref(), proof) => Ok(()),
            }
        }
        Storage::Etcd { address, advertise } => {
            let told = told_to_end(shutdown, manager.as_ref());
            run_as_one_of_several(&config, address, advertise.as_deref(), token, (told, manager.as_ref()))
                .await
        }
    }
}

async fn run_as_one_of_several(
    config: &Config,
    address: &Address,
    advertise: Option<&str>,
    token: Option<Token>,
    (told_to_end, manager): (impl Future<Output = ()>, Option<&Manager>),
) -> anyhow::Result<()> {
    let listener = config.listen.bind()?;
    let url = own_url(config, advertise, &listener);
    let _announcement = announced(config, &url)?;
    let election = Arc::new(Election::new(Etcd::new(address.clone()).await?, url.clone()));
    let office = Office::new();
    let server = server::with_office(&office, token.clone());
    let asked = office.clone();
    let candidate = Candidate {
        settings: config.settings(),
        token,
        office,
        election: Arc::clone(&election),
        url,
        compact_every: config.compact_every,
    };
    announce(config, &listener, &format!("metadata in {address}"));
    ready(manager, "One of several allocators");
    let ended = tokio::select! {
        () = server.serve(listener, told_to_end) => Ok(()),
        error = candidate.run() => Err(error),
        () = prove_alive(manager, || asked.answers(STATUS)) => Ok(()),
    };
    election.resign().await;
    ended
}

/// The URL by which others reach this allocator.
fn own_url(config: &Config, advertise: Option<&str>, listener: &Listener) -> String {
    match (advertise, listener.address()) {
        (Some(url), _) => url.to_owned(),
        (None, Some(address)) => format!("http://{address}"),
        (None, None) => config.listen.to_string(),
    }
}

/// Announces the URL by multicast DNS, if configured.
fn announced(config: &Config, url: &str) -> anyhow::Result<Option<Announcement>> {
    let Some(group) = &config.announce else { return Ok(None) };
    let Place::Tcp(address) = &config.listen else {
        anyhow::bail!("--announce is for an allocator that others can reach: give --listen ADDRESS:PORT");
    };
    anyhow::ensure!(
        !url.contains("//0.0.0.0") && !url.contains("//[::]"),
        "other machines cannot reach this allocator at {url}: give --listen with one of this machine's addresses"
    );
    let announcement = discover::announce(url, address.port(), group, random::u128()?);
    announcement.map(Some).context("--announce")
}

fn announce(config: &Config, listener: &Listener, metadata: &str) {
    let place = listener.address().map_or_else(|| config.listen.to_string(), |address| address.to_string());
    tracing::info!("xpm-allocator {} listens at {place}, {metadata}", env!("CARGO_PKG_VERSION"));
}

async fn told_to_end(mut shutdown: Shutdown, manager: Option<&Manager>) {
    let signal = shutdown.signalled().await;
    tracing::info!("{signal}: ending");
    end_in_time();
    if let Some(manager) = manager {
        manager.stopping();
    }
}

fn ready(manager: Option<&Manager>, status: &str) {
    if let Some(manager) = manager {
        manager.ready(status);
    }
}
