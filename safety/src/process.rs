//! Flags of the process: its allocations do no I/O, and the OOM killer does not choose it.

#![allow(unsafe_code)]

use std::fs;
use std::io;

use xpm_protocol::api::blk::SafetyItem;

/// `PR_SET_IO_FLUSHER` and `PR_GET_IO_FLUSHER` of prctl(2), since Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;

const OOM_SCORE_FILE: &str = "/proc/self/oom_score_adj";
const OOM_SCORE: &str = "-1000";

/// Keeps allocations of this process from waiting for I/O, which it may serve itself, and lets its writes be
/// throttled only by their own device.
pub(super) fn set_io_flusher(on: bool) {
    // SAFETY: takes numbers only; the last three arguments must be zero.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, libc::c_ulong::from(on), 0, 0, 0) } != 0 {
        tracing::warn!("PR_SET_IO_FLUSHER: {}", io::Error::last_os_error());
    }
}

pub(super) fn io_flusher() -> SafetyItem {
    // SAFETY: takes numbers only; the last four arguments must be zero.
    let found = match unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) } {
        ..0 => Err(io::Error::last_os_error().to_string()),
        value => Ok((value == 1, value.to_string())),
    };
    super::item("io-flusher", found, "run as root, or give CAP_SYS_RESOURCE")
}

/// Makes the kernel kill any other process before this one.
pub(super) fn set_oom_score() {
    if let Err(error) = fs::write(OOM_SCORE_FILE, OOM_SCORE) {
        tracing::warn!("{OOM_SCORE_FILE}: {error}");
    }
}

pub(super) fn oom_score() -> SafetyItem {
    let read = fs::read_to_string(OOM_SCORE_FILE).map_err(|error| error.to_string());
    let found = read.map(|score| (score.trim() == OOM_SCORE, score.trim().to_owned()));
    super::item("oom-score-adj", found, "run as root, give CAP_SYS_RESOURCE, or set OOMScoreAdjust=-1000")
}
