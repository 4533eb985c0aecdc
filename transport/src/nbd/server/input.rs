//! What a connection has received and not looked at yet.

/// Bytes of one receive buffer. All requests of a deep queue of small writes come in one call;
/// of a large write only the first of it is copied, the rest goes where it belongs directly.
const INPUT_LEN: usize = 128 << 10;

/// A receive buffer: bytes `start..end` are there.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    /// # Panics
    /// When more bytes are given than a handshake can leave over.
    pub(super) fn new(already_there: &[u8]) -> Input {
        let mut bytes = vec![0; INPUT_LEN].into_boxed_slice();
        bytes[..already_there.len()].copy_from_slice(already_there);
        Input { bytes, start: 0, end: already_there.len() }
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// The first `N` bytes, when they are there.
    pub(super) fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        self.bytes[self.start..self.end].first_chunk().copied()
    }

    /// Takes up to `max` bytes away.
    pub(super) fn take(&mut self, max: usize) -> &[u8] {
        let first = self.start;
        self.start += max.min(self.len());
        &self.bytes[first..self.start]
    }

    /// Where the next bytes go. Never empty unless a whole buffer waits.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.bytes.len() - self.end < INPUT_LEN / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were put into [`Input::room`].
    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= self.bytes.len(), "received within the room");
    }
}
