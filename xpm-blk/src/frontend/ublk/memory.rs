//! Memory shared with the kernel: the descriptors of a queue.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap};

use super::request::Descriptor;
use super::uapi;
use crate::frontend::buffers::Mapping;

/// The descriptors of one queue, written by the kernel.
pub(super) struct Descriptors {
    mapping: Mapping,
    depth: u16,
}

impl Descriptors {
    /// Maps the descriptors of a queue of `depth` tags from the device file.
    pub(super) fn map(device: BorrowedFd<'_>, queue: u16, depth: u16) -> io::Result<Descriptors> {
        // The kernel accepts exactly the whole pages that the queue's descriptors take.
        let len = (usize::from(depth) * uapi::DESCRIPTOR_LEN).next_multiple_of(rustix::param::page_size());
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        let offset = uapi::descriptors_offset(queue);
        // SAFETY: a new mapping at an address that the kernel chooses; it aliases no other memory.
        let address = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, device, offset) }?;
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the mapping was just created with this length, and only this value unmaps it.
        let mapping = unsafe { Mapping::own(address, len) };
        Ok(Descriptors { mapping, depth })
    }

    /// The kernel's request for a tag.
    ///
    /// # Panics
    /// When the queue has no such tag.
    pub(super) fn get(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth, "tag {tag} of a queue of depth {}", self.depth);
        let place = self.mapping.address().as_ptr().wrapping_add(usize::from(tag) * uapi::DESCRIPTOR_LEN);
        // SAFETY: the tag is below the depth (asserted), so the 24 bytes at its place are within the mapping
        // and aligned to 8. The reads are volatile because the kernel writes there; it does so before it
        // completes the fetch of the tag, which the caller has seen.
        unsafe {
            Descriptor {
                op_flags: place.cast::<u32>().read_volatile(),
                sectors: place.add(4).cast::<u32>().read_volatile(),
                start: place.add(8).cast::<u64>().read_volatile(),
            }
        }
    }
}
