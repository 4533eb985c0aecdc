//! mlockall(2): locks what is local, and leaves external memory to its budget. Done by the kernel alone it would
//! bring all of external memory in, page by page.

use std::ffi::c_int;
use std::ops::Range;

use crate::external::{self, External};
use crate::{process, start};

fn kernel(flags: c_int) -> c_int {
    // SAFETY: it takes flags only.
    unsafe { libc::syscall(libc::SYS_mlockall, flags) as c_int }
}

/// # Safety
/// As of mlockall(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    process::look();
    let known = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    let locks = flags & (libc::MCL_CURRENT | libc::MCL_FUTURE) != 0;
    if start::place().is_none() || !locks || flags & !known != 0 {
        return kernel(flags);
    }
    let on_fault = flags & libc::MCL_ONFAULT;
    let current = flags & libc::MCL_CURRENT != 0;
    let locked = match external::get() {
        None if current => kernel(libc::MCL_CURRENT | on_fault),
        Some(external) if current => match external.service.call(move || lock(external, on_fault != 0)) {
            0 => 0,
            errno => {
                // SAFETY: errno is this thread's own.
                unsafe { *libc::__errno_location() = errno };
                -1
            }
        },
        _ => 0,
    };
    if locked != 0 || flags & libc::MCL_FUTURE == 0 {
        return locked;
    }
    // Later mappings are locked as they are used: to fill it at once would fill external memory that is opened then.
    kernel(libc::MCL_FUTURE | libc::MCL_ONFAULT)
}

/// Locks what the process has but for external memory; why it cannot, by errno(3). By the thread that serves.
fn lock(external: &External, on_fault: bool) -> c_int {
    eprintln!(
        "xpm run: mlockall(2): external memory is not locked: what is local of it stays within --local"
    );
    let mut reserved = external.reserved();
    reserved.sort_by_key(|range| range.start);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut refused = 0;
    for (range, accessible) in maps.lines().filter_map(mapping) {
        for part in without(&range, &reserved) {
            let flags = if on_fault { libc::MLOCK_ONFAULT as usize } else { 0 };
            // SAFETY: it changes nothing of what memory holds.
            let locked = unsafe { libc::syscall(libc::SYS_mlock2, part.start, part.end - part.start, flags) };
            if locked != 0 && accessible {
                refused = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            }
        }
    }
    // mlockall(2) does not mind what cannot be filled, either: behind the end of a file, or gone meanwhile.
    let counts = refused == libc::EPERM || refused == libc::EAGAIN || refused == libc::ENOMEM && is_limited();
    if counts { refused } else { 0 }
}

fn is_limited() -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: it is written to.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    limit.rlim_cur != libc::RLIM_INFINITY
}

/// Addresses of a line of /proc/PID/maps, and whether they can be read or written to.
fn mapping(line: &str) -> Option<(Range<usize>, bool)> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let edge = |text| usize::from_str_radix(text, 16).ok();
    let special = ["[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]"].iter().any(|name| line.ends_with(name));
    (!special).then_some((edge(start)?..edge(end)?, !rest.starts_with("---")))
}

/// The parts of a range that are outside of other ranges, which are in order.
fn without(range: &Range<usize>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut at, mut left) = (range.start, Vec::new());
    for other in others.iter().filter(|other| other.start < range.end && other.end > range.start) {
        if other.start > at {
            left.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}
