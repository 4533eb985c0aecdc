//! ublk: a block device of the kernel that this process serves, over the plain interface of
//! `linux/ublk_cmd.h`.
//!
//! The data of requests are in a buffer of ours for each tag: the kernel copies between the buffer and the
//! pages of the request, and the transport sends from and receives into the buffer. Towards shared memory,
//! this is one copy more than `UBLK_F_USER_COPY` needs, and one system call per request less; at the 4 KiB
//! and 32 KiB of swap the call costs more than the copy.
//!
//! Where the kernel supports it, a device outlives its server (`UBLK_F_USER_RECOVERY`): I/O waits for the
//! next server, which also receives the requests that the dead server had in flight (`_REISSUE`).
//! `recovery.rs` gives a device another server, `orphans.rs` removes devices that no record needs. The
//! channels ensure that late writes of the dead server do not land behind those of the new one: a queue's
//! channel has the same number and session in each life, and a higher generation.

mod control;
mod mark;
mod memory;
mod minder;
mod orphans;
mod queue;
mod recovery;
mod request;
mod ring;
mod uapi;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use xpm_client_core::Volume;
use xpm_protocol::api::ErrorKind;

use self::control::Control;
pub use self::mark::Mark;
use self::minder::Minder;
pub use self::orphans::remove as remove_orphans;
pub(crate) use self::recovery::prepare;
use self::uapi::{DeviceInfo, Params};
use super::{Health, Shape, Shown, io_len_max};
use crate::error::{DeviceError, Step};
use crate::links::Label;
use crate::{lifecycle, sysfs};

/// Physical blocks have 4096 bytes even where logical ones are smaller, so that file systems and swap align
/// to pages.
const PHYSICAL_BLOCK_SHIFT: u8 = 12;

/// The block layer limits a request to 4 GiB less a sector; this is the limit in whole pages.
const DISCARD_SECTORS_MAX: u32 = (u32::MAX >> 9) & !7;

/// How often the kernel checks for unanswered requests. When a server dies while all requests of a queue are
/// in flight, Linux before 6.16 notices only by this check (`ublk_timeout` in drivers/block/ublk_drv.c), and
/// no other server can take over before. It has no effect on a server that is alive.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A ublk device that this process serves.
pub struct UblkDevice {
    number: u32,
    disk: String,
    /// The size of the device in bytes: the volume's size when the device was created.
    size: u64,
    /// Whether it outlives its server.
    recoverable: bool,
    volume: Volume,
    label: Label,
    give_up: Arc<OwnedFd>,
    hidden: Arc<AtomicBool>,
    /// The thread that keeps it served; none once it is hidden.
    minder: Mutex<Option<JoinHandle<()>>>,
}

impl UblkDevice {
    /// Shows a volume: by the device with this mark that a dead process left, or by a new one. Blocks until
    /// the device can be used: for a new device until the kernel's first reads, which look for partitions,
    /// have ended; for a device that was left until its server is completely gone.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) if there is no ublk.
    pub fn show(volume: Volume, shape: &Shape, mark: Mark) -> Result<UblkDevice, DeviceError> {
        let mut control = Control::open()?;
        if let Some(left) = recovery::find(&mut control, shape.number, mark)? {
            return UblkDevice::recover(&mut control, volume, shape, left);
        }
        let info = add(&mut control, shape, mark)?;
        let made = UblkDevice::make(&mut control, volume, shape, info);
        if made.is_err() {
            let _ = control.delete(info.device);
        }
        made
    }

    fn make(
        control: &mut Control,
        volume: Volume,
        shape: &Shape,
        info: DeviceInfo,
    ) -> Result<UblkDevice, DeviceError> {
        let size = volume.size();
        control.set_params(
            info.device,
            Params {
                sectors: size >> 9,
                sectors_max: info.io_len_max >> 9,
                discard_sectors_max: DISCARD_SECTORS_MAX,
                logical_block_shift: shape.block_size.unwrap_or_default().bytes().ilog2() as u8,
                physical_block_shift: PHYSICAL_BLOCK_SHIFT,
            },
        )?;
        let device = UblkDevice::serve(volume, shape, info, size)?;
        device.label.announce();
        if let Err(error) = control.start(info.device) {
            let _ = device.stop(control);
            device.label.remove(&device.disk);
            return Err(error);
        }
        sysfs::tune(&device.disk);
        sysfs::set_look_interval(&device.disk, LOOK_EVERY);
        device.label.link(&device.disk);
        Ok(device)
    }

