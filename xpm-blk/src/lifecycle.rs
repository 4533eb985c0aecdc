//! The life of the process: made safe for swap, started, and ended without taking a device away
//! from its users.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use xpm_client::owner::Owner;
use xpm_control::client::Client;
use xpm_control::listen::{Listener, Place};
use xpm_control::manager::{Manager, prove_alive};
use xpm_control::server::{Limits, Server as ControlServer, answers};
use xpm_control::shutdown::Shutdown;
use xpm_control::token::Token;
use xpm_control::{error_line, host, random};
use xpm_protocol::api::ErrorKind;
use xpm_safety as safety;
use xpm_transport::nbd::server::{Server, ServerOptions};

use crate::config::Config;
use crate::control;
use crate::daemon::{Daemon, Parts, lookout};
use crate::error::{DeviceError, Step};
use crate::frontend::ublk;
use crate::records::Records;

/// Stack of a thread of the data plane, in bytes; all of it is locked.
pub(crate) const STACK_LEN: usize = 256 << 10;
/// Stack of a thread of the control plane, in bytes.
const CONTROL_STACK_LEN: usize = 1 << 20;
/// Threads for control work that blocks: one device whose start waits must not stop the others.
const BLOCKING_THREADS_MAX: usize = 32;
/// How long a device may take to be opened before it counts as one that holds its I/O.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// How long a request waits where there are several allocators and none leads.
const LEADER_LIMIT: Duration = Duration::from_secs(8);
/// How often the users of devices are looked at while the process waits for them to end.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs the daemon until it is told to end. Must be called while the process has one thread.
///
/// # Errors
/// Why it cannot start, in one line.
pub fn run(config: Config) -> Result<(), DeviceError> {
    config.check().map_err(|error| DeviceError::new(ErrorKind::Invalid, error))?;
    safety::set_up("xpm-blk");
    if let Some(missing) = safety::missing(&safety::items()) {
        tracing::warn!("not safe for swap: {missing}");
    }
    let runtime = runtime().at("start the control plane")?;
    runtime.block_on(serve(config))
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_stack_size(CONTROL_STACK_LEN)
        .thread_name("xpm-control")
        .enable_all()
        .build()
}

async fn serve(config: Config) -> Result<(), DeviceError> {
    let mut shutdown = Shutdown::catch().at("catch signals")?;
    let manager = Manager::from_environment();
    let listener = listen(&config.control)?;
    let stop_limit = config.stop_limit.0;
    let daemon = Arc::new(Daemon::new(parts(config)?));
    ublk::remove_orphans().iter().for_each(|line| tracing::warn!("{line}"));
    daemon.restore()?;
    let lookout = tokio::spawn(lookout::run(Arc::clone(&daemon)));
    let follower = tokio::spawn(lookout::follow(Arc::clone(&daemon)));
    let routes = control::routes(Arc::clone(&daemon));
    let server = ControlServer::new(routes.clone(), None, Limits::default());
    tracing::info!("xpm-blk {} is ready", env!("CARGO_PKG_VERSION"));
    if let Some(manager) = &manager {
        manager.ready("Shows external memory as block devices");
    }
    tokio::select! {
        () = server.serve(listener, end(&daemon, &mut shutdown, stop_limit, manager.as_ref())) => {}
        () = prove_alive(manager.as_ref(), || answers(routes.clone(), "/v1/status")) => {}
    }
    lookout.abort();
    follower.abort();
    let work = tokio::task::spawn_blocking(move || daemon.take_all_away());
    if work.await.is_err() {
        tracing::error!("some devices could not be taken away");
    }
    Ok(())
}

fn listen(control: &Path) -> Result<Listener, DeviceError> {
    if let Some(directory) = control.parent() {
        std::fs::create_dir_all(directory).at(format!("make {}", directory.display()))?;
    }
    Place::Unix(control.to_owned())
        .bind()
        .map_err(|error| DeviceError::new(ErrorKind::Conflict, error_line(&error)))
}

fn parts(config: Config) -> Result<Parts, DeviceError> {
    let invalid = |line: String| DeviceError::new(ErrorKind::Invalid, line);
    let token = config.token_file.as_deref().map(Token::load).transpose();
    let token = token.map_err(|error| invalid(error_line(&error)))?;
    let allocator =
        Client::one_of(&config.allocator, token.clone()).map_err(|error| invalid(error_line(&error)))?;
    let records = Records::open(&config.state)?;
    let client = records.client_id(random::u128().at("make a client id")?)?;
    let server = Server::start(ServerOptions {
        name: "xpm-nbd",
        loops: usize::from(config.threads()),
        spin: config.spin(),
        buffers_len: config.buffer.0 as usize,
        ..ServerOptions::default()
    })
    .at("start the threads for NBD sockets")?;
    let owner = Owner {
        client,
        host: host::host_id().at("find out which kernel this is")?,
        host_name: host::host_name().at("find out the host's name")?,
        allocator: allocator.with_patience(LEADER_LIMIT),
        token,
    };
    Ok(Parts { owner, records, server, config })
}

/// Resolves when the process may end: told so, and nobody uses a device that it serves; or told so
/// a second time, `limit` or more after the first.
async fn end(daemon: &Arc<Daemon>, shutdown: &mut Shutdown, limit: Duration, manager: Option<&Manager>) {
    let signal = shutdown.signalled().await;
    if let Some(manager) = manager {
        manager.stopping();
    }
    let told = Instant::now();
    let mut said = Vec::new();
    loop {
        let in_use = in_use(daemon).await;
        if in_use.is_empty() {
            return;
        }
        if in_use != said {
            tracing::warn!(
                "{signal}: not ending while devices are in use ({}); free them, or signal again after {limit:?} to end in \
                 spite of them",
                in_use.join("; ")
            );
            if let Some(manager) = manager {
                manager.status(&format!("Told to end; waits until nobody uses {}", in_use.join("; ")));
            }
            said = in_use;
        }
        tokio::select! {
            _ = shutdown.signalled() => if told.elapsed() >= limit {
                tracing::error!("{signal} again: ending although devices are in use");
                return;
            },
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

async fn in_use(daemon: &Arc<Daemon>) -> Vec<String> {
    let daemon = Arc::clone(daemon);
    let look = tokio::task::spawn_blocking(move || daemon.in_use());
    match tokio::time::timeout(OPEN_LIMIT, look).await {
        Ok(Ok(in_use)) => in_use,
        Ok(Err(_)) | Err(_) => vec!["a device does not answer, so its users are not known".to_owned()],
    }
}
