//! The life of the program: it opens all resources before it serves clients, so that every defect is reported
//! at the start.

use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use xpm_control::client::Client;
use xpm_control::known::KnownMetadata;
use xpm_control::listen::{Listener, Place};
use xpm_control::manager::{Manager, prove_alive};
use xpm_control::server::{Limits, Server as ControlServer, answers};
use xpm_control::shutdown::{Shutdown, end_in_time};
use xpm_control::token::Token;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{Life, Visitor};
use xpm_transport::nbd::server::{Listener as NbdListener, Server, ServerOptions};
use xpm_transport::rdma::server::RdmaServer;
use xpm_transport::shm::server::{Listener as ShmListener, ShmServer};
use xpm_transport::sound;

use crate::arena::Arena;
use crate::config::{Config, Rdma};
use crate::control::{self, Appliance, Traffic};
use crate::host;
use crate::keep::{Handed, Keeper};
use crate::rdma::{RdmaFence, RdmaGrants};
use crate::regions::{Fence, Table};
use crate::register::{self, Identity};
use crate::serve::GrantExports;
use crate::share::SharedGrants;
use crate::state::StateDir;

/// Default port of RDMA; the one after NBD's.
const RDMA_PORT: u16 = 10810;

/// Interval of checking the limits of the process's memory.
const LIMITS_EVERY: Duration = Duration::from_secs(1);

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start.
pub fn run(config: Config) -> anyhow::Result<()> {
    // Must run before any other descriptor is opened.
    let handed = Handed::take();
    sound::survive().context("cannot install the handler for bad memory")?;
    host::raise_limits();
    host::avoid_oom_killer();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Control only: the data plane has threads of its own.
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the threads of the control interface")?;
    runtime.block_on(serve(config, handed))
}

async fn serve(config: Config, handed: Handed) -> anyhow::Result<()> {
    let mut shutdown = Shutdown::catch().context("cannot catch signals")?;
    let token = config.token_file.as_deref().map(Token::load).transpose()?;
    let state = StateDir::open(&config.state)?;
    let control = config.listen.bind().context("control interface")?;
    let data = DataPlane::bind(&config)?;

    let manager = Manager::from_environment().map(Arc::new);
    let arena = Arena::with_held(&config.backing, config.capacity, config.lock, handed.held())?;
    let (keeper, returned) = Keeper::open(&arena, &config.state, manager.clone(), handed)?;
    let mut identity = identity(&config, &state, &arena, &control, &data)?;
    let table = Table::start_with(arena, config.capacity, config.stock, keeper, returned)
        .context("cannot start the memory's threads")?;
    tell_returned(&table, config.capacity);
    let client = allocator(&config, token.clone())?;
    let serving = data.serve(&config, &table)?;
    identity.rdma = serving.plane.rdma.as_ref().map(|rdma| rdma.addresses()).unwrap_or_default();
    let appliance = Appliance::new(table, Box::new(serving.plane.clone())).context("cannot start to copy")?;
    let appliance = appliance.with_known(KnownMetadata::load(&config.state));
    let appliance = Arc::new(appliance.with_id(identity.id));
    announce(&config, &identity);

    let heartbeat = match (client, config.discover.clone()) {
        (Some(client), _) => Some(tokio::spawn(register::run(client, identity, appliance.clone()))),
        (None, Some(group)) => {
            Some(tokio::spawn(register::look_for(group, token.clone(), identity, appliance.clone())))
        }
        (None, None) => None,
    };
    let watch = tokio::spawn(watch_limits(appliance.clone()));
    let routes = control::routes(appliance.clone());
    let server = ControlServer::new(routes.clone(), token, Limits::default());
    if let Some(manager) = &manager {
        manager.ready(&format!("Lends {} as {}", ByteSize(config.capacity), config.name));
    }
    let ended = server.serve(control, async {
        let signal = shutdown.signalled().await;
        tracing::info!("{signal}: ending");
        end_in_time();
        if let Some(manager) = &manager {
            manager.stopping();
        }
    });
    tokio::select! {
        () = ended => {}
        // The service manager is notified only while the table answers.
        () = prove_alive(manager.as_deref(), || answers(routes.clone(), "/v1/status")) => {}
    }
    watch.abort();
    if let Some(task) = heartbeat {
        task.abort();
    }
    warn_of_loss(&appliance);
    drop(serving);
    let table = appliance.table().clone();
    let work = tokio::task::spawn_blocking(move || table.end());
    work.await.context("cannot leave the memory for the next start")?;
    remove_sockets(&config);
    Ok(())
}

