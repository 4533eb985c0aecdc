//! What a server of NBD connections is given to serve: one store for each connection, owned by the
//! thread that serves it.

use std::os::fd::BorrowedFd;

use crate::io::{Completion, IoBuf, IoError, Kind, Operation};

/// The bytes behind one connection.
///
/// Requests reach it checked against the export's size and flags. Memory that can be accessed in
/// place is offered by [`Store::direct`] and then read and written by the server itself, straight
/// from and to the socket; everything else goes through [`Store::post`].
pub trait Store: Send {
    /// Whether reads and writes that begin now may use [`Store::direct`]. May change at any time.
    fn is_direct(&self) -> bool;

    /// The memory at `offset`, as far as it lies in one piece: at least one byte and at most `len`.
    /// It stays valid until the store is dropped, and once [`Store::is_direct`] was true, it is
    /// given for any offset for the store's whole life: what has begun so can be finished.
    fn direct(&mut self, offset: u64, len: usize) -> Option<IoBuf>;

    /// Whether a read or write that begins now may use [`Store::direct`] for these bytes. Memory that is known to be bad may
    /// not be, and the request is answered with an I/O error.
    fn is_sound(&mut self, kind: Kind, offset: u64, len: u64) -> bool {
        let _ = (kind, offset, len);
        true
    }

    /// Some of these bytes could not be accessed in place: their memory is bad. The connection ends, as a reply may be out
    /// in part; when the client asks again, [`Store::is_sound`] is to know.
    fn found_bad(&mut self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Whether something that began in place, by [`Store::direct`], is unfinished. Told when that changes.
    fn in_place(&mut self, unfinished: bool) {
        let _ = unfinished;
    }

    /// Takes an operation. Either it is done at once, or its completion comes out of
    /// [`Store::poll`] later. Never blocks on the network.
    fn post(&mut self, operation: Operation) -> Posted;

    /// Sends what was posted. Called once for each batch of requests.
    fn submit(&mut self) {}

    /// Appends the completions that are there. Never blocks.
    fn poll(&mut self, completions: &mut Vec<Completion>) {
        let _ = completions;
    }

    /// A descriptor that is readable when [`Store::poll`] has something to do. The same one for the
    /// store's whole life; none when every operation is done at once.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// How the bytes at `offset` are held: an extent that starts there, of at most `len` bytes.
    fn extent(&mut self, offset: u64, len: u64) -> Extent {
        let _ = offset;
        Extent { len, hole: false }
    }

    /// Whether the store may still be served. When it turns false (the grant was revoked), the
    /// connection is closed before its next request is looked at.
    fn alive(&self) -> bool {
        true
    }
}

/// What became of a posted operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// It is done, this way.
    Done(Result<(), IoError>),
    /// Its completion follows.
    Pending,
    /// As many operations are in flight as the store takes: post it again after a completion.
    Full,
}

/// A run of bytes that are held alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes; at least 1.
    pub len: u64,
    /// It holds no memory and reads as zeros.
    pub hole: bool,
}
