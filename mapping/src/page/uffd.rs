//! A safe wrapper of the parts of userfaultfd(2) that this library uses.
//!
//! Sources: userfaultfd(2), ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h of Linux 6.12; mm/userfaultfd.c
//! for what UFFDIO_MOVE refuses.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use xpm_transport::IoBuf;

/// A fault raises SIGBUS in the faulting thread, and sends no message.
pub(crate) const FEATURE_SIGBUS: u64 = 1 << 7;
/// Write protection of pages of anonymous memory.
const FEATURE_PROTECT: u64 = 1 << 0;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// [`Uffd::poison`] is available (Linux 6.6).
pub(crate) const FEATURE_POISON: u64 = 1 << 14;
/// [`Uffd::move_pages`] is available (Linux 6.8).
const FEATURE_MOVE: u64 = 1 << 16;

/// Most attempts of a move without progress, while another user holds the page for a moment.
const MOVES_MAX: u32 = 1000;

const USER_MODE_ONLY: i32 = 1;
const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_PROTECT: u64 = 2;
const MODE_MINOR: u64 = 4;
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;

const fn request(direction: u64, size: usize, number: u64) -> u64 {
    direction << 30 | (size as u64) << 16 | API << 8 | number
}

const READ_WRITE: u64 = 3;
const READ: u64 = 2;
const UFFDIO_API: u64 = request(READ_WRITE, size_of::<ApiArg>(), 0x3f);
const UFFDIO_REGISTER: u64 = request(READ_WRITE, size_of::<RegisterArg>(), 0);
const UFFDIO_WAKE: u64 = request(READ, size_of::<Range>(), 2);
const UFFDIO_COPY: u64 = request(READ_WRITE, size_of::<CopyArg>(), 3);
const UFFDIO_ZEROPAGE: u64 = request(READ_WRITE, size_of::<RangeArg>(), 4);
const UFFDIO_MOVE: u64 = request(READ_WRITE, size_of::<CopyArg>(), 5);
const UFFDIO_WRITEPROTECT: u64 = request(READ_WRITE, size_of::<ProtectArg>(), 6);
const UFFDIO_CONTINUE: u64 = request(READ_WRITE, size_of::<RangeArg>(), 7);
const UFFDIO_POISON: u64 = request(READ_WRITE, size_of::<RangeArg>(), 8);
const USERFAULTFD_IOC_NEW: u64 = API << 8;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArg {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct ProtectArg {
    range: Range,
    mode: u64,
}

/// The argument of copy and move.
#[repr(C)]
struct CopyArg {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// The argument of zeropage, continue and poison.
#[repr(C)]
struct RangeArg {
    range: Range,
    mode: u64,
    done: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// A thread touched an absent page, and waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) address: usize,
    /// Whether the access was a write.
    pub(crate) write: bool,
}

/// The accesses that the descriptor handles; this depends on how it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Accesses by the kernel on the program's behalf wait for the page, too.
    Kernel,
    /// Accesses by the kernel fail with EFAULT.
    UserOnly,
}

/// The memory that the descriptor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Shared memory that is mapped twice.
    Shared,
    /// Private anonymous memory, whose pages are moved.
    Private,
}

impl Backing {
    const fn features(self) -> u64 {
        match self {
            Backing::Shared => FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM,
            Backing::Private => FEATURE_PROTECT | FEATURE_MOVE,
        }
    }
}

/// The error of one page or run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A page is present already.
    Exists,
    /// The file has no page that could be mapped.
    Nothing,
    /// Another error, by its errno(3).
    Other(i32),
}

/// An error in the middle of a run, with the number of bytes that are done: the program may have written to these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Partly {
    pub(crate) done: usize,
    pub(crate) why: Refused,
}

/// A descriptor of userfaultfd(2).
pub(crate) struct Uffd {
    fd: OwnedFd,
    pub(crate) reach: Reach,
}

