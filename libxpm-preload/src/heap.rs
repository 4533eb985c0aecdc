//! malloc(3) and its family. A piece that is at least as long as the threshold is external, if possible; the rest
//! goes to the allocator that the program would have used.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::external::{self, PAGE};
use crate::{adopted, process, threads};

/// glibc's own, under names that programs do not replace: for this library's own memory.
pub(crate) struct Local;

unsafe extern "C" {
    fn __libc_malloc(len: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, len: usize) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, len: usize) -> *mut c_void;
    fn __libc_memalign(align: usize, len: usize) -> *mut c_void;
    fn __libc_free(old: *mut c_void);
}

/// The alignment of glibc's malloc.
const ALIGN: usize = 16;

// SAFETY: glibc's functions do what GlobalAlloc asks for, of memory of their own.
unsafe impl GlobalAlloc for Local {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: any length and any power of two.
        unsafe {
            match layout.align() <= ALIGN {
                true => __libc_malloc(layout.size()).cast(),
                false => __libc_memalign(layout.align(), layout.size()).cast(),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: any length; more strictly aligned memory is zeroed here.
        unsafe {
            if layout.align() <= ALIGN {
                return __libc_calloc(1, layout.size()).cast();
            }
            let new = self.alloc(layout);
            if !new.is_null() {
                new.write_bytes(0, layout.size());
            }
            new
        }
    }

    unsafe fn dealloc(&self, old: *mut u8, _layout: Layout) {
        // SAFETY: by the caller's word it is of `alloc`.
        unsafe { __libc_free(old.cast()) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        // SAFETY: by the caller's word it is of `alloc`, and of that layout.
        unsafe {
            if layout.align() <= ALIGN {
                return __libc_realloc(old.cast(), len).cast();
            }
            let new = self.alloc(Layout::from_size_align_unchecked(len, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(old, layout.size().min(len));
                self.dealloc(old, layout);
            }
            new
        }
    }
}

/// A function of whoever comes behind this library.
struct Next {
    address: AtomicUsize,
    name: &'static CStr,
}

impl Next {
    const fn new(name: &'static CStr) -> Next {
        Next { address: AtomicUsize::new(0), name }
    }

    /// Its address. Looking up a name that is there allocates nothing.
    fn get(&self) -> usize {
        let known = self.address.load(Ordering::Relaxed);
        if known != 0 {
            return known;
        }
        // SAFETY: a name, of the next object behind this one.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) } as usize;
        if found == 0 {
            // Every C library has them.
            std::process::abort();
        }
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

macro_rules! next {
    ($name:ident, $text:literal, $kind:ty) => {
        next!($name, $text, $kind, None);
    };
    ($name:ident, $text:literal, $kind:ty, $own:expr) => {
        pub(crate) fn $name() -> $kind {
            static NEXT: Next = Next::new($text);
            const OWN: Option<$kind> = $own;
            if let Some(own) = OWN.filter(|_| threads::is_own()) {
                return own;
            }
            // SAFETY: the function of this name has this type in every C library.
            unsafe { std::mem::transmute::<usize, $kind>(NEXT.get()) }
        }
    };
}

type OfLen = unsafe extern "C" fn(usize) -> *mut c_void;
type OfTwo = unsafe extern "C" fn(usize, usize) -> *mut c_void;

next!(next_malloc, c"malloc", OfLen, Some(__libc_malloc));
next!(next_calloc, c"calloc", OfTwo, Some(__libc_calloc));
next!(
    next_realloc,
    c"realloc",
    unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void,
    Some(__libc_realloc)
);
next!(next_memalign, c"memalign", OfTwo, Some(__libc_memalign));
next!(next_posix_memalign, c"posix_memalign", unsafe extern "C" fn(*mut *mut c_void, usize, usize) -> c_int);
next!(next_free, c"free", unsafe extern "C" fn(*mut c_void), Some(__libc_free));
next!(
    next_pthread_create,
    c"pthread_create",
    unsafe extern "C" fn(
        *mut libc::pthread_t,
        *const libc::pthread_attr_t,
        extern "C" fn(*mut c_void) -> *mut c_void,
        *mut c_void,
    ) -> c_int
);
next!(next_usable, c"malloc_usable_size", unsafe extern "C" fn(*mut c_void) -> usize);

fn external_for(align: usize, len: usize) -> Option<*mut c_void> {
    if align > PAGE {
        if !threads::is_own() {
            external::stays_local(external::Local::Other, len);
        }
        return None;
    }
    external::allocate(len, true).map(<*mut u8>::cast)
}

/// # Safety
/// As of malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(len: usize) -> *mut c_void {
    // SAFETY: by the caller's word.
    external_for(1, len).unwrap_or_else(|| unsafe { next_malloc()(len) })
}

/// # Safety
/// As of calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(count: usize, len: usize) -> *mut c_void {
    // External memory is zeros at first. A length that overflows is refused by the next allocator.
    let external = count.checked_mul(len).and_then(|all| external_for(1, all));
    // SAFETY: by the caller's word.
    external.unwrap_or_else(|| unsafe { next_calloc()(count, len) })
}

/// # Safety
/// As of free(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(old: *mut c_void) {
    if !external::is_heap(old as usize) {
        match process::is_dead(old as usize) {
            true => adopted::free(old as usize),
            // SAFETY: by the caller's word.
            false => unsafe { next_free()(old) },
        }
        return;
    }
    if let Some(external) = external::get() {
        external.free(old as usize);
    }
}

/// # Safety
/// As of realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(old: *mut c_void, len: usize) -> *mut c_void {
    if old.is_null() {
        // SAFETY: any length.
        return unsafe { malloc(len) };
    }
    if process::is_dead(old as usize) {
        // SAFETY: by the caller's word.
        return unsafe { grow_adopted(old, len) };
    }
    if !external::is_heap(old as usize) {
        // SAFETY: by the caller's word.
        return unsafe { grow_local(old, len) };
    }
    let Some(external) = external::get() else { return std::ptr::null_mut() };
    if len == 0 {
        external.free(old as usize);
        return std::ptr::null_mut();
    }
    let room = external.room(old as usize);
    if len <= room && len > room / 4 {
        return old;
    }
    // SAFETY: the new one is another piece; of the old one no more is copied than it has.
    unsafe {
        let new = malloc(len);
        if !new.is_null() {
            new.cast::<u8>().copy_from_nonoverlapping(old.cast(), room.min(len));
            free(old);
        }
        new
    }
}

/// # Safety
/// As of realloc(3), of a pointer to what the parent had.
unsafe fn grow_adopted(old: *mut c_void, len: usize) -> *mut c_void {
    let Some(room) = adopted::len(old as usize, true) else {
        // It is not in the child.
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
        return std::ptr::null_mut();
    };
    if len <= room && len > room / 4 {
        return old;
    }
    // SAFETY: the new one is another piece; of the old one no more is copied than it has.
    unsafe {
        let new = malloc(len);
        if !new.is_null() {
            new.cast::<u8>().copy_from_nonoverlapping(old.cast(), room.min(len));
            adopted::free(old as usize);
        }
        new
    }
}

/// # Safety
/// As of realloc(3), of a pointer that is not external.
unsafe fn grow_local(old: *mut c_void, len: usize) -> *mut c_void {
    let Some(new) = external_for(1, len) else {
        // SAFETY: by the caller's word.
        return unsafe { next_realloc()(old, len) };
    };
    // SAFETY: the new one is another piece; of the old one no more is copied than it has.
    unsafe {
        new.cast::<u8>().copy_from_nonoverlapping(old.cast(), next_usable()(old).min(len));
        next_free()(old);
    }
    new
}

/// # Safety
/// As of reallocarray(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(old: *mut c_void, count: usize, len: usize) -> *mut c_void {
    let Some(all) = count.checked_mul(len) else {
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
        return std::ptr::null_mut();
    };
    // SAFETY: by the caller's word.
    unsafe { realloc(old, all) }
}

/// # Safety
/// As of memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memalign(align: usize, len: usize) -> *mut c_void {
    // SAFETY: by the caller's word.
    external_for(align, len).unwrap_or_else(|| unsafe { next_memalign()(align, len) })
}

/// # Safety
/// As of aligned_alloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(align: usize, len: usize) -> *mut c_void {
    // SAFETY: by the caller's word.
    unsafe { memalign(align, len) }
}

/// # Safety
/// As of posix_memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, align: usize, len: usize) -> c_int {
    // An impossible request is refused by the next allocator.
    match align.is_power_of_two().then(|| external_for(align, len)).flatten() {
        Some(new) => {
            // SAFETY: by the caller's word it can be written to.
            unsafe { *to = new };
            0
        }
        // SAFETY: by the caller's word.
        None => unsafe { next_posix_memalign()(to, align, len) },
    }
}

/// # Safety
/// As of malloc_usable_size(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(old: *mut c_void) -> usize {
    if !external::is_heap(old as usize) {
        if process::is_dead(old as usize) {
            return adopted::len(old as usize, true).unwrap_or(0);
        }
        // SAFETY: by the caller's word.
        return unsafe { next_usable()(old) };
    }
    external::get().map_or(0, |external| external.room(old as usize))
}
