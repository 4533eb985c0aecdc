//! mmap(2) and its family: large anonymous private mappings are external, and what is done with them is done here.
//! Everything else goes to the kernel as it is.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use libc::{off_t, off64_t};
use xpm_mapping::Advice;

use crate::external::{self, External, Local, PAGE};
use crate::{adopted, process, threads};

/// Further flags that a mapping which becomes external may have.
const HARMLESS: c_int =
    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_POPULATE | libc::MAP_NONBLOCK;

fn failed() -> *mut c_void {
    libc::MAP_FAILED
}

fn set_errno(number: c_int) {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = number };
}

fn range(address: *mut c_void, len: usize) -> Range<usize> {
    address as usize..(address as usize).saturating_add(len)
}

/// Why such a mapping cannot be external.
fn stays_local(prot: c_int, flags: c_int) -> Option<Local> {
    let fixed = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE;
    Some(match prot == libc::PROT_READ | libc::PROT_WRITE {
        _ if flags & libc::MAP_SHARED != 0 => Local::Shared,
        _ if flags & fixed != 0 => Local::Fixed,
        true if flags & !HARMLESS == 0 => return None,
        false if prot == libc::PROT_NONE => Local::Reserved,
        _ => Local::Other,
    })
}

/// The program puts memory at an address that is external: new zeros, or an address range that is only reserved.
/// Nothing else can be there.
///
/// # Safety
/// As of mmap(2) with MAP_FIXED.
unsafe fn replace(
    external: &'static External,
    at: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
) -> *mut c_void {
    let private = flags & libc::MAP_PRIVATE != 0 && flags & libc::MAP_ANONYMOUS != 0;
    let range = range(at, len);
    if !private || !external::is_external(range.end - 1) || flags & libc::MAP_FIXED_NOREPLACE != 0 {
        set_errno(if flags & libc::MAP_FIXED_NOREPLACE != 0 { libc::EEXIST } else { libc::ENOMEM });
        return failed();
    }
    if !external.clear(range.clone()) {
        set_errno(libc::ENOMEM);
        return failed();
    }
    external.set_protected(&range);
    // SAFETY: by the caller's word.
    match unsafe { libc::syscall(libc::SYS_mprotect, at, len, prot) } {
        0 => at,
        _ => failed(),
    }
}

/// # Safety
/// As of mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    hint: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    process::look();
    if flags & libc::MAP_ANONYMOUS != 0 && !threads::is_own() {
        match stays_local(prot, flags) {
            None => {
                if let Some(address) = external::allocate(len, false) {
                    return address.cast();
                }
            }
            Some(why) => external::stays_local(why, len),
        }
    }
    let fixed = flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) != 0;
    if fixed
        && len > 0
        && external::is_external(hint as usize)
        && let Some(external) = external::get()
    {
        // SAFETY: by the caller's word.
        return unsafe { replace(external, hint, len, prot, flags) };
    }
    // SAFETY: by the caller's word.
    unsafe { libc::syscall(libc::SYS_mmap, hint, len, prot, flags, fd, offset) as *mut c_void }
}

/// # Safety
/// As of mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    hint: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> *mut c_void {
    // SAFETY: by the caller's word; both offsets have 64 bits.
    unsafe { mmap(hint, len, prot, flags, fd, offset) }
}

/// # Safety
/// As of munmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, len: usize) -> c_int {
    if !external::is_external(address as usize) {
        // The addresses of what the parent had stay reserved.
        if process::is_dead(address as usize) {
            let range = range(address, len);
            return if adopted::holds(&range) && !adopted::reserve(&range) { -1 } else { 0 };
        }
        // SAFETY: by the caller's word.
        return unsafe { libc::syscall(libc::SYS_munmap, address, len) as c_int };
    }
    if len == 0 || !(address as usize).is_multiple_of(PAGE) {
        set_errno(libc::EINVAL);
        return -1;
    }
    if let Some(external) = external::get() {
        external.unmap(range(address, len));
    }
    0
}

/// # Safety
/// As of mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    len: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    if process::is_dead(old as usize) {
        // SAFETY: by the caller's word.
        return unsafe { grow_adopted(old, old_len, len, flags) };
    }
    if !external::is_external(old as usize) {
        // SAFETY: by the caller's word; where there is no `to`, the kernel does not look at it.
        return unsafe { libc::syscall(libc::SYS_mremap, old, old_len, len, flags, to) as *mut c_void };
    }
    let known = external::get().map(|external| (external, external.len(old as usize)));
    match known {
        // Whole pieces only, and no address of the program's choice.
        Some((external, whole))
            if whole == old_len.next_multiple_of(PAGE) && len > 0 && flags & !libc::MREMAP_MAYMOVE == 0 =>
        {
            // SAFETY: a piece of this length.
            unsafe { resize(external, old, whole, len, flags) }
        }
        _ => {
            set_errno(libc::EINVAL);
            failed()
        }
    }
}

