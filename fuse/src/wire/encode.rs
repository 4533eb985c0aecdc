//! Writing numbers to the front of a buffer.

/// A buffer that is filled from its begin. The caller knows that all of the content fits.
pub(super) struct Out<'b> {
    buffer: &'b mut [u8],
    len: usize,
}

impl<'b> Out<'b> {
    pub(super) fn new(buffer: &'b mut [u8]) -> Self {
        Out { buffer, len: 0 }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.buffer[self.len..][..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn zeros(&mut self, len: usize) -> &mut Self {
        self.buffer[self.len..][..len].fill(0);
        self.len += len;
        self
    }

    /// All of the buffer is filled.
    pub(super) fn done(&self) {
        debug_assert_eq!(self.len, self.buffer.len(), "the length of an encoding");
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}
