//! The forms in which an allocation is shown. Each front end turns a [`Volume`] (or, for `nbd-direct`, the
//! map itself) into an object with a path, and removes that object again.

pub(crate) mod fuse;
pub mod kernel_nbd;
pub mod nbd_socket;
pub mod ublk;
pub mod vhost_user;

pub(crate) mod buffers;

mod socket;

use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xpm_client_core::Volume;
use xpm_client_core::owner::Guarded;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::api::blk::{Cache, DeviceState, Form, LinkStatus};
use xpm_protocol::{ApplianceId, BlockSize, Name};

use self::fuse::Mounted;
use crate::error::DeviceError;

/// The parameters of a device, including all defaults.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Queues; at least 1.
    pub queues: u16,
    /// Requests in flight on one queue; at least 1.
    pub depth: u16,
    /// Longest busy wait of a thread.
    pub spin: Duration,
    /// Memory for the buffers of one queue, in bytes.
    pub buffer_len: u64,
    /// The number that the device had before (`N` of `/dev/ublkbN` or `/dev/nbdN`), which is requested again.
    pub number: Option<u32>,
    /// The allocation's name, for links to the device.
    pub name: Name,
    /// Logical block size; none if clients choose.
    pub block_size: Option<BlockSize>,
}

/// A shown allocation. Dropping it without [`Shown::hide`] leaves the kernel's objects in place.
pub(crate) trait Shown: Send + Sync {
    /// The device node, or the socket.
    fn path(&self) -> String;

    /// The kernel's name of the block device (`ublkb0`); none for a socket or a file.
    fn disk(&self) -> Option<&str> {
        None
    }

    /// Number to request when the device is created again; none where devices have no number.
    fn number(&self) -> Option<u32> {
        None
    }

    /// The state of I/O.
    fn health(&self) -> Health;

    /// Number of connected clients, for forms that clients connect to.
    fn clients(&self) -> usize {
        0
    }

    /// Whether the device continues to serve I/O when this process ends.
    fn outlives_process(&self) -> bool {
        false
    }

    /// Whether the kernel keeps the device, and holds its I/O, until the next process takes it over.
    fn waits_for_next_process(&self) -> bool {
        false
    }

    /// The descriptor that the next process needs, beside the record, to take the device over.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Of a file: the parameters of its mount.
    fn mounted(&self) -> Option<Mounted> {
        None
    }

    /// Programs that use it, for forms that are neither a block device nor a socket.
    fn users(&self) -> Vec<String> {
        Vec::new()
    }

    /// Ends all I/O of its users with an error, at once and for good.
    ///
    /// # Errors
    /// When the form does not support this.
    fn abort(&self) -> Result<(), DeviceError> {
        Err(DeviceError::unsupported("only a file can be aborted", "use `xpm blk detach NAME --force`"))
    }

    /// The kernel's cache of its data; with `drop`, after changed pages were written back and all pages were
    /// dropped that were not used meanwhile. Blocks until that is done.
    ///
    /// # Errors
    /// When the form has no cache of its own.
    fn cache(&self, drop: bool) -> Result<Cache, DeviceError> {
        let _ = drop;
        Err(DeviceError::unsupported("only a file has a cache of its own", "use blockdev --flushbufs"))
    }

    /// The volume behind it; none if the kernel or a client connects to the appliance itself.
    fn volume(&self) -> Option<&Volume> {
        None
    }

    /// The object that receives the allocator's statements about the paths to the appliances.
    fn guarded(&self) -> Option<&dyn Guarded> {
        self.volume().map(|volume| volume as &dyn Guarded)
    }

    /// Adjusts the device to a new size of the allocation. Returns one line about the result if the device
    /// cannot follow completely. Blocks.
    ///
    /// # Errors
    /// When the kernel refuses; the device has its old size.
    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        let _ = size;
        Ok(None)
    }

    /// Whether the device can shrink while it exists.
    fn can_shrink(&self) -> bool {
        true
    }

    /// Gives an appliance up for good: its pending and new I/O ends with an error. `why` is shown to
    /// operators.
    fn give_up(&self, appliance: ApplianceId, why: &str) {
        if let Some(volume) = self.volume() {
            volume.give_up(appliance, why);
        }
    }

    /// Removes the device and waits until its volume is not used any more. Waits for I/O in flight, unless
    /// `give_up` is set: then that I/O fails.
    ///
    /// # Errors
    /// When the kernel refuses; the device still exists then.
    fn hide(&self, give_up: bool) -> Result<(), DeviceError>;
}

/// The state of a device's I/O.
#[derive(Debug, Clone)]
pub struct Health {
    /// Whether I/O passes.
    pub state: DeviceState,
    /// The appliances behind the device.
    pub links: Vec<LinkStatus>,
    /// Counters since it was attached.
    pub counters: Counters,
    /// Requests in flight.
    pub in_flight: u64,
}

impl Health {
    pub(crate) fn of(volume: &Volume) -> Health {
        let status = volume.status();
        Health {
            state: status.state,
            links: status.links,
            counters: status.counters,
            in_flight: status.in_flight,
        }
    }
}

/// Whether this kernel supports a form. Blocks for a moment.
///
/// # Errors
/// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) with the missing part.
pub fn check_support(form: &Form) -> Result<(), DeviceError> {
    match form {
        Form::Ublk => ublk::check_support(),
        Form::Nbd | Form::NbdDirect => kernel_nbd::check_support(),
        Form::NbdSocket(_) | Form::VhostUser(_) => Ok(()),
        Form::File(_) | Form::Tree(_) | Form::InTree(_) => fuse::check_support(),
    }
}

/// Whether this host may have to write to a form's device before it can free memory, as with swap or the
/// write-back of a file. Such a device needs a process that is safe for swap. A guest's swap is not needed by
/// this host.
pub const fn can_carry_swap(form: &Form) -> bool {
    !matches!(form, Form::NbdSocket(_) | Form::VhostUser(_))
}

/// Whether a form can be shown while its I/O waits for the allocation: on each new block device, the kernel
/// looks for partitions, and would block on that.
pub const fn can_stand_by(form: &Form) -> bool {
    matches!(form, Form::NbdSocket(_) | Form::VhostUser(_) | Form::File(_))
}

/// Seconds since 1970: higher than any generation that an earlier process of this device used, unless two of
/// them began within a moment, or the clock was set back; [`crate::records::Record::begin_life`] handles
/// these cases.
pub(crate) fn first_generation() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    seconds as u32
}

/// Longest read or write of one request, in bytes: the buffers of a queue's tags together take `buffer_len`,
/// each at least 64 KiB (swap reads 32 KiB) and at most 1 MiB.
pub(crate) fn io_len_max(buffer_len: u64, depth: u16) -> u32 {
    let each = (buffer_len / u64::from(depth)).clamp(64 << 10, 1 << 20);
    1 << each.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_a_queue_stay_within_its_memory() {
        assert_eq!(io_len_max(16 << 20, 128), 128 << 10);
        assert_eq!(io_len_max(16 << 20, 16), 1 << 20);
        assert_eq!(io_len_max(16 << 20, 1), 1 << 20, "never longer than 1 MiB");
        assert_eq!(io_len_max(1 << 20, 1024), 64 << 10, "never shorter than a swap read");
        assert_eq!(io_len_max(24 << 20, 128), 128 << 10, "a power of two");
    }
}