impl Uffd {
    /// Opens a descriptor by the first of these ways that is allowed: the system call, `/dev/userfaultfd`, or the
    /// system call for faults in user mode only.
    pub(crate) fn new(wanted: u64, backing: Backing) -> io::Result<Uffd> {
        let (probe, _) = open()?;
        let known = api(&probe, 0)?;
        let needed = backing.features();
        if known & needed != needed {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                match backing {
                    Backing::Shared => {
                        "this kernel has no minor faults of shared memory in userfaultfd (Linux 5.14 and later have)"
                    }
                    Backing::Private => {
                        "this kernel does not move pages in userfaultfd (Linux 6.8 and later do)"
                    }
                },
            ));
        }
        drop(probe);
        let (fd, reach) = open()?;
        api(&fd, needed | wanted & known)?;
        Ok(Uffd { fd, reach })
    }

    /// Registers shared memory: from now on, a touch of an absent page in this range is a fault for this descriptor.
    pub(crate) fn register_shared(&self, address: usize, len: usize) -> io::Result<()> {
        self.register(address, len, MODE_MISSING | MODE_MINOR)
    }

    /// Registers anonymous memory, to and from which pages can be moved, and which can be write-protected.
    pub(crate) fn register_private(&self, address: usize, len: usize) -> io::Result<()> {
        self.register(address, len, MODE_MISSING | MODE_PROTECT)
    }

    fn register(&self, address: usize, len: usize, mode: u64) -> io::Result<()> {
        let mut arg = RegisterArg { range: range(address, len), mode, ioctls: 0 };
        // SAFETY: the argument is what UFFDIO_REGISTER takes; the kernel checks the range.
        match unsafe { self.ioctl(UFFDIO_REGISTER, (&raw mut arg).cast()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Moves pages from one registered range to absent pages of another, and wakes the threads that wait for these. A
    /// write to a page that is moved is always moved with it.
    pub(crate) fn move_pages(&self, to: usize, from: usize, len: usize) -> Result<(), Partly> {
        let (mut at, mut idle) = (0, 0);
        while at < len {
            let (to, from) = ((to + at) as u64, (from + at) as u64);
            let mut arg = CopyArg { to, from, len: (len - at) as u64, mode: 0, copied: 0 };
            // SAFETY: the argument is what UFFDIO_MOVE takes. Only the window, its shelf and its blocks are
            // registered, about whose content Rust knows nothing, and the kernel refuses others.
            let errno = unsafe { self.ioctl(UFFDIO_MOVE, (&raw mut arg).cast()) };
            let moved = done(errno, arg.copied).map_err(|why| Partly { done: at, why })? as usize;
            at += moved;
            idle = if moved == 0 { idle + 1 } else { 0 };
            if idle > MOVES_MAX {
                return Err(Partly { done: at, why: Refused::Other(libc::EAGAIN) });
            }
            if idle > 0 {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Sets or clears the write protection of these pages, under which a write is a fault for this descriptor, and
    /// wakes the threads that wait for them.
    pub(crate) fn protect(&self, address: usize, len: usize, protect: bool) -> Result<(), Refused> {
        loop {
            let mut arg = ProtectArg { range: range(address, len), mode: u64::from(protect) };
            // SAFETY: the argument is what UFFDIO_WRITEPROTECT takes; the kernel checks the range.
            match unsafe { self.ioctl(UFFDIO_WRITEPROTECT, (&raw mut arg).cast()) } {
                0 => return Ok(()),
                libc::EAGAIN => std::thread::yield_now(),
                errno => return Err(Refused::Other(errno)),
            }
        }
    }

    /// Fills absent pages from `from`, and wakes the threads that wait for them.
    pub(crate) fn copy(&self, to: usize, from: IoBuf) -> Result<(), Partly> {
        let all = from.len() as u64;
        let (mut to, mut from, mut left) = (to as u64, from.as_ptr() as u64, all);
        while left > 0 {
            let mut arg = CopyArg { to, from, len: left, mode: 0, copied: 0 };
            // SAFETY: the source is mapped by the contract of `IoBuf::new`; the kernel checks the target.
            let errno = unsafe { self.ioctl(UFFDIO_COPY, (&raw mut arg).cast()) };
            let done = done(errno, arg.copied).map_err(|why| Partly { done: (all - left) as usize, why })?;
            (to, from, left) = (to + done, from + done, left.saturating_sub(done));
        }
        Ok(())
    }

    /// Fills absent pages with zeros, and wakes the threads that wait for them.
    pub(crate) fn zero(&self, to: usize, len: usize) -> Result<(), Partly> {
        self.each(UFFDIO_ZEROPAGE, to, len)
    }

    /// Maps pages that are in the file but not in the page table, and wakes the threads that wait for them.
    pub(crate) fn map(&self, to: usize, len: usize) -> Result<(), Refused> {
        self.each(UFFDIO_CONTINUE, to, len).map_err(|partly| partly.why)
    }

    /// Makes every access to these absent pages raise SIGBUS, and wakes the threads that wait for them.
    pub(crate) fn poison(&self, to: usize, len: usize) -> Result<(), Refused> {
        self.each(UFFDIO_POISON, to, len).map_err(|partly| partly.why)
    }

    /// Wakes the threads that wait for these pages; a thread faults again if its page is still absent.
    pub(crate) fn wake(&self, address: usize, len: usize) {
        let mut arg = range(address, len);
        // SAFETY: the argument is what UFFDIO_WAKE takes; it changes nothing of the program's memory.
        unsafe { self.ioctl(UFFDIO_WAKE, (&raw mut arg).cast()) };
    }

    /// Takes pending faults; returns their number. Never blocks.
    pub(crate) fn read(&self, faults: &mut [Fault; 16]) -> usize {
        let mut messages = [Message { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0 }; 16];
        // SAFETY: the kernel writes whole messages, of any content, into an array of them.
        let read = unsafe {
            libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast::<c_void>(), size_of_val(&messages))
        };
        let count = usize::try_from(read).unwrap_or(0) / size_of::<Message>();
        let mut taken = 0;
        for message in messages[..count].iter().filter(|message| message.event == EVENT_PAGEFAULT) {
            faults[taken] =
                Fault { address: message.address as usize, write: message.flags & FLAG_WRITE != 0 };
            taken += 1;
        }
        taken
    }

    fn each(&self, request: u64, to: usize, len: usize) -> Result<(), Partly> {
        let (mut to, mut left) = (to as u64, len as u64);
        while left > 0 {
            let mut arg = RangeArg { range: Range { start: to, len: left }, mode: 0, done: 0 };
            // SAFETY: the argument is what these requests take; the kernel checks the range, which only the
            // window registered.
            let errno = unsafe { self.ioctl(request, (&raw mut arg).cast()) };
            let done = done(errno, arg.done).map_err(|why| Partly { done: len - left as usize, why })?;
            (to, left) = (to + done, left.saturating_sub(done));
        }
        Ok(())
    }

    /// # Safety
    /// `arg` must point to what the request takes.
    unsafe fn ioctl(&self, request: u64, arg: *mut c_void) -> i32 {
        // SAFETY: by the caller's word.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request as libc::Ioctl, arg) } {
            0 => 0,
            _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The bytes that a request has done so far. The kernel stops a request in between when memory mappings change
/// (EAGAIN); then the caller continues it.
fn done(errno: i32, bytes: i64) -> Result<u64, Refused> {
    match errno {
        0 => Ok(bytes as u64),
        libc::EAGAIN => Ok(u64::try_from(bytes).unwrap_or(0)),
        libc::EEXIST => Err(Refused::Exists),
        libc::EFAULT => Err(Refused::Nothing),
        other => Err(Refused::Other(other)),
    }
}

const fn range(address: usize, len: usize) -> Range {
    Range { start: address as u64, len: len as u64 }
}

fn open() -> io::Result<(OwnedFd, Reach)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let call = |flags: i32| {
        // SAFETY: it takes flags only, and gives a new descriptor.
        match unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } {
            // SAFETY: the descriptor is new, and not owned by other code.
            fd if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
            _ => Err(io::Error::last_os_error()),
        }
    };
    if let Ok(fd) = call(flags) {
        return Ok((fd, Reach::Kernel));
    }
    if let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: USERFAULTFD_IOC_NEW takes flags as its argument, and gives a new descriptor.
        let fd = unsafe {
            libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as libc::Ioctl, flags as libc::c_ulong)
        };
        if fd >= 0 {
            // SAFETY: the descriptor is new, and not owned by other code.
            return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Reach::Kernel));
        }
    }
    call(flags | USER_MODE_ONLY).map(|fd| (fd, Reach::UserOnly))
}

fn api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut arg = ApiArg { api: API, features, ioctls: 0 };
    // SAFETY: the argument is what UFFDIO_API takes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as libc::Ioctl, &raw mut arg) } {
        0 => Ok(arg.features),
        _ => Err(io::Error::last_os_error()),
    }
}
