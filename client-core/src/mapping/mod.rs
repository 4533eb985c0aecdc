//! Direct mapping: external memory at addresses of this process.
//!
//! A [`Space`] shows an allocation as one range of addresses, the *window*. Touching a page brings it
//! into local memory, of which no more than the [`Budget`] is used; what has not been used for longest leaves
//! again, and is written to external memory first if it changed. [`Mapping`]s are parts of the window:
//! slabs that are carved out with no message to anyone ([`Space::carve`]), ranges of the allocation whose content
//! stays ([`Space::map`]), and private copies of others ([`Space::private_copy`]).
//!
//! **Errors.** Calls return them. Where there is only an access, it waits while an appliance is out of reach (for
//! as long as the volume holds I/O), and is a SIGBUS when the content cannot be had any more: the
//! memory is lost, or belongs to another client. A program that has a handler of SIGBUS gets it there. In
//! [`Faults::Handled`] on kernels without UFFDIO_POISON (before Linux 6.6) such an access waits, and
//! is tried again each second.
//!
//! **fork and exec.** A child has nothing at the window's addresses: touching them is a SIGSEGV. Nothing of it
//! survives an exec.
//!
//! **Signals.** [`Faults::Inline`] installs a handler of SIGBUS, which passes on what is not its own. A program that
//! installs another one afterwards has to do the same.
//!
//! **System calls.** In [`Faults::Inline`], and where userfaultfd(2) is allowed for user mode only, a system call that
//! is given absent pages fails with EFAULT: touch or pin them before.

mod anchor;
mod bell;
mod budget;
mod buffer;
mod carver;
mod error;
mod evict;
mod fetch;
mod heap;
mod inline;
mod io;
mod named;
mod open;
mod options;
mod pager;
mod pages;
mod part;
mod policy;
mod prefetch;
mod say;
mod signal;
mod space;
mod sync;
mod tend;
mod uffd;
mod window;
mod worker;

pub use self::budget::Budget;
pub use self::buffer::Buffer;
pub use self::error::MapError;
pub use self::heap::{Array, SpaceAllocator};
pub use self::named::{NamedSlabError, NamedSlabs};
pub use self::options::{Access, Advice, Faults, MappingStats, SpaceOptions};
pub use self::part::Mapping;
pub use self::space::Space;

/// Bytes of 2 MiB: what parts of an allocation with different uses are multiples of.
pub const CHUNK_LEN: u64 = pager::CHUNK as u64 * window::PAGE as u64;
