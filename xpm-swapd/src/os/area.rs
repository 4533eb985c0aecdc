//! swapon(2).

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// `SWAP_FLAG_PREFER`: the lower bits are the priority.
const PREFER: libc::c_int = 0x8000;
/// `SWAP_FLAG_DISCARD`: unused memory is freed, at once as a whole and later page by page.
const DISCARD: libc::c_int = 0x10000;

/// Turns swap on at a device or file with a swap header. Blocks for its I/O, and while the whole area is
/// discarded.
///
/// # Errors
/// The kernel's error; `EBUSY` if it is on already.
pub fn turn_on(path: &Path, priority: u16, discard: bool) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = PREFER | libc::c_int::from(priority) | if discard { DISCARD } else { 0 };
    // SAFETY: the path is a zero-terminated string that lives through the call.
    match unsafe { libc::swapon(path.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
