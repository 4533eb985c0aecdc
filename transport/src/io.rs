//! Operations on external memory and how they end. The same words at every layer: a device's
//! queue posts them to a volume, a volume to links, a server to a store.

#![allow(unsafe_code)]

use std::ptr::NonNull;

use xpm_protocol::nbd::Errno;

/// Memory that an operation reads into or writes from, by address: it may be a device's buffer, a
/// guest's memory or a mapping, which another party can change at any time, so it is never a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoBuf {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: an `IoBuf` is an address and a length. That the memory behind it may be used from the
// thread that the operation goes to is part of the contract of `IoBuf::new`.
unsafe impl Send for IoBuf {}
// SAFETY: as for `Send`; all of its methods take it by value, so sharing it is copying it.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A buffer of `len` bytes at `address`.
    ///
    /// # Safety
    /// From the moment that an operation with it is posted until the operation's completion is
    /// returned (or the link or store that it was posted to is dropped), the memory must stay
    /// mapped, readable (for a write) and writable (for a read), and no Rust reference to it may
    /// be used. It may be accessed from any thread.
    pub const unsafe fn new(address: NonNull<u8>, len: usize) -> IoBuf {
        IoBuf { address, len }
    }

    /// First byte.
    pub const fn as_ptr(self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Length in bytes.
    pub const fn len(self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` bytes of it from `start`.
    ///
    /// # Panics
    /// When they are not within the buffer.
    #[must_use]
    pub fn part(self, start: usize, len: usize) -> IoBuf {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "part outside of the buffer");
        // SAFETY: `start` is within the buffer (asserted), so the address stays in its allocation.
        let address = unsafe { self.address.add(start) };
        IoBuf { address, len }
    }

    /// Copies the buffer's bytes to `target`, which must be of the same length.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy_to(self, target: IoBuf) {
        assert_eq!(self.len, target.len, "copy between buffers of different lengths");
        // SAFETY: both are mapped for their whole length by the contract of `IoBuf::new`. `copy`
        // allows them to overlap. Another process may change the source meanwhile: the bytes then
        // are some mix of old and new, as for any device, and are not interpreted here.
        unsafe { std::ptr::copy(self.as_ptr(), target.as_ptr(), self.len) }
    }

    /// Fills the buffer from `bytes`, which must be of the same length.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy_from_slice(self, bytes: &[u8]) {
        assert_eq!(self.len, bytes.len(), "copy between buffers of different lengths");
        // SAFETY: the target is mapped and writable for its length by the contract of
        // `IoBuf::new`; a live `&[u8]` cannot be the same memory by that contract too.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr(), self.len) }
    }

    /// Copies the buffer's bytes to `target`, which must be of the same length.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy_to_slice(self, target: &mut [u8]) {
        assert_eq!(self.len, target.len(), "copy between buffers of different lengths");
        // SAFETY: the source is mapped and readable for its length by the contract of `IoBuf::new`; a
        // live `&mut [u8]` cannot be the same memory by that contract too.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), target.as_mut_ptr(), self.len) }
    }

    /// Sets every byte to zero.
    pub fn zero(self) {
        // SAFETY: mapped and writable for its length by the contract of `IoBuf::new`.
        unsafe { std::ptr::write_bytes(self.as_ptr(), 0, self.len) }
    }
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// External memory into the buffer.
    Read,
    /// The buffer into external memory.
    Write,
    /// Gives the memory back; it reads as zeros afterwards.
    Trim,
    /// Makes it read as zeros and keeps the memory.
    Zero,
    /// Ends when all writes that ended before it was posted are where they are meant to be.
    Flush,
}

/// One operation. Who posts it gets exactly one [`Completion`] with its token, or, when the link
/// goes down, the news that none will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// What it does.
    pub kind: Kind,
    /// First byte, in the space of what it is posted to (volume, or export of a grant).
    pub offset: u64,
    /// Bytes; for reads and writes the length of the buffer; 0 for a flush.
    pub len: u64,
    /// The buffer of a read or a write; none for the others.
    pub buf: Option<IoBuf>,
    /// Comes back in the completion.
    pub token: u64,
}

/// The end of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The operation's token.
    pub token: u64,
    /// How it ended.
    pub result: Result<(), IoError>,
}

/// Why an operation failed. Small and without text: it is made on the data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IoError {
    /// The appliance could not be reached for longer than I/O is held.
    #[error("the appliance was out of reach for longer than I/O is held")]
    Unreachable,
    /// The memory is gone: the appliance restarted without it.
    #[error("the memory is gone from the appliance")]
    Lost,
    /// The allocation belongs to another client now.
    #[error("the allocation belongs to another client now")]
    Fenced,
    /// The other end had no memory left for it.
    #[error("no memory left for it at the appliance")]
    NoSpace,
    /// It lies outside of the volume or the export, or is not allowed there.
    #[error("outside of the volume, or not allowed on it")]
    Invalid,
    /// The other end does not do this kind of operation.
    #[error("the other end does not do this kind of operation")]
    Unsupported,
    /// The other end failed.
    #[error("the other end failed")]
    Failed,
}

impl IoError {
    /// All of them.
    pub const ALL: [IoError; 7] = [
        IoError::Unreachable,
        IoError::Lost,
        IoError::Fenced,
        IoError::NoSpace,
        IoError::Invalid,
        IoError::Unsupported,
        IoError::Failed,
    ];

    /// Whether trying again is of no use: what lies there is gone, or somebody else's.
    pub const fn is_final(self) -> bool {
        matches!(self, IoError::Lost | IoError::Fenced)
    }

    /// What an NBD client is told.
    pub const fn nbd(self) -> Errno {
        match self {
            IoError::Unreachable | IoError::Lost | IoError::Failed => Errno::Io,
            IoError::Fenced => Errno::Shutdown,
            IoError::NoSpace => Errno::NoSpace,
            IoError::Invalid => Errno::Invalid,
            IoError::Unsupported => Errno::NotSupported,
        }
    }

    /// What an NBD server's error means.
    pub const fn from_nbd(errno: Errno) -> IoError {
        match errno {
            Errno::NoSpace => IoError::NoSpace,
            Errno::Invalid | Errno::Overflow | Errno::Permission => IoError::Invalid,
            Errno::NotSupported => IoError::Unsupported,
            Errno::Shutdown => IoError::Fenced,
            Errno::Io | Errno::NoMemory => IoError::Failed,
        }
    }

    /// The errno of errno(3) that the kernel is told.
    pub const fn errno(self) -> i32 {
        match self {
            IoError::Unreachable | IoError::Lost | IoError::Failed | IoError::Fenced => libc::EIO,
            IoError::NoSpace => libc::ENOSPC,
            IoError::Invalid => libc::EINVAL,
            IoError::Unsupported => libc::EOPNOTSUPP,
        }
    }
}
