//! Form `nbd`: the kernel gets one end of a socket pair, this process serves the other.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use xpm_client_core::Volume;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::nbd::ExportInfo;
use xpm_transport::nbd::server::{Opened, Server};

use super::source::Source;
use crate::error::{DeviceError, Step};
use crate::export;
use crate::frontend::Health;
use crate::sysfs::Statistics;

/// How long to wait for appliances to close the connections of an earlier process.
const SHUT_OUT_WITHIN: Duration = Duration::from_secs(2);

/// Serves a volume to the kernel.
pub(super) struct Local {
    server: Server,
    volume: Volume,
    /// Group number of the first queue's connections at the server; each further queue adds its number.
    group: u128,
    queues: u16,
}

impl Local {
    /// No time limit of a request: with one socket the kernel then only checks every [`Local::LOOK_EVERY`]
    /// whether the request's socket was replaced, and never closes a connection because I/O is held.
    pub(super) const TIMEOUT_OF_ONE: Option<Duration> = None;

    /// How often the kernel checks whether a request's socket was replaced; this is the pause when this
    /// process is replaced. The kernel logs a line at each check of a waiting request.
    pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

    /// With several sockets the kernel moves a request that took too long to another socket, while the first
    /// one may still execute it: the limit is so long that only a dead process reaches it.
    pub(super) const TIMEOUT_OF_SEVERAL: Option<Duration> = Some(Duration::from_secs(24 * 3600));

    pub(super) fn new(server: Server, volume: Volume, group: u128, queues: u16) -> Local {
        Local { server, volume, group, queues }
    }

    const fn group_of(&self, queue: u16) -> u128 {
        self.group.wrapping_add(queue as u128)
    }
}

impl Source for Local {
    fn server_flags(&self) -> u16 {
        export::kernel_flags().bits()
    }

    fn socket(&self, queue: u16) -> Result<OwnedFd, DeviceError> {
        let step = || format!("serve queue {queue} of a kernel nbd device");
        let (kernel, ours) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).at(step())?;
        // The kernel repeats requests that had no answer. So no late request of the queue's earlier channel
        // may land any more, also if another process sent it; and a queue may have only one channel at a
        // time.
        self.server.close_group(self.group_of(queue));
        let channel = self.volume.channel_of(queue).at(step())?;
        let opened = Opened {
            // The kernel learns the size and its changes by netlink; the channel checks the range of each
            // request.
            info: ExportInfo { size: i64::MAX as u64, ..export::info(&self.volume, None) },
            store: Box::new(channel),
            group: self.group_of(queue),
            session: None,
        };
        self.server.adopt(ours, opened).at(step())?;
        Ok(kernel)
    }

    /// An appliance closes a queue's earlier connection when it accepts the next one.
    fn shut_out_all(&self) {
        if self.queues > 1
            && let Err(error) = self.volume.wait_ready(SHUT_OUT_WITHIN)
        {
            tracing::warn!(
                "continuing before all appliances have closed the connections of an earlier \
                 process: {error}"
            );
        }
    }

    /// The server notices the end of each socket that the kernel released, also of a socket that it never
    /// took.
    fn dead(&self) -> Vec<u16> {
        (0..self.queues).filter(|queue| self.server.connections(Some(self.group_of(*queue))) == 0).collect()
    }

    /// The kernel's counters, because the server bypasses the volume where it accesses memory in place.
    fn health(&self, statistics: Statistics) -> Health {
        let health = Health::of(&self.volume);
        let counters = Counters { errors: health.counters.errors, ..statistics.counters() };
        Health { counters, in_flight: statistics.in_flight, ..health }
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn close(&self) {
        (0..self.queues).for_each(|queue| self.server.close_group(self.group_of(queue)));
    }
}
