//! [`Store`], the bytes that a server of NBD connections serves: one store for each connection, owned by the
//! thread that serves the connection.

use std::os::fd::BorrowedFd;

use crate::io::{Completion, IoBuf, IoError, Kind, Operation};

/// The bytes behind one connection.
///
/// The server checks requests against the export's size and flags before it passes them on. A store offers
/// memory that can be accessed in place by [`Store::direct`]; the server then reads and writes that memory
/// itself, straight from and to the socket. All other requests go through [`Store::post`].
pub trait Store: Send {
    /// Whether reads and writes that begin now may use [`Store::direct`]. The answer may change at any time.
    fn is_direct(&self) -> bool;

    /// The memory at `offset`, as far as it lies in one piece: at least one byte and at most `len`. The
    /// memory stays valid until the store is dropped. Once [`Store::is_direct`] was true, this method returns
    /// memory for any offset for the store's whole life, so that a transfer that began in place can be
    /// finished.
    fn direct(&mut self, offset: u64, len: usize) -> Option<IoBuf>;

    /// Whether a read or write that begins now may use [`Store::direct`] for these bytes. Returns false for
    /// memory that is known to be bad; the server then answers the request with an I/O error.
    fn is_sound(&mut self, kind: Kind, offset: u64, len: u64) -> bool {
        let _ = (kind, offset, len);
        true
    }

    /// Reports that some of these bytes could not be accessed in place: their memory is bad. The server then
    /// ends the connection, as a part of a reply may be sent already; when the client asks again,
    /// [`Store::is_sound`] has to know.
    fn found_bad(&mut self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Reports whether a transfer that began in place, by [`Store::direct`], is unfinished. Called when that
    /// changes.
    fn in_place(&mut self, unfinished: bool) {
        let _ = unfinished;
    }

    /// Takes an operation. Either it is done at once, or [`Store::poll`] returns its completion later. Never
    /// blocks on the network.
    fn post(&mut self, operation: Operation) -> Posted;

    /// Sends the posted operations. Called once for each batch of requests.
    fn submit(&mut self) {}

    /// Appends the completions that have arrived. Never blocks.
    fn poll(&mut self, completions: &mut Vec<Completion>) {
        let _ = completions;
    }

    /// A descriptor that is readable when [`Store::poll`] has work to do. The same descriptor for the store's
    /// whole life; none when every operation is done at once.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// How the bytes at `offset` are stored: an extent that starts there, of at most `len` bytes.
    fn extent(&mut self, offset: u64, len: u64) -> Extent {
        let _ = offset;
        Extent { len, hole: false }
    }

    /// Whether the store may still be served. When this turns false (the grant was revoked), the server
    /// closes the connection before it looks at the next request.
    fn alive(&self) -> bool {
        true
    }
}

/// The outcome of [`Store::post`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// The operation is done, with this result.
    Done(Result<(), IoError>),
    /// The operation's completion follows.
    Pending,
    /// The store's limit of operations in flight is reached: post the operation again after a completion.
    Full,
}

/// A run of bytes that are stored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes; at least 1.
    pub len: u64,
    /// Whether the run has no memory and reads as zeros.
    pub hole: bool,
}
