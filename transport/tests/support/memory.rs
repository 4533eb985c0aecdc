//! Memory that is accessed by address only, like devices' buffers.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use xpm_transport::IoBuf;

/// An owned run of memory.
pub(crate) struct Memory {
    address: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    pub(crate) fn new(len: usize) -> Memory {
        let layout = Layout::from_size_align(len.max(1), 4096).unwrap();
        // SAFETY: the layout is not empty.
        let address = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory for the test");
        Memory { address, layout }
    }

    pub(crate) fn buf(&self) -> IoBuf {
        // SAFETY: the memory lives as long as `self`, which the tests keep until their operations
        // have ended, and no reference to it is ever made.
        unsafe { IoBuf::new(self.address, self.layout.size()) }
    }

    pub(crate) fn set(&self, start: usize, bytes: &[u8]) {
        self.buf().part(start, bytes.len()).copy_from_slice(bytes);
    }

    pub(crate) fn get(&self, start: usize, len: usize) -> Vec<u8> {
        let target = Memory::new(len);
        self.buf().part(start, len).copy_to(target.buf().part(0, len));
        // SAFETY: `target` is exclusively owned, initialised and `len` bytes long.
        unsafe { std::slice::from_raw_parts(target.address.as_ptr(), len) }.to_vec()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.address.as_ptr(), self.layout) }
    }
}
