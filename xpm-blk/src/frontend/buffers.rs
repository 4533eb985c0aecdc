//! The buffers of a queue's requests, and memory for them that is allocated in advance.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use xpm_transport::io::IoBuf;

/// A mapping, undone when dropped.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it, and is accessed only through its
// owner.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping that this value owns. An error would mean that
        // it is not mapped, and needs no action.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.len) };
    }
}

impl Mapping {
    /// Takes ownership of a mapping.
    ///
    /// # Safety
    /// `len` bytes must be mapped at `address`, and only this value may unmap them.
    pub(crate) const unsafe fn own(address: NonNull<u8>, len: usize) -> Mapping {
        Mapping { address, len }
    }

    /// First byte.
    pub(crate) const fn address(&self) -> NonNull<u8> {
        self.address
    }
}

/// The buffers of a queue's tags: one contiguous, page-aligned range of memory, faulted in.
pub(crate) struct Buffers {
    mapping: Mapping,
    each_len: usize,
}

/// Memory for future queues: a process that takes devices over may be unable to allocate any.
static SET_ASIDE: Mutex<Vec<Mapping>> = Mutex::new(Vec::new());

/// Prepares memory for buffers of these lengths in bytes, and frees prepared memory beyond that.
///
/// # Errors
/// When there is no memory; a part of it may be prepared.
pub(crate) fn set_aside(mut lens: Vec<usize>) -> io::Result<()> {
    let mut ready = SET_ASIDE.lock().unwrap_or_else(PoisonError::into_inner);
    ready.retain(|mapping| {
        let wanted = lens.iter().position(|&len| len == mapping.len);
        wanted.map(|place| lens.swap_remove(place)).is_some()
    });
    for len in lens {
        ready.push(Mapping::anonymous(len)?);
    }
    Ok(())
}

fn take_aside(len: usize) -> Option<Mapping> {
    let mut ready = SET_ASIDE.lock().unwrap_or_else(PoisonError::into_inner);
    let place = ready.iter().position(|mapping| mapping.len == len)?;
    Some(ready.swap_remove(place))
}

impl Mapping {
    /// New memory, faulted in.
    fn anonymous(len: usize) -> io::Result<Mapping> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses.
        let address =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { address, len })
    }
}

impl Buffers {
    /// Buffers of `each_len` bytes for `depth` tags; uses prepared memory of the right length if there is
    /// any.
    pub(crate) fn new(depth: u16, each_len: usize) -> io::Result<Buffers> {
        let len = usize::from(depth) * each_len;
        let mapping = take_aside(len).map_or_else(|| Mapping::anonymous(len), Ok)?;
        Ok(Buffers { mapping, each_len })
    }

    /// The buffer of a tag. Operations may use it while this value lives, which the queue guarantees: it
    /// drops its channel, and with it every operation, before its buffers.
    ///
    /// # Panics
    /// When there is no such tag.
    pub(crate) fn of(&self, tag: u16) -> IoBuf {
        let start = usize::from(tag) * self.each_len;
        assert!(start + self.each_len <= self.mapping.len, "tag {tag} has no buffer");
        // SAFETY: within the mapping (asserted), which is readable and writable and lives until after the
        // channel that operations with this buffer are posted to. No reference to it is ever made: the kernel
        // and the transports access it by address.
        unsafe { IoBuf::new(self.mapping.address.add(start), self.each_len) }
    }

    /// The whole memory, to be registered with transports.
    pub(crate) const fn all(&self) -> IoBuf {
        // SAFETY: the mapping is readable and writable and lives until after the channel that it is
        // registered with, as for `Buffers::of`.
        unsafe { IoBuf::new(self.mapping.address, self.mapping.len) }
    }

    /// The address of a tag's buffer, in the kernel's form.
    pub(crate) fn address(&self, tag: u16) -> u64 {
        self.of(tag).as_ptr().addr() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap_and_are_aligned() {
        let buffers = Buffers::new(4, 8192).unwrap();
        for tag in 0..4 {
            let address = buffers.address(tag);
            assert_eq!(address % 4096, 0);
            assert_eq!(address - buffers.address(0), u64::from(tag) * 8192);
            buffers.of(tag).copy_from_slice(&[tag as u8; 8192]);
        }
    }

    #[test]
    fn prepared_memory_is_used_once() {
        set_aside(vec![5 << 12, 5 << 12]).unwrap();
        set_aside(vec![6 << 12, 5 << 12]).unwrap();
        let place = || {
            let ready = SET_ASIDE.lock().unwrap();
            ready.iter().find(|mapping| mapping.len == 5 << 12).map(|mapping| mapping.address)
        };
        let ready = place().unwrap();
        let buffers = Buffers::new(5, 4096).unwrap();
        assert_eq!(buffers.mapping.address, ready);
        assert_eq!(place(), None);
        set_aside(Vec::new()).unwrap();
        assert!(take_aside(6 << 12).is_none());
    }

    #[test]
    #[should_panic(expected = "no buffer")]
    fn a_tag_beyond_the_depth_has_no_buffer() {
        Buffers::new(4, 4096).unwrap().of(4);
    }
}