/// A limit may be lowered at any time, and nothing warns the administrator who does it.
async fn watch_limits(appliance: Arc<Appliance>) {
    loop {
        tokio::time::sleep(LIMITS_EVERY).await;
        let table = appliance.table().clone();
        let _ = tokio::task::spawn_blocking(move || table.look_at_limits()).await;
    }
}

/// Logs the memory that was taken back from an earlier life.
fn tell_returned(table: &Table, capacity: u64) {
    let summary = table.summary();
    if summary.grants > 0 {
        tracing::info!(
            "{} of lent memory in {} grants is as it was before the restart",
            ByteSize(summary.totals.granted),
            summary.grants
        );
    }
    if summary.totals.granted > capacity {
        tracing::warn!(
            "{} is lent already, and --memory is {}: nothing more is lent until enough of it is given back",
            ByteSize(summary.totals.granted),
            ByteSize(capacity)
        );
    }
}

/// Listening sockets, opened before clients are served.
struct DataPlane {
    tcp: Vec<std::net::TcpListener>,
    addresses: Vec<SocketAddr>,
    unix: UnixListener,
    shm: UnixListener,
}

/// The running servers; they end when this is dropped.
struct Serving {
    plane: Plane,
    _nbd: Vec<NbdListener>,
    _shm: Option<ShmListener>,
}

impl DataPlane {
    fn bind(config: &Config) -> anyhow::Result<DataPlane> {
        let bind = |address: &SocketAddr| match Place::Tcp(*address).bind()? {
            Listener::Tcp(listener) => Ok(listener.into_std()?),
            Listener::Unix(_) => unreachable!("a TCP place gives a TCP listener"),
        };
        let tcp: anyhow::Result<Vec<std::net::TcpListener>> = config.nbd.iter().map(bind).collect();
        let tcp = tcp.context("NBD")?;
        let addresses: Result<_, _> = tcp.iter().map(std::net::TcpListener::local_addr).collect();
        let addresses = addresses.context("NBD")?;
        Ok(DataPlane { tcp, addresses, unix: bind_unix(&config.unix)?, shm: bind_unix(&config.shm)? })
    }

    fn serve(self, config: &Config, table: &Table) -> anyhow::Result<Serving> {
        let options = ServerOptions {
            name: "nbd",
            loops: config.threads,
            spin: config.spin,
            ..ServerOptions::default()
        };
        let server = Server::start(options).context("cannot start the threads of the data plane")?;
        let rdma = serve_rdma(config.rdma, table)?;
        if let Some(rdma) = &rdma {
            table.add_fence(Arc::new(RdmaFence(rdma.clone())));
        }
        let shm = ShmServer::new(Arc::new(SharedGrants(table.clone())));
        let plane = Plane { nbd: server.clone(), shm, rdma: rdma.clone() };
        table.add_fence(Arc::new(plane.clone()));
        table.open_returned();
        let exports =
            GrantExports::new(table.clone(), rdma).context("cannot start the threads of the data plane")?;
        let exports = Arc::new(exports);
        let tcp = self.tcp.into_iter().map(|socket| server.listen_tcp(socket, exports.clone()));
        let tcp: std::io::Result<Vec<NbdListener>> = tcp.collect();
        let mut listeners = tcp.context("cannot serve NBD over TCP")?;
        let unix = server.listen_unix(self.unix, exports.clone());
        listeners.push(unix.context("cannot serve NBD at the unix socket")?);
        let shm = match table.arena().is_shareable() {
            true => Some(plane.shm.listen(self.shm).context("cannot pass memory at the unix socket")?),
            false => None,
        };
        Ok(Serving { plane, _nbd: listeners, _shm: shm })
    }
}

/// Listens for RDMA clients, if it is configured and available.
fn serve_rdma(wanted: Rdma, table: &Table) -> anyhow::Result<Option<Arc<RdmaServer>>> {
    let (address, needed) = match wanted {
        Rdma::Off => return Ok(None),
        Rdma::Auto => (SocketAddr::from((Ipv6Addr::UNSPECIFIED, RDMA_PORT)), false),
        Rdma::At(address) => (address, true),
    };
    match RdmaServer::start(address, Arc::new(RdmaGrants(table.clone()))) {
        Ok(server) => {
            let addresses: Vec<String> = server.addresses().iter().map(ToString::to_string).collect();
            tracing::info!("RDMA at {} (on {})", addresses.join(", "), server.devices().join(", "));
            Ok(Some(Arc::new(server)))
        }
        Err(why) if needed => {
            anyhow::bail!(
                "--rdma {address}: {why}; `--rdma off` does without, `xpm doctor` says what there is"
            )
        }
        Err(why) => {
            tracing::info!("serving without RDMA: {why}");
            Ok(None)
        }
    }
}

fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).with_context(|| {
            format!(
                "cannot make the directory {} for sockets; choose one with --run-dir",
                directory.display()
            )
        })?;
    }
    match Place::Unix(path.to_owned()).bind()? {
        Listener::Unix(listener) => listener.into_std().context("cannot listen at a unix socket"),
        Listener::Tcp(_) => unreachable!("a unix place gives a unix listener"),
    }
}

fn identity(
    config: &Config,
    state: &StateDir,
    arena: &Arena,
    control: &Listener,
    data: &DataPlane,
) -> anyhow::Result<Identity> {
    Ok(Identity {
        id: state.id,
        life: state.life,
        name: config.name.clone(),
        host: xpm_control::host::host_id().context("cannot tell which kernel this is")?,
        medium: arena.medium(),
        region_len: config.stock.region_len,
        control: control.address().map_or_else(|| config.listen.clone(), Place::Tcp),
        nbd: data.addresses.clone(),
        rdma: Vec::new(),
        nbd_unix: config.unix.clone(),
        shm: arena.is_shareable().then(|| config.shm.clone()),
        advertise: config.advertise.clone(),
        labels: config.labels.clone(),
        link_speed: config.link_speed,
    })
}

fn allocator(config: &Config, token: Option<Token>) -> anyhow::Result<Option<Client>> {
    let client = config.allocator.as_ref().map(|urls| Client::one_of(urls, token)).transpose();
    client.context("--allocator")
}

fn announce(config: &Config, identity: &Identity) {
    tracing::info!(
        "appliance {} ({}) lends {}: control at {}, NBD at {} and {}",
        identity.name,
        identity.id,
        ByteSize(config.capacity),
        identity.control,
        joined(&identity.nbd),
        identity.nbd_unix.display()
    );
    match &config.allocator {
        None if config.discover.is_some() => {}
        None => tracing::warn!("no allocator will know this appliance: give --allocator URL, or --discover"),
        Some(urls) if urls.iter().any(|url| identity.is_local_only(url)) => tracing::warn!(
            "the allocator at {urls} tells clients to reach this appliance at {}, which only this machine can: give \
             --nbd ADDRESS:PORT with an address of the network",
            joined(&identity.nbd)
        ),
        Some(_) => {}
    }
}

fn joined(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn warn_of_loss(appliance: &Appliance) {
    let granted = appliance.status().granted;
    if granted.0 == 0 {
        return;
    }
    match (appliance.table().is_kept(), appliance.table().arena().file()) {
        (true, Some(file)) => tracing::info!("{granted} of lent memory stays in {}", file.path().display()),
        (true, None) => tracing::info!(
            "{granted} of lent memory stays with the service manager: it is lost if this is not started again"
        ),
        (false, _) => tracing::warn!("{granted} of lent memory is lost with this process"),
    }
}

/// A remaining socket would have to be recognised as stale later.
fn remove_sockets(config: &Config) {
    for path in [&config.unix, &config.shm] {
        let _ = std::fs::remove_file(path);
    }
    if let Place::Unix(path) = &config.listen {
        let _ = std::fs::remove_file(path);
    }
}

/// The servers, as the control plane uses them.
#[derive(Clone)]
struct Plane {
    nbd: Server,
    shm: ShmServer,
    rdma: Option<Arc<RdmaServer>>,
}

impl Fence for Plane {
    fn close_group(&self, group: u128) -> usize {
        self.nbd.close_group(group);
        self.shm.close_group(group)
    }

    fn connections(&self, group: u128) -> usize {
        self.nbd.connections(Some(group)) + self.shm.connections(Some(group))
    }

    fn living(&self, group: u128, life: &Life) -> Vec<Visitor> {
        let local = self.shm.living(group, life);
        if local.is_empty() { self.nbd.living(group, life) } else { local }
    }

    fn close_others(&self, group: u128, life: &Life) {
        self.nbd.close_others(group, life);
    }
}

impl Traffic for Plane {
    fn connections(&self) -> usize {
        let rdma = self.rdma.as_ref().map_or(0, |rdma| rdma.connections(None));
        self.nbd.connections(None) + self.shm.connections(None) + rdma
    }

    fn counters(&self) -> Counters {
        self.nbd.counters()
    }
}
