//! The buffers of a queue, for the kernel's requests and their answers.
//!
//! In each buffer, the data of a WRITE and of the answer to a READ begin at a page border, and the headers end there.
//! So data are neither moved nor copied here, and are aligned for transports.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use xpm_fuse::Device;
use xpm_fuse::wire::{OUT_HEADER_LEN, WRITE_DATA_OFFSET};
use xpm_transport::io::IoBuf;

use crate::frontend::buffers::Buffers;

/// Offset of the data within a buffer, in bytes.
const DATA: usize = 4096;
/// Offset of a request, so that the data of a WRITE begin at [`DATA`].
const REQUEST: usize = DATA - WRITE_DATA_OFFSET;
/// Offset of an answer, so that the data behind its header begin at [`DATA`].
const ANSWER: usize = DATA - OUT_HEADER_LEN;

/// Length of a buffer for data of at most `io_len` bytes.
pub(super) const fn buffer_len(io_len: u32) -> usize {
    DATA + io_len as usize
}

/// The buffers. Each is either owned by the queue or lent to an operation.
pub(super) struct Requests {
    buffers: Buffers,
    io_len: usize,
    lent: Vec<bool>,
}

impl Requests {
    /// Buffers for `depth` requests with data of at most `io_len` bytes.
    pub(super) fn new(depth: u16, io_len: u32) -> io::Result<Requests> {
        let buffers = Buffers::new(depth, buffer_len(io_len))?;
        Ok(Requests { buffers, io_len: io_len as usize, lent: vec![false; usize::from(depth)] })
    }

    /// All memory, to be registered with transports.
    pub(super) const fn all(&self) -> IoBuf {
        self.buffers.all()
    }

    /// Reads a request into a buffer; returns its length.
    ///
    /// # Panics
    /// When the buffer is lent.
    pub(super) fn receive(&mut self, tag: u16, device: &Device) -> io::Result<usize> {
        let buffer = self.own(tag, REQUEST, DATA - REQUEST + self.io_len);
        loop {
            // SAFETY: the buffer is mapped and writable for its length, and no operation uses it (asserted by `own`).
            let read =
                unsafe { libc::read(device.as_fd().as_raw_fd(), buffer.as_ptr().cast(), buffer.len()) };
            match usize::try_from(read) {
                Ok(len) => return Ok(len),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    // ENOENT: the request was interrupted before it was read (fuse_dev_do_read in fs/fuse/dev.c).
                    match error.raw_os_error() {
                        Some(libc::EINTR | libc::ENOENT) => {}
                        _ => return Err(error),
                    }
                }
            }
        }
    }

    /// Copies a request that was received before into a buffer.
    ///
    /// # Panics
    /// When the buffer is lent, or is shorter.
    pub(super) fn put(&mut self, tag: u16, request: &[u8]) {
        self.own(tag, REQUEST, request.len()).copy_from_slice(request);
    }

    /// The request that was read into a buffer.
    ///
    /// # Panics
    /// When the buffer is lent, or is shorter.
    pub(super) fn request(&self, tag: u16, len: usize) -> &[u8] {
        let buffer = self.own(tag, REQUEST, len);
        // SAFETY: mapped and readable for its length. No operation writes to it (asserted by `own`), and none can begin
        // during the borrow, because `lend` needs `&mut self`.
        unsafe { std::slice::from_raw_parts(buffer.as_ptr(), buffer.len()) }
    }

    /// Lends the first `len` bytes of data to an operation, until [`Requests::take_back`].
    ///
    /// # Panics
    /// When the buffer is lent already, or is shorter.
    pub(super) fn lend(&mut self, tag: u16, len: usize) -> IoBuf {
        let buffer = self.own(tag, DATA, len);
        self.lent[usize::from(tag)] = true;
        buffer
    }

    /// Takes a buffer back, after the operation that it was lent to has ended.
    pub(super) fn take_back(&mut self, tag: u16) {
        self.lent[usize::from(tag)] = false;
    }

    /// Sends the answer to a READ: a header in front of the first `len` bytes of data.
    ///
    /// # Panics
    /// When the buffer is lent, or is shorter.
    pub(super) fn send(
        &mut self,
        tag: u16,
        header: &[u8; OUT_HEADER_LEN],
        len: usize,
        device: &Device,
    ) -> io::Result<()> {
        let answer = self.own(tag, ANSWER, OUT_HEADER_LEN + len);
        answer.part(0, OUT_HEADER_LEN).copy_from_slice(header);
        // SAFETY: the buffer is mapped and readable for its length, and no operation uses it (asserted by `own`).
        let answer = unsafe { std::slice::from_raw_parts(answer.as_ptr(), answer.len()) };
        device.send_bytes(answer)?;
        Ok(())
    }

    fn own(&self, tag: u16, start: usize, len: usize) -> IoBuf {
        assert!(!self.lent[usize::from(tag)], "the buffer of request {tag} is in use by an operation");
        self.buffers.of(tag).part(start, len)
    }
}
