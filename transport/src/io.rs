//! Operations on external memory and their results. Every layer uses these types: a device's queue posts
//! operations to a volume, a volume to links, a server to a store.

#![allow(unsafe_code)]

use std::ptr::NonNull;

use xpm_protocol::nbd::Errno;

/// The memory that an operation reads into or writes from, as an address with a length. The memory may be a
/// device's buffer, a guest's memory or a mapping that another party can change at any time, so an `IoBuf` is
/// never a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoBuf {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: an `IoBuf` is an address and a length. The contract of `IoBuf::new` guarantees that the memory may
// be used from the thread that the operation goes to.
unsafe impl Send for IoBuf {}
// SAFETY: as for `Send`; all methods take `self` by value, so sharing an `IoBuf` is copying it.
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

    /// Whether the length is 0.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes that begins at byte `start`.
    ///
    /// # Panics
    /// When the part is not within the buffer.
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
        // SAFETY: both are mapped for their whole length by the contract of `IoBuf::new`. `copy` allows them
        // to overlap. Another process may change the source meanwhile: the copied bytes are then a mix of old
        // and new, as with any device, and this function does not interpret them.
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

/// The kind of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Copies external memory into the buffer.
    Read,
    /// Copies the buffer into external memory.
    Write,
    /// Frees the memory of the range; the range reads as zeros afterwards.
    Trim,
    /// Sets the range to zeros and keeps its memory.
    Zero,
    /// Ends when all writes that completed before this flush was posted have reached their destination.
    Flush,
}

/// An operation. Its poster receives exactly one [`Completion`] with its token or, when the link goes down,
/// an error that says no completion will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// The kind of the operation.
    pub kind: Kind,
    /// First byte, as an offset in the volume, or in the export of a grant, that the operation is posted to.
    pub offset: u64,
    /// Bytes; for reads and writes the length of the buffer; 0 for a flush.
    pub len: u64,
    /// The buffer of a read or a write; none for the others.
    pub buf: Option<IoBuf>,
    /// Copied into the completion.
    pub token: u64,
}

/// The end of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The operation's token.
    pub token: u64,
    /// The result of the operation.
    pub result: Result<(), IoError>,
}

/// Why an operation failed. Small and without text, because it is created on the data path.
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
    /// The appliance had no memory left for the operation.
    #[error("no memory left for it at the appliance")]
    NoSpace,
    /// The operation lies outside of the volume or the export, or is not allowed there.
    #[error("outside of the volume, or not allowed on it")]
    Invalid,
    /// The other end does not support this kind of operation.
    #[error("the other end does not do this kind of operation")]
    Unsupported,
    /// A page of the appliance's memory, mapped here, cannot be accessed: the hardware reports an error, or its
    /// file was made shorter.
    #[error("the appliance's memory cannot be accessed: a page of it is bad, or its file was made shorter")]
    BadMemory,
    /// The other end reported an I/O error.
    #[error("the other end failed")]
    Failed,
}

impl IoError {
    /// All variants.
    pub const ALL: [IoError; 8] = [
        IoError::Unreachable,
        IoError::Lost,
        IoError::Fenced,
        IoError::NoSpace,
        IoError::Invalid,
        IoError::Unsupported,
        IoError::BadMemory,
        IoError::Failed,
    ];

    /// Whether a retry is useless: the data are gone, or belong to another client.
    pub const fn is_final(self) -> bool {
        matches!(self, IoError::Lost | IoError::Fenced)
    }

    /// The NBD error that is sent to a client for this error.
    pub const fn nbd(self) -> Errno {
        match self {
            IoError::Unreachable | IoError::Lost | IoError::BadMemory | IoError::Failed => Errno::Io,
            IoError::Fenced => Errno::Shutdown,
            IoError::NoSpace => Errno::NoSpace,
            IoError::Invalid => Errno::Invalid,
            IoError::Unsupported => Errno::NotSupported,
        }
    }

    /// The error that an NBD server's error stands for.
    pub const fn from_nbd(errno: Errno) -> IoError {
        match errno {
            Errno::NoSpace => IoError::NoSpace,
            Errno::Invalid | Errno::Overflow | Errno::Permission => IoError::Invalid,
            Errno::NotSupported => IoError::Unsupported,
            Errno::Shutdown => IoError::Fenced,
            Errno::Io | Errno::NoMemory => IoError::Failed,
        }
    }

    /// The errno(3) value that is reported to the kernel for this error.
    pub const fn errno(self) -> i32 {
        match self {
            IoError::Unreachable | IoError::Lost | IoError::BadMemory | IoError::Failed | IoError::Fenced => {
                libc::EIO
            }
            IoError::NoSpace => libc::ENOSPC,
            IoError::Invalid => libc::EINVAL,
            IoError::Unsupported => libc::EOPNOTSUPP,
        }
    }
}
