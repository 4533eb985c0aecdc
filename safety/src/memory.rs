//! Locked memory: the process never waits for a page of its own.

#![allow(unsafe_code)]

use std::fs;
use std::hint::black_box;

use rustix::mm::{MlockAllFlags, mlockall};
use xpm_protocol::api::blk::SafetyItem;

/// Heap that is locked and faulted in from the start, in bytes. Measured in xpm-blk with two devices on sockets, one
/// of which was resized and moved: 0.9 MiB are used at most.
const HEAP_LEN: usize = 1536 << 10;
/// Growth of the heap once a standby has its own, in bytes.
const GROWTH_LEN: usize = 256 << 10;
/// Part of the first thread's stack that is faulted in, in bytes.
const STACK_LEN: usize = 128 << 10;

/// Makes the allocator keep its memory: memory that was given back would have to be requested again, possibly when
/// there is none.
pub(super) fn prepare_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets parameters of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, HEAP_LEN as libc::c_int);
        // Large pieces, too, come from kept memory, and not from a new mapping each.
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}

pub(super) fn lock() {
    if let Err(error) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE) {
        tracing::warn!("mlockall: {error}");
    }
    // The allocator requests HEAP_LEN more than this from the kernel, which locks it, and keeps it for later.
    drop(black_box(vec![1_u8; 64 << 10]));
}

/// Prepares this much free heap, in bytes, locked and faulted in. From then on the heap grows in small steps: a
/// process that goes on when memory has run out must not request megabytes for a few bytes.
pub(super) fn reserve_heap(len: usize) {
    // Set first, so that the heap grows by the missing part, without another HEAP_LEN.
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets a parameter of the allocator, and takes its lock.
    unsafe {
        libc::mallopt(libc::M_TOP_PAD, GROWTH_LEN as libc::c_int);
    }
    drop(black_box(vec![1_u8; len]));
}

/// Touches the stack as deep as control work may go.
pub(super) fn fault_in_stack() {
    black_box([1_u8; STACK_LEN]);
}

pub(super) fn locked() -> SafetyItem {
    let read = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string());
    let found = read.map(|status| {
        let locked = field_kib(&status, "VmLck:");
        let anonymous = field_kib(&status, "RssAnon:");
        // Memory of other processes that is only mapped here (shm) is not locked, and need not be.
        (locked > 0 && locked >= anonymous, format!("{locked} KiB locked, {anonymous} KiB anonymous"))
    });
    super::item(
        "mlockall",
        found,
        "run as root, or give CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK (LimitMEMLOCK=infinity)",
    )
}

pub(super) fn locked_bytes() -> u64 {
    fs::read_to_string("/proc/self/status").map_or(0, |status| field_kib(&status, "VmLck:") << 10)
}

fn field_kib(status: &str, name: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    value.trim().trim_end_matches(" kB").parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_status_file() {
        let status = "Name:\txpm-blk\nVmLck:\t   16384 kB\nVmRSS:\t    9000 kB\n";
        assert_eq!(field_kib(status, "VmLck:"), 16_384);
        assert_eq!(field_kib(status, "VmSwap:"), 0);
    }
}
