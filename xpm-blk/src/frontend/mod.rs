//! The forms in which an allocation is shown: each front end turns a [`Volume`] (or, for
//! `nbd-direct`, the map itself) into something with a path, and takes it away again.

pub(crate) mod fuse;
pub mod kernel_nbd;
pub mod nbd_socket;
pub mod ublk;
pub mod vhost_user;

pub(crate) mod buffers;

mod socket;

use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xpm_client::Volume;
use xpm_client::owner::Guarded;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::api::blk::{Cache, DeviceState, Form, LinkStatus};
use xpm_protocol::{ApplianceId, BlockSize, Name};

use self::fuse::Mounted;
use crate::error::DeviceError;

/// How a device is made, with every default resolved.
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
    /// The number that the device had before (`N` of `/dev/ublkbN` or `/dev/nbdN`), to be had
    /// again if it can.
    pub number: Option<u32>,
    /// The allocation's name, for links to the device.
    pub name: Name,
    /// Logical block size; none where clients choose.
    pub block_size: Option<BlockSize>,
}

/// An allocation that is shown. Dropping it without [`Shown::hide`] leaves what the kernel has.
pub(crate) trait Shown: Send + Sync {
    /// The device node, or the socket.
    fn path(&self) -> String;

    /// The kernel's name of the block device (`ublkb0`); none for a socket.
    fn disk(&self) -> Option<&str>;

    /// Number to ask for when the device is made again.
    fn number(&self) -> Option<u32>;

    /// How I/O is going.
    fn health(&self) -> Health;

    /// Clients that are connected, for forms that clients connect to.
    fn clients(&self) -> usize {
        0
    }

    /// Whether the device goes on to serve I/O when this process ends.
    fn outlives_process(&self) -> bool {
        false
    }

    /// Whether the kernel keeps the device, and holds its I/O, until the next process takes it over.
    fn waits_for_next_process(&self) -> bool {
        false
    }

    /// The descriptor that the next process needs, beside the record, to go on with it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Of a file: what its mount was made with.
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
    /// When the form has no such thing.
    fn abort(&self) -> Result<(), DeviceError> {
        Err(DeviceError::unsupported("only a file can be aborted", "use `xpm blk detach NAME --force`"))
    }

    /// What the kernel caches of its data; where `drop` is set, after changed pages were written back and all were dropped that
    /// nobody touched meanwhile. Blocks for as long as that takes.
    ///
    /// # Errors
    /// When the form has no cache that belongs to it alone.
    fn cache(&self, drop: bool) -> Result<Cache, DeviceError> {
        let _ = drop;
        Err(DeviceError::unsupported("only a file has a cache of its own", "use blockdev --flushbufs"))
    }

    /// The volume behind it; none where the kernel or a client goes to the appliance itself.
    fn volume(&self) -> Option<&Volume> {
        None
    }

    /// What the allocator's word on the paths to the appliances is told to.
    fn guarded(&self) -> Option<&dyn Guarded> {
        self.volume().map(|volume| volume as &dyn Guarded)
    }

    /// The allocation has this size now: makes the device follow. In one line, what became of it where it
    /// cannot, or not wholly. Blocks.
    ///
    /// # Errors
    /// When the kernel refuses; the device has its old size.
    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        let _ = size;
        Ok(None)
    }

    /// Whether the device can become smaller while it is there.
    fn can_shrink(&self) -> bool {
        true
    }

    /// An appliance does not come back: I/O that it has or would have ends with an error, for good. `why` is what people are
    /// told.
    fn give_up(&self, appliance: ApplianceId, why: &str) {
        if let Some(volume) = self.volume() {
            volume.give_up(appliance, why);
        }
    }

    /// Takes the device away and waits until nothing uses its volume any more. Waits for I/O in
    /// flight, unless `give_up` is set: then that I/O fails.
    ///
    /// # Errors
    /// When the kernel refuses; the device is then still there.
    fn hide(&self, give_up: bool) -> Result<(), DeviceError>;
}

/// How I/O of a device is going.
#[derive(Debug, Clone)]
pub struct Health {
    /// Whether I/O passes.
    pub state: DeviceState,
    /// The appliances behind the device.
    pub links: Vec<LinkStatus>,
    /// What passed since it was attached.
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

/// Whether this kernel can have a form's device. Blocks for a moment.
///
/// # Errors
/// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) with what is missing.
pub fn check_support(form: &Form) -> Result<(), DeviceError> {
    match form {
        Form::Ublk => ublk::check_support(),
        Form::Nbd | Form::NbdDirect => kernel_nbd::check_support(),
        Form::NbdSocket(_) | Form::VhostUser(_) => Ok(()),
        Form::File(_) => fuse::check_support(),
    }
}

/// Whether this host may have to write to a form's device before it has memory again, as to swap or as back to a file,
/// and so needs a process that is safe for it. A guest's swap is no part of what this host needs to go on.
pub const fn can_carry_swap(form: &Form) -> bool {
    !matches!(form, Form::NbdSocket(_) | Form::VhostUser(_))
}

/// Whether a form can be shown while its I/O waits for the allocation: a kernel looks for partitions on each new device, and
/// would wait with it.
pub const fn can_stand_by(form: &Form) -> bool {
    matches!(form, Form::NbdSocket(_) | Form::VhostUser(_) | Form::File(_))
}

/// Seconds since 1970: higher than any generation that an earlier process of this device used, unless two of them began
/// within a moment, or the clock was set back; [`crate::records::Record::begin_life`] sees to that.
pub(crate) fn first_generation() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    seconds as u32
}

/// Longest read or write of one request, in bytes: the buffers of a queue's tags together take
/// `buffer_len`, each at least 64 KiB (32 KiB is what swap reads) and at most 1 MiB.
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
