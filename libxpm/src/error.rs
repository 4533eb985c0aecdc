//! How errors get to C: a number, and a line for people that each thread keeps.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use xpm_mapping::{AttachError, MapError, NamedSlabError, PageError};

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What went wrong: an errno, and a line that says what it was and what to do instead.
pub(crate) struct Error(c_int, String);

impl Error {
    pub(crate) fn invalid(line: impl Into<String>) -> Error {
        Error(libc::EINVAL, line.into())
    }

    pub(crate) fn busy(line: impl Into<String>) -> Error {
        Error(libc::EBUSY, line.into())
    }
}

impl From<AttachError> for Error {
    fn from(error: AttachError) -> Error {
        let number = match &error {
            AttachError::Url(_) => libc::EINVAL,
            AttachError::Allocator(_) => libc::EACCES,
            AttachError::Open(_) => libc::EHOSTUNREACH,
            AttachError::System(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        Error(number, error.to_string())
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Error {
        let number = match &error {
            MapError::Invalid(_) | MapError::Range { .. } | MapError::Unaligned(_) => libc::EINVAL,
            MapError::Mapped { .. } => libc::EBUSY,
            MapError::Slab(_) => libc::ENOMEM,
            MapError::Userfaultfd(_) => libc::EPERM,
            MapError::System { error, .. } => error.raw_os_error().unwrap_or(libc::EIO),
            MapError::Io(_) | MapError::Gone(_) => libc::EIO,
        };
        Error(number, error.to_string())
    }
}

impl From<NamedSlabError> for Error {
    fn from(error: NamedSlabError) -> Error {
        let number = match error {
            NamedSlabError::Allocator(error) => return error.into(),
            NamedSlabError::Map(error) => return error.into(),
            NamedSlabError::Exists(_) => libc::EEXIST,
            NamedSlabError::Missing(_) => libc::ENOENT,
            NamedSlabError::Mapped(_) => libc::EBUSY,
            NamedSlabError::Changed(_) => libc::ESTALE,
            NamedSlabError::Unknown { .. } => libc::EHOSTUNREACH,
        };
        Error(number, error.to_string())
    }
}

impl From<PageError> for Error {
    fn from(error: PageError) -> Error {
        Error(libc::EIO, error.to_string())
    }
}

fn keep(error: Error) -> c_int {
    let Error(number, line) = error;
    let line = CString::new(line.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = line);
    number
}

fn caught<T>(act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
        Err(Error(
            libc::ENOTRECOVERABLE,
            "libxpm has a fault of its own: what it said is on stderr".to_owned(),
        ))
    })
}

/// 0, or a negative errno. No panic gets out.
pub(crate) fn status(act: impl FnOnce() -> Result<(), Error>) -> c_int {
    match caught(act) {
        Ok(()) => 0,
        Err(error) => -keep(error),
    }
}

/// A new object, or NULL and errno.
pub(crate) fn boxed<T>(act: impl FnOnce() -> Result<T, Error>) -> *mut T {
    pointer(|| act().map(|object| Box::into_raw(Box::new(object))))
}

/// An address, or NULL and errno.
pub(crate) fn pointer<T>(act: impl FnOnce() -> Result<*mut T, Error>) -> *mut T {
    match caught(act) {
        Ok(address) => address,
        Err(error) => {
            let number = keep(error);
            // SAFETY: errno is this thread's own.
            unsafe { *libc::__errno_location() = number };
            std::ptr::null_mut()
        }
    }
}

/// What the last call of this thread that failed had to say, in one line. Valid until the next such call of this thread;
/// never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xpm_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Version of the library, as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn xpm_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
