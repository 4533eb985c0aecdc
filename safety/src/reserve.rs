//! Memory that is left for this process when the machine has none.
//!
//! Sending a swapped-out page takes memory for the socket's buffers. When the machine has none, an ordinary thread
//! that allocates waits for the kernel to swap pages out, which needs this process: a deadlock. A real-time thread
//! may use half of the kernel's reserve (`gfp_to_alloc_flags` and `__zone_watermark_ok` in the kernel's
//! mm/page_alloc.c). So the threads of this process are real-time, at the lowest priority, and the reserve is made
//! large enough for full socket buffers of the connections to some appliances.

#![allow(unsafe_code)]

use std::fs;
use std::io;

use xpm_protocol::api::blk::SafetyItem;

/// The reserve in KiB; see proc_sys_vm(5).
const RESERVE_FILE: &str = "/proc/sys/vm/min_free_kbytes";
/// The wanted reserve, in KiB: twice 32 MiB, which is eight send buffers of the 4 MiB that tcp(7) names as the usual
/// maximum.
const RESERVE_KIB: u64 = 64 << 10;
/// Divisor of the machine's memory that limits the reserve.
const RESERVE_PART: u64 = 10;

/// Makes the calling thread an ordinary one. A child of a real-time thread starts as a real-time thread, and would
/// fill its memory from the reserve of the serving processes.
pub(super) fn leave_alone() {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives through the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const priority) } != 0 {
        tracing::warn!("SCHED_OTHER: {}", io::Error::last_os_error());
    }
}

/// Makes every thread of the process, and threads that they start later, real-time threads.
pub(super) fn set_real_time() {
    // Repeats until all threads are real-time: another thread may have started a new one meanwhile.
    while let Some(changed) = set_all() {
        if !changed {
            return;
        }
    }
}

/// Returns whether there was a thread to change; none if that is not permitted.
fn set_all() -> Option<bool> {
    let mut changed = false;
    for entry in fs::read_dir("/proc/self/task").ok()?.flatten() {
        let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // SAFETY: takes a number only.
        if matches!(unsafe { libc::sched_getscheduler(thread) }, libc::SCHED_RR | libc::SCHED_FIFO) {
            continue;
        }
        let priority = libc::sched_param { sched_priority: 1 };
        // SAFETY: the structure lives through the call.
        if unsafe { libc::sched_setscheduler(thread, libc::SCHED_RR, &raw const priority) } == 0 {
            changed = true;
            continue;
        }
        let error = io::Error::last_os_error();
        // A thread that has ended needs nothing.
        if error.raw_os_error() != Some(libc::ESRCH) {
            tracing::warn!("SCHED_RR: {error}");
            return None;
        }
    }
    Some(changed)
}

/// The scheduling policy of the calling thread.
pub(super) fn real_time() -> SafetyItem {
    // SAFETY: takes a number only; 0 means the calling thread.
    let found = match unsafe { libc::sched_getscheduler(0) } {
        ..0 => Err(io::Error::last_os_error().to_string()),
        policy => Ok((matches!(policy, libc::SCHED_RR | libc::SCHED_FIFO), name(policy))),
    };
    super::item(
        "real-time",
        found,
        "run as root, give CAP_SYS_NICE, or set CPUSchedulingPolicy=rr in the unit",
    )
}

fn name(policy: libc::c_int) -> String {
    match policy {
        libc::SCHED_OTHER => "other".to_owned(),
        libc::SCHED_FIFO => "fifo".to_owned(),
        libc::SCHED_RR => "rr".to_owned(),
        policy => policy.to_string(),
    }
}

/// Raises the kernel's reserve to the wanted size; never lowers it.
pub(super) fn raise() {
    let Ok((found, wanted)) = read() else { return };
    if found >= wanted {
        return;
    }
    match fs::write(RESERVE_FILE, wanted.to_string()) {
        Ok(()) => tracing::info!("{RESERVE_FILE} raised from {found} to {wanted}"),
        Err(error) => tracing::warn!("{RESERVE_FILE}: {error}"),
    }
}

pub(super) fn kept_free() -> SafetyItem {
    let found =
        read().map(|(found, wanted)| (found >= wanted, format!("{found} KiB of {wanted} KiB wanted")));
    super::item("memory-reserve", found, "run as root, or raise the setting vm.min_free_kbytes")
}

/// The present and the wanted reserve, in KiB.
fn read() -> Result<(u64, u64), String> {
    let reserve = fs::read_to_string(RESERVE_FILE).map_err(|error| format!("{RESERVE_FILE}: {error}"))?;
    let found = reserve.trim().parse().map_err(|_| format!("{RESERVE_FILE} is not a number"))?;
    let memory = fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let total = total_kib(&memory).ok_or("/proc/meminfo has no MemTotal")?;
    Ok((found, wanted_kib(total)))
}

/// The machine's memory by `/proc/meminfo`, in KiB.
fn total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn wanted_kib(total_kib: u64) -> u64 {
    RESERVE_KIB.min(total_kib / RESERVE_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_fits_the_machine() {
        assert_eq!(total_kib("MemTotal:         475188 kB\nMemFree: 1 kB\n"), Some(475_188));
        assert_eq!(total_kib("MemFree: 1 kB\n"), None);
        assert_eq!(wanted_kib(475_188), 47_518);
        assert_eq!(wanted_kib(64 << 20), RESERVE_KIB);
    }
}
