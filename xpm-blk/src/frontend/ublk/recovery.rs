//! A device gets another server.

use std::fs;
use std::io;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use super::control::{self, Control};
use super::device_numbers;
use super::mark::Mark;
use super::uapi::{self, DeviceInfo};
use crate::error::{DeviceError, Step};
use crate::frontend::{Shape, io_len_max};
use crate::lifecycle::STACK_LEN;

/// How long a server that has died may take to be wholly gone, before the caller is told and tries again.
const GONE_LIMIT: Duration = Duration::from_secs(60);
/// Reading or writing it waits for a turn of the kernel's common work queue on each processor
/// (`Documentation/admin-guide/sysctl/vm.rst`, and `vmstat_refresh` in mm/vmstat.c).
const TURN_OF_WORK: &str = "/proc/sys/vm/stat_refresh";
/// How long that may take, and the pause after it, in which what has its turn ends.
const SETTLE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(10));
/// First and longest pause between two looks whether it is.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// The device with this mark, looked for at `number` first. One that the kernel has given up is deleted and counts as
/// none.
pub(super) fn find(
    control: &mut Control,
    number: Option<u32>,
    mark: Mark,
) -> Result<Option<DeviceInfo>, DeviceError> {
    let mut marked =
        |number| Ok::<_, DeviceError>(control.info(number)?.filter(|info| info.mark == mark.bits()));
    let mut found = number.map(&mut marked).transpose()?.flatten();
    if found.is_none() {
        for number in device_numbers() {
            found = found.or(marked(number)?);
        }
    }
    match found {
        Some(info) if info.state == uapi::STATE_DEAD || info.flags & uapi::F_USER_RECOVERY == 0 => {
            control.delete(info.device)?;
            Ok(None)
        }
        found => Ok(found),
    }
}

/// Has the kernel forget the server of a device, as soon as that is wholly gone, and with it what was to be done about its death.
pub(super) fn start(control: &mut Control, device: u32) -> Result<(), DeviceError> {
    let since = Instant::now();
    let mut pause = PAUSES.0;
    loop {
        let error = match control.start_recovery(device) {
            Ok(()) => {
                settle();
                return Ok(());
            }
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if since.elapsed() < GONE_LIMIT => {}
            // It was begun by a process that died before it had fetched anything.
            Some(libc::EINVAL) if is_quiesced(control, device)? => return Ok(()),
            Some(libc::EBUSY) => {
                let error = io::Error::from(io::ErrorKind::TimedOut);
                return Err(error.at(format!("take over ublk device {device}, whose server is still there")));
            }
            _ => return Err(error.at(format!("take over ublk device {device}"))),
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Lets the driver end what it began when the server died. Linux 6.12 asks for that once for each queue
/// (`ublk_uring_cmd_cancel_fn`), on the common work queue: what has its turn only when the next server has fetched, ends
/// the fetches of that one.
fn settle() {
    let (done, told) = sync_channel(1);
    let turn = move || {
        // Where it cannot be had, the pause has to do.
        let _ = fs::write(TURN_OF_WORK, "1");
        let _ = done.send(());
    };
    // Apart, for a limit: the workers may wait for memory, and so for this device.
    if thread::Builder::new().name("xpm-settle".to_owned()).stack_size(STACK_LEN).spawn(turn).is_ok() {
        let _ = told.recv_timeout(SETTLE.0);
    }
    thread::sleep(SETTLE.1);
}

fn is_quiesced(control: &mut Control, device: u32) -> Result<bool, DeviceError> {
    Ok(control.info(device)?.is_some_and(|info| info.state == uapi::STATE_QUIESCED))
}

/// Has the control device ready for taking over devices of these shapes. Returns the lengths of the buffers that their
/// queues need, in bytes. Blocks.
///
/// # Errors
/// When there is no ublk.
pub(crate) fn prepare(shapes: &[Shape]) -> Result<Vec<usize>, DeviceError> {
    if shapes.is_empty() {
        return Ok(Vec::new());
    }
    let mut control = Control::open()?;
    let mut lens = Vec::new();
    for shape in shapes {
        let info = shape.number.map(|number| control.info(number)).transpose()?.flatten();
        let (queues, depth, each_len) = info
            .map_or((shape.queues, shape.depth, io_len_max(shape.buffer_len, shape.depth)), |info| {
                (info.queues, info.depth, info.io_len_max)
            });
        lens.extend((0..queues).map(|_| usize::from(depth) * each_len as usize));
    }
    control::set_aside()?;
    Ok(lens)
}
