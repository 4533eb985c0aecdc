//! An allocation at addresses.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::xpm_mapping::{Access, Attachment, Buffer, MappingStats, NamedSlabs, Space};

use crate::error::{Error, boxed, pointer, status};
use crate::mapping::xpm_mapping;
use crate::options::{self, xpm_options};

/// An allocation at addresses of this process.
pub struct xpm_space {
    pub(crate) space: Space,
    attachment: Attachment,
    /// One reference for each mapping, and this one.
    pub(crate) mappings: Arc<()>,
    /// Buffers, by their addresses.
    buffers: Mutex<BTreeMap<usize, Buffer>>,
}

impl xpm_space {
    fn buffers(&self) -> MutexGuard<'_, BTreeMap<usize, Buffer>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn named(&self) -> Result<NamedSlabs, Error> {
        Ok(NamedSlabs::open(&self.attachment, &self.space)?)
    }
}

/// What happened in a space, and what it has. Counts begin when it is opened.
#[repr(C)]
#[derive(Default)]
pub struct xpm_statistics {
    /// Local memory that may be used, in bytes.
    pub budget: u64,
    /// Local memory that is used, in bytes.
    pub resident: u64,
    /// Pages that were touched and were not in local memory.
    pub faults: u64,
    /// Pages fetched from external memory.
    pub fetched: u64,
    /// Those of them that were fetched ahead.
    pub prefetched: u64,
    /// Pages that left local memory unchanged.
    pub dropped: u64,
    /// Pages that were written to external memory.
    pub written: u64,
    /// Operations on external memory that failed.
    pub errors: u64,
}

impl From<MappingStats> for xpm_statistics {
    fn from(stats: MappingStats) -> xpm_statistics {
        let MappingStats { budget, resident, faults, fetched, prefetched, dropped, written, errors, .. } =
            stats;
        xpm_statistics { budget, resident, faults, fetched, prefetched, dropped, written, errors }
    }
}

/// The space behind a pointer.
///
/// # Safety
/// It must be NULL or one of xpm_open() that was not closed.
unsafe fn known<'a>(space: *const xpm_space) -> Result<&'a xpm_space, Error> {
    // SAFETY: by the caller's word.
    unsafe { space.as_ref() }.ok_or_else(|| Error::invalid("the space is NULL: look at what xpm_open() gave"))
}

/// Becomes the owner of an allocation and shows it at addresses. Blocks until its appliances are connected. The
/// allocation has to exist (xpm alloc create).
///
/// # Safety
/// `name` is a string, `options` a structure as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_open(name: *const c_char, options: *const xpm_options) -> *mut xpm_space {
    boxed(|| {
        let (attach, options) = options::read(name, options)?;
        let (attachment, volume) = Attachment::attach(&attach)?;
        let opened = Space::open(volume.clone(), &options(volume.size()));
        drop(volume);
        match opened {
            Ok(space) => {
                Ok(xpm_space { space, attachment, mappings: Arc::new(()), buffers: Mutex::default() })
            }
            Err(error) => {
                // It was not used.
                let _ = attachment.detach();
                Err(error.into())
            }
        }
    })
}

/// Ends a space and its buffers, and gives the allocation back. -EBUSY while it has mappings: nothing happened then. After any
/// other error the space is gone, and the allocation may still be this client's.
///
/// # Safety
/// `space` is one of xpm_open() that was not closed, or NULL, and nobody uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_close(space: *mut xpm_space) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        if Arc::strong_count(&known.mappings) > 1 {
            return Err(Error::busy("the space has mappings: end them by xpm_unmap() first"));
        }
        // SAFETY: made by `boxed`, and by the caller's word not used any more.
        let xpm_space { space, attachment, buffers, .. } = *unsafe { Box::from_raw(space) };
        drop((buffers, space));
        Ok(attachment.detach()?)
    })
}

/// Carves a slab of at least `len` bytes out of the allocation: zeros, with no message to anyone. What it holds is
/// forgotten when it is unmapped.
///
/// # Safety
/// `space` is one of xpm_open() that was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_carve(space: *mut xpm_space, len: u64) -> *mut xpm_mapping {
    boxed(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        Ok(xpm_mapping { mapping: known.space.carve(len)?, _counted: known.mappings.clone() })
    })
}