/// Of what the parent had.
///
/// # Safety
/// As of mremap(2).
unsafe fn grow_adopted(old: *mut c_void, old_len: usize, len: usize, flags: c_int) -> *mut c_void {
    let held = old_len > 0 && len > 0 && adopted::holds(&range(old, old_len));
    if !held || flags & !libc::MREMAP_MAYMOVE != 0 || flags & libc::MREMAP_MAYMOVE == 0 && len > old_len {
        set_errno(if held { libc::ENOMEM } else { libc::EINVAL });
        return failed();
    }
    if len <= old_len {
        let end = old as usize + old_len;
        let rest = (old as usize + len).next_multiple_of(PAGE)..end;
        return if rest.is_empty() || adopted::reserve(&rest) { old } else { failed() };
    }
    let (prot, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the new one is another mapping, and longer.
    unsafe {
        let new = mmap(std::ptr::null_mut(), len, prot, kind, -1, 0);
        if new != failed() {
            new.cast::<u8>().copy_from_nonoverlapping(old.cast(), old_len);
            adopted::reserve(&range(old, old_len));
        }
        new
    }
}

/// # Safety
/// `old` must be an external piece of `old_len` bytes.
unsafe fn resize(
    external: &'static External,
    old: *mut c_void,
    old_len: usize,
    len: usize,
    flags: c_int,
) -> *mut c_void {
    if len <= external.room(old as usize) {
        external.set_len(old as usize, len);
        return old;
    }
    let (prot, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    if flags & libc::MREMAP_MAYMOVE == 0 {
        set_errno(libc::ENOMEM);
        return failed();
    }
    // SAFETY: the new one is another mapping, and longer.
    unsafe {
        let new = mmap(std::ptr::null_mut(), len, prot, kind, -1, 0);
        if new != failed() {
            new.cast::<u8>().copy_from_nonoverlapping(old.cast(), old_len);
            external.free(old as usize);
        }
        new
    }
}

/// # Safety
/// As of madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int {
    if !external::is_external(address as usize) {
        if process::is_dead(address as usize) && !adopted::holds(&range(address, len)) {
            return 0;
        }
        // SAFETY: by the caller's word.
        return unsafe { libc::syscall(libc::SYS_madvise, address, len, advice) as c_int };
    }
    if !(address as usize).is_multiple_of(PAGE) {
        set_errno(libc::EINVAL);
        return -1;
    }
    let Some(external) = external::get() else { return 0 };
    let range = range(address, len);
    match advice {
        libc::MADV_DONTNEED | libc::MADV_FREE if !external.clear(range.clone()) => {
            set_errno(libc::EAGAIN);
            return -1;
        }
        libc::MADV_DONTNEED | libc::MADV_FREE => {}
        libc::MADV_NORMAL => external.advise(range, Advice::Normal),
        libc::MADV_RANDOM => external.advise(range, Advice::Random),
        libc::MADV_SEQUENTIAL => external.advise(range, Advice::Sequential),
        libc::MADV_WILLNEED => external.advise(range, Advice::WillNeed),
        libc::MADV_COLD | libc::MADV_PAGEOUT => external.advise(range, Advice::DontNeed),
        libc::MADV_HUGEPAGE
        | libc::MADV_NOHUGEPAGE
        | libc::MADV_DONTDUMP
        | libc::MADV_DODUMP
        | libc::MADV_DONTFORK => {}
        _ => {
            set_errno(libc::EINVAL);
            return -1;
        }
    }
    0
}

/// # Safety
/// As of mprotect(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(address: *mut c_void, len: usize, prot: c_int) -> c_int {
    if process::is_dead(address as usize) && !adopted::holds(&range(address, len)) {
        // Zeros would come to lie there.
        set_errno(libc::ENOMEM);
        return -1;
    }
    if external::is_external(address as usize)
        && let Some(external) = external::get()
    {
        external.set_protected(&range(address, len));
    }
    // SAFETY: by the caller's word.
    unsafe { libc::syscall(libc::SYS_mprotect, address, len, prot) as c_int }
}
