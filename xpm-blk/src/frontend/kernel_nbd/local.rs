//! Form `nbd`: the kernel gets one end of a socket pair, this process serves the other.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use xpm_client::Volume;
use xpm_protocol::api::appliance::Counters;
use xpm_protocol::nbd::ExportInfo;
use xpm_transport::nbd::server::{Opened, Server};

use super::source::Source;
use crate::error::{DeviceError, Step};
use crate::export;
use crate::frontend::Health;
use crate::sysfs::Statistics;

/// How long appliances are waited for that have to shut out an earlier process.
const SHUT_OUT_WITHIN: Duration = Duration::from_secs(2);

/// Serves a volume to the kernel.
pub(super) struct Local {
    server: Server,
    volume: Volume,
    /// Names the device's connections at the server, each queue's by its number more.
    group: u128,
    queues: u16,
}

impl Local {
    /// No limit of one request: with one socket, the kernel then only looks every [`Local::LOOK_EVERY`] whether the
    /// request's socket was replaced, and never kills a connection because I/O is held.
    pub(super) const TIMEOUT_OF_ONE: Option<Duration> = None;

    /// How often the kernel looks whether a request's socket was replaced: the pause when this process was. The kernel
    /// logs a line each time for a request that waits.
    pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

    /// With several sockets the kernel moves a request that took too long to another one, while
    /// the first may still carry it out: so late that only a dead process is meant.
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
        // The kernel submits again what it had no answer to. So nothing that the queue's earlier channel sent may land any more,
        // also if that was another process's; and there may be one channel of a queue at a time.
        self.server.close_group(self.group_of(queue));
        let channel = self.volume.channel_of(queue).at(step())?;
        let opened = Opened {
            // The kernel knows the size by netlink, also when it changes; the channel checks what it asks for.
            info: ExportInfo { size: i64::MAX as u64, ..export::info(&self.volume, None) },
            store: Box::new(channel),
            group: self.group_of(queue),
            session: None,
        };
        self.server.adopt(ours, opened).at(step())?;
        Ok(kernel)
    }

    /// An appliance shuts out a queue's earlier connection when it has the next one.
    fn shut_out_all(&self) {
        if self.queues > 1
            && let Err(error) = self.volume.wait_ready(SHUT_OUT_WITHIN)
        {
            tracing::warn!("goes on before all of an earlier process is shut out: {error}");
        }
    }

    /// The server sees the end of each socket that the kernel let go of, also of one that it never took.
    fn dead(&self) -> Vec<u16> {
        (0..self.queues).filter(|queue| self.server.connections(Some(self.group_of(*queue))) == 0).collect()
    }

    /// The kernel's numbers: the server goes past the volume where it accesses memory in place.
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
