//! The serving process's side of the standby: keeps a standby, sends it all records, and hands over to it or
//! to a newer process on request. The same thread runs the watchdog of the data plane.
//!
//! At most one other process is *armed*: it has the lock of the state directory, and takes over when this
//! process is dead. Before another one is armed, the first one has died. So two processes never take over.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use xpm_protocol::api::blk::{Standby, StandbyState};
use xpm_protocol::units::ByteSize;
use xpm_protocol::{ClientId, Name};
use xpm_transport::nbd::server::LoopWatch;

use super::link::{self, FromStandby, Receiver, Sender, ToStandby};
use super::{ARGUMENT, TICK, socket_path};
use crate::error::{DeviceError, Step};
use crate::frontend::ublk;
use crate::lifecycle;
use crate::program::Program;
use crate::records::{self, Follower, Record, Records};
use crate::watch::Watchdog;

/// Shortest and longest pause before a standby that ended is replaced; the pause doubles.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Time limit for ending this process once another one takes over.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Factor on the limit of silence for a process that is not ready yet.
const FILLING: u32 = 8;

/// The handle of the keeper's thread: takes requests, and shows the standby's status.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    wake: OwnedFd,
    /// Whether to hand over to the standby, which then ends when no device is in use.
    leave: AtomicBool,
    stop: AtomicBool,
    status: Mutex<Standby>,
}

/// The parameters of the keeper.
pub(crate) struct Settings {
    pub(crate) program: Program,
    /// Whether a standby is kept; none: from the time when the kernel's devices can outlive their server,
    /// because the driver may be loaded at any time.
    pub(crate) standby: Option<bool>,
    /// Seconds of silence after which a process or thread counts as hung.
    pub(crate) silence_max: u32,
    pub(crate) state: PathBuf,
    pub(crate) client: ClientId,
    /// Delay before the first standby is started: devices that were taken over have to be served first.
    pub(crate) delay: Duration,
}