    /// Takes over a device whose server died.
    fn recover(
        control: &mut Control,
        volume: Volume,
        shape: &Shape,
        left: DeviceInfo,
    ) -> Result<UblkDevice, DeviceError> {
        let size = control.sectors(left.device)? << 9;
        if size > volume.size() {
            let what = format!(
                "ublk device {} has {size} bytes, and its allocation only {}: it cannot be served",
                left.device,
                volume.size()
            );
            return Err(DeviceError::new(ErrorKind::Internal, what));
        }
        recovery::start(control, left.device)?;
        let device = UblkDevice::serve(volume, shape, left, size)?;
        if let Err(error) = control.end_recovery(left.device) {
            // The device's queues are fetched and this process cannot continue, so another process has to
            // try.
            tracing::error!("{error}; ending, so that another process can take the device over");
            lifecycle::die();
        }
        tracing::info!("took over ublk device {}, which an earlier xpm-blk left", left.device);
        Ok(device)
    }

    /// Serves the queues of a device that the kernel has not started, or whose recovery is not complete.
    fn serve(volume: Volume, shape: &Shape, info: DeviceInfo, size: u64) -> Result<UblkDevice, DeviceError> {
        let give_up = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).at("make an eventfd")?);
        let hidden = Arc::new(AtomicBool::new(false));
        let minder = Minder {
            volume: volume.clone(),
            shape: shape.clone(),
            info,
            size,
            give_up: Arc::clone(&give_up),
            hidden: Arc::clone(&hidden),
        };
        let minder = minder.start()?;
        let disk = format!("ublkb{}", info.device);
        Ok(UblkDevice {
            number: info.device,
            label: Label::new(&disk, &shape.name),
            disk,
            size,
            recoverable: info.flags & uapi::F_USER_RECOVERY_REISSUE != 0,
            volume,
            give_up,
            hidden,
            minder: Mutex::new(Some(minder)),
        })
    }

    /// Makes the kernel stop the device, and waits for its threads.
    fn stop(&self, control: &mut Control) -> Result<(), DeviceError> {
        self.hidden.store(true, Ordering::Relaxed);
        let stopped = control.stop(self.number);
        if stopped.is_err() {
            self.hidden.store(false, Ordering::Relaxed);
            return stopped;
        }
        let minder = self.minder.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(minder) = minder {
            // A panic of a queue has ended the process already.
            let _ = minder.join();
        }
        Ok(())
    }
}

fn add(control: &mut Control, shape: &Shape, mark: Mark) -> Result<DeviceInfo, DeviceError> {
    let recovery = (uapi::F_USER_RECOVERY | uapi::F_USER_RECOVERY_REISSUE) & control.features()?;
    let info = DeviceInfo {
        queues: shape.queues,
        depth: shape.depth,
        state: uapi::STATE_DEAD,
        io_len_max: io_len_max(shape.buffer_len, shape.depth),
        device: shape.number.unwrap_or(u32::MAX),
        pid: -1,
        flags: uapi::F_CMD_IOCTL_ENCODE | recovery,
        mark: mark.bits(),
    };
    match control.add(info) {
        Err(_) if shape.number.is_some() => control.add(DeviceInfo { device: u32::MAX, ..info }),
        result => result,
    }
}

impl Shown for UblkDevice {
    fn path(&self) -> String {
        format!("/dev/{}", self.disk)
    }

    fn disk(&self) -> Option<&str> {
        Some(&self.disk)
    }

    fn number(&self) -> Option<u32> {
        Some(self.number)
    }

    fn health(&self) -> Health {
        Health::of(&self.volume)
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        let shown = xpm_protocol::ByteSize(self.size);
        Ok((size > self.size).then(|| {
            format!(
                "/dev/{} goes on to show {shown}: this kernel cannot resize ublk devices; detach and attach it again when nobody \
                 uses it",
                self.disk
            )
        }))
    }

    fn can_shrink(&self) -> bool {
        false
    }

    fn waits_for_next_process(&self) -> bool {
        self.recoverable
    }

    fn hide(&self, give_up: bool) -> Result<(), DeviceError> {
        let mut control = Control::open()?;
        if give_up {
            rustix::io::write(&*self.give_up, &1_u64.to_ne_bytes()).at("wake the queues")?;
        }
        self.stop(&mut control)?;
        self.label.remove(&self.disk);
        control.delete(self.number)
    }
}

/// Whether this kernel has ublk, and this process may use it.
///
/// # Errors
/// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) with the missing part.
pub fn check_support() -> Result<(), DeviceError> {
    Control::open()?.features().map(drop)
}

/// Whether the driver is loaded. Checks one path.
pub fn is_there() -> bool {
    std::path::Path::new(uapi::CONTROL_PATH).exists()
}

/// Whether devices of this kernel outlive their server.
pub fn can_recover() -> bool {
    let wanted = uapi::F_USER_RECOVERY | uapi::F_USER_RECOVERY_REISSUE;
    Control::open()
        .and_then(|mut control| control.features())
        .is_ok_and(|features| features & wanted == wanted)
}

/// The numbers of all ublk devices.
fn device_numbers() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/dev") else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_ublk_the_error_names_the_module_to_load() {
        if std::path::Path::new(uapi::CONTROL_PATH).exists() {
            return;
        }
        let error = Control::open().err().expect("there is no control device");
        assert!(error.to_string().contains("modprobe ublk_drv"), "{error}");
    }
}
