//! What a client sees of every transport.
//!
//! Verbs-shaped (post, submit, poll, wait), because RDMA has this shape already and the others can
//! be made to fit it. One link belongs to one queue and so to one thread; it leads to one grant on
//! one appliance, in whose export its offsets run.
//!
//! **Ordering.** Operations may end in any order. Two operations on overlapping bytes that are in
//! flight together have no defined order.
//!
//! **Ownership.** A posted operation's buffer belongs to the link until its completion came out of
//! [`Link::poll`], or `poll` returned [`LinkDown`], or the link was dropped.
//!
//! **Going down.** After `poll` returned [`LinkDown`] the link touches no buffer again and gives no
//! completion: what was in flight may or may not have happened. All operations are idempotent, so
//! the owner posts them again on the next link to the same grant, whose connection shuts out what
//! the old one left behind.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::io::{Completion, IoBuf, Operation};

/// The client's end of a transport to one grant. See the module's documentation for its contract.
pub trait Link: Send {
    /// Takes an operation, to be sent with the next [`Link::submit`] at the latest. Never blocks.
    ///
    /// # Errors
    /// [`Full`] when as many operations are in flight as the link was made for; it was not taken.
    fn post(&mut self, operation: Operation) -> Result<(), Full>;

    /// Sends what was posted, as far as the other end takes it now; [`Link::poll`] sends the rest.
    /// Never blocks.
    fn submit(&mut self);

    /// Appends the completions that are there. Never blocks, and never grows `completions` beyond
    /// the operations in flight.
    ///
    /// # Errors
    /// [`LinkDown`] when the link cannot be used any more; completions appended before count.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown>;

    /// A descriptor that is readable (as epoll(7) sees it) when [`Link::poll`] has something to do;
    /// none when every operation has ended when [`Link::submit`] returns.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether completions are there to be polled without [`Link::wait_fd`] telling of them, until
    /// [`Link::arm`] is called: asking to be told costs something, so it is left to who is about to
    /// wait.
    fn is_quiet(&self) -> bool {
        false
    }

    /// Makes [`Link::wait_fd`] tell of the next completion. True when there is something to poll
    /// already. Never blocks.
    fn arm(&mut self) -> bool {
        false
    }

    /// Offers memory that many operations will use, for the link to register. It has to stay mapped
    /// until the link is dropped. May block; not for the path of an operation.
    fn register(&mut self, buffer: IoBuf) {
        let _ = buffer;
    }

    /// The address of `len` bytes of external memory at `offset`, for a transport that accesses it
    /// by loads and stores. Valid while the link lives. None: use operations.
    fn direct(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let _ = (offset, len);
        None
    }
}

/// The link has as many operations in flight as it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many operations are in flight as the link was made for")]
pub struct Full;

/// Why a link cannot be used any more, and so what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum LinkDown {
    /// The connection broke: connect again.
    #[error("the connection to the appliance broke")]
    Broken,
    /// The other end broke the protocol: connect again, with back-off.
    #[error("the appliance broke the protocol")]
    Protocol,
    /// The appliance revoked the grant: connecting again will tell whether it is lost or fenced.
    #[error("the appliance revoked the grant")]
    Revoked,
}
