//! Bytes at addresses.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

use ::xpm_mapping::{Advice, Mapping};

use crate::error::{Error, boxed, status};

/// Bytes at addresses, that are a part of a space.
pub struct xpm_mapping {
    pub(crate) mapping: Mapping,
    pub(crate) _counted: Arc<()>,
}

/// Nothing is known of how it will be used.
pub const XPM_NORMAL: c_int = 0;
/// From the start to the end: it is fetched far ahead.
pub const XPM_SEQUENTIAL: c_int = 1;
/// Here and there: nothing is fetched ahead.
pub const XPM_RANDOM: c_int = 2;
/// Soon: it is brought, as far as there is room, without waiting for it.
pub const XPM_WILLNEED: c_int = 3;
/// Not soon: it leaves local memory; what was changed is written first. Blocks for that.
pub const XPM_DONTNEED: c_int = 4;
/// It stays in local memory, which it is brought into first; no more than half of the budget.
pub const XPM_PIN: c_int = 5;
/// It need not stay any more.
pub const XPM_UNPIN: c_int = 6;

const NO_MAPPING: &str = "the mapping is NULL: look at what made it";

/// The mapping behind a pointer.
///
/// # Safety
/// It must be NULL or one that was not unmapped.
unsafe fn known<'a>(mapping: *const xpm_mapping) -> Result<&'a xpm_mapping, Error> {
    // SAFETY: by the caller's word.
    let known = unsafe { mapping.as_ref() };
    known.ok_or_else(|| Error::invalid(NO_MAPPING))
}

/// A slab with what another mapping of the same space holds now: writes go to the slab only. The other one must not be
/// written to while this one is there.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_copy(mapping: *const xpm_mapping) -> *mut xpm_mapping {
    boxed(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(mapping) }?;
        let copy = known.mapping.space().private_copy(&known.mapping)?;
        Ok(xpm_mapping { mapping: copy, _counted: known._counted.clone() })
    })
}

/// Ends a mapping. What was changed of a range that stays is written first; a slab is forgotten. NULL: nothing happens.
///
/// # Safety
/// `mapping` was not unmapped, and nobody uses its addresses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_unmap(mapping: *mut xpm_mapping) {
    if !mapping.is_null() {
        let _ = status(|| {
            // SAFETY: made by `boxed`, and by the caller's word not used any more.
            drop(unsafe { Box::from_raw(mapping) });
            Ok(())
        });
    }
}

/// Its first byte, at the start of a page. NULL for NULL.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_address(mapping: *const xpm_mapping) -> *mut c_void {
    // SAFETY: by the caller's word.
    unsafe { known(mapping) }.map_or(std::ptr::null_mut(), |known| known.mapping.as_ptr().as_ptr().cast())
}

/// Its length in bytes; of a slab what was asked for, rounded up to a power of two. 0 for NULL.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_length(mapping: *const xpm_mapping) -> usize {
    // SAFETY: by the caller's word.
    unsafe { known(mapping) }.map_or(0, |known| known.mapping.len())
}

/// Writes what was changed of it to external memory, and waits until it is there.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_flush(mapping: *const xpm_mapping) -> c_int {
    // SAFETY: by the caller's word.
    status(|| Ok(unsafe { known(mapping) }?.mapping.flush()?))
}

/// Writes what was changed of the pages of `len` bytes at `offset` of it, and waits until it is there.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_flush_range(mapping: *const xpm_mapping, offset: usize, len: usize) -> c_int {
    // SAFETY: by the caller's word.
    status(|| Ok(unsafe { known(mapping) }?.mapping.flush_range(offset..offset.saturating_add(len))?))
}

/// Makes a slab at least `len` bytes long, rounded up to a power of two, or shorter, where it is: its address stays, and so does
/// what it holds; what is new holds zeros, what is cut off is forgotten. -ENOMEM where it cannot grow there: it is as before then.
///
/// # Safety
/// `mapping` was not unmapped, and no other call uses it meanwhile; nobody uses addresses that are cut off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_resize(mapping: *mut xpm_mapping, len: u64) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { mapping.as_mut() };
        let known = known.ok_or_else(|| Error::invalid(NO_MAPPING))?;
        Ok(known.mapping.resize(len)?)
    })
}

/// Makes the pages of `len` bytes at `offset` of a slab zeros again; local and external memory that they had is free then.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_clear(mapping: *const xpm_mapping, offset: usize, len: usize) -> c_int {
    // SAFETY: by the caller's word.
    status(|| Ok(unsafe { known(mapping) }?.mapping.clear(offset..offset.saturating_add(len))?))
}

/// Says how `len` bytes at `offset` of it will be used: XPM_NORMAL and so on. Whole pages, those at the edges included.
///
/// # Safety
/// `mapping` was not unmapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_advise(
    mapping: *const xpm_mapping,
    offset: usize,
    len: usize,
    advice: c_int,
) -> c_int {
    status(|| {
        let advice = match advice {
            XPM_NORMAL => Advice::Normal,
            XPM_SEQUENTIAL => Advice::Sequential,
            XPM_RANDOM => Advice::Random,
            XPM_WILLNEED => Advice::WillNeed,
            XPM_DONTNEED => Advice::DontNeed,
            XPM_PIN => Advice::Pin,
            XPM_UNPIN => Advice::Unpin,
            other => {
                return Err(Error::invalid(format!("{other} is no advice: use XPM_NORMAL to XPM_UNPIN")));
            }
        };
        // SAFETY: by the caller's word.
        Ok(unsafe { known(mapping) }?.mapping.advise(offset..offset.saturating_add(len), advice)?)
    })
}

/// Copies `len` bytes at `offset` of it to `to`, without a fault, and without taking room in local memory.
///
/// # Safety
/// `mapping` was not unmapped; `len` bytes at `to` can be written to, and are not external memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_get(
    mapping: *const xpm_mapping,
    offset: usize,
    to: *mut c_void,
    len: usize,
) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(mapping) }?;
        if to.is_null() {
            return Err(Error::invalid("there is no place to copy to: NULL"));
        }
        // SAFETY: by the caller's word they can be written to.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<MaybeUninit<u8>>(), len) };
        Ok(known.mapping.get_uninit(offset, to)?)
    })
}

/// Copies `len` bytes at `from` to `offset` of it, without a fault, and without taking room in local memory.
///
/// # Safety
/// `mapping` was not unmapped; `len` bytes at `from` can be read, and are not external memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xpm_put(
    mapping: *const xpm_mapping,
    offset: usize,
    from: *const c_void,
    len: usize,
) -> c_int {
    status(|| {
        // SAFETY: by the caller's word.
        let known = unsafe { known(mapping) }?;
        if from.is_null() {
            return Err(Error::invalid("there is nothing to copy: NULL"));
        }
        // SAFETY: by the caller's word.
        let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) };
        Ok(known.mapping.put(offset, from)?)
    })
}
