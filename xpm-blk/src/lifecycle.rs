//! The life of the process: it is made safe for swap, started, and ended without taking a device away from
//! its users.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::task::spawn_blocking;
use xpm_client_core::owner::Owner;
use xpm_control::client::Client;
use xpm_control::known::KnownMetadata;
use xpm_control::listen::{Listener, Place};
use xpm_control::manager::{Manager, machine_stops, prove_alive};
use xpm_control::server::{Limits, Server as ControlServer, answers};
use xpm_control::shutdown::{Shutdown, end_in_time};
use xpm_control::token::Token;
use xpm_control::{error_line, host, random};
use xpm_protocol::HostId;
use xpm_protocol::api::ErrorKind;
use xpm_safety as safety;
use xpm_transport::nbd::server::{Server, ServerOptions};

use crate::config::Config;
use crate::control;
use crate::daemon::{self, Daemon, herald, lookout, trees};
use crate::error::{DeviceError, Step};
use crate::kept::{self, Depositor};
use crate::program::Program;
use crate::records::{Records, Taken};
use crate::standby::keeper::{self, Keeper};
use crate::standby::waiting::{Outcome, Post, nobody};

/// Stack of a thread of the data plane, in bytes; all of it is locked. An optimized build uses at most 22 KiB with two
/// devices on sockets or a tree of files (measured).
pub(crate) const STACK_LEN: usize = if cfg!(debug_assertions) { 256 << 10 } else { 128 << 10 };
/// Stack of a thread of the control plane, in bytes; all of it is locked. A debug build that attaches,
/// resizes and moves uses at most 220 KiB, an optimized one that attaches and resizes 70 KiB (measured).
const CONTROL_STACK_LEN: usize = if cfg!(debug_assertions) { 512 << 10 } else { 192 << 10 };
/// Threads for control work that blocks: a device whose start blocks must not stop the others.
const BLOCKING_THREADS_MAX: usize = 32;
/// How long opening a device may take before the device counts as holding its I/O.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// How long a request waits when none of several allocators leads.
const LEADER_LIMIT: Duration = Duration::from_secs(8);
/// Number of threads for blocking work that are started at once, and how long idle ones stay: practically for
/// ever.
const THREADS_READY: usize = 4;
const KEEP_ALIVE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long devices that were taken over are served before a standby for this process is started: if a
/// service manager starts a process that wants to serve, it has done so by then, and that process is the
/// standby.
const STANDBY_DELAY: Duration = Duration::from_secs(5);
/// How long a process whose state directory is in use looks for the serving process, and the pause between
/// two tries.
const SUCCESSION_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Interval of checking the users of devices while the process waits for them to end.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs the daemon until it is told to end: directly, or, with `stands_by`, as the standby of the process at
/// standard input. If another process serves with the same state, this one becomes its successor. Must be
/// called while the process has one thread.
///
/// # Errors
/// Why it cannot start, or is not needed, in one line.
pub fn run(config: &Config, stands_by: bool) -> Result<(), DeviceError> {
    config.check().map_err(|error| DeviceError::new(ErrorKind::Invalid, error))?;
    let mut post = announce(config, stands_by)?;
    if stands_by {
        // The process was started by a path without a name; the name lets tools find it. An error is
        // harmless.
        let name = std::ffi::CString::new(config.program.name()).unwrap_or_default();
        let _ = rustix::thread::set_name(&name);
    }
    config.program.set_up();
    xpm_control::log::detach().at("start a thread for the log")?;
    let runtime = runtime().at("start the control plane")?;
    let ended = serve_or_wait(&runtime, config, &mut post);
    xpm_control::log::flush();
    ended
}

/// Announces this process to the serving process, if there is one. This happens before any step that
/// allocates memory: a serving process starts its own standby unless it knows of another process, and a
/// machine that is short of memory has no room for three.
fn announce(config: &Config, stands_by: bool) -> Result<Option<Post>, DeviceError> {
    if stands_by {
        return Post::of_parent().map(Some);
    }
    // A directory that cannot be used is reported when it is opened.
    let post = Post::of_successor(&config.state()).unwrap_or_default();
    if let Some(post) = &post {
        post.wait_for_answer();
    }
    Ok(post)
}

fn serve_or_wait(runtime: &Runtime, config: &Config, post: &mut Option<Post>) -> Result<(), DeviceError> {
    let parts = runtime.block_on(async { parts(config) })?;
    runtime.block_on(warm_up());
    let started = Instant::now();
    loop {
        let waits = match post.take() {
            Some(post) => post,
            None => match Records::open(&config.state())? {
                Taken::Mine(records) => {
                    records.adopt(kept::handed());
                    safety::use_reserve();
                    return runtime.block_on(serve(parts, Origin::new(*records)));
                }
                Taken::Others => match Post::of_successor(&config.state())? {
                    Some(post) => post,
                    None if started.elapsed() > SUCCESSION_LIMIT => return Err(nobody(config)),
                    None => {
                        std::thread::sleep(LOOK_AGAIN);
                        continue;
                    }
                },
            },
        };
        match waits.wait(config) {
            Outcome::GoOn(left) => {
                let kept = (left.records, left.descriptors);
                let records = Records::inherit(&config.state(), left.lock, (left.client, left.life), kept);
                let origin = Origin { records, takes_over: true, ends: left.ends };
                return runtime.block_on(serve(parts, origin));
            }
            Outcome::LookAgain => std::thread::sleep(LOOK_AGAIN),
            Outcome::End(why) => return Err(DeviceError::new(ErrorKind::Conflict, why)),
        }
    }
}

