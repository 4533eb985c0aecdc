//! The descriptor of `/dev/fuse` by which a connection is served.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};

/// The one descriptor of a connection. Requests are read and replies are written by any thread of any process that
/// has it.
///
/// It does not block: it is polled for POLLIN where there is no request, and POLLERR says that the connection has
/// ended. The connection ends when the mount ends, when it is aborted, or when the last process that has the
/// descriptor closes it.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
}

/// The result of reading from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A request of so many bytes.
    Request(usize),
    /// There is none at present.
    Nothing,
    /// There will be none any more.
    Gone(Gone),
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The last mount of it was unmounted, and its last file closed.
    Unmounted,
    /// It was aborted; all who waited got an error. The mount may still be there.
    Aborted,
}

/// The result of sending a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The kernel took it.
    Taken,
    /// No request waits for it: the request was interrupted, is answered, or was ended by an abort.
    Unwanted,
}

impl Device {
    /// A descriptor that is not mounted yet.
    pub(crate) fn open() -> Result<Device, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(Device { fd: rustix::fs::open("/dev/fuse", flags, Mode::empty())? })
    }

    /// The descriptor of a connection that another process served or serves. It is set not to block, which counts for
    /// all who have it.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn from_fd(fd: OwnedFd) -> Result<Device, Errno> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let flags = rustix::io::fcntl_getfd(&fd)?;
        rustix::io::fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)?;
        Ok(Device { fd })
    }

    /// Another descriptor of the same open file, for a guard or a successor. It is no clone in the sense of
    /// `FUSE_DEV_IOC_CLONE`, which loses requests.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn try_clone(&self) -> Result<Device, Errno> {
        Ok(Device { fd: rustix::io::fcntl_dupfd_cloexec(&self.fd, 3)? })
    }

    /// The next request. The buffer has at least [`read_buffer_len`](crate::wire::read_buffer_len) bytes, else the
    /// kernel says EINVAL. Does not wait for a request.
    ///
    /// # Errors
    /// Those of read(2) that concern neither one request nor the connection's end.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received, Errno> {
        loop {
            return match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => Ok(Received::Request(len)),
                // ENOENT: the request was interrupted before anybody had it.
                Err(Errno::INTR | Errno::NOENT) => continue,
                Err(Errno::AGAIN) => Ok(Received::Nothing),
                Err(Errno::NODEV) => Ok(Received::Gone(Gone::Unmounted)),
                Err(Errno::CONNABORTED) => Ok(Received::Gone(Gone::Aborted)),
                Err(error) => Err(error),
            };
        }
    }

    /// Sends a reply, whole: its header, and data that follow.
    ///
    /// # Errors
    /// EINVAL where the reply does not suit the request (too long, an impossible error number).
    pub fn send(&self, parts: &[IoSlice<'_>]) -> Result<Sent, Errno> {
        match self.write(parts) {
            Ok(()) => Ok(Sent::Taken),
            Err(Errno::NOENT | Errno::NODEV | Errno::PERM | Errno::CONNABORTED) => Ok(Sent::Unwanted),
            Err(error) => Err(error),
        }
    }

    /// Sends a reply of one piece. See [`send`](Device::send).
    ///
    /// # Errors
    /// As there.
    pub fn send_bytes(&self, reply: &[u8]) -> Result<Sent, Errno> {
        self.send(&[IoSlice::new(reply)])
    }

    /// Sends a notification: of [`wire::notify`](crate::wire::notify), and data that follow. Blocks as that module
    /// says.
    ///
    /// # Errors
    /// The notification's result.
    pub fn notify(&self, parts: &[IoSlice<'_>]) -> Result<(), Errno> {
        self.write(parts)
    }

    /// A message is one call, and the kernel takes all of it or none.
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<(), Errno> {
        loop {
            return match rustix::io::writev(&self.fd, parts) {
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// The descriptor, to be handed on.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
