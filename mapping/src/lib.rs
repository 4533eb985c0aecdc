//! External memory at addresses of this process: the library for programs.
//!
//! This crate is all that a program depends on: what it needs of the client core (becoming the owner of an
//! allocation, and what the options are made of) is re-exported here.
//!
//! A [`Space`] shows an allocation as one range of addresses, the *window*. Touching a page brings it
//! into local memory, of which no more than the [`Budget`] is used; what has not been used for longest leaves
//! again, and is written to external memory first if it changed. [`Mapping`]s are parts of the window:
//! slabs that are carved out with no message to anyone ([`Space::carve`]), ranges of the allocation whose content
//! stays ([`Space::map`]), and private copies of others ([`Space::private_copy`]).
//!
//! **Errors.** Calls return them. Where there is only an access, it waits while an appliance is out of reach (for as
//! long as the volume holds I/O), and is a SIGBUS when the content cannot be had any more: the memory is lost, or
//! belongs to another client. A program that has a handler of SIGBUS gets it there; [`Space::last_error`] tells it
//! why, and so does a line on standard error. In [`Faults::Handled`] on kernels without UFFDIO_POISON (before Linux
//! 6.6) such an access waits, and is tried again each second.
//!
//! **fork and exec.** A child has nothing at the window's addresses: touching them is a SIGSEGV. Nothing of it
//! survives an exec.
//!
//! **Signals.** [`Faults::Inline`] installs a handler of SIGBUS, which passes on what is not its own. A program that
//! installs another one afterwards has to do the same.
//!
//! **System calls.** In [`Faults::Inline`], and where userfaultfd(2) is allowed for user mode only, a system call that
//! is given absent pages fails with EFAULT: touch or pin them before.

// Imports point downwards only: page < wake < pager < fault, evict < api. `sync` and `say` are below all of them.
mod api;
mod evict;
mod fault;
mod page;
mod pager;
mod say;
mod sync;
mod wake;

// What a program needs of the client core, and what options and answers are made of.
pub use xpm_client_core::{
    AttachError, AttachOptions, Attachment, ClientId, Hold, Map, Name, OpenError, ParseUrlsError, Token,
    TokenError, TransportKind, Urls, Volume,
};

pub use self::api::CHUNK_LEN;
pub use xpm_transport::IoError;

pub use self::api::array::{Array, SpaceAllocator};
pub use self::api::buffer::Buffer;
pub use self::api::error::MapError;
pub use self::api::mapping::Mapping;
pub use self::api::named::{NamedSlabError, NamedSlabs};
pub use self::api::options::{Access, Advice, SpaceOptions};
pub use self::api::slab;
pub use self::api::space::Space;
pub use self::evict::budget::Budget;
pub use self::pager::Faults;
pub use self::pager::errors::{Cause, ErrorCounts, PageError};
pub use self::pager::stats::MappingStats;