/// The state that a process begins with.
struct Origin {
    records: Records,
    /// Whether users wait for its devices.
    takes_over: bool,
    /// Whether it was told to end before it began.
    ends: bool,
}

impl Origin {
    const fn new(records: Records) -> Origin {
        Origin { records, takes_over: false, ends: false }
    }
}

/// The parts of a process before it has the state directory.
struct Parts {
    config: Config,
    allocator: Client,
    token: Option<Token>,
    server: Server,
    host: HostId,
    host_name: String,
    /// Whether this process keeps a standby; none: as soon as devices of this kernel outlive their server.
    standby: Option<bool>,
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(KEEP_ALIVE)
        .thread_stack_size(CONTROL_STACK_LEN)
        .thread_name("xpm-control")
        .enable_all()
        .build()
}

/// Starts the threads for blocking work.
async fn warm_up() {
    let all_there = Arc::new(std::sync::Barrier::new(THREADS_READY));
    let threads: Vec<_> = (0..THREADS_READY)
        .map(|_| {
            let all_there = Arc::clone(&all_there);
            tokio::task::spawn_blocking(move || {
                let _ = all_there.wait();
            })
        })
        .collect();
    for thread in threads {
        let _ = thread.await;
    }
}

async fn serve(parts: Parts, origin: Origin) -> Result<(), DeviceError> {
    let mut shutdown = Shutdown::catch().at("catch signals")?;
    let manager = Manager::from_environment();
    let program = parts.config.program;
    let (control_path, stop_limit) = (parts.config.control(), parts.config.stop_limit.0);
    let Origin { records, takes_over, ends } = origin;
    if !takes_over && let Some(missing) = safety::missing(&program.safety()) {
        tracing::warn!("not safe for swap: {missing}");
    }
    // Devices are taken over before the socket is created, because the socket is a file; a process that
    // begins creates the socket first, to check whether it may have it.
    let listener = (!takes_over).then(|| listen(&control_path)).transpose()?;
    if program == Program::Fs
        && let Some(manager) = Manager::from_environment()
    {
        records.follow(Box::new(Depositor(manager)));
    }
    let daemon = Arc::new(Daemon::new(daemon_parts(parts, records, takes_over)?));
    let trees = tokio::spawn(trees::tend(Arc::clone(&daemon)));
    if takes_over {
        daemon.take_over().await;
    }
    match daemon.restore() {
        // Devices that are served stay served, whatever error occurs.
        Err(error) if takes_over => tracing::error!("{error}"),
        restored => restored?,
    }
    let listener = match listener {
        Some(listener) => listener,
        None => listen_in_the_end(&control_path).await,
    };
    let lookout = tokio::spawn(lookout::run(Arc::clone(&daemon)));
    let follower = tokio::spawn(lookout::follow(Arc::clone(&daemon)));
    let herald = tokio::spawn(herald::run(Arc::clone(&daemon)));
    let routes = control::routes(Arc::clone(&daemon));
    let server = ControlServer::new(routes.clone(), None, Limits::default());
    tracing::info!("{} {} is ready", program.name(), env!("CARGO_PKG_VERSION"));
    if let Some(manager) = &manager {
        manager.ready(program.purpose());
    }
    let ending = Ending { daemon: &daemon, limit: stop_limit, manager: manager.as_ref() };
    tokio::select! {
        () = server.serve(listener, end(ending, &mut shutdown, ends)) => {}
        () = prove_alive(manager.as_ref(), || answers(routes.clone(), "/v1/status")) => {}
    }
    lookout.abort();
    follower.abort();
    herald.abort();
    trees.abort();
    let work = tokio::task::spawn_blocking(move || {
        daemon.keeper().stop();
        daemon.take_all_away();
    });
    if work.await.is_err() {
        tracing::error!("some devices could not be taken away");
    }
    Ok(())
}

/// Waits until the process may end, and then ends it even if a part of it is stuck.
async fn end(ending: Ending<'_>, shutdown: &mut Shutdown, told: bool) {
    ending.wait(shutdown, told).await;
    end_in_time();
}

