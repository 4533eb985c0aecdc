//! The allocator: it knows the appliances, decides which of them serve an allocation, and
//! remembers. Nothing on the data path ever waits for it.
//!
//! A request walks `server` (HTTP) -> `driver` (the one task that owns the service) ->
//! [`service`] (decisions, no I/O) -> [`strategy`] (pure) and back out as effects, which the
//! driver carries out: [`store`] makes changes durable, `appliances` calls the appliances.

#![forbid(unsafe_code)]

mod appliances;
pub mod config;
mod driver;
pub mod inventory;
pub mod policy;
mod server;
pub mod service;
pub mod store;
pub mod strategy;
#[cfg(test)]
mod testing;
pub mod usage;

use anyhow::Context as _;
use xpm_control::shutdown::Shutdown;

use crate::config::Config;

/// Runs the allocator until a signal ends it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let mut shutdown = Shutdown::catch().context("cannot catch signals")?;
    let token = config.token()?;
    config.listen.check_exposure(token.is_some(), config.insecure)?;
    let store = store::redb::RedbStore::open(&config.data)?;
    let listener = config.listen.bind()?;
    let place = listener.address().map_or_else(|| config.listen.to_string(), |address| address.to_string());
    let (handle, driver) = driver::start(config.settings(), token.clone(), store)?;
    tracing::info!(
        "xpm-allocator {} listens at {place}, data in {}",
        env!("CARGO_PKG_VERSION"),
        config.data.display()
    );
    let stop = async {
        let signal = shutdown.signalled().await;
        tracing::info!("{signal}: ending");
    };
    let serve = server::scaffold(handle, token).serve(listener, stop);
    tokio::select! {
        () = serve => Ok(()),
        error = driver.failed() => Err(error),
    }
}
