//! Recovery: giving a device another server.

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

/// How long a dead server may take to be completely gone, before the caller gets an error and tries again.
const GONE_LIMIT: Duration = Duration::from_secs(60);
/// Reading or writing this file waits for a turn of the kernel's common work queue on each processor
/// (`Documentation/admin-guide/sysctl/vm.rst`, and `vmstat_refresh` in mm/vmstat.c).
const TURN_OF_WORK: &str = "/proc/sys/vm/stat_refresh";
/// Time limit for that turn, and the pause after it, in which the queued work ends.
const SETTLE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(10));
/// Shortest and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// Finds the device with this mark, first at `number`. A device that the kernel has given up is deleted and
/// counts as none.
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

/// Makes the kernel forget the server of a device, as soon as the server is completely gone, together with
/// its queued work about the server's death.
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
            // The recovery was begun by a process that died before it had fetched a tag.
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

/// Lets the driver complete the work that it queued when the server died. Linux 6.12 queues it once for each
/// queue of the device (`ublk_uring_cmd_cancel_fn`), on the common work queue: work that runs only after the
/// next server has fetched ends the fetches of that server.
fn settle() {
    let (done, told) = sync_channel(1);
    let turn = move || {
        // If this file cannot be written, the pause has to suffice.
        let _ = fs::write(TURN_OF_WORK, "1");
        let _ = done.send(());
    };
    // On a separate thread, to have a time limit: the kernel's workers may wait for memory, and so for this
    // device.
    if thread::Builder::new().name("xpm-settle".to_owned()).stack_size(STACK_LEN).spawn(turn).is_ok() {
        let _ = told.recv_timeout(SETTLE.0);
    }
    thread::sleep(SETTLE.1);
}

fn is_quiesced(control: &mut Control, device: u32) -> Result<bool, DeviceError> {
    Ok(control.info(device)?.is_some_and(|info| info.state == uapi::STATE_QUIESCED))
}

/// Prepares the control device for taking over devices of these shapes. Returns the lengths of the buffers
/// that their queues need, in bytes. Blocks.
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
