//! A connected queue pair of the client, made by the connection manager or over TCP.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_mummy_sys::ibv_qp;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::cm::{Channel, Id, Kind};
use super::plain::Pair as Plain;

/// A queue pair, and the source that reports its end.
pub(super) enum Pair {
    /// Connected by the connection manager.
    Managed { id: Id, events: Arc<Channel> },
    /// Connected by messages over a TCP connection, which stays open as long.
    Plain { pair: Option<Plain>, control: OwnedFd },
}

impl Pair {
    /// The queue pair, while there is one.
    pub(super) fn raw(&self) -> Option<NonNull<ibv_qp>> {
        match self {
            Pair::Managed { id, .. } => id.queue_pair(),
            Pair::Plain { pair, .. } => pair.as_ref().map(Plain::raw),
        }
    }

    /// Destroys the queue pair. After this call, the device no longer accesses a buffer for it.
    pub(super) fn destroy(&mut self) {
        match self {
            Pair::Managed { id, .. } => id.destroy_queue_pair(),
            Pair::Plain { pair, .. } => drop(pair.take()),
        }
    }

    /// A descriptor that is readable when there may be an event.
    pub(super) fn news(&self) -> BorrowedFd<'_> {
        match self {
            Pair::Managed { events, .. } => events.as_fd(),
            Pair::Plain { control, .. } => control.as_fd(),
        }
    }

    /// Takes pending events; returns whether the connection is over.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Pair::Managed { events, .. } => loop {
                match events.next() {
                    Ok(None) => return false,
                    Ok(Some(event)) => match event.kind {
                        Kind::Disconnected | Kind::DeviceRemoved | Kind::Failed | Kind::Rejected => {
                            return true;
                        }
                        _ => {}
                    },
                    Err(_) => return true,
                }
            },
            // The appliance sends nothing more, so any event means the end.
            Pair::Plain { control, .. } => {
                !matches!(recv(control, &mut [0; 1], RecvFlags::DONTWAIT), Err(Errno::AGAIN | Errno::INTR))
            }
        }
    }
}
