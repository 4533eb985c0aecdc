//! A vhost-user-blk back-end at a unix socket: the disk of a virtual machine.
//!
//! The front end (the machine's monitor) passes the guest's memory as files. Rings and buffers are used in
//! place: the data of a guest's read or write are posted to the channel of its queue with guest memory as the
//! buffer, piece by piece, and are not copied here.
//!
//! * `message.rs`: the protocol's messages; `session.rs`: their execution.
//! * `memory.rs`: guest memory; `fault.rs`: its loss; `ring.rs`, `chain.rs`, `request.rs`: from a ring to
//!   operations, each of which checks the data that a guest may have written.
//! * `inflight.rs`: marks of requests in flight, which outlive this process.
//! * `queue.rs`: the thread of a queue.
//!
//! When this process dies and is restarted, it creates the socket again. The front end reconnects (QEMU with
//! `reconnect=1`) and passes the marks, and the marked requests are submitted again. Late requests of the
//! dead process cannot land at an appliance behind these: a queue's channel has the same number in each life,
//! and so its new connections shut the old ones out.
//!
//! One front end is served at a time. The crates `vhost` and `vhost-user-backend` are not used here: the
//! latter does not track requests in flight, and neither can notify a front end of a changed size.

mod chain;
mod config;
mod fault;
mod inflight;
mod memory;
mod message;
mod queue;
mod request;
mod ring;
mod session;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use xpm_client_core::Volume;
use xpm_protocol::api::ErrorKind;

use self::message::ReceiveError;
use self::queue::DeviceFacts;
use self::request::ID_LEN;
use self::session::{Device, Session};
use super::{Health, Shape, Shown, socket};
use crate::error::{DeviceError, Step};
use crate::lifecycle;

/// Most queues of a guest by default: QEMU gives it one for each of its processors.
pub const QUEUES_DEFAULT: u16 = 16;

/// A socket at which an allocation is a vhost-user-blk device.
pub struct VhostUserBlk {
    path: PathBuf,
    device: Arc<Device>,
    server: Arc<Server>,
    /// None once it is hidden.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl VhostUserBlk {
    /// Listens.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when another process listens there.
    pub fn show(
        name: &str,
        path: &Path,
        volume: Volume,
        shape: &Shape,
        allow_unsealed: bool,
    ) -> Result<VhostUserBlk, DeviceError> {
        let listener = socket::bind(path).map_err(|error| socket::refused(error, path.display()))?;
        let at = || format!("serve {}", path.display());
        listener.set_nonblocking(true).at(at())?;
        let facts = DeviceFacts { size: AtomicU64::new(volume.size()), id: id(name) };
        let device = Arc::new(Device {
            name: name.to_owned(),
            volume,
            facts: Arc::new(facts),
            queues: shape.queues,
            block_size: shape.block_size.unwrap_or_default(),
            spin: shape.spin,
            allow_unsealed,
            listener: Mutex::new(None),
        });
        let server = Arc::new(Server {
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).at(at())?,
            ended: AtomicBool::new(false),
            give_up: AtomicBool::new(false),
            connected: AtomicUsize::new(0),
            connection: Mutex::new(None),
        });
        let (ours, theirs) = (Arc::clone(&server), Arc::clone(&device));
        let thread = thread::Builder::new()
            .name(format!("xpm-vu-{}", name.chars().take(24).collect::<String>()))
            .stack_size(lifecycle::STACK_LEN)
            .spawn(move || ours.run(&listener, &theirs))
            .at(at())?;
        Ok(VhostUserBlk { path: path.to_owned(), device, server, thread: Mutex::new(Some(thread)) })
    }
}

/// The name of an allocation for the guest, truncated if it is longer.
fn id(name: &str) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    let len = name.len().min(ID_LEN);
    id[..len].copy_from_slice(&name.as_bytes()[..len]);
    id
}

/// Serves front ends, one after the other, on a thread of its own. No I/O passes through it.
struct Server {
    /// Readable when the thread has to end.
    stop: OwnedFd,
    ended: AtomicBool,
    /// Whether the end does not wait for requests in flight.
    give_up: AtomicBool,
    connected: AtomicUsize,
    /// The front end's socket, which is shut down when the thread has to end.
    connection: Mutex<Option<UnixStream>>,
}

/// The first event.
enum Event {
    Stop,
    NewFrontEnd,
    Message,
    /// No event within the time limit.
    Nothing,
}

/// A front end that has sent no message for this long is waiting for no answer.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

