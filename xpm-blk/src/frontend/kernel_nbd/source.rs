//! [`Source`]: supplies the sockets of a kernel nbd device.

use std::os::fd::OwnedFd;

use xpm_client_core::Volume;
use xpm_client_core::owner::Guarded;

use crate::error::DeviceError;
use crate::frontend::Health;
use crate::sysfs::Statistics;

/// Supplies the kernel with connected sockets, at first and to replace dead ones.
///
/// Called by control threads and by the device's watcher, never concurrently for one queue.
pub(super) trait Source: Send + Sync {
    /// Transmission flags that apply to every socket.
    fn server_flags(&self) -> u16;

    /// A connected socket for this queue, in the transmission phase. Late requests of the queue's previous
    /// socket are shut out before it is returned.
    ///
    /// # Errors
    /// The reason why no socket is available now; a later attempt may succeed.
    fn socket(&self, queue: u16) -> Result<OwnedFd, DeviceError>;

    /// Waits until late requests of an earlier process on any queue are shut out, by all appliances that can
    /// be reached. Needed because the kernel may repeat a request of one queue on another.
    fn shut_out_all(&self) {}

    /// Queues whose last socket is dead or was not taken by the kernel.
    fn dead(&self) -> Vec<u16>;

    /// Checks whether the appliance behind working sockets answers, if no volume does so. Blocks for some
    /// seconds at most.
    fn look(&self) {}

    /// The state of the device's I/O; `statistics` are the kernel's counters.
    fn health(&self, statistics: Statistics) -> Health;

    /// Stops all transfers if the sockets lead to an appliance that is given up; `why` is shown to operators.
    /// Returns whether they do, so that the device has to end.
    fn give_up(&self, why: &str) -> bool {
        let _ = why;
        false
    }

    /// The volume that is served; none if the sockets lead to the appliance.
    fn volume(&self) -> Option<&Volume>;

    /// The object that receives the allocator's statements about the paths to the appliances.
    fn guarded(&self) -> Option<&dyn Guarded> {
        self.volume().map(|volume| volume as &dyn Guarded)
    }

    /// Ends the server of the sockets; called after the kernel released them.
    fn close(&self);
}
