//! External memory at addresses of this process: the library for programs.
//!
//! This crate is all that a program depends on: what it needs of the client core (becoming the owner of an
//! allocation, and what the options are made of) is re-exported here.
//!
//! A [`Space`] shows an allocation as one range of addresses, the *window*. A touch of a page brings the page into
//! local memory, of which the space uses at most its [`Budget`]. Pages that have not been used for a long time leave
//! local memory again, and are written to external memory first if they changed. [`Mapping`]s are parts of the window:
//! slabs, which are carved out without a message to another machine ([`Space::carve`]), ranges of the allocation whose
//! content stays ([`Space::map`]), and private copies of other mappings ([`Space::private_copy`]).
//!
//! **Errors.** Calls return them. A plain access waits while an appliance is out of reach (for as long as the volume
//! holds I/O). It raises SIGBUS when the content is lost for good: the memory is lost, or belongs to another client.
//! The program's own handler of SIGBUS, if there is one, is called then; [`Space::last_error`] returns the cause, and a
//! line on standard error names it. With [`Faults::Handled`] on kernels without UFFDIO_POISON (before Linux 6.6) such
//! an access waits instead, and the library retries it each second.
//!
//! **fork and exec.** A child process has no memory at the window's addresses: an access raises SIGSEGV there. After an
//! exec the window is gone.
//!
//! **Signals.** [`Faults::Inline`] installs a handler of SIGBUS, which passes other faults to the previous handler. A
//! program that installs a handler later has to pass signals on in the same way.
//!
//! **System calls.** With [`Faults::Inline`], and where userfaultfd(2) is allowed for user mode only, a system call
//! that accesses an absent page fails with EFAULT: touch or pin the pages before.

// Imports point downwards only: page < wake < pager < fault, evict < api. `sync` and `say` are below all of them.
mod api;
mod evict;
mod fault;
mod page;
mod pager;
mod say;
mod sync;
mod wake;

// The parts of the client core that a program needs, and the types of options and results.
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
