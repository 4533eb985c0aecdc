//! [`Link`], the client's interface of every transport.
//!
//! The interface is shaped like verbs (post, submit, poll, wait), because RDMA has this shape already and the
//! other transports can be made to fit it. One link belongs to one queue and so to one thread; it leads to
//! one grant on one appliance, and its offsets are offsets in the export of that grant.
//!
//! **Ordering.** Operations may end in any order. Two operations on overlapping bytes that are in flight
//! together have no defined order.
//!
//! **Ownership.** A posted operation's buffer belongs to the link until [`Link::poll`] returned its
//! completion or [`LinkDown`], or the link was dropped.
//!
//! **Going down.** After `poll` returned [`LinkDown`] the link touches no buffer again and gives no
//! completion; each operation that was in flight may or may not have taken effect. All operations are
//! idempotent, so the owner posts them again on the next link to the same grant. The connection of that next
//! link shuts out late requests of the old one.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::io::{Completion, IoBuf, Operation};

/// The client's end of a transport to one grant. See the module's documentation for its contract.
pub trait Link: Send {
    /// Takes an operation, to be sent with the next [`Link::submit`] at the latest. Never blocks.
    ///
    /// # Errors
    /// [`Full`] when the link's limit of operations in flight is reached; the operation was not taken.
    fn post(&mut self, operation: Operation) -> Result<(), Full>;

    /// Sends the posted operations, as far as the other end takes them now; [`Link::poll`] sends the rest.
    /// Never blocks.
    fn submit(&mut self);

    /// Appends the completions that have arrived. Never blocks, and never grows `completions` beyond the
    /// operations in flight.
    ///
    /// # Errors
    /// [`LinkDown`] when the link cannot be used any more; completions that were appended before the error
    /// are valid.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown>;

    /// A descriptor that is readable (as epoll(7) sees it) when [`Link::poll`] has work to do; none for a
    /// transport whose operations all end before [`Link::submit`] returns.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether [`Link::wait_fd`] does not report completions until [`Link::arm`] is called. Arming costs
    /// time, so only a caller that is about to wait does it.
    fn is_quiet(&self) -> bool {
        false
    }

    /// Makes [`Link::wait_fd`] report the next completion. Returns true when a completion can be polled
    /// already. Never blocks.
    fn arm(&mut self) -> bool {
        false
    }

    /// Offers memory that many operations will use, so that the link can register it. The memory has to stay
    /// mapped until the link is dropped. May block, so never call this on the data path.
    fn register(&mut self, buffer: IoBuf) {
        let _ = buffer;
    }

    /// The address of `len` bytes of external memory at `offset`, for a transport that accesses the memory by
    /// loads and stores. The address is valid while the link lives. With `None` the caller has to use
    /// operations.
    fn direct(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let _ = (offset, len);
        None
    }
}

/// The link's limit of operations in flight is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many operations are in flight as the link was made for")]
pub struct Full;

/// Why a link cannot be used any more; the variant decides the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum LinkDown {
    /// The connection broke: connect again.
    #[error("the connection to the appliance broke")]
    Broken,
    /// The other end violated the protocol: connect again, with back-off.
    #[error("the appliance broke the protocol")]
    Protocol,
    /// The appliance revoked the grant. A new connection attempt tells whether the grant is lost or fenced.
    #[error("the appliance revoked the grant")]
    Revoked,
}
