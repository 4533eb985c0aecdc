//! The receive buffer of a connection.

/// Length of a receive buffer in bytes. All requests of a deep queue of small writes arrive in one call; of a
/// large write only the first bytes are copied, the rest is received straight to its destination.
const INPUT_LEN: usize = 128 << 10;

/// A receive buffer: bytes `start..end` are received and not processed yet.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    /// # Panics
    /// When `already_there` is longer than the buffer; a handshake leaves fewer bytes over.
    pub(super) fn new(already_there: &[u8]) -> Input {
        let mut bytes = vec![0; INPUT_LEN].into_boxed_slice();
        bytes[..already_there.len()].copy_from_slice(already_there);
        Input { bytes, start: 0, end: already_there.len() }
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// The first `N` bytes, when they have arrived.
    pub(super) fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        self.bytes[self.start..self.end].first_chunk().copied()
    }

    /// Removes and returns up to `max` bytes.
    pub(super) fn take(&mut self, max: usize) -> &[u8] {
        let first = self.start;
        self.start += max.min(self.len());
        &self.bytes[first..self.start]
    }

    /// The room for the next bytes. Empty only when a whole buffer waits to be processed.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.bytes.len() - self.end < INPUT_LEN / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// Records that `count` bytes were put into [`Input::room`].
    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= self.bytes.len(), "received within the room");
    }
}