/// Repeats until the socket exists, for a process that users depend on already.
async fn listen_in_the_end(control: &Path) -> Listener {
    let mut said = false;
    loop {
        match listen(control) {
            Ok(listener) => return listener,
            Err(error) if !said => tracing::error!("{error}; trying again"),
            Err(_) => {}
        }
        said = true;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn listen(control: &Path) -> Result<Listener, DeviceError> {
    if let Some(directory) = control.parent() {
        std::fs::create_dir_all(directory).at(format!("make {}", directory.display()))?;
    }
    Place::Unix(control.to_owned())
        .bind()
        .map_err(|error| DeviceError::new(ErrorKind::Conflict, error_line(&error)))
}

fn parts(config: &Config) -> Result<Parts, DeviceError> {
    let invalid = |line: String| DeviceError::new(ErrorKind::Invalid, line);
    let token = config.token_file.as_deref().map(Token::load).transpose();
    let token = token.map_err(|error| invalid(error_line(&error)))?;
    let allocator =
        Client::one_of(&config.allocator, token.clone()).map_err(|error| invalid(error_line(&error)))?;
    let server = Server::start(ServerOptions {
        name: "xpm-nbd",
        loops: usize::from(config.threads()),
        spin: config.spin(),
        buffers_len: config.buffer.0 as usize,
        ..ServerOptions::default()
    })
    .at("start the threads for NBD sockets")?;
    Ok(Parts {
        config: config.clone(),
        allocator: allocator.with_patience(LEADER_LIMIT),
        token,
        server,
        host: host::host_id().at("find out which kernel this is")?,
        host_name: host::host_name().at("find out the host's name")?,
        standby: config.standby,
    })
}

fn daemon_parts(parts: Parts, records: Records, takes_over: bool) -> Result<daemon::Parts, DeviceError> {
    let Parts { config, allocator, token, server, host, host_name, standby } = parts;
    let client = records.client_id(random::u128().at("make a client id")?)?;
    let records = Arc::new(records);
    let settings = keeper::Settings {
        program: config.program,
        standby,
        silence_max: config.silence_max(),
        state: config.state(),
        client,
        delay: if takes_over { STANDBY_DELAY } else { Duration::ZERO },
    };
    let keeper = Keeper::start(settings, Arc::clone(&records), server.loops())?;
    let known = Arc::new(KnownMetadata::load(&config.state()));
    let life = records.life().copied();
    let owner = Owner { client, host, host_name, allocator, token, life, known };
    Ok(daemon::Parts { owner, records, keeper, server, config })
}

/// Kills the process in its present state, so that another one can take over. Not by `abort`: for the core
/// dump the kernel would wait for every thread, and this is called because a thread hangs.
pub(crate) fn die() -> ! {
    xpm_control::log::flush();
    loop {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Kills the process when it is dropped. A thread that must not end alone holds this, and forgets it when it
/// may end.
pub(crate) struct DieOnDrop;

impl Drop for DieOnDrop {
    fn drop(&mut self) {
        die();
    }
}

/// The procedure that ends the process.
struct Ending<'a> {
    daemon: &'a Arc<Daemon>,
    /// Time after the first signal from which a second one counts.
    limit: Duration,
    manager: Option<&'a Manager>,
}

impl Ending<'_> {
    /// Resolves when the process may end: it was told to, and no device that it serves is in use; or it was
    /// told a second time, the limit or more after the first. While devices are in use and a standby is
    /// ready, the standby takes over, and this process ends by itself. Two processes hand over to no standby:
    /// a process that was told to end by its predecessor (`told`), and a process that ends because the
    /// machine shuts down. In the latter case, services that end after it, such as the network, have to stay
    /// until no device is in use.
    async fn wait(self, shutdown: &mut Shutdown, told: bool) {
        let signal = if told { "its predecessor was told to end" } else { shutdown.signalled().await };
        if let Some(manager) = self.manager {
            manager.stopping();
        }
        let since = Instant::now();
        let last = told || self.manager.is_some() && spawn_blocking(machine_stops).await.unwrap_or_default();
        let mut said = Vec::new();
        loop {
            let in_use = in_use(self.daemon).await;
            if in_use.is_empty() {
                return;
            }
            if !last {
                self.daemon.keeper().leave();
            }
            if in_use != said {
                self.say(signal, &in_use);
                said = in_use;
            }
            tokio::select! {
                _ = shutdown.signalled() => if since.elapsed() >= self.limit {
                    tracing::error!("signalled again: ending although devices are in use");
                    return;
                },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    fn say(&self, signal: &str, in_use: &[String]) {
        tracing::warn!(
            "{signal}: not ending while devices are in use ({}) and no standby goes on with them; free them, or signal again \
             after {:?} to end in spite of them",
            in_use.join("; "),
            self.limit
        );
        if let Some(manager) = self.manager {
            manager
                .status(&format!("Told to end; waits until {} are not in use any more", in_use.join("; ")));
        }
    }
}

async fn in_use(daemon: &Arc<Daemon>) -> Vec<String> {
    let daemon = Arc::clone(daemon);
    let look = spawn_blocking(move || daemon.in_use());
    match tokio::time::timeout(OPEN_LIMIT, look).await {
        Ok(Ok(in_use)) => in_use,
        Ok(Err(_)) | Err(_) => vec!["a device does not answer, so its users are not known".to_owned()],
    }
}
