//! Virtual machines of QEMU whose RAM is external memory: started, resized, suspended, and moved to another host without
//! copying their RAM.
//!
//! QEMU maps a file as the guest's RAM ([`memory`]). The page cache of that file is the machine's local memory, which a cgroup
//! bounds ([`cgroup`]). Everything else is control: nothing here is on the path of a page.
//!
//! Unsafe code is in [`memory`] alone, for a system call that no library has.

#![deny(unsafe_code)]

pub mod arguments;
pub mod cgroup;
pub mod filter;
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

/// Why something could not be done with a virtual machine. Each text is one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command asks for what cannot be.
    #[error("{0}")]
    Usage(String),
    /// This host, or a machine on it, is not as it has to be.
    #[error("{0}")]
    Machine(String),
    /// The other host refused, failed or is silent.
    #[error("{0}")]
    Peer(String),
    /// A file.
    #[error("cannot {what} {path}: {why}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it could not.
        why: io::Error,
    },
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] qmp::QmpError),
}

impl Error {
    /// A failure at `path`, for `map_err`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |why| Error::Io { what, path: path.to_owned(), why }
    }
}
