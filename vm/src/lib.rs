//! Virtual machines of QEMU whose RAM is external memory: they are started, resized, suspended, and moved to another
//! host without copying their RAM.
//!
//! QEMU maps a file as the guest's RAM ([`memory`]). The page cache of that file is the machine's local memory, which
//! a cgroup limits ([`cgroup`]). All other modules are control: no module here is on the path of a page.
//!
//! Only [`memory`] contains unsafe code, for a system call that no library has.

#![deny(unsafe_code)]

pub mod arguments;
pub mod cgroup;
pub mod disk;
pub mod filter;
pub mod hot;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod ownership;
pub mod place;
pub mod process;
pub mod qmp;
pub mod resize;
pub mod suspend;
mod verbs;
pub mod xml;

use std::io;
use std::path::{Path, PathBuf};

/// Why an operation on a virtual machine failed. Each text is one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command's arguments are invalid.
    #[error("{0}")]
    Usage(String),
    /// This host, or a machine on it, is not in the required state.
    #[error("{0}")]
    Machine(String),
    /// The other host refused, failed or does not answer.
    #[error("{0}")]
    Peer(String),
    /// An operation on a file failed.
    #[error("cannot {what} {path}: {why}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        why: io::Error,
    },
    /// A QMP command failed.
    #[error(transparent)]
    Qmp(#[from] qmp::QmpError),
}

impl Error {
    /// An error at `path`, for `map_err`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |why| Error::Io { what, path: path.to_owned(), why }
    }
}
