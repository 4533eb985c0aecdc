//! The life of the process: it is made fit for a lack of memory, started, and ended with every area left on,
//! or off if the machine shuts down.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_blocking};
use xpm_control::client::Client;
use xpm_control::listen::{Listener, Place};
use xpm_control::manager::{Manager, machine_stops, prove_alive};
use xpm_control::server::{Limits, Server, answers};
use xpm_control::shutdown::{Shutdown, end_in_time};
use xpm_control::token::Token;
use xpm_control::{error_line, facts, host};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;

use crate::config::Config;
use crate::control;
use crate::engine::{Daemon, Parts};
use crate::error::{Error, Step as _};
use crate::os::hand::Hand;
use crate::os::pressure::Watch;
use crate::state::Store;

/// Stack of a thread, in bytes; all of it is locked.
const STACK_LEN: usize = 512 << 10;
/// Threads for blocking work: an area's header, the last resort, and one more of each that hangs.
const BLOCKING_THREADS_MAX: usize = 8;
/// Idle threads stay, because there may be no memory for new ones when they are needed.
const KEEP_ALIVE: Duration = Duration::from_secs(u32::MAX as u64);
/// How long a request waits when none of several allocators leads.
const LEADER_LIMIT: Duration = Duration::from_secs(8);
/// Interval of reporting the status to the service manager.
const TELL_EVERY: Duration = Duration::from_secs(15);
/// Longest part of a host's name in the names of areas.
const HOST_LEN_MAX: usize = Name::LEN_MAX - "swap--9999".len();

/// Runs the daemon until it is told to end. Must be called while the process has one thread.
///
/// # Errors
/// Why it cannot start, in one line.
pub fn run(config: Config) -> Result<(), Error> {
    config.check().map_err(|error| Error::new(ErrorKind::Invalid, error))?;
    xpm_safety::set_up_keeper("xpm-swapd");
    if let Some(missing) = xpm_safety::missing(&xpm_safety::keeper_items()) {
        tracing::warn!("not fit for the moment when there is no memory: {missing}");
    }
    let hand = Hand::start().at("start the process for swapoff")?;
    let runtime = runtime().at("start the runtime")?;
    runtime.block_on(serve(config, hand))
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(KEEP_ALIVE)
        .thread_stack_size(STACK_LEN)
        .thread_name("xpm-swapd")
        .enable_all()
        .build()
}

async fn serve(config: Config, hand: Hand) -> Result<(), Error> {
    let mut shutdown = Shutdown::catch().at("catch signals")?;
    let manager = Manager::from_environment();
    let store = Store::open(&config.state)?;
    let listener = listen(&config.control)?;
    let daemon = Arc::new(Daemon::new(parts(config, store, hand)?));
    daemon.settle()?;
    let routes = control::routes(Arc::clone(&daemon));
    let server = Server::new(routes.clone(), None, Limits::default());
    let working = [tokio::spawn(Arc::clone(&daemon).run()), tokio::spawn(Arc::clone(&daemon).listen())];
    tracing::info!("xpm-swapd {} is ready", env!("CARGO_PKG_VERSION"));
    if let Some(manager) = &manager {
        manager.ready("Looks after swap on external memory");
    }
    let end = async {
        let signal = shutdown.signalled().await;
        tracing::info!("{signal}: ending");
        manager.iter().for_each(Manager::stopping);
    };
    tokio::select! {
        () = server.serve(listener, end) => {}
        () = prove_alive(manager.as_ref(), || answers(routes.clone(), "/v1/status")) => {}
        () = tell(&daemon, manager.as_ref()) => {}
    }
    working.iter().for_each(JoinHandle::abort);
    let stops = manager.is_some() && spawn_blocking(machine_stops).await.unwrap_or_default();
    if stops {
        tracing::info!("the machine goes down: turning swap off, so that its servers can end");
        daemon.turn_all_off().await;
    } else {
        end_in_time();
        tracing::info!("swap stays on");
    }
    Ok(())
}

/// Reports the status as long as there is a service manager. Never ends.
async fn tell(daemon: &Daemon, manager: Option<&Manager>) {
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        manager.iter().for_each(|manager| manager.status(&daemon.line()));
    }
}

fn listen(control: &Path) -> Result<Listener, Error> {
    if let Some(directory) = control.parent() {
        std::fs::create_dir_all(directory).at(format!("make {}", directory.display()))?;
    }
    Place::Unix(control.to_owned()).bind().map_err(|error| Error::conflict(error_line(&error)))
}

fn parts(config: Config, store: Store, hand: Hand) -> Result<Parts, Error> {
    let invalid = |line: String| Error::new(ErrorKind::Invalid, line);
    let token = config.token_file.as_deref().map(Token::load).transpose();
    let token = token.map_err(|error| invalid(error_line(&error)))?;
    let allocator = Client::one_of(&config.allocator, token).map_err(|error| invalid(error_line(&error)))?;
    let blk = Client::new(&format!("unix:{}", config.blk.display()), None);
    let blk = blk.map_err(|error| invalid(error_line(&error)))?;
    let notify = Arc::new(Notify::new());
    Ok(Parts {
        host: host_part(),
        boot: host::host_id().at("find out which kernel this is")?,
        store,
        allocator: allocator.with_patience(LEADER_LIMIT),
        blk,
        hand,
        watch: watch(&config, &notify),
        notify,
        config,
    })
}

fn watch(config: &Config, notify: &Arc<Notify>) -> Option<Watch> {
    if config.grow.pressure.0.is_zero() {
        return None;
    }
    let watch = Watch::start(config.grow.pressure.0, Arc::clone(notify));
    watch
        .inspect_err(|error| {
            tracing::warn!(
                "the kernel does not report memory pressure ({error}): swap grows only when little of it is \
                 free; boot with psi=1"
            );
        })
        .ok()
}

/// This host's part in the names of areas.
fn host_part() -> String {
    let name = facts::client_name().map_or_else(|_| "host".to_owned(), |name| name.to_string());
    name.chars().take(HOST_LEN_MAX).collect()
}
