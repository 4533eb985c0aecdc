//! Keeps the queues of a device served until the device is hidden.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use xpm_client_core::Volume;
use xpm_protocol::api::ErrorKind;
use xpm_transport::spin::Spin;

use super::control::Control;
use super::queue::{self, Gate, QueueParts};
use super::recovery;
use super::uapi::{self, DeviceInfo};
use crate::error::{DeviceError, Step};
use crate::frontend::Shape;
use crate::lifecycle;
use crate::watch::Pulse;

/// The resources that serve a device.
pub(super) struct Minder {
    pub(super) volume: Volume,
    pub(super) shape: Shape,
    pub(super) info: DeviceInfo,
    /// The size of the device in bytes.
    pub(super) size: u64,
    /// Readable once every request has to fail.
    pub(super) give_up: Arc<OwnedFd>,
    /// Whether this process is stopping the device.
    pub(super) hidden: Arc<AtomicBool>,
}

/// The device file and the queues' threads.
struct Running {
    device: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Minder {
    /// Serves the queues by threads of their own, and by new threads if the kernel ends the first ones. A
    /// supervising thread does the latter; it ends when the device has stopped. Blocks until all tags are
    /// fetched.
    ///
    /// # Errors
    /// When a queue cannot be served; then no queue is served.
    pub(super) fn start(self) -> Result<JoinHandle<()>, DeviceError> {
        let (tell, told) = sync_channel(1);
        let name = format!("xpm-ublk{}", self.info.device);
        let at = format!("start a thread for ublk device {}", self.info.device);
        let mind = move || match self.start_queues() {
            Ok(running) => {
                let _ = tell.send(Ok(()));
                self.mind(running);
            }
            Err(error) => drop(tell.send(Err(error))),
        };
        let thread =
            thread::Builder::new().name(name).stack_size(lifecycle::STACK_LEN).spawn(mind).at(at.clone())?;
        told.recv().unwrap_or_else(|_| Err(DeviceError::new(ErrorKind::Internal, at)))?;
        Ok(thread)
    }

    fn mind(&self, mut running: Running) {
        let device = self.info.device;
        loop {
            for thread in running.threads {
                // A panic of a queue has ended the process already.
                let _ = thread.join();
            }
            // Closed before the kernel can give the device another server, even this process.
            drop(running.device);
            if self.hidden.load(Ordering::Relaxed) {
                return;
            }
            running = match self.go_on() {
                Ok(Some(running)) => running,
                Ok(None) => {
                    tracing::error!("ublk device {device} was stopped by another program; detach it");
                    return;
                }
                Err(error) => {
                    tracing::error!("{error}; ending, so that another process can take the device over");
                    lifecycle::die();
                }
            };
            tracing::warn!("the kernel had ended the service of ublk device {device}; it is served again");
        }
    }

    /// Serves the device again after the kernel ended its fetches; none when the device does not exist any
    /// more.
    fn go_on(&self) -> Result<Option<Running>, DeviceError> {
        let device = self.info.device;
        let mut control = Control::open()?;
        let found = control.info(device)?.filter(|info| info.mark == self.info.mark);
        if found.is_none_or(|info| info.state == uapi::STATE_DEAD) {
            return Ok(None);
        }
        recovery::start(&mut control, device)?;
        let running = self.start_queues()?;
        control.end_recovery(device)?;
        Ok(Some(running))
    }

    fn start_queues(&self) -> Result<Running, DeviceError> {
        let Minder { volume, shape, info, size, give_up, .. } = self;
        let device = Arc::new(open_device(info.device)?);
        let gate = Arc::new(Gate::default());
        let (ready, answers) = sync_channel(2 * usize::from(info.queues));
        let mut threads = Vec::with_capacity(usize::from(info.queues));
        let mut outcome = Ok(());
        for id in 0..info.queues {
            let name = format!("xpm-ublk{}q{id}", info.device);
            let spawned = Pulse::new(name.clone()).and_then(|pulse| {
                let parts = QueueParts {
                    id,
                    depth: info.depth,
                    size: *size,
                    io_len_max: info.io_len_max,
                    device: Arc::clone(&device),
                    give_up: Arc::clone(give_up),
                    channel: volume.channel_of(id)?,
                    spin: Spin::new(shape.spin),
                    pulse,
                };
                let (gate, ready) = (Arc::clone(&gate), ready.clone());
                let builder = thread::Builder::new().name(name).stack_size(lifecycle::STACK_LEN);
                builder.spawn(move || queue::run(parts, &gate, &ready))
            });
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    outcome = Err(error.at(format!("start queue {id} of ublk device {}", info.device)));
                    break;
                }
            }
        }
        drop(ready);
        let hear_all = |outcome: Result<(), DeviceError>| {
            (0..threads.len()).fold(outcome, |outcome, _| {
                let answer = answers.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
                outcome.and(answer.at(format!("start the queues of ublk device {}", info.device)))
            })
        };
        let outcome = hear_all(outcome);
        gate.decide(outcome.is_ok());
        if let Err(error) = outcome {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            return Err(error);
        }
        if let Err(error) = hear_all(Ok(())) {
            // Some of its queues are fetched; only the end of this process undoes that.
            tracing::error!("{error}");
            lifecycle::die();
        }
        Ok(Running { device, threads })
    }
}

/// Opens `/dev/ublkcN`, which the kernel creates with the device; if udev creates the nodes, it may take a
/// moment.
fn open_device(number: u32) -> Result<OwnedFd, DeviceError> {
    let path = format!("/dev/ublkc{number}");
    let limit = Instant::now() + Duration::from_secs(3);
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file.into()),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy)
                    && Instant::now() < limit =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.at(format!("open {path}"))),
        }
    }
}
