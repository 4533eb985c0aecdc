//! Control commands of ublk, one at a time, each waited for. They can block for as long as the device has I/O
//! in flight, and are called by control threads only.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::uapi::{self, ControlCommand, DeviceInfo, Params};
use crate::error::{DeviceError, Step};

/// An open control device.
pub(super) struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

const MODPROBE: &str = "load the kernel's module with `modprobe ublk_drv` (Linux 6.5 or newer, CONFIG_BLK_DEV_UBLK), \
                        or show the allocation as nbd or nbd-socket";

/// A control device opened in advance, for a process that takes devices over.
static SET_ASIDE: Mutex<Option<Control>> = Mutex::new(None);

/// Opens the control device in advance.
///
/// # Errors
/// As for [`Control::open`].
pub(super) fn set_aside() -> Result<(), DeviceError> {
    let mut ready = SET_ASIDE.lock().unwrap_or_else(PoisonError::into_inner);
    if ready.is_none() {
        *ready = Some(Control::open_new()?);
    }
    Ok(())
}

impl Control {
    /// The control device, opened now or in advance.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if the kernel has no ublk, or no io_uring for this process.
    pub(super) fn open() -> Result<Control, DeviceError> {
        let ready = SET_ASIDE.lock().unwrap_or_else(PoisonError::into_inner).take();
        ready.map_or_else(Control::open_new, Ok)
    }

    fn open_new() -> Result<Control, DeviceError> {
        let file =
            OpenOptions::new().read(true).write(true).open(uapi::CONTROL_PATH).map_err(
                |error| match error.kind() {
                    io::ErrorKind::NotFound => DeviceError::unsupported(
                        format!("{} is not there: this kernel has no ublk", uapi::CONTROL_PATH),
                        MODPROBE,
                    ),
                    io::ErrorKind::PermissionDenied => DeviceError::unsupported(
                        format!("{}: {error}", uapi::CONTROL_PATH),
                        "run xpm-blk as root (CAP_SYS_ADMIN)",
                    ),
                    _ => error.at(format!("open {}", uapi::CONTROL_PATH)),
                },
            )?;
        let ring = IoUring::builder().build(4).map_err(|error| {
            DeviceError::unsupported(
                format!("io_uring: {error}"),
                "allow io_uring for this process (sysctl kernel.io_uring_disabled=0, seccomp)",
            )
        })?;
        Ok(Control { file, ring })
    }

    /// The features of this kernel's driver, as bits `UBLK_F_*`.
    pub(super) fn features(&mut self) -> Result<u64, DeviceError> {
        let mut features = [0_u8; 8];
        self.command(uapi::GET_FEATURES, u32::MAX, &mut features, 0).map_err(|error| {
            DeviceError::unsupported(format!("ask ublk for its features: {error}"), MODPROBE)
        })?;
        Ok(u64::from_ne_bytes(features))
    }

    /// Adds a device; returns `info` as the kernel completed it, including the device's number.
    pub(super) fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo, DeviceError> {
        let mut bytes = info.encode();
        self.command(uapi::ADD_DEV, info.device, &mut bytes, 0).at("add a ublk device")?;
        Ok(DeviceInfo::decode(&bytes))
    }

    /// The kernel's information about a device; none when the device does not exist.
    pub(super) fn info(&mut self, device: u32) -> Result<Option<DeviceInfo>, DeviceError> {
        let mut bytes = [0; DeviceInfo::LEN];
        match self.command(uapi::GET_DEV_INFO, device, &mut bytes, 0) {
            Ok(()) => Ok(Some(DeviceInfo::decode(&bytes))),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => Ok(None),
            Err(error) => Err(error.at(format!("ask for ublk device {device}"))),
        }
    }

    /// Sets size and limits of a device before it is started.
    pub(super) fn set_params(&mut self, device: u32, params: Params) -> Result<(), DeviceError> {
        self.command(uapi::SET_PARAMS, device, &mut params.encode(), 0)
            .at(format!("set the parameters of ublk device {device}"))
    }

    /// Starts a device. Waits until every tag of every queue was fetched.
    pub(super) fn start(&mut self, device: u32) -> Result<(), DeviceError> {
        let pid = u64::from(std::process::id());
        self.command(uapi::START_DEV, device, &mut [], pid).at(format!("start ublk device {device}"))
    }

    /// The size of a device, in sectors of 512 bytes.
    pub(super) fn sectors(&mut self, device: u32) -> Result<u64, DeviceError> {
        let mut bytes = Params::empty();
        self.command(uapi::GET_PARAMS, device, &mut bytes, 0)
            .at(format!("ask for the parameters of ublk device {device}"))?;
        Ok(Params::sectors(&bytes))
    }

    /// Begins to give a device another server.
    ///
    /// # Errors
    /// `EBUSY` while the previous server is not completely gone, `EINVAL` if this was begun before and no
    /// queue has been fetched since.
    pub(super) fn start_recovery(&mut self, device: u32) -> io::Result<()> {
        self.command(uapi::START_USER_RECOVERY, device, &mut [], 0)
    }

    /// Completes the recovery: from here on requests arrive, including those of the previous server. Waits
    /// until every tag of every queue was fetched.
    pub(super) fn end_recovery(&mut self, device: u32) -> Result<(), DeviceError> {
        let pid = u64::from(std::process::id());
        self.command(uapi::END_USER_RECOVERY, device, &mut [], pid)
            .at(format!("complete the recovery of ublk device {device}"))
    }

    /// Stops a device: removes the disk, waits for its I/O, and ends every fetch.
    pub(super) fn stop(&mut self, device: u32) -> Result<(), DeviceError> {
        self.command(uapi::STOP_DEV, device, &mut [], 0).at(format!("stop ublk device {device}"))
    }

    /// Deletes a stopped device. Waits until its file is closed.
    pub(super) fn delete(&mut self, device: u32) -> Result<(), DeviceError> {
        self.command(uapi::DEL_DEV, device, &mut [], 0).at(format!("delete ublk device {device}"))
    }

    fn command(&mut self, number: u32, device: u32, buffer: &mut [u8], data: u64) -> io::Result<()> {
        let buffer = (buffer.as_mut_ptr().addr() as u64, buffer.len() as u16);
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), number)
            .cmd(ControlCommand { device, buffer, data }.encode())
            .build();
        // SAFETY: the descriptor is open while `self` lives. The command's buffer is borrowed for the whole
        // call, which does not return before the command has completed.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::ResourceBusy)?;
        let completion = loop {
            let submitted = self.ring.submit_and_wait(1);
            if let Some(completion) = self.ring.completion().next() {
                break completion;
            }
            match submitted {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Without a completion the kernel may still use the buffer, so the call cannot return.
                Err(error) => {
                    tracing::error!(%error, "io_uring failed under a ublk control command");
                    std::process::abort();
                }
            }
        };
        match completion.result() {
            0.. => Ok(()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}
