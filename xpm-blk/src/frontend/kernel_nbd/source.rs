//! Where the sockets of a kernel nbd device lead.

use std::os::fd::OwnedFd;

use xpm_client::Volume;
use xpm_client::owner::Guarded;

use crate::error::DeviceError;
use crate::frontend::Health;
use crate::sysfs::Statistics;

/// Supplies the kernel with connected sockets, at first and in place of dead ones.
///
/// Called from control threads and from the device's watcher, never from two at once for one
/// queue.
pub(super) trait Source: Send + Sync {
    /// Transmission flags that hold for every socket.
    fn server_flags(&self) -> u16;

    /// A connected socket for this queue, in the transmission phase. What the queue's last socket
    /// left behind is shut out before.
    ///
    /// # Errors
    /// Why there is none now; trying again may help.
    fn socket(&self, queue: u16) -> Result<OwnedFd, DeviceError>;

    /// Waits until what an earlier process sent on any queue is shut out, by appliances that can be reached. The kernel may
    /// submit a request of one queue again on another.
    fn shut_out_all(&self) {}

    /// Queues whose last socket is dead or was not taken by the kernel.
    fn dead(&self) -> Vec<u16>;

    /// Looks whether the appliance at the other end of sockets that seem to work is there, where no volume does so. Blocks for
    /// some seconds at most.
    fn look(&self) {}

    /// How I/O of the device is going, of which the kernel counted `statistics`.
    fn health(&self, statistics: Statistics) -> Health;

    /// Lets nothing more pass where the sockets lead to an appliance that is given up; `why` is what people are told. Gives
    /// whether they do, and so the device has to end.
    fn give_up(&self, why: &str) -> bool {
        let _ = why;
        false
    }

    /// The volume that is served; none where the sockets lead to the appliance.
    fn volume(&self) -> Option<&Volume>;

    /// What the allocator's word on the paths to the appliances is told to.
    fn guarded(&self) -> Option<&dyn Guarded> {
        self.volume().map(|volume| volume as &dyn Guarded)
    }

    /// Ends what serves the sockets; called after the kernel let go of them.
    fn close(&self);
}
