//! Scatter and gather on a stream socket, over memory that is given by address.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::net::sockopt;

use crate::io::IoBuf;

/// Most pieces in one call. More have no effect: the socket buffer is full before.
const PIECES_MAX: usize = 64;

/// Send buffer of a unix socket, in bytes.
const UNIX_SEND_LEN: usize = 2 << 20;

/// Enlarges the send buffer of a unix socket to hold several long messages, as TCP does by itself: otherwise
/// sender and receiver wake each other for each 200 KiB, and on a host with busy processors each wake-up
/// waits for a turn of other threads. A buffer above net.core.wmem_max needs privileges; other processes get
/// that maximum.
pub(crate) fn widen_unix(socket: BorrowedFd<'_>) -> rustix::io::Result<()> {
    sockopt::set_socket_send_buffer_size_force(socket, UNIX_SEND_LEN)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, UNIX_SEND_LEN))
}

/// The pieces of memory of one call, in order. The list takes one kilobyte: it is filled in place, and never
/// cleared or moved.
pub(crate) struct Pieces<'a> {
    /// The first `count` are initialized.
    list: [MaybeUninit<libc::iovec>; PIECES_MAX],
    count: usize,
    bytes: usize,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new() -> Pieces<'a> {
        Pieces { list: [MaybeUninit::uninit(); PIECES_MAX], count: 0, bytes: 0, borrowed: PhantomData }
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) const fn is_full(&self) -> bool {
        self.count == PIECES_MAX
    }

    /// Whether there is room for only one more piece: the receive buffer.
    pub(crate) const fn is_nearly_full(&self) -> bool {
        self.count + 1 >= PIECES_MAX
    }

    pub(crate) fn push(&mut self, piece: IoBuf) {
        self.push_raw(piece.as_ptr(), piece.len());
    }

    pub(crate) fn push_mut(&mut self, piece: &'a mut [u8]) {
        self.push_raw(piece.as_mut_ptr(), piece.len());
    }

    /// For [`send`] only: the bytes are only read.
    pub(crate) fn push_ref(&mut self, piece: &'a [u8]) {
        self.push_raw(piece.as_ptr().cast_mut(), piece.len());
    }

    /// Empty pieces, and pieces beyond [`PIECES_MAX`], are ignored.
    fn push_raw(&mut self, address: *mut u8, len: usize) {
        if len > 0 && !self.is_full() {
            self.list[self.count].write(libc::iovec { iov_base: address.cast(), iov_len: len });
            self.count += 1;
            self.bytes += len;
        }
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: `msghdr` is a plain C struct for which all zeros is a valid, empty value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // Neither recvmsg nor sendmsg writes to the list.
        message.msg_iov = self.list.as_ptr().cast_mut().cast();
        message.msg_iovlen = self.count as _;
        message
    }
}

/// Receives the available bytes into the pieces; never blocks. 0 is the end of the stream.
pub(crate) fn receive(socket: BorrowedFd<'_>, pieces: &mut Pieces<'_>) -> io::Result<usize> {
    let mut message = pieces.message();
    // SAFETY: the message points to `count` iovecs, each of memory that is writable for its length: borrowed
    // for as long as `pieces` lives, or mapped by the contract of `IoBuf::new`.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// Sends as many bytes of the pieces as the socket accepts; never blocks, never raises SIGPIPE.
pub(crate) fn send(socket: BorrowedFd<'_>, pieces: &Pieces<'_>) -> io::Result<usize> {
    let message = pieces.message();
    // SAFETY: as in `receive`; sendmsg(2) only reads the memory.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
/// Whether the error is about inaccessible memory, and not about the socket.
pub(super) fn is_bad_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Whether the socket will accept more later despite this error. A temporary lack of memory is no reason to
/// close the connection: under memory pressure, the transfers on it are needed to relieve the pressure.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM))
}
