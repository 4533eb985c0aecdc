//! The payload of a write, received into the store's memory, into buffers, or discarded.

use xpm_protocol::nbd::Errno;

use super::deferred::Buffer;
use super::input::Input;
use crate::nbd::socket::Pieces;
use crate::store::Store;

/// A payload of which `remaining` bytes have not arrived yet; the next byte belongs to `offset`.
pub(super) struct Incoming {
    pub(super) cookie: u64,
    pub(super) length: u32,
    pub(super) offset: u64,
    pub(super) remaining: u32,
    pub(super) target: Target,
}

/// The destination of the payload.
pub(super) enum Target {
    /// Straight into the store's memory.
    Direct,
    /// Into buffers, one after the other, for this request.
    Parts { request: u32, filling: Option<Filling> },
    /// Discarded: the request is refused with this error.
    Nowhere(Errno),
}

/// A buffer that is being filled.
pub(super) struct Filling {
    pub(super) buffer: Buffer,
    pub(super) filled: usize,
}

/// The store ceased to be direct in the middle of a request, or its memory is bad.
pub(super) struct NotDirect;

impl Incoming {
    /// Adds the destination of the next payload bytes to `pieces`, and returns its length. Received bytes
    /// beyond that length belong to the next request, or have to be passed to [`Incoming::copy`].
    pub(super) fn pieces(&self, store: &mut dyn Store, pieces: &mut Pieces<'_>) -> usize {
        match &self.target {
            Target::Direct => {
                let (mut offset, mut left) = (self.offset, self.remaining as usize);
                while left > 0 && !pieces.is_nearly_full() {
                    let Some(memory) = store.direct(offset, left) else { break };
                    pieces.push(memory);
                    offset += memory.len() as u64;
                    left -= memory.len();
                }
            }
            Target::Parts { filling: Some(Filling { buffer: (_, buf), filled }), .. } => {
                pieces.push(buf.part(*filled, buf.len() - filled));
            }
            Target::Parts { filling: None, .. } | Target::Nowhere(_) => {}
        }
        pieces.bytes()
    }

    /// Records that `count` bytes were received into the memory that [`Incoming::pieces`] gave, or were
    /// copied there.
    pub(super) fn advance(&mut self, count: usize) {
        debug_assert!(count <= self.remaining as usize, "no more than the payload");
        self.offset += count as u64;
        self.remaining -= count as u32;
        if let Target::Parts { filling: Some(filling), .. } = &mut self.target {
            filling.filled += count;
        }
    }

    /// Moves payload bytes that are in the receive buffer already to their destination.
    pub(super) fn copy(&mut self, input: &mut Input, store: &mut dyn Store) -> Result<(), NotDirect> {
        while self.remaining > 0 && input.len() > 0 {
            let there = input.len().min(self.remaining as usize);
            let count = match &self.target {
                Target::Nowhere(_) => input.take(there).len(),
                Target::Direct => {
                    let memory = store.direct(self.offset, there).ok_or(NotDirect)?;
                    if memory.try_copy_from_slice(input.take(memory.len())).is_err() {
                        store.found_bad(self.offset, memory.len() as u64);
                        return Err(NotDirect);
                    }
                    memory.len()
                }
                Target::Parts { filling: Some(Filling { buffer: (_, buf), filled }), .. } => {
                    let count = there.min(buf.len() - filled);
                    buf.part(*filled, count).copy_from_slice(input.take(count));
                    if count == 0 {
                        return Ok(());
                    }
                    count
                }
                Target::Parts { filling: None, .. } => return Ok(()),
            };
            self.advance(count);
        }
        Ok(())
    }
}