impl Server {
    fn run(&self, listener: &UnixListener, device: &Arc<Device>) {
        while let Event::NewFrontEnd = self.wait(listener, None, None) {
            let Ok((socket, _)) = listener.accept() else { continue };
            if let Err(error) = self.serve(&socket, listener, device) {
                tracing::warn!(
                    "allocation {}: {error}; its vhost-user front end is disconnected",
                    device.name
                );
            }
            *self.connection() = None;
            self.connected.store(0, Ordering::Relaxed);
        }
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a front end until it disconnects or has to be disconnected.
    fn serve(
        &self,
        socket: &UnixStream,
        listener: &UnixListener,
        device: &Arc<Device>,
    ) -> Result<(), ReceiveError> {
        *self.connection() = Some(socket.try_clone()?);
        self.connected.store(1, Ordering::Relaxed);
        tracing::info!("allocation {}: a vhost-user front end is connected", device.name);
        let mut session = Session::new(Arc::clone(device));
        let outcome = self.exchange(socket, listener, &mut session, device);
        if self.give_up.load(Ordering::Relaxed) {
            session.stop_all(Duration::ZERO);
        }
        match outcome {
            Err(ReceiveError::Closed) => {
                tracing::info!("allocation {}: its vhost-user front end is gone", device.name);
                Ok(())
            }
            // This process shut the connection down.
            Err(_) if self.ended.load(Ordering::Relaxed) => Ok(()),
            outcome => outcome,
        }
    }

    fn exchange(
        &self,
        socket: &UnixStream,
        listener: &UnixListener,
        session: &mut Session,
        device: &Device,
    ) -> Result<(), ReceiveError> {
        // A front end that was connected before keeps the size that it read then, which may have changed
        // since. It is notified only when it is quiet: QEMU 7.2 mixes up the answers when it reads the
        // configuration space within another request.
        let mut told = false;
        loop {
            let quiet = (!told && session.serves()).then_some(&QUIET);
            match self.wait(listener, Some(socket), quiet) {
                Event::Stop => return Ok(()),
                Event::Nothing => {
                    told = true;
                    if let Some(Err(error)) = device.tell_config_change() {
                        tracing::warn!(
                            "allocation {}: its front end could not be notified of its size: {error}",
                            device.name
                        );
                    }
                }
                Event::NewFrontEnd => {
                    if listener.accept().is_ok() {
                        tracing::warn!(
                            "allocation {}: a second vhost-user front end was turned away; one is connected",
                            device.name
                        );
                    }
                }
                Event::Message => {
                    let message = message::receive(socket)?;
                    let handled = session.handle(message.request);
                    if let Err(refused) = &handled {
                        if !message.answered.can_be_refused() {
                            return Err(ReceiveError::Refused(refused.to_string()));
                        }
                        tracing::warn!(
                            "allocation {}: refused to its vhost-user front end: {refused}",
                            device.name
                        );
                    }
                    message::answer(socket, &message.answered, handled.as_ref().ok())?;
                }
            }
        }
    }

    fn wait(&self, listener: &UnixListener, socket: Option<&UnixStream>, limit: Option<&Timespec>) -> Event {
        loop {
            let mut watched =
                vec![PollFd::new(&self.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            watched.extend(socket.map(|socket| PollFd::new(socket, PollFlags::IN)));
            let waited = poll(&mut watched, limit);
            let ready = |place: usize| watched.get(place).is_some_and(|one| !one.revents().is_empty());
            match waited {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return Event::Nothing,
                _ if ready(0) => return Event::Stop,
                _ if ready(2) => return Event::Message,
                _ if ready(1) => return Event::NewFrontEnd,
                // Without memory poll(2) fails.
                _ => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Makes the thread end.
    fn end(&self, give_up: bool) -> io::Result<()> {
        self.give_up.store(give_up, Ordering::Relaxed);
        self.ended.store(true, Ordering::Relaxed);
        rustix::io::write(self.stop.as_fd(), &1_u64.to_ne_bytes())?;
        if let Some(socket) = &*self.connection() {
            // The thread may be waiting for the rest of a message.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        Ok(())
    }
}

impl Shown for VhostUserBlk {
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn health(&self) -> Health {
        Health::of(&self.device.volume)
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.device.volume)
    }

    fn clients(&self) -> usize {
        self.server.connected.load(Ordering::Relaxed)
    }

    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        self.device.facts.size.store(size, Ordering::Relaxed);
        if self.clients() == 0 {
            return Ok(None);
        }
        match self.device.tell_config_change() {
            Some(Ok(())) => Ok(None),
            Some(Err(error)) => {
                Ok(Some(format!("the virtual machine could not be notified of its new size: {error}")))
            }
            None => Ok(Some("the virtual machine sees the new size when it is started again".to_owned())),
        }
    }

    fn hide(&self, give_up: bool) -> Result<(), DeviceError> {
        self.stop(give_up)?;
        // The file may be gone already.
        let _ = std::fs::remove_file(&self.path);
        Ok(())
    }
}

impl VhostUserBlk {
    /// Disconnects the front end, and waits until no queue is served any more.
    fn stop(&self, give_up: bool) -> Result<(), DeviceError> {
        self.server.end(give_up).at(format!("stop serving {}", self.path.display()))?;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            let what = format!("the server of {} failed; see the log", self.path.display());
            return Err(DeviceError::new(ErrorKind::Internal, what));
        }
        Ok(())
    }
}

impl Drop for VhostUserBlk {
    fn drop(&mut self) {
        if let Err(error) = self.stop(true) {
            tracing::warn!("{error}");
        }
    }
}
