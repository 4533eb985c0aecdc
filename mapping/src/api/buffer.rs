//! Memory of the program's that transports use as it is.

#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use super::error::{MapError, system};
use super::space::Space;
use crate::page::window::{PAGE, Staging};

/// Memory for [`Mapping::get`](crate::Mapping::get) and [`Mapping::put`](crate::Mapping::put) that is registered with
/// the transports, so that no transport has to copy: RDMA reads the appliance's memory into it and writes from it
/// directly. The buffer is local memory in addition to the budget, and locked if RDMA is used. Its initial content is
/// undefined. The space lives at least as long as the buffer.
pub struct Buffer {
    space: Space,
    memory: Option<Staging>,
    len: usize,
}

impl Space {
    /// Makes a buffer of `len` bytes, whose memory is rounded up to a power of two. Blocks until the memory is
    /// registered. The memory of dropped buffers is reused, and freed with the space.
    ///
    /// # Errors
    /// [`MapError::Invalid`] for no bytes, [`MapError::System`] where the system has no memory.
    pub fn buffer(&self, len: usize) -> Result<Buffer, MapError> {
        if len == 0 {
            return Err(MapError::Invalid(
                "a buffer of no bytes cannot be: ask for one byte or more".to_owned(),
            ));
        }
        let whole = len.max(PAGE).checked_next_power_of_two().unwrap_or(usize::MAX);
        let memory = self.inner.calls().take_buffer(whole).map_err(system("get memory for a buffer"))?;
        Ok(Buffer { space: self.clone(), memory: Some(memory), len })
    }
}

impl Buffer {
    fn start(&self) -> *mut u8 {
        self.memory.as_ref().map_or(std::ptr::dangling_mut(), |memory| memory.all().as_ptr())
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped until the buffer is dropped, at least this long, and not used otherwise; the memory was
        // initialized to zeros.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.space.inner.calls().give_buffer(memory);
        }
    }
}
