//! A channel as the store of an NBD server in this process.

use std::os::fd::BorrowedFd;

use xpm_transport::io::{Completion, IoBuf, Operation};
use xpm_transport::link::Full;
use xpm_transport::store::{Posted, Store};

use super::{Channel, Way};

impl Store for Channel {
    fn is_direct(&self) -> bool {
        let direct = |way: &Way| way.link.as_ref().is_some_and(|link| link.direct(0, 1).is_some());
        !self.following.is_changing() && self.ways.iter().all(|way| way.connector.is_none() || direct(way))
    }

    fn in_place(&mut self, unfinished: bool) {
        self.following.in_place = unfinished;
        if !unfinished && self.following.is_waiting() {
            self.take_orders();
        }
    }

    fn direct(&mut self, offset: u64, len: usize) -> Option<IoBuf> {
        if !self.plan.contains(offset, len as u64) {
            // The allocation was shrunk, and the client of the server has not learned of it yet.
            return None;
        }
        let leg = self.plan.first_leg(offset, len as u64);
        let way = &self.ways[leg.grant as usize];
        let link = way.link.as_ref().or(way.last_direct.as_ref())?;
        direct::buffer(&**link, leg.offset, leg.len as usize)
    }

    fn post(&mut self, operation: Operation) -> Posted {
        match Channel::post(self, operation) {
            Ok(()) => Posted::Pending,
            Err(Full) => Posted::Full,
        }
    }

    fn submit(&mut self) {
        Channel::submit(self);
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        Channel::poll(self, completions);
        // After submitting and polling, the server's loop either waits or queries its epoll set; both need an
        // armed channel.
        Channel::arm(self);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(Channel::wait_fd(self))
    }
}

mod direct {
    #![allow(unsafe_code)]

    use xpm_transport::io::IoBuf;
    use xpm_transport::link::Link;

    /// The link's memory as a buffer.
    pub(super) fn buffer(link: &dyn Link, offset: u64, len: usize) -> Option<IoBuf> {
        let address = link.direct(offset, len)?;
        // SAFETY: the link guarantees that `len` bytes at `address` are its memory for as long as it lives.
        // The channel keeps the link, or another one of the same grant, until the channel is dropped, and the
        // caller of `Store::direct` uses the buffer at once and not later.
        Some(unsafe { IoBuf::new(address, len) })
    }
}
