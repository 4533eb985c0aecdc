//! A generic netlink socket.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// Length of the receive buffer in bytes: more than the longest message of the nbd driver or the control
/// family.
const DATAGRAM_LEN_MAX: usize = 32 << 10;

pub(super) struct Socket {
    fd: OwnedFd,
    datagram: Vec<u8>,
}

impl Socket {
    /// A socket whose receive calls wait at most `limit` for an answer.
    pub(super) fn open(limit: Duration) -> io::Result<Socket> {
        let flags = SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::GENERIC))?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&fd, Timeout::Recv, Some(limit))?;
        let socket = Socket { fd, datagram: vec![0; DATAGRAM_LEN_MAX] };
        // The kernel's reasons as text, and errors that do not repeat the request: optional, because an older
        // kernel may refuse the options.
        let _ = socket.set(libc::NETLINK_EXT_ACK, 1);
        let _ = socket.set(libc::NETLINK_CAP_ACK, 1);
        Ok(socket)
    }

    /// Makes the socket receive the messages of a multicast group, too.
    pub(super) fn join(&self, group: u32) -> io::Result<()> {
        self.set(libc::NETLINK_ADD_MEMBERSHIP, group as libc::c_int)
    }

    fn set(&self, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the option takes an int, whose address and length are passed; the descriptor is open.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub(super) fn send(&self, message: &[u8]) -> io::Result<()> {
        send(&self.fd, message, SendFlags::empty())?;
        Ok(())
    }

    /// The next datagram. Blocks up to the socket's time limit.
    pub(super) fn receive(&mut self) -> io::Result<&[u8]> {
        self.receive_with(RecvFlags::empty())
    }

    /// The next datagram that has arrived already. Never blocks.
    pub(super) fn receive_now(&mut self) -> io::Result<&[u8]> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with(&mut self, flags: RecvFlags) -> io::Result<&[u8]> {
        loop {
            match recv(&self.fd, &mut self.datagram[..], flags) {
                Ok((len, _)) => return Ok(&self.datagram[..len]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if flags.is_empty() => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer in time"));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
