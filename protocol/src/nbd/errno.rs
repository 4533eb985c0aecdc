//! Error values of the wire.

/// An error of the protocol ("Error values" of the specification). The numbers are those of Linux, on every system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u32)]
pub enum Errno {
    /// `NBD_EPERM`: the export is read-only.
    #[error("EPERM: the export is read-only")]
    Permission = 1,
    /// `NBD_EIO`: the bytes could not be read or written.
    #[error("EIO: the bytes could not be read or written")]
    Io = 5,
    /// `NBD_ENOMEM`: the server has no memory for the request.
    #[error("ENOMEM: the server has no memory for the request")]
    NoMemory = 12,
    /// `NBD_EINVAL`: the request is malformed, or outside of the export.
    #[error("EINVAL: the request is malformed, or outside of the export")]
    Invalid = 22,
    /// `NBD_ENOSPC`: no space left, or a write beyond the end.
    #[error("ENOSPC: no space left, or a write beyond the end")]
    NoSpace = 28,
    /// `NBD_EOVERFLOW`: the request or its answer is too long.
    #[error("EOVERFLOW: the request or its answer is too long")]
    Overflow = 75,
    /// `NBD_ENOTSUP`: the request cannot be done in the requested way.
    #[error("ENOTSUP: the request cannot be done in the way that was asked for")]
    NotSupported = 95,
    /// `NBD_ESHUTDOWN`: the server is going down.
    #[error("ESHUTDOWN: the server is going down")]
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    #[inline]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }

    /// The error of a number on the wire; by the specification, an unknown number counts as `EINVAL`. None for 0,
    /// which is success.
    #[inline]
    pub const fn from_wire(number: u32) -> Option<Errno> {
        Some(match number {
            0 => return None,
            1 => Errno::Permission,
            5 => Errno::Io,
            12 => Errno::NoMemory,
            28 => Errno::NoSpace,
            75 => Errno::Overflow,
            95 => Errno::NotSupported,
            108 => Errno::Shutdown,
            _ => Errno::Invalid,
        })
    }
}
