//! The send queue of a connection: reply headers, runs of external memory, and buffers, in order. The memory
//! of a direct store is looked up only when it is sent, so that a reply of any length takes two places in the
//! queue.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::buffers::{Buffers, Run};
use crate::io::IoBuf;
use crate::nbd::socket::{self, Pieces};
use crate::store::Store;

/// Room for one reply header, with the extents of a block status reply behind it.
pub(super) const HEAD_LEN: usize = 128;
/// Most pieces in the queue; a reply takes at most two. When a client sends requests without reading replies,
/// the server stops reading its requests at this limit.
const PIECES_MAX: usize = 512;

#[derive(Debug, Clone, Copy)]
enum Piece {
    Head { slot: u32, len: u32 },
    Direct { offset: u64, len: usize },
    Buffer { run: Run, buf: IoBuf },
}

impl Piece {
    const fn len(&self) -> usize {
        match self {
            Piece::Head { len, .. } => *len as usize,
            Piece::Direct { len, .. } => *len,
            Piece::Buffer { buf, .. } => buf.len(),
        }
    }
}

/// The queue of one connection.
pub(super) struct Output {
    heads: Box<[[u8; HEAD_LEN]]>,
    head_next: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are sent already.
    sent: usize,
    /// Number of pieces that are memory of the store.
    directs: usize,
}

/// The result of [`Output::flush`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Everything is sent.
    All,
    /// The socket accepts no more bytes now.
    Blocked,
}

impl Output {
    pub(super) fn new() -> Output {
        Output {
            heads: vec![[0; HEAD_LEN]; PIECES_MAX].into_boxed_slice(),
            head_next: 0,
            pieces: VecDeque::with_capacity(PIECES_MAX),
            sent: 0,
            directs: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether the queue has room for one more reply beside those of `in_flight` requests.
    pub(super) fn has_room(&self, in_flight: usize) -> bool {
        self.pieces.len() + 2 * (in_flight + 1) <= PIECES_MAX
    }

    /// Queues the first `len` bytes of a header; `write` fills the header and returns `len`.
    pub(super) fn head(&mut self, write: impl FnOnce(&mut [u8; HEAD_LEN]) -> usize) {
        let slot = self.head_next % PIECES_MAX;
        let len = write(&mut self.heads[slot]);
        debug_assert!(len > 0 && len <= HEAD_LEN, "a header has bytes, and room");
        self.head_next = slot + 1;
        self.pieces.push_back(Piece::Head { slot: slot as u32, len: len as u32 });
    }

    /// Whether memory of the store is queued.
    pub(super) fn has_direct(&self) -> bool {
        self.directs > 0
    }

    /// Calls `each` with offset and length of the store's memory that is queued.
    pub(super) fn for_each_direct(&self, mut each: impl FnMut(u64, u64)) {
        for piece in &self.pieces {
            if let Piece::Direct { offset, len } = piece {
                each(*offset, *len as u64);
            }
        }
    }

    pub(super) fn direct(&mut self, offset: u64, len: usize) {
        self.directs += 1;
        self.pieces.push_back(Piece::Direct { offset, len });
    }

    pub(super) fn buffer(&mut self, run: Run, buf: IoBuf) {
        self.pieces.push_back(Piece::Buffer { run, buf });
    }

    /// Sends as much as the socket accepts, and frees the buffers that are sent.
    pub(super) fn flush(
        &mut self,
        socket: BorrowedFd<'_>,
        store: &mut dyn Store,
        buffers: Option<&mut Buffers>,
    ) -> io::Result<Flushed> {
        let mut buffers = buffers;
        while !self.pieces.is_empty() {
            let mut pieces = Pieces::new();
            self.gather(store, &mut pieces)?;
            let wanted = pieces.bytes();
            let sent = match socket::send(socket, &pieces) {
                Ok(sent) => sent,
                Err(error) if socket::is_passing(&error) => return Ok(Flushed::Blocked),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.advance(sent, buffers.as_deref_mut());
            if sent < wanted {
                return Ok(Flushed::Blocked);
            }
        }
        Ok(Flushed::All)
    }

    fn gather<'a>(&'a self, store: &mut dyn Store, gathered: &mut Pieces<'a>) -> io::Result<()> {
        let mut skip = self.sent;
        for piece in &self.pieces {
            if gathered.is_full() {
                break;
            }
            match *piece {
                Piece::Head { slot, len } => {
                    gathered.push_ref(&self.heads[slot as usize][skip..len as usize]);
                }
                Piece::Direct { offset, len } => {
                    gather_direct(gathered, store, offset + skip as u64, len - skip)?;
                }
                Piece::Buffer { buf, .. } => gathered.push(buf.part(skip, buf.len() - skip)),
            }
            skip = 0;
        }
        Ok(())
    }

    fn advance(&mut self, sent: usize, mut buffers: Option<&mut Buffers>) {
        self.sent += sent;
        while let Some(first) = self.pieces.front()
            && self.sent >= first.len()
        {
            self.sent -= first.len();
            match (self.pieces.pop_front(), buffers.as_deref_mut()) {
                (Some(Piece::Buffer { run, .. }), Some(buffers)) => buffers.free(run),
                (Some(Piece::Direct { .. }), _) => self.directs -= 1,
                _ => {}
            }
        }
    }
}

fn gather_direct(
    gathered: &mut Pieces<'_>,
    store: &mut dyn Store,
    mut offset: u64,
    mut len: usize,
) -> io::Result<()> {
    while len > 0 && !gathered.is_full() {
        let memory = store.direct(offset, len).ok_or(io::ErrorKind::ConnectionAborted)?;
        gathered.push(memory);
        offset += memory.len() as u64;
        len -= memory.len();
    }
    Ok(())
}
