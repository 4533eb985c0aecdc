//! Memory of the program's that transports use as it is.

#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use super::error::{MapError, system};
use super::space::Space;
use crate::page::window::{PAGE, Staging};

/// Memory for [`Mapping::get`](crate::Mapping::get) and [`Mapping::put`](crate::Mapping::put) that is registered with
/// the transports, so that none has to copy: over RDMA the appliance's memory is read into it and written from it
/// directly. Local memory besides the budget, locked where RDMA is used. Its first content is undefined. Its space
/// ends after it.
pub struct Buffer {
    space: Space,
    memory: Option<Staging>,
    len: usize,
}

impl Space {
    /// Memory of `len` bytes, in a power of two of them, that transports use as it is. Blocks for as long as it takes
    /// to register it; what was dropped is used again, and is given back with the space.
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
        // SAFETY: mapped until it is dropped, at least so long, and nobody else uses it; it began as zeros.
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