impl Keeper {
    /// Starts the thread, which also watches these loops.
    pub(crate) fn start(
        settings: Settings,
        records: Arc<Records>,
        loops: Vec<LoopWatch>,
    ) -> Result<Keeper, DeviceError> {
        let at = || "start the thread that keeps a standby";
        // A mount outlives its server on every supported kernel.
        let wanted =
            settings.standby.unwrap_or_else(|| settings.program == Program::Fs || ublk::can_recover());
        let state = if wanted { StandbyState::Starting } else { StandbyState::Off };
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).at(at())?,
            leave: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            status: Mutex::new(Standby { state, pid: None, locked: ByteSize(0) }),
        });
        let work = Work {
            watchdog: Watchdog::new(settings.silence_max, loops),
            records,
            shared: Arc::clone(&shared),
            listener: None,
            standby: None,
            successor: None,
            due: Instant::now() + settings.delay,
            settings,
            wanted,
            starting: None,
            pause: PAUSES.0,
        };
        let thread = thread::Builder::new()
            .name("xpm-watch".to_owned())
            .stack_size(lifecycle::STACK_LEN)
            .spawn(move || work.run())
            .at(at())?;
        Ok(Keeper { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The status of the standby.
    pub(crate) fn status(&self) -> Standby {
        self.shared.status().clone()
    }

    /// Ends this process if a standby can take over at once; the standby ends when no device is in use any
    /// more. Does not block.
    pub(crate) fn leave(&self) {
        self.shared.leave.store(true, Ordering::Relaxed);
        self.shared.wake();
    }

    /// Ends the standby, and waits for its end: no process takes over.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        // A full counter makes the descriptor readable as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn status(&self) -> std::sync::MutexGuard<'_, Standby> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process that stands by.
struct Peer {
    sender: Sender,
    receiver: Receiver,
    pid: u32,
    process: Process,
    /// Whether it has the lock.
    armed: bool,
    /// Its locked memory in bytes, once it is ready.
    ready: Option<u64>,
    /// Checks since its last message.
    silent: u32,
}

/// The handle of its process.
enum Process {
    Child(Child),
    /// A child of another process, by a pidfd.
    Other(OwnedFd),
}

impl Peer {
    /// Closes the connection. When this returns, the process is dead if it is a child or was armed.
    fn end(mut self) {
        self.sender.close();
        // An error means that it is dead already.
        match &mut self.process {
            Process::Child(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Process::Other(process) if self.armed => {
                let _ = pidfd_send_signal(&*process, Signal::KILL);
                while let Err(rustix::io::Errno::INTR) =
                    poll(&mut [PollFd::new(process, PollFlags::IN)], None)
                {}
            }
            Process::Other(_) => {}
        }
    }
}

/// Sends the records to a process that stands by.
struct Teller(Sender);

impl Follower for Teller {
    fn kept(&mut self, record: &Record) -> bool {
        serde_json::to_string(record).is_ok_and(|text| self.say(&ToStandby::Record(text)))
    }

    fn descriptor(&mut self, name: &Name, descriptor: BorrowedFd<'_>) -> bool {
        self.say_with(&ToStandby::Descriptor(name.clone()), Some(descriptor))
    }

    fn removed(&mut self, name: &Name) -> bool {
        self.say(&ToStandby::Removed(name.clone()))
    }
}

impl Teller {
    /// Returns false when a message was not sent; such a process no longer counts as a follower.
    fn say(&self, message: &ToStandby) -> bool {
        self.say_with(message, None)
    }

    fn say_with(&self, message: &ToStandby, passed: Option<BorrowedFd<'_>>) -> bool {
        let said = self.0.send(message, passed).is_ok();
        if !said {
            self.0.close();
        }
        said
    }
}

/// The role of a process that stands by.
#[derive(Clone, Copy)]
enum Who {
    Standby,
    Successor,
}

struct Work {
    settings: Settings,
    /// Whether a standby is kept.
    wanted: bool,
    records: Arc<Records>,
    shared: Arc<Shared>,
    watchdog: Watchdog,
    /// The socket at which newer processes connect.
    listener: Option<UnixListener>,
    /// The armed process.
    standby: Option<Peer>,
    /// A newer process, which is not armed before it takes over.
    successor: Option<Peer>,
    /// A standby that is being started, which allocates memory and so may take long.
    starting: Option<JoinHandle<io::Result<Peer>>>,
    /// When the next standby is started if there is none.
    due: Instant,
    pause: Duration,
}

impl Work {
    fn run(mut self) {
        self.listener = match listen(&self.settings.state) {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(
                    "no newer {} can take over from this one: {error}",
                    self.settings.program.name()
                );
                None
            }
        };
        let mut tick = Instant::now() + TICK;
        while !self.shared.stop.load(Ordering::Relaxed) {
            if Instant::now() >= tick {
                tick = Instant::now() + TICK;
                self.tick();
            }
            if self.shared.leave.load(Ordering::Relaxed) {
                self.leave();
            }
            self.wait(tick);
        }
        if let Some(listener) = self.listener.take() {
            drop(listener);
            let _ = std::fs::remove_file(socket_path(&self.settings.state));
        }
        self.end_started();
        self.standby.take().into_iter().chain(self.successor.take()).for_each(Peer::end);
    }

    fn tick(&mut self) {
        if let Some(thread) = self.watchdog.look() {
            tracing::error!(
                "thread {thread} has hung for {} s: ending, so that another process can go on",
                self.settings.silence_max
            );
            lifecycle::die();
        }
        let silence_max = self.settings.silence_max;
        for who in [Who::Standby, Who::Successor] {
            let Some(peer) = self.peer(who) else { continue };
            peer.silent += 1;
            // A process that is locking its memory may have to wait for swap, which this process serves.
            let silence_max = if peer.ready.is_some() { silence_max } else { silence_max * FILLING };
            if peer.silent > silence_max {
                self.lose(who, "it hangs");
            } else if peer.has_ended() {
                self.lose(who, "it ended");
            } else if peer.sender.send(&ToStandby::Beat, None).is_err() {
                self.lose(who, "it does not listen");
            }
        }
        self.take_started();
        // A process that wants to serve allocates memory too, and stands by as well.
        let missing = self.standby.is_none() && self.starting.is_none() && self.successor.is_none();
        if !self.wanted && self.settings.standby.is_none() && ublk::is_there() && ublk::can_recover() {
            tracing::info!("the kernel has ublk devices now: a standby is kept from here on");
            self.wanted = true;
            *self.shared.status() = Standby { state: StandbyState::Starting, pid: None, locked: ByteSize(0) };
        }
        if self.wanted && missing && Instant::now() >= self.due {
            self.start_standby();
        }
    }

    fn peer(&mut self, who: Who) -> &mut Option<Peer> {
        match who {
            Who::Standby => &mut self.standby,
            Who::Successor => &mut self.successor,
        }
    }

    fn start_standby(&mut self) {
        let thread = thread::Builder::new().name("xpm-standby".to_owned()).stack_size(lifecycle::STACK_LEN);
        match thread.spawn(spawn) {
            Ok(thread) => self.starting = Some(thread),
            Err(error) => {
                tracing::warn!("cannot start a standby: {error}");
                self.put_off();
            }
        }
    }

    fn take_started(&mut self) {
        let Some(thread) = self.starting.take_if(|thread| thread.is_finished()) else { return };
        match thread.join() {
            Ok(Ok(peer)) => {
                *self.shared.status() =
                    Standby { state: StandbyState::Starting, pid: Some(peer.pid), locked: ByteSize(0) };
                self.standby = Some(peer);
            }
            Ok(Err(error)) => {
                tracing::warn!("cannot start a standby: {error}");
                self.put_off();
            }
            Err(_) => self.put_off(),
        }
    }

    /// Ends a standby that is being started and is not needed any more, before any other step.
    fn end_started(&mut self) {
        if let Some(Ok(Ok(peer))) = self.starting.take().map(JoinHandle::join) {
            peer.end();
        }
    }

    /// Makes room for a successor, which is armed instead of a standby: if two processes lock memory at once,
    /// that is one more than a machine that is short of memory can bear. A standby that is ready stays.
    fn end_unready_standby(&mut self) {
        self.end_started();
        if let Some(standby) = self.standby.take_if(|standby| standby.ready.is_none()) {
            tracing::info!("the standby, process {}, makes room for a newer process", standby.pid);
            standby.end();
        }
        if self.standby.is_none() {
            self.shared.status().pid = None;
        }
    }

    fn put_off(&mut self) {
        self.due = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSES.1);
        *self.shared.status() = Standby { state: StandbyState::Starting, pid: None, locked: ByteSize(0) };
    }

    /// Handles the loss of a process. A standby is dead when this returns, and can be replaced.
    fn lose(&mut self, who: Who, why: &str) {
        let Some(peer) = self.peer(who).take() else { return };
        let pid = peer.pid;
        peer.end();
        match who {
            Who::Standby => {
                tracing::warn!("the standby, process {pid}, is lost: {why}");
                self.put_off();
            }
            Who::Successor => tracing::warn!("process {pid} does not take over: {why}"),
        }
    }

    /// Waits for a message, or until this time.
    fn wait(&mut self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut watched = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let peers = [&self.standby, &self.successor];
        let sockets = peers.map(|peer| peer.as_ref().map(|peer| peer.receiver.socket()));
        watched.extend(sockets.iter().flatten().map(|socket| PollFd::new(socket, PollFlags::IN)));
        watched.extend(self.listener.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        if !poll(&mut watched, Some(&timeout)).is_ok_and(|ready| ready > 0) {
            return;
        }
        let mut ready = watched.iter().map(|one| !one.revents().is_empty());
        let woken = ready.next() == Some(true);
        let heard = sockets.map(|socket| socket.is_some() && ready.next() == Some(true));
        let called = self.listener.is_some() && ready.next() == Some(true);
        if woken {
            let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
        }
        for (heard, who) in heard.into_iter().zip([Who::Standby, Who::Successor]) {
            if heard {
                self.hear(who);
            }
        }
        if called {
            self.accept();
        }
    }

    fn hear(&mut self, who: Who) {
        let Some(peer) = self.peer(who) else { return };
        peer.silent = 0;
        match peer.receiver.receive::<FromStandby>() {
            Ok((FromStandby::Beat, _)) => {}
            Ok((FromStandby::Hello { records, .. }, _)) if records < records::VERSION => {
                let why = format!(
                    "it is older than the one that serves (version {records} of the records, and version {} is in use)",
                    records::VERSION
                );
                let _ = peer.sender.send(&ToStandby::Refused(why.clone()), None);
                self.lose(who, &why);
            }
            Ok((FromStandby::Hello { .. }, _)) => {
                if let Err(error) = self.tell(who) {
                    self.lose(who, &error.to_string());
                }
            }
            Ok((FromStandby::Ready { locked }, _)) => {
                let first = peer.ready.replace(locked).is_none();
                let pid = peer.pid;
                match who {
                    Who::Successor => self.hand_over(),
                    Who::Standby => self.note_ready(pid, locked, first),
                }
            }
            Err(error) => self.lose(who, &error.to_string()),
        }
    }

    fn note_ready(&mut self, pid: u32, locked: u64, first: bool) {
        self.pause = PAUSES.0;
        let locked = ByteSize(locked);
        if first {
            tracing::info!("a standby is ready: process {pid}, with {locked} locked");
        }
        *self.shared.status() = Standby { state: StandbyState::Ready, pid: Some(pid), locked };
    }

    /// Sends all records to a process that stands by, and arms it unless the other one is armed.
    fn tell(&mut self, who: Who) -> io::Result<()> {
        let records = Arc::clone(&self.records);
        let (pid, client) = (std::process::id(), self.settings.client);
        let life = self.records.life().copied();
        let Some(peer) = self.peer(who) else { return Ok(()) };
        let hello = ToStandby::Hello { pid, records: records::VERSION, client, life };
        peer.sender.send(&hello, None)?;
        records.follow(Box::new(Teller(peer.sender.clone())));
        peer.sender.send(&ToStandby::Told, None)?;
        let other = match who {
            Who::Standby => &self.successor,
            Who::Successor => &self.standby,
        };
        if other.as_ref().is_some_and(|other| other.armed) {
            return Ok(());
        }
        self.arm(who)
    }

    /// Arms a process, so that it takes over when this process is dead. No other process is armed.
    fn arm(&mut self, who: Who) -> io::Result<()> {
        let records = Arc::clone(&self.records);
        let Some(peer) = self.peer(who) else { return Ok(()) };
        // Set before the send, because after an error it is unknown whether the lock arrived.
        peer.armed = true;
        peer.sender.send(&ToStandby::Lock, Some(records.lock()))
    }

    fn accept(&mut self) {
        let Some(Ok((socket, _))) = self.listener.as_ref().map(UnixListener::accept) else { return };
        match Peer::connected(socket) {
            Ok(peer) if self.successor.is_none() => {
                self.end_unready_standby();
                self.successor = Some(peer);
            }
            Ok(peer) => {
                let why = "another process is about to take over".to_owned();
                let _ = peer.sender.send(&ToStandby::Refused(why), None);
            }
            Err(error) => tracing::warn!("a process that wanted to take over was turned away: {error}"),
        }
    }

    /// Arms the successor, instead of the standby, and ends.
    fn hand_over(&mut self) {
        let records = Arc::clone(&self.records);
        let frozen = records.freeze();
        if let Some(standby) = self.standby.take() {
            standby.end();
        }
        let armed = self.successor.as_ref().is_some_and(|successor| successor.armed);
        if !armed && let Err(error) = self.arm(Who::Successor) {
            drop(frozen);
            self.lose(Who::Successor, &error.to_string());
            return self.put_off();
        }
        let Some(successor) = &self.successor else { return };
        let pid = successor.pid;
        // The successor takes over when this process is dead, whether or not it receives this message.
        let _ = successor.sender.send(&ToStandby::Go { ends: false }, None);
        tracing::info!("process {pid} takes over");
        end();
    }

    /// Lets the standby take over, if it is ready.
    fn leave(&mut self) {
        let records = Arc::clone(&self.records);
        let Some(standby) = self.standby.as_ref().filter(|standby| standby.ready.is_some()) else { return };
        let frozen = records.freeze();
        let pid = standby.pid;
        if let Err(error) = standby.sender.send(&ToStandby::Go { ends: true }, None) {
            drop(frozen);
            return self.lose(Who::Standby, &error.to_string());
        }
        tracing::info!("process {pid} goes on until nobody uses a device any more");
        end();
    }
}

impl Peer {
    fn new(socket: UnixStream, pid: u32, process: Process) -> io::Result<Peer> {
        let (sender, receiver) = link::split(socket)?;
        Ok(Peer { sender, receiver, pid, process, armed: false, ready: None, silent: 0 })
    }

    /// A process that connected; only the same user is accepted. It sends a message before it is armed, so
    /// when its pidfd is opened, the process is known to be alive under this number.
    fn connected(socket: UnixStream) -> io::Result<Peer> {
        let peer = socket_peercred(&socket)?;
        if peer.uid != geteuid() {
            let why = format!("process {} is of another user", peer.pid.as_raw_pid());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let process = Process::Other(pidfd_open(peer.pid, PidfdFlags::empty())?);
        Peer::new(socket, peer.pid.as_raw_pid().cast_unsigned(), process)
    }

    fn has_ended(&mut self) -> bool {
        match &mut self.process {
            Process::Child(child) => !matches!(child.try_wait(), Ok(None)),
            Process::Other(process) => {
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
            }
        }
    }
}

/// Starts another process of this program, even if the program's file has been replaced since.
fn spawn() -> io::Result<Peer> {
    let (ours, theirs) = UnixStream::pair()?;
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != ARGUMENT);
    let mut command = Command::new("/proc/self/exe");
    command.args(arguments).arg(ARGUMENT).stdin(Stdio::from(OwnedFd::from(theirs)));
    // The service manager accepts messages of its main process only.
    for variable in
        ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"]
    {
        command.env_remove(variable);
    }
    let child = command.spawn()?;
    Peer::new(ours, child.id(), Process::Child(child))
}

fn listen(state: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;

    let path = socket_path(state);
    // Only the process with the lock of the directory listens there.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Ends this process; another one takes over as soon as it is dead.
fn end() -> ! {
    xpm_control::log::flush();
    let killer = thread::Builder::new().spawn(|| {
        thread::sleep(END_LIMIT);
        lifecycle::die();
    });
    if killer.is_err() {
        lifecycle::die();
    }
    std::process::exit(0);
}
