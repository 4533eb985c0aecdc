//! [`MapError`]: the error of all calls on spaces and mappings.

use xpm_transport::IoError;

use super::slab::SlabError;
use crate::fault::calls::CallError;

/// Why opening a space, mapping memory, or a call on a mapping failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// An option or argument is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The range is not within the part of the allocation that is mapped by range.
    #[error(
        "{start} to {end} is not within what is mapped by range: the allocation has {size} bytes, the first {kept} of them for this; \
         choose a shorter range, a larger allocation, or more to keep"
    )]
    Range {
        /// First byte.
        start: u64,
        /// First byte behind the range.
        end: u64,
        /// Bytes that can be mapped by range.
        kept: u64,
        /// Size of the allocation.
        size: u64,
    },
    /// The start or the end is no multiple of the page length.
    #[error("{0} is no multiple of 4096 bytes")]
    Unaligned(u64),
    /// Another mapping covers a part of the range.
    #[error("{start} to {end} is mapped already: use that mapping, or drop it first")]
    Mapped {
        /// First byte of the other mapping.
        start: u64,
        /// First byte behind the other mapping.
        end: u64,
    },
    /// The slab cannot be carved or resized.
    #[error("{0}; free slabs, or resize the allocation and open it again")]
    Slab(#[from] SlabError),
    /// userfaultfd(2) is not allowed, or not available.
    #[error(
        "userfaultfd cannot be used: {0}. Give this user access to /dev/userfaultfd (group xpm where the package is installed, else a \
         udev rule, or chmod), or set vm.unprivileged_userfaultfd to 1; in a container, its seccomp profile has to allow the call, too"
    )]
    Userfaultfd(std::io::Error),
    /// Another operation of the system failed.
    #[error("cannot {what}: {error}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// Its error.
        error: std::io::Error,
    },
    /// The program discarded this page by a call of its own, and with it the changes in the page.
    #[error(
        "page {0} of the allocation was thrown away by a call of the program, such as madvise(2), and what it held with it: use the \
         advice of the library, which writes it first, or clear the slab"
    )]
    Gone(u32),
    /// The operation on external memory failed.
    #[error("{0}")]
    Io(#[from] IoError),
}

impl From<CallError> for MapError {
    fn from(error: CallError) -> MapError {
        match error {
            CallError::Io(error) => MapError::Io(error),
            CallError::Gone(page) => MapError::Gone(page),
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> MapError {
    move |error| MapError::System { what, error }
}