/// Shows `len` bytes at `offset` of the allocation, in whole pages, within what is kept: with what they hold, which
/// stays. `writable`: 0 for read-only.
///
/// # Safety
/// As of xpm_carve().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_map(
    space: *mut xpm_space,
    offset: u64,
    len: u64,
    writable: c_int,
) -> *mut xpm_mapping {
    boxed(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        let access = if writable == 0 { Access::ReadOnly } else { Access::ReadWrite };
        let mapping = known.space.map(offset..offset.saturating_add(len), access)?;
        Ok(xpm_mapping { mapping, _counted: known.mappings.clone() })
    })
}

/// Makes a slab with a name, of at least `len` bytes, rounded up to a power of two and to 2 MiB: zeros. What is written to
/// it stays when the program ends, and belongs to whoever owns the allocation then. Blocks until the allocator has written it
/// down. While another slab has the name, EEXIST.
///
/// # Safety
/// As of xpm_carve(); `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_slab_create(
    space: *mut xpm_space,
    name: *const c_char,
    len: u64,
) -> *mut xpm_mapping {
    boxed(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        let mapping = known.named()?.create(&options::name(name)?, len)?;
        Ok(xpm_mapping { mapping, _counted: known.mappings.clone() })
    })
}

/// Shows a slab with a name, with what it holds; writing to it is a SIGSEGV unless `writable`. While there is none, ENOENT.
///
/// # Safety
/// As of xpm_slab_create().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_slab_open(
    space: *mut xpm_space,
    name: *const c_char,
    writable: c_int,
) -> *mut xpm_mapping {
    boxed(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        let access = if writable == 0 { Access::ReadOnly } else { Access::ReadWrite };
        let mapping = known.named()?.get(&options::name(name)?, access)?;
        Ok(xpm_mapping { mapping, _counted: known.mappings.clone() })
    })
}

/// Removes a slab with a name, which must not be mapped (EBUSY); what it held is forgotten.
///
/// # Safety
/// As of xpm_slab_create().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_slab_remove(space: *mut xpm_space, name: *const c_char) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        Ok(known.named()?.remove(&options::name(name)?)?)
    })
}

/// Memory of `len` bytes for xpm_get() and xpm_put() that transports use as it is: over RDMA nothing is copied then. It is local
/// memory besides the budget.
///
/// # Safety
/// As of xpm_carve().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_buffer(space: *mut xpm_space, len: usize) -> *mut c_void {
    pointer(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(space) }?;
        let mut buffer = known.space.buffer(len)?;
        let address = buffer.as_mut_ptr();
        known.buffers().insert(address as usize, buffer);
        Ok(address.cast())
    })
}

/// Gives memory of xpm_buffer() back; it is used again for the next one of that length.
///
/// # Safety
/// As of xpm_carve(); nobody uses the memory any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_buffer_free(space: *mut xpm_space, buffer: *mut c_void) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let freed = unsafe { known(space) }?.buffers().remove(&(buffer as usize));
        freed
            .map(drop)
            .ok_or_else(|| Error::invalid("it is no buffer of this space: give what xpm_buffer() gave"))
    })
}

/// Changes how many bytes of local memory may be used.
///
/// # Safety
/// As of xpm_carve().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_set_budget(space: *mut xpm_space, bytes: u64) -> c_int {
    // SAFETY: by the caller's word.
    status(|| Ok(unsafe { known(space) }?.space.set_budget(bytes)?))
}

/// Bytes of the allocation that are in no slab, and are not kept. 0 for NULL.
///
/// # Safety
/// As of xpm_carve().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_free_bytes(space: *const xpm_space) -> u64 {
    // SAFETY: by the caller's word.
    unsafe { known(space) }.map_or(0, |known| known.space.free_bytes())
}

/// Says why a page of the space could last not be used, and so why an access was a SIGBUS: -EIO, and xpm_last_error() has the line;
/// 0 when all pages could be used. Not for a handler of that signal: call it outside of one, or read the line on standard error.
///
/// # Safety
/// As of xpm_carve().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_space_error(space: *const xpm_space) -> c_int {
    // SAFETY: by the caller's word.
    status(|| match unsafe { known(space) }?.space.last_error() {
        Some(error) => Err(error.into()),
        None => Ok(()),
    })
}

/// Writes what happened so far, and what is there, to `statistics`.
///
/// # Safety
/// As of xpm_carve(); `statistics` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_stats(space: *const xpm_space, statistics: *mut xpm_statistics) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let (known, statistics) = (unsafe { known(space) }?, unsafe { statistics.as_mut() });
        let statistics =
            statistics.ok_or_else(|| Error::invalid("there is no place for the statistics: NULL"))?;
        *statistics = known.space.stats().into();
        Ok(())
    })
}
